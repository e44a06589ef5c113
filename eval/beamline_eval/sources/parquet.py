"""Parquet tables: events, or histories with their target, as in delimited text."""

from beamline_eval.errors import EvalError
from beamline_eval.sources.columns import RATING
from beamline_eval.sources.users import User, grouped
from beamline_eval.values import identifier, real, seconds, shifted

PER_SECOND = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}


def read(path, offset, columns, min_rating=None):
    """The users of a table."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise EvalError("Parquet needs pyarrow: pip install 'beamline-eval[parquet]'") from error
    try:
        header = list(pyarrow.parquet.read_schema(path).names)
        layout = columns.layout(path, header)
        if min_rating is not None and (RATING not in header or layout.history):
            raise EvalError(f"{path}: --min-rating needs events with a column {RATING}; the columns are {', '.join(header)}")
        wanted = [
            name
            for name in (layout.user, layout.item, layout.time, layout.history, RATING if min_rating is not None else None)
            if name
        ]
        table = pyarrow.parquet.read_table(path, columns=wanted)
    except (OSError, pyarrow.ArrowException) as error:
        # The system's and the library's words run over several lines.
        raise EvalError(f"{path}: {str(error).splitlines()[0]}") from error
    for name in wanted:
        if table.column(name).null_count:
            raise EvalError(f"{path}: column {name} has {table.column(name).null_count} nulls; drop those rows")
    if layout.history:
        return split_rows(path, table, layout, offset)
    return events(path, table, layout, offset, min_rating)


def split_rows(path, table, layout, offset):
    users = []
    columns = [table.column(name).to_pylist() for name in (layout.user, layout.history, layout.item)]
    for number, (user, history, target) in enumerate(zip(*columns), 1):
        where = f"{path}, row {number}"
        if not isinstance(history, list):
            raise EvalError(f"{where}: {layout.history} is not a list of items")
        items = [shifted(item, offset, where) for item in history]
        users.append(User(identifier(user, where), items, target=shifted(target, offset, where)))
    return users


def events(path, table, layout, offset, min_rating):
    ratings = table.column(RATING).to_pylist() if min_rating is not None else [None] * len(table)
    times, per_second = ticks(path, table.column(layout.time), layout.time) if layout.time else ([None] * len(table), 1)
    users, items = table.column(layout.user).to_pylist(), table.column(layout.item).to_pylist()
    found = []
    for number, (user, item, time, rating) in enumerate(zip(users, items, times, ratings), 1):
        where = f"{path}, row {number}"
        if rating is None or real(rating, where) >= min_rating:
            found.append((identifier(user, where), shifted(item, offset, where), time))
    result = grouped(found, layout.time is not None)
    # The order was found in the column's own unit, which is exact.
    for user in result if per_second > 1 else ():
        user.times = [time / per_second for time in user.times]
    return result


def ticks(path, column, name):
    """(values, how many make a second): timestamps of any unit, dates, numbers, or text."""
    import pyarrow

    if pyarrow.types.is_date(column.type):
        column = column.cast(pyarrow.timestamp("ms"))
    if pyarrow.types.is_timestamp(column.type):
        return column.cast(pyarrow.int64()).to_pylist(), PER_SECOND[column.type.unit]
    return [seconds(value, f"{path}, row {number}, {name}") for number, value in enumerate(column.to_pylist(), 1)], 1
