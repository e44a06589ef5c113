"""evaluate: how good are these slates? Full ranking: every item of the catalog competes, nothing is sampled.

RUN is the answers file of `beamline batch` or a TREC run; DATA is a folder of `prepare`. A user without an answer counts as a
miss.

  beamline batch --checkpoint DIR data/requests.jsonl answers.jsonl
  beamline-eval evaluate data answers.jsonl --catalog DIR/catalog.jsonl --out metrics.json
"""

import json
import os

from beamline_eval import __version__, measures, runs
from beamline_eval.beyond import beyond
from beamline_eval.errors import EvalError
from beamline_eval.files import digest, read_json, write_json
from beamline_eval.prepared import Catalog, Prepared
from beamline_eval.progress import say

HELP = "metrics of one run, overall and by history length"
BUCKETS = "1-5,6-10,11-20,21-50,51-"


def add_arguments(parser):
    parser.add_argument("data", help="folder that `prepare` wrote")
    parser.add_argument("run", help="answers of `beamline batch` (JSON lines) or a TREC run")
    parser.add_argument(
        "--catalog", help="catalog.jsonl: which items exist. Default: the items of the training part and the targets"
    )
    parser.add_argument("--name", help="what to call this run in tables (default: the file's name)")
    parser.add_argument("--out", help="write everything as JSON; a table goes to standard output in any case")
    parser.add_argument(
        "--cut-offs",
        default="1,5,10,20,50",
        help="(default %(default)s); those beyond the length that was asked for are left out",
    )
    parser.add_argument("--buckets", default=BUCKETS, help="history lengths (default %(default)s)")
    parser.add_argument("--sample", type=int, help="only N users, evenly spaced over the qrels")
    parser.add_argument(
        "--users-of",
        metavar="RUN",
        help="only users that this other run has: to judge two systems on the sample that the slower one did",
    )
    parser.add_argument("--timing", help="timing.json of the run, to go into the result")
    parser.add_argument("--engine", choices=["ir-measures", "plain"], help=measures.ENGINE_HELP)


def parse_buckets(text):
    """[(label, low, high)]; `51-` has no end."""
    found = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        try:
            found.append((part.strip(), int(low), int(high or low) if high or not dash else float("inf")))
        except ValueError as error:
            raise EvalError(f"--buckets {text}: {part!r} is not `from-to`") from error
    for one, other in zip(found, found[1:]):
        if other[1] <= one[2]:
            raise EvalError(f"--buckets {text}: {one[0]} and {other[0]} overlap")
    return found


def parse_cut_offs(text):
    try:
        return sorted({int(k) for k in text.split(",")})
    except ValueError as error:
        raise EvalError(f"--cut-offs {text}: numbers separated by commas") from error


def semantic_id_measures(targets, slates, sids, cut_offs):
    """HR and NDCG if finding the target's semantic ID counted as finding the target, in the list of distinct semantic IDs.

    A diagnosis, not a result: papers that score generated IDs report this, and with collisions it is higher than what a shop
    would see.
    """
    wanted = {user: [sid for sid in dict.fromkeys(sids.get(item) for item in items) if sid] for user, items in targets.items()}
    ranked = {user: list(dict.fromkeys(sids[item] for item in slate if item in sids)) for user, slate in slates.items()}
    values = measures.by_hand({user: sids or [None] for user, sids in wanted.items()}, ranked, cut_offs)
    return measures.mean(values, [f"{name}@{k}" for k in cut_offs for name in ("HR", "NDCG")])


def evaluate(
    data,
    run_path,
    catalog=None,
    name=None,
    cut_offs=(1, 5, 10, 20, 50),
    buckets=BUCKETS,
    sample=None,
    timing=None,
    engine=None,
    users_of=None,
):
    """The whole result as one JSON-able object."""
    prepared = data if isinstance(data, Prepared) else Prepared(data)
    catalog = Catalog(catalog) if isinstance(catalog, str) else catalog
    users = runs.sample(prepared.targets, sample)
    if users_of:
        chosen = runs.read(users_of).slates
        users = [user for user in users if user in chosen]
        if not users:
            raise EvalError(f"{users_of}: has none of the users of {prepared.folder}/qrels.txt")
    targets = {user: prepared.targets[user] for user in users}
    everything = runs.read(run_path)
    strangers = [user for user in everything.slates if user not in prepared.targets]
    if strangers:
        raise EvalError(
            f"{run_path}: {len(strangers)} users, the first {strangers[0]!r}, are not in {prepared.folder}/qrels.txt; is it the run of another data set?"
        )
    run = everything.only(users)
    deepest = max((len(slate) for slate in run.slates.values()), default=0)
    asked = int(prepared.protocol.get("num_items", deepest))
    # By what was asked for and not by what came: a run of empty slates must stand in the same table, with zeros.
    kept = [k for k in cut_offs if k <= asked] or [min(cut_offs)]
    engine = measures.engine(engine)
    values = measures.per_user(targets, run.slates, kept, engine)
    names = measures.keys(kept)
    counts, histories = prepared.counts(), prepared.histories()
    items = catalog if catalog is not None else set(counts) | {item for found in prepared.targets.values() for item in found}
    depths = [k for k in kept if k in (10, max(kept))]

    def of(group):
        return {"users": len(group), **measures.mean(values, names, group),
                **{key: value for k in depths for key, value in beyond(group, run.slates, k, items, counts, histories).items()}}

    overall = of(users)
    overall.pop("users")
    result = {
        "format": "beamline-eval/metrics/1",
        "version": __version__,
        "name": name or os.path.splitext(os.path.basename(run_path))[0],
        "users": len(users),
        "users_without_answer": sum(user not in run.slates for user in users),
        "users_with_empty_slate": sum(not slate for slate in run.slates.values()),
        "sampled": len(users) < len(prepared.targets),
        "cut_offs": kept,
        "computed_by": engine,
        "metrics": overall,
        "by_history_length": [],
        "run_notes": everything.notes,
        "protocol": prepared.protocol,
        "catalog_items": len(items),
        "catalog_from": "catalog file" if catalog is not None else "training part and targets",
        "inputs": [digest(run_path), *prepared.digests(), *([digest(catalog.path)] if isinstance(catalog, Catalog) else [])],
    }
    if asked > deepest:
        result["run_notes"] = {**result["run_notes"], "longest_slate": deepest}
    edges = parse_buckets(buckets)
    outside = [user for user in users if not any(low <= len(histories[user]) <= high for _, low, high in edges)]
    for label, low, high in edges:
        group = [user for user in users if low <= len(histories[user]) <= high]
        if group:
            result["by_history_length"].append({"bucket": label, **of(group)})
    if outside:
        result["by_history_length"].append({"bucket": "other", **of(outside)})
    if isinstance(catalog, Catalog) and all(catalog.sids.values()):
        result["if_semantic_ids_counted"] = semantic_id_measures(targets, run.slates, catalog.sids, kept)
        result["items_sharing_a_semantic_id"] = len(catalog) - sum(
            1 for n in occurrences(catalog.sids.values()).values() if n == 1
        )
    if timing:
        result["timing"] = read_json(timing)
    return result


def occurrences(values):
    found = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return found


def table(result):
    """The main figures as text."""
    rows = [("", *[f"@{k}" for k in result["cut_offs"]])]
    for name in measures.NAMES:
        rows.append((name, *[f"{result['metrics'][f'{name}@{k}']:.4f}" for k in result["cut_offs"]]))
    text = "\n".join(f"{row[0]:8}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows)
    seen = "history items excluded" if result["protocol"].get("exclude_seen") else "history items stay in the ranking"
    return f"{result['name']}: {result['users']} users, {seen}\n{text}"


def main(arguments):
    result = evaluate(
        arguments.data,
        arguments.run,
        arguments.catalog,
        arguments.name,
        parse_cut_offs(arguments.cut_offs),
        arguments.buckets,
        arguments.sample,
        arguments.timing,
        arguments.engine,
        arguments.users_of,
    )
    if result["users_without_answer"]:
        say(f"{result['users_without_answer']} users have no answer and count as misses")
    if result["run_notes"].get("errors"):
        say(
            f"{result['run_notes']['errors']} answers are errors and count as misses: {json.dumps(result['run_notes'].get('error_types', {}))}"
        )
    if result["run_notes"].get("repeated_items"):
        say(f"{result['run_notes']['repeated_items']} repeated items in slates were dropped")
    if result["run_notes"].get("rank_score_conflicts"):
        say(f"{result['run_notes']['rank_score_conflicts']} users have scores that contradict their ranks; ranks were used")
    if result["run_notes"].get("users_ordered_by_score"):
        say(f"{result['run_notes']['users_ordered_by_score']} users have items of equal rank; their scores were used")
    print(table(result))
    if arguments.out:
        write_json(arguments.out, result)
