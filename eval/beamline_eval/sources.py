"""Interaction logs of the field, read into one form: users with their events in time order.

Order matters more than anything else here. Files without times are taken in file order, which is what S3-Rec files promise;
files with times are sorted by time, and equal times keep file order (a stable sort), because nothing better is known.
"""

import dataclasses

from beamline_eval.errors import EvalError
from beamline_eval.files import json_lines, lines


@dataclasses.dataclass
class User:
    """Events oldest first; `times` is None for sources without them. `target` is set for sources that come already split."""

    id: str
    items: list
    times: list | None = None
    target: str | None = None


def shifted(item, offset, where):
    if not offset:
        return str(item)
    try:
        return str(int(item) + offset)
    except (TypeError, ValueError) as error:
        raise EvalError(f"{where}: --item-offset needs item numbers, found {item!r}") from error


def sequences(path, offset=0):
    """S3-Rec / SASRec: `user item item ...`, oldest first."""
    users = []
    for number, line in lines(path):
        user, *items = line.split()
        if items:
            users.append(User(user, [shifted(item, offset, f"{path}:{number}") for item in items]))
    return users


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
        users.append(User(str(record["user_id"]), items, target=None if whole is not None else shifted(record["target"], offset, where)))
    return users


def grouped(events):
    """Users in order of first appearance, their events sorted by time. `events`: (user, item, time) in file order."""
    found = {}
    for user, item, time in events:
        found.setdefault(user, []).append((time, item))
    users = []
    for user, pairs in found.items():
        pairs.sort(key=lambda pair: pair[0])
        users.append(User(user, [item for _, item in pairs], [time for time, _ in pairs]))
    return users


def recbole(path, offset=0, min_rating=None):
    """RecBole's atomic `.inter`: tab separated, header `user_id:token item_id:token rating:float timestamp:float`."""
    header, events = None, []
    for number, line in lines(path):
        cells = line.rstrip("\r\n").split("\t")
        if header is None:
            header = [cell.split(":")[0] for cell in cells]
            missing = {"user_id", "item_id", "timestamp"} - set(header)
            if missing:
                raise EvalError(f"{path}: the header lacks {', '.join(sorted(missing))}")
            if min_rating is not None and "rating" not in header:
                raise EvalError(f"{path}: --min-rating needs a rating column")
            continue
        if len(cells) != len(header):
            raise EvalError(f"{path}:{number}: {len(cells)} columns, the header has {len(header)}")
        row = dict(zip(header, cells))
        try:
            if min_rating is None or float(row["rating"]) >= min_rating:
                events.append((row["user_id"], shifted(row["item_id"], offset, f"{path}:{number}"), float(row["timestamp"])))
        except ValueError as error:
            raise EvalError(f"{path}:{number}: {error}") from error
    return grouped(events)


def parquet(path, offset=0, columns=("user_id", "item_id", "ts")):
    """Any Parquet table with a user, an item and a time column (numbers or timestamps)."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise EvalError("Parquet needs pyarrow: pip install 'beamline-eval[parquet]'") from error
    try:
        table = pyarrow.parquet.read_table(path, columns=list(columns))
    except Exception as error:  # pyarrow has its own hierarchy for missing columns, bad files and the like
        raise EvalError(f"{path}: {error}") from error
    found = [column.name for column in table.schema]
    if set(found) != set(columns):
        raise EvalError(f"{path}: needs the columns {', '.join(columns)}; name others with --columns user,item,time")
    values = []
    for name in columns:
        column = table.column(name)
        if column.null_count:
            raise EvalError(f"{path}: column {name} has {column.null_count} nulls")
        if name == columns[2] and pyarrow.types.is_timestamp(column.type):
            column = column.cast(pyarrow.timestamp("us", getattr(column.type, "tz", None))).cast(pyarrow.int64())
        values.append(column.to_pylist())
    return grouped((str(user), shifted(item, offset, path), time) for user, item, time in zip(*values))


FORMATS = ("sequences", "rows", "recbole", "parquet")


def guess(path):
    """The format that a file name promises."""
    for ending, form in ((".jsonl", "rows"), (".json", "rows"), (".inter", "recbole"), (".parquet", "parquet"), (".txt", "sequences")):
        if path.endswith(ending):
            return form
    raise EvalError(f"{path}: cannot tell the format from the name; say --format {'|'.join(FORMATS)}")


def read(path, form=None, offset=0, columns=("user_id", "item_id", "ts"), min_rating=None):
    form = form or guess(path)
    if form == "recbole":
        return recbole(path, offset, min_rating)
    if form == "parquet":
        return parquet(path, offset, columns)
    return {"sequences": sequences, "rows": rows}[form](path, offset)
