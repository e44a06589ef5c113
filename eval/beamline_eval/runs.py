"""What a system recommended: the answers of `beamline batch` (JSON lines) or any TREC run, as one ranked list per user."""

import itertools

from beamline_eval import trec
from beamline_eval.errors import EvalError
from beamline_eval.files import json_lines, lines


class Run:
    """slates {user: [items best first, no repeats]}, and what was noticed on the way."""

    def __init__(self, slates, **notes):
        self.notes = {"errors": 0, "repeated_items": 0, **notes}
        self.slates = {}
        for user, items in slates.items():
            unique = list(dict.fromkeys(items))
            # A repeated item would count twice in NDCG; the first place is the one that was shown.
            self.notes["repeated_items"] += len(items) - len(unique)
            self.slates[user] = unique

    def only(self, users):
        """The same run for these users alone."""
        chosen = Run({user: self.slates[user] for user in users if user in self.slates})
        chosen.notes = dict(self.notes)
        return chosen


def read(path):
    """A run from either form; the first line tells which."""
    first = next(itertools.islice(lines(path), 1), (0, ""))[1]
    # A run in which nobody gets anything is a file without lines, and a valid statement.
    if first.lstrip().startswith("{"):
        return read_answers(path)
    slates, notes = trec.read_run(path)
    return Run(slates, kind="trec", **notes)


def read_answers(path):
    """Answers of `beamline batch`. An error is an empty slate: the user gets nothing and counts as a miss."""
    slates, errors, degraded, models, catalogs, reasons = {}, 0, 0, set(), set(), {}
    for number, answer in json_lines(path):
        if answer.get("id") is None:
            raise EvalError(f"{path}:{number}: the answer has no `id`, so it belongs to nobody; give each request an `id`")
        user = str(answer["id"])
        if user in slates:
            raise EvalError(f"{path}:{number}: a second answer for {user}")
        if "error" in answer:
            errors += 1
            kind = (answer["error"] or {}).get("type", "unknown") if isinstance(answer["error"], dict) else "unknown"
            reasons[kind] = reasons.get(kind, 0) + 1
            slates[user] = []
            continue
        try:
            slates[user] = [str(item["item_id"]) for item in answer["items"]]
        except (KeyError, TypeError) as error:
            raise EvalError(f"{path}:{number}: neither `items` with an `item_id` each nor an `error`") from error
        degraded += answer.get("degraded") is not None
        models.add((answer.get("model") or {}).get("sha256"))
        catalogs.add(answer.get("catalog_version"))
    if len(models - {None}) > 1 or len(catalogs - {None}) > 1:
        raise EvalError(f"{path}: answers of several models or catalogs in one file; evaluate them apart")
    notes = {"kind": "beamline batch", "errors": errors, "degraded": degraded}
    if reasons:
        notes["error_types"] = reasons
    for key, found in (("model_sha256", models), ("catalog_version", catalogs)):
        if found - {None}:
            notes[key] = (found - {None}).pop()
    return Run(slates, **notes)


def sample(users, count):
    """`count` users evenly spaced over the whole list, from the first on. None, or more than there are: all.

    Place i is i * n / count, not i * (n // count): the latter stops short of the end of the list, and files are ordered. On
    Beauty the last 500 users are ten times easier than the first, so 4,000 users by the second rule gave HR@10 .0455 where all
    have .0585. """
    users = list(users)
    if not count or count >= len(users):
        return users
    return [users[place * len(users) // count] for place in range(count)]
