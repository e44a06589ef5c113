"""Requests to the demo checkpoint. What must hold is read from the words of the right value."""

import os
import re

from engine import DEMO
from folder import counts


def check(folder, engine):
    """Complaints, and None if no word of the right value was understood."""
    complaints, understood = [], False
    catalogs = [path for path in folder.ending(".jsonl", ".parquet") if os.path.basename(path).startswith("catalog")]
    if catalogs:
        return one_rule(folder, engine, catalogs)
    for requests in folder.requests():
        run, answers = engine.batch(DEMO, requests)
        flags = re.findall(r"`(--[a-z-]+)`", folder.right)
        if flags and folder.says("refused"):
            understood = True
            complaints += with_flags(folder, engine, requests, run, answers, flags)
            continue
        asked = asked_of(requests)
        for claim in (how_many, no_error, error_types, allowed, distinct, same_first, company, constant):
            found = claim(folder, engine, requests, asked, answers)
            if found is not None:
                understood = True
                complaints += found
    return complaints if understood else None


def asked_of(requests):
    """The requests themselves, where they are text."""
    import json

    if requests.endswith(".parquet"):
        return []
    with open(requests, encoding="utf-8-sig") as file:
        return [json.loads(line) for line in file if line.strip()]


def items_of(answer):
    return [item["item_id"] for item in answer.get("items", [])]


def how_many(folder, _engine, _requests, asked, answers):
    """`3, 0 and 0 items, with `reason``"""
    wanted = counts(folder.right, "items")
    if wanted is None:
        return None
    found = [len(items_of(answer)) for answer in answers]
    complaints = [f"{found} items, not {wanted}"] if found != wanted else []
    if folder.says("with `reason`"):
        short = [answer for answer, request in zip(answers, asked) if len(items_of(answer)) < request.get("num_items", 0)]
        complaints += [
            f"{answer.get('id')}: fewer items than asked for, and no reason" for answer in short if not answer.get("reason")
        ]
    return complaints


def no_error(folder, _engine, _requests, _asked, answers):
    """`Two answers, none an error`"""
    wanted = counts(folder.right, "answers")
    if wanted is None or not folder.says("none an error|no error"):
        return None
    errors = [str(answer["error"]) for answer in answers if "error" in answer]
    return errors + ([f"{len(answers)} answers, not {wanted[0]}"] if len(answers) != wanted[0] else [])


def error_types(folder, _engine, _requests, _asked, answers):
    """`a and b: `token_out_of_range`; c: `empty_context`; d: an answer`"""
    claims = re.findall(r"((?:\w+(?:, | and ))*\w+): (?:`(\w+)`|an answer)", folder.right)
    if not claims:
        return None
    found = {str(answer.get("id")): (answer.get("error") or {}).get("type", "") for answer in answers}
    complaints = []
    for names, kind in claims:
        for name in re.split(", | and ", names):
            if name not in found:
                complaints.append(f"{name}: neither an answer nor an error")
            elif found[name] != kind:
                complaints.append(f"{name}: {found[name] or 'an answer'}, not {kind or 'an answer'}")
    return complaints


def allowed(folder, _engine, _requests, asked, answers):
    """`only allowed items`"""
    if not folder.says("only allowed items"):
        return None
    complaints = []
    for request, answer in zip(asked, answers):
        wrong = set(items_of(answer)) - set(request.get("filters", {}).get("allow_items", items_of(answer)))
        complaints += [f"{request.get('id')}: {item} is not allowed" for item in sorted(wrong)]
    return complaints


def distinct(folder, _engine, _requests, _asked, answers):
    """`without repeats`"""
    if not folder.says("without repeats"):
        return None
    return [
        f"{answer.get('id')}: an item is repeated" for answer in answers if len(set(items_of(answer))) != len(items_of(answer))
    ]


def same_first(folder, _engine, _requests, _asked, answers):
    """`the first item is the same in all`"""
    if not folder.says("first item is the same"):
        return None
    firsts = {tuple(items_of(answer)[:1]) for answer in answers}
    return [] if len(firsts) == 1 else [f"different first items: {sorted(firsts)}"]


def company(folder, engine, requests, _asked, answers):
    """`Byte-equal outputs`, with `--in-flight 1` and `--in-flight 32`"""
    if not folder.says("byte-equal|byte for byte"):
        return None
    runs = [engine.batch(DEMO, requests, *flag.split())[1] for flag in re.findall(r"`(--[^`]+)`", folder.input)]
    failed = [answer for answer in answers if "error" in answer]
    return [] if answers and not failed and all(run == answers for run in runs) else ["the answers differ, or are errors"]


def constant(folder, _engine, _requests, _asked, answers):
    """`full score minus prefix score is one constant within 1e-5`"""
    if not folder.says("one constant"):
        return None
    if len(answers) != 2 or any("error" in answer for answer in answers):
        return ["two answers are needed"]
    one, other = ({item["item_id"]: item["score"] for item in answer["items"]} for answer in answers)
    gaps = [one[item] - other[item] for item in one.keys() & other.keys()]
    spread = max(gaps, default=0) - min(gaps, default=1)
    return [] if gaps and spread <= folder.tolerance(1e-5) else [f"the difference varies by {spread:g} over {len(gaps)} items"]


def with_flags(folder, engine, requests, run, answers, flags):
    """`Refused by name with the option that helps; with `--flag` two answers`"""
    good = [answer for answer in answers if "error" not in answer]
    complaints = (
        []
        if good or any(flag in run.said for flag in flags)
        else [f"the message names none of {', '.join(flags)}: {run.said[-200:]}"]
    )
    _, answers = engine.batch(DEMO, requests, *flags)
    wanted = counts(folder.right, "answers")
    good = [answer for answer in answers if "error" not in answer]
    if wanted and len(good) != wanted[0]:
        complaints.append(f"with {' '.join(flags)}: {len(good)} answers, not {wanted[0]}")
    return complaints


def one_rule(folder, engine, catalogs):
    """`The same rule for both catalogs and for requests of either kind`"""
    if not folder.says("same rule"):
        return None
    outcomes = {}
    for catalog in catalogs:
        taken = engine.run("catalog", "check", catalog).status == 0
        outcomes[os.path.basename(catalog)] = taken
        for requests in folder.requests() if taken else ():
            _, answers = engine.batch(DEMO, requests, "--catalog", catalog)
            for answer in answers:
                outcomes[f"{os.path.basename(catalog)}, request {answer.get('id')}"] = "error" not in answer
            told = {tuple(items_of(answer)) for answer in answers}
            if all("error" not in answer for answer in answers) and len(told) > 1:
                return [f"{os.path.basename(catalog)}: the same history gives different items: {sorted(told)}"]
    if len(set(outcomes.values())) == 1:
        return []
    return [f"{name}: {'taken' if taken else 'refused'}" for name, taken in outcomes.items()]
