"""Inputs of the evaluation package: logs to prepare, and runs to evaluate."""

import json
import os
import re
import tempfile

from checkpoints import brief
from folder import counts, number


def check(folder, engine):
    """Complaints, and None if no word of the right value was understood."""
    logs, runs = folder.ending(".inter", ".csv", ".tsv", "rows.jsonl", "events.jsonl", ".inter.json"), folder.ending(".run")
    with tempfile.TemporaryDirectory() as place:
        data = os.path.join(place, "data")
        settings = re.search(r"prepare with ((?:--[\w-]+ [^\s(),]+ ?)+)", folder.input)
        flags = settings.group(1).split() if settings else []
        prepared = engine.evaluation("prepare", logs[0], "--out", data, *flags)
        if prepared.status:
            refusal = folder.may_be_refused() and "--" in prepared.said
            return [] if refusal else [f"prepare: {brief(prepared.said)}"]
        if runs:
            return evaluated(folder, engine, data, runs[0], os.path.join(place, "metrics.json"))
        return asked(folder, data)


def evaluated(folder, engine, data, run, out):
    done = engine.evaluation("evaluate", data, run, "--out", out)
    if done.status:
        return [f"evaluate: {brief(done.said)}"]
    with open(out, encoding="utf-8") as file:
        result = json.load(file)
    complaints, understood = [], False
    for name, value in re.findall(r"\b([A-Za-z]+@\d+) (\d[\d.]*\d|\d)", folder.right):
        understood = True
        found = result["metrics"].get(name)
        if found is None or abs(found - float(value)) > 5e-5:
            complaints.append(f"{name} is {found}, not {value}")
    if folder.says("no value above 1"):
        named = {name: value for name, value in result["metrics"].items() if re.match(r"HR|Recall|NDCG|MRR", name)}
        complaints += [f"{name} is {value}" for name, value in named.items() if value > 1]
    for pattern, found in (
        (r"(\w+) repeats? reported", result["run_notes"]["repeated_items"]),
        (r"(\w+) users? without an answer", result["users_without_answer"]),
    ):
        said = re.search(pattern, folder.right)
        if said:
            understood = True
            if number(said.group(1)) != found:
                complaints.append(f"{found}, not {said.group(0)}")
    return complaints if understood else None


def asked(folder, data):
    """The questions that were prepared: how many, and which."""
    with open(os.path.join(data, "requests.jsonl"), encoding="utf-8") as file:
        histories = {body["id"]: [event["item_id"] for event in body["history"]] for body in map(json.loads, file)}
    with open(os.path.join(data, "qrels.txt"), encoding="utf-8") as file:
        targets = {}
        for line in file:
            targets.setdefault(line.split()[0], []).append(line.split()[2])
    complaints, understood = [], False
    wanted = counts(folder.right, "questions")
    if wanted:
        understood = True
        if len(histories) != wanted[0]:
            complaints.append(f"{len(histories)} questions, not {wanted[0]}")
    for user, history, target in re.findall(r"(\w+): history (\w+(?: \w+)*), target (\w+)", folder.right):
        understood = True
        if (histories.get(user), targets.get(user)) != (history.split(), [target]):
            complaints.append(f"{user}: history {histories.get(user)}, target {targets.get(user)}; not {history}, {target}")
    return complaints if understood else None
