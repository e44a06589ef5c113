"""HR, Recall, NDCG and MRR per user: through ir-measures, and once more by hand as a check on both.

ir-measures is what the field trusts, and it has two traps that are taken care of here. It sorts by score and breaks ties by
document id, in 32-bit floats: so it is given n, n-1, ..., 1 and never a model's scores. And only users of the qrels count, all
of them: who has no slate scores 0, so dropping users cannot raise a mean. """

import math

from beamline_eval.errors import EvalError
from beamline_eval.progress import say

NAMES = ("HR", "Recall", "NDCG", "MRR")
ENGINE_HELP = "who computes the metrics (default: ir-measures if it is installed, else plain, the package's own definitions; results say which)"


def keys(cut_offs):
    return [f"{name}@{k}" for k in cut_offs for name in NAMES]


def by_hand(targets, slates, cut_offs):
    """{user: {measure: value}} from the definitions; binary relevance, ideal DCG over min(k, number of targets)."""
    values = {}
    for user, relevant in targets.items():
        wanted, slate = set(relevant), slates.get(user, [])
        hits = [rank for rank, item in enumerate(slate) if item in wanted]
        found = values[user] = {}
        for k in cut_offs:
            top = [rank for rank in hits if rank < k]
            ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(wanted))))
            found[f"HR@{k}"] = float(bool(top))
            found[f"Recall@{k}"] = len(top) / len(wanted)
            found[f"NDCG@{k}"] = sum(1 / math.log2(rank + 2) for rank in top) / ideal
            found[f"MRR@{k}"] = 1 / (top[0] + 1) if top else 0.0
    return values


def installed():
    try:
        import ir_measures  # noqa: F401
    except ImportError:
        return False
    return True


def engine(wanted=None):
    """Who computes: what was asked for, else ir-measures if it is installed, else the definitions here, and says so."""
    if wanted is None and not installed():
        say("ir-measures is not installed: metrics are computed by this package's own definitions, as --engine plain does")
    return wanted or ("ir-measures" if installed() else "plain")


def by_library(targets, slates, cut_offs):
    """The same through ir-measures."""
    if not installed():
        raise EvalError(
            "ir-measures is not installed: pip install ./eval, or leave --engine out to use this package's own definitions"
        )
    import ir_measures
    from ir_measures import RR, R, Success, nDCG

    measures = {}
    for k in cut_offs:
        measures |= {Success @ k: f"HR@{k}", R @ k: f"Recall@{k}", nDCG @ k: f"NDCG@{k}", RR @ k: f"MRR@{k}"}
    deepest = max(cut_offs)
    qrels = {user: {item: 1 for item in items} for user, items in targets.items()}
    run = {}
    for user in targets:
        slate = slates.get(user, [])[:deepest]
        if slate:
            run[user] = {item: float(len(slate) - rank) for rank, item in enumerate(slate)}
    values = {user: dict.fromkeys(measures.values(), 0.0) for user in targets}
    for metric in ir_measures.iter_calc(list(measures), qrels, run) if run else ():
        values[metric.query_id][measures[metric.measure]] = float(metric.value)
    return values


def per_user(targets, slates, cut_offs, engine="ir-measures"):
    """{user: {measure: value}} for every user of the qrels."""
    if not cut_offs or min(cut_offs) < 1:
        raise EvalError("cut-offs are positive numbers")
    return by_library(targets, slates, cut_offs) if engine == "ir-measures" else by_hand(targets, slates, cut_offs)


def mean(values, names, users=None):
    """Means over users, in a fixed order of summation (fsum: exact, so order cannot matter either)."""
    users = list(values) if users is None else users
    return {name: math.fsum(values[user][name] for user in users) / len(users) if users else 0.0 for name in names}
