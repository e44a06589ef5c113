"""Ids and times: one definition each, whatever file they come from.

An id is text. A whole number is written out in digits, because most public data numbers its items and users: 7, 7.0 in a
table of floats and "7" are one item. A time is seconds since 1970: a number, or ISO 8601 text (UTC where it names no zone).
"""

import datetime
import math

from beamline_eval.errors import EvalError


def identifier(value, where):
    """The text of an id."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise EvalError(f"{where}: {value!r} is not an id; give text or a whole number")


def shifted(value, offset, where):
    """An item id, `offset` added to its number."""
    text = identifier(value, where)
    if not offset:
        return text
    try:
        return str(int(text) + offset)
    except ValueError as error:
        raise EvalError(f"{where}: --item-offset needs item numbers, found {value!r}") from error


def seconds(value, where):
    """A time; whole numbers stay exact, so that events closer than a float can tell keep their order."""
    found = value
    if isinstance(value, str):
        found = iso(value) if number(value) is None else number(value)
    if not finite(found):
        raise EvalError(f"{where}: {value!r} is not a time; give seconds since 1970, or text such as 2026-01-31T12:00:00Z")
    return found


def real(value, where):
    """Any other number, such as a rating."""
    found = number(value) if isinstance(value, str) else value
    if not finite(found):
        raise EvalError(f"{where}: {value!r} is not a number")
    return found


def finite(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(text):
    """What the text says, or nothing."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def iso(text):
    """Seconds of ISO 8601 text, or nothing."""
    try:
        moment = datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    whole = since.days * 86400 + since.seconds
    return whole + since.microseconds / 1e6 if since.microseconds else whole
