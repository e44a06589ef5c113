"""Interaction logs of the field, read into one form: users with their events in time order.

Order matters more than anything else here. Files without times are taken in file order, which is what S3-Rec files promise;
files with times are sorted by time, and equal times keep file order (a stable sort), because nothing better is known.
"""

from beamline_eval.errors import EvalError
from beamline_eval.files import read_json
from beamline_eval.sources import delimited, json_rows, parquet, sequences
from beamline_eval.sources.columns import Columns
from beamline_eval.sources.users import User

__all__ = ["FORMATS", "Columns", "User", "guess", "read"]

FORMATS = ("sequences", "rows", "events", "lists", "recbole", "csv", "parquet")
ENDINGS = {".inter": "recbole", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet", ".txt": "sequences"}


def guess(path):
    """The format that a file's name promises; of JSON files, what they hold decides."""
    for ending, form in ENDINGS.items():
        if path.endswith(ending):
            return form
    if path.endswith((".jsonl", ".ndjson", ".json")):
        return json_rows.guess(path)
    raise EvalError(f"{path}: cannot tell the format from the name; say --format {'|'.join(FORMATS)}")


def read(path, form=None, offset=0, columns=None, min_rating=None):
    """The users of a file. `columns`: names given with --columns, or None to find them by name."""
    form, wanted = form or guess(path), columns if isinstance(columns, Columns) else Columns.given(columns)
    if min_rating is not None and form in ("sequences", "rows", "lists"):
        raise EvalError(f"{path}: --min-rating needs a rating column, and the format {form} has none")
    if form == "sequences":
        return sequences.read(path, offset)
    if form == "lists":
        return sequences.of_object(path, read_json(path), offset)
    if form == "rows":
        return json_rows.rows(path, offset)
    if form == "events":
        return json_rows.events(path, offset, wanted, min_rating)
    if form == "parquet":
        return parquet.read(path, offset, wanted, min_rating)
    return delimited.read(path, form, offset, wanted, min_rating)
