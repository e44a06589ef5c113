"""compare: is run B better than run A, by how much, and is it luck?

Per measure: both means, the mean difference, a paired bootstrap interval over users, a randomisation test, and p adjusted by
Holm over all measures named. Beside that: how alike the slates are (overlap, RBO), and who won and who lost.

  beamline-eval compare data before.jsonl after.jsonl --out comparison.json
"""

import json
import os

from beamline_eval import measures, runs
from beamline_eval.agreement import overlap, rbo
from beamline_eval.errors import EvalError
from beamline_eval.evaluate import parse_cut_offs
from beamline_eval.files import digest, write_json
from beamline_eval.prepared import Prepared
from beamline_eval.statistics import bootstrap, holm, numpy, randomisation

HELP = "two runs: intervals, tests, agreement, users won and lost"


def add_arguments(parser):
    parser.add_argument("data", help="folder that `prepare` wrote")
    parser.add_argument("a", help="the run to compare with")
    parser.add_argument("b", help="the run in question; differences are b - a")
    parser.add_argument("--cut-offs", default="5,10", help="(default %(default)s)")
    parser.add_argument("--measures", default="HR,NDCG,MRR", help="of HR, Recall, NDCG, MRR (default %(default)s)")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (default %(default)s, and not less)")
    parser.add_argument("--permutations", type=int, default=10000, help="of the randomisation test (default %(default)s)")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--sample", type=int, help="only N users, evenly spaced over the qrels")
    parser.add_argument(
        "--answered-only",
        action="store_true",
        help="only users that both runs answer (for a run over a sample); stated in the result",
    )
    parser.add_argument("--engine", choices=["ir-measures", "plain"], help=measures.ENGINE_HELP)
    parser.add_argument("--out", help="write everything as JSON")


def compare(data, a, b, cut_offs=(5, 10), names=("HR", "NDCG", "MRR"), resamples=2000, permutations=10000, seed=20, sample=None,
            answered_only=False, engine=None):
    """The whole comparison as one JSON-able object."""
    if resamples < 2000:
        raise EvalError("--resamples: at least 2000, or the interval's ends are themselves noise")
    unknown = set(names) - set(measures.NAMES)
    if unknown:
        raise EvalError(f"--measures: {', '.join(sorted(unknown))} is not one of {', '.join(measures.NAMES)}")
    prepared = data if isinstance(data, Prepared) else Prepared(data)
    one, other = runs.read(a), runs.read(b)
    users = runs.sample(prepared.targets, sample)
    if answered_only:
        users = [user for user in users if user in one.slates and user in other.slates]
    if not users:
        raise EvalError("no user is in both runs")
    targets = {user: prepared.targets[user] for user in users}
    keys = [f"{name}@{k}" for k in cut_offs for name in names]
    engine = measures.engine(engine)
    left = measures.per_user(targets, one.slates, cut_offs, engine)
    right = measures.per_user(targets, other.slates, cut_offs, engine)
    np = numpy()
    differences = np.array([[right[user][key] - left[user][key] for key in keys] for user in users])
    low, high = bootstrap(differences, resamples, seed)
    p = randomisation(differences, permutations, seed)
    adjusted = holm([float(value) for value in p])
    before, after = measures.mean(left, keys), measures.mean(right, keys)
    rows = []
    for place, key in enumerate(keys):
        column = differences[:, place]
        rows.append({
            "measure": key, "a": before[key], "b": after[key], "difference": after[key] - before[key],
            "interval_95": [float(low[place]), float(high[place])], "p": float(p[place]), "p_holm": adjusted[place],
            "users_won": int((column > 0).sum()), "users_lost": int((column < 0).sum()),
        })
    depth = max(cut_offs)
    slates = [(one.slates.get(user, []), other.slates.get(user, [])) for user in users]
    return {
        "format": "beamline-eval/comparison/1",
        "a": os.path.basename(a),
        "b": os.path.basename(b),
        "users": len(users),
        "answered_only": answered_only,
        "missing_in_a": sum(user not in one.slates for user in users),
        "missing_in_b": sum(user not in other.slates for user in users),
        "measures": rows,
        "agreement": {
            **{f"overlap@{k}": sum(overlap(x, y, k) for x, y in slates) / len(slates) for k in cut_offs},
            f"rbo_0.9@{depth}": sum(rbo(x[:depth], y[:depth]) for x, y in slates) / len(slates),
            f"identical_slates@{depth}": sum(x[:depth] == y[:depth] for x, y in slates) / len(slates),
        },
        "resamples": resamples,
        "permutations": permutations,
        "seed": seed,
        "computed_by": engine,
        "protocol": prepared.protocol,
        "inputs": [digest(a), digest(b), *prepared.digests()],
    }


def table(result):
    lines = [f"a = {result['a']}, b = {result['b']}, {result['users']} users",
             f"{'':9}{'a':>9}{'b':>9}{'b - a':>10}{'95 % interval':>23}{'p':>9}{'Holm':>9}{'won':>7}{'lost':>7}"]
    for row in result["measures"]:
        interval = f"[{row['interval_95'][0]:+.4f}, {row['interval_95'][1]:+.4f}]"
        lines.append(f"{row['measure']:9}{row['a']:9.4f}{row['b']:9.4f}{row['difference']:+10.4f}{interval:>23}{row['p']:9.4f}{row['p_holm']:9.4f}"
                     f"{row['users_won']:7}{row['users_lost']:7}")
    lines.append("agreement: " + json.dumps({key: round(value, 4) for key, value in result["agreement"].items()}))
    return "\n".join(lines)


def main(arguments):
    result = compare(
        arguments.data,
        arguments.a,
        arguments.b,
        parse_cut_offs(arguments.cut_offs),
        tuple(arguments.measures.split(",")),
        arguments.resamples,
        arguments.permutations,
        arguments.seed,
        arguments.sample,
        arguments.answered_only,
        arguments.engine,
    )
    print(table(result))
    if arguments.out:
        write_json(arguments.out, result)
