"""JSON lines: rows of a history and its target, whole sequences, or single events."""

import itertools
import json

from beamline_eval.errors import EvalError
from beamline_eval.files import json_lines, lines
from beamline_eval.sources.columns import RATING
from beamline_eval.sources.users import User, grouped
from beamline_eval.values import identifier, real, seconds, shifted


def guess(path):
    """`events`, `rows` or `lists`, by the first line."""
    first = next(itertools.islice(lines(path), 1), (0, "{}"))[1]
    try:
        record = json.loads(first)
    except json.JSONDecodeError:
        # One object over many lines.
        return "lists"
    if not isinstance(record, dict) or "history" in record or "items" in record:
        return "rows"
    if record and all(isinstance(value, list) for value in record.values()):
        return "lists"
    return "events" if "target" not in record else "rows"


def rows(path, offset=0):
    """MiniOneRec as JSON lines: {"user_id", "history": [...], "target"}; already split, one row per target.

    `{"user_id", "items": [...]}` is read too, as a whole sequence: that is what the demo world writes.
    """
    users = []
    for number, record in json_lines(path):
        where = f"{path}:{number}"
        whole = record.get("items")
        history = record.get("history") if whole is None else whole
        if "user_id" not in record or not isinstance(history, list) or (whole is None and "target" not in record):
            raise EvalError(f"{where}: expected `user_id` with `history` and `target`, or with `items`")
        items = [shifted(item, offset, where) for item in history]
        target = None if whole is not None else shifted(record["target"], offset, where)
        users.append(User(identifier(record["user_id"], where), items, target=target))
    return users


def events(path, offset, columns, min_rating=None):
    """One event a line: {"user_id", "item_id", "timestamp"}, fields of other names with --columns."""
    layout, found = None, []
    for number, record in json_lines(path):
        where = f"{path}:{number}"
        if layout is None:
            layout = columns.layout(path, list(record))
            if layout.history:
                raise EvalError(f"{where}: rows of a history with its target have `history` and `target`; see --format rows")
        needed = [
            layout.user,
            layout.item,
            *([layout.time] if layout.time else []),
            *([RATING] if min_rating is not None else []),
        ]
        for name in needed:
            if record.get(name) is None:
                raise EvalError(f"{where}: {name} is missing; name other fields with --columns user,item,time")
        if min_rating is not None and real(record[RATING], f"{where}, {RATING}") < min_rating:
            continue
        time = seconds(record[layout.time], f"{where}, {layout.time}") if layout.time else None
        found.append((identifier(record[layout.user], where), shifted(record[layout.item], offset, where), time))
    return grouped(found, layout is None or layout.time is not None)

