"""Delimited text with a header: CSV and TSV, and RecBole's atomic `.inter`, whose header has types (`item_id:token`).

A row is an event (user, item, time), or a list of earlier items with its target: `item_id_list` and `item_id` as RecBole and
LC-Rec write them, `history_item_id` and `item_id` as MiniOneRec does. """

import ast
import csv

from beamline_eval.errors import EvalError
from beamline_eval.files import opened
from beamline_eval.sources.columns import RATING
from beamline_eval.sources.users import User, grouped
from beamline_eval.values import identifier, real, seconds, shifted

# A history of thousands of items is one cell.
csv.field_size_limit(2**31 - 1)


def read(path, form, offset, columns, min_rating=None):
    """The users of a table."""
    with opened(path) as file:
        rows = records(path, file, form)
        header = next(rows, (0, None))[1]
        if header is None:
            raise EvalError(f"{path}: the file is empty; the first line must name the columns")
        header = [cell.split(":")[0].strip() for cell in header]
        layout = columns.layout(path, header)
        if min_rating is not None and RATING not in header:
            raise EvalError(f"{path}: --min-rating needs a column {RATING}; the columns are {', '.join(header)}")
        return (split_rows if layout.history else event_rows)(path, header, rows, offset, layout, min_rating)


def records(path, file, form):
    """(line number, cells) of the lines that are not blank."""
    first = file.readline()
    file.seek(0)
    if form == "recbole":
        # Nothing is quoted there, and a title may hold a quotation mark.
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        delimiter = max(",\t;|", key=first.count)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise EvalError(f"{path}:{reader.line_num}: {error}") from error


def cells_by_name(path, header, rows):
    """(place of the row, {column: cell})."""
    for number, cells in rows:
        where = f"{path}:{number}"
        if len(cells) != len(header):
            raise EvalError(f"{where}: {len(cells)} columns, the header has {len(header)}")
        yield where, dict(zip(header, cells))


def event_rows(path, header, rows, offset, layout, min_rating):
    found = []
    for where, row in cells_by_name(path, header, rows):
        if min_rating is not None and real(row[RATING], f"{where}, {RATING}") < min_rating:
            continue
        user, item = (
            identifier(row[layout.user], f"{where}, {layout.user}"),
            shifted(row[layout.item], offset, f"{where}, {layout.item}"),
        )
        found.append((user, item, seconds(row[layout.time], f"{where}, {layout.time}") if layout.time else None))
    return grouped(found, layout.time is not None)


def split_rows(path, header, rows, offset, layout, min_rating):
    if min_rating is not None:
        raise EvalError(f"{path}: --min-rating is for events; these rows hold a history each")
    users = []
    for where, row in cells_by_name(path, header, rows):
        items = [
            shifted(item, offset, f"{where}, {layout.history}")
            for item in listed(row[layout.history], f"{where}, {layout.history}")
        ]
        target = shifted(row[layout.item], offset, f"{where}, {layout.item}")
        users.append(User(identifier(row[layout.user], f"{where}, {layout.user}"), items, target=target))
    return users


def listed(text, where):
    """Items of a cell: blanks between them, or the text of a Python or JSON list."""
    text = text.strip()
    if not text.startswith("["):
        return text.split()
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise EvalError(f"{where}: not a list of items: {text[:60]!r}") from error
    return items
