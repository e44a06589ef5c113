"""TREC files, which every retrieval tool reads: qrels `user 0 item 1` and runs `user Q0 item rank score tag`.

Fields are separated by blanks, so ids with blanks in them cannot be written; that is an error here and not a broken file later.
"""

import math

from beamline_eval.errors import EvalError
from beamline_eval.files import lines, writing


def check_id(kind, value):
    if not value or value.split() != [value]:
        raise EvalError(f"{kind} id {value!r} is empty or contains blanks, which TREC files cannot hold; rename it in the source")
    return value


def write_qrels(path, targets):
    """`targets`: {user: [items]}."""
    with writing(path) as file:
        for user, items in targets.items():
            for item in items:
                file.write(f"{check_id('user', user)} 0 {check_id('item', item)} 1\n")


def read_qrels(path):
    """{user: [relevant items]} in file order. Judgements of 0 are no targets."""
    targets = {}
    for number, line in lines(path):
        parts = line.split()
        if len(parts) != 4:
            raise EvalError(f"{path}:{number}: a qrels line is `user 0 item relevance`")
        user, _, item, relevance = parts
        try:
            relevant = int(relevance) > 0
        except ValueError as error:
            raise EvalError(f"{path}:{number}: relevance {relevance!r} is not a number") from error
        known = targets.setdefault(user, [])
        if relevant:
            if item in known:
                raise EvalError(f"{path}:{number}: {item} is listed twice for user {user}")
            known.append(item)
    empty = [user for user, items in targets.items() if not items]
    if empty or not targets:
        raise EvalError(f"{path}: {f'user {empty[0]} has' if empty else 'there are'} no relevant items")
    return targets


def write_run(path, slates, tag):
    """`slates`: {user: [items best first]}. Scores are n, n-1, ..., 1: the order is the statement, and no tool can reorder a
    tie."""
    with writing(path) as file:
        for user, items in slates.items():
            check_id("user", user)
            for rank, item in enumerate(items, 1):
                file.write(f"{user} Q0 {check_id('item', item)} {rank} {len(items) - rank + 1} {tag}\n")


def read_run(path):
    """({user: [items best first]}, notes). Order is that of the rank column, or of the scores where ranks say nothing.

    Tools that sort by score break ties by document id (trec_eval) or by input order (ranx), and trec_eval reads scores as
    32-bit floats; ranks say what the system showed. Users whose scores contradict their ranks are counted. Some toolkits write
    rank 0 on every line: where two items of a user share a rank, his scores decide, and such users are counted too.
    """
    rows = {}
    for number, line in lines(path):
        parts = line.split()
        if len(parts) != 6:
            raise EvalError(f"{path}:{number}: a run line is `user Q0 item rank score tag`")
        try:
            rows.setdefault(parts[0], []).append((int(parts[3]), score(parts[4]), parts[2]))
        except ValueError as error:
            raise EvalError(f"{path}:{number}: {error}") from error
    slates, conflicts, unranked = {}, 0, 0
    for user, found in rows.items():
        if len({rank for rank, _, _ in found}) == len(found):
            found.sort(key=lambda row: row[0])
            conflicts += any(one[1] < other[1] for one, other in zip(found, found[1:]))
        elif len({value for _, value, _ in found}) == len(found):
            found.sort(key=lambda row: -row[1])
            unranked += 1
        else:
            raise EvalError(
                f"{path}: two items of user {user} share a rank, and two share a score: the order is undefined; write ranks 1, 2, 3, ..."
            )
        slates[user] = [item for _, _, item in found]
    return slates, {"rank_score_conflicts": conflicts, "users_ordered_by_score": unranked}


def score(text):
    """A score of a run; it may be infinite, but it must compare."""
    value = float(text)
    if math.isnan(value):
        raise ValueError("the score is not a number")
    return value
