"""Whole histories without times: text files of S3-Rec and SASRec, and the `.inter.json` of LC-Rec."""

from beamline_eval.errors import EvalError
from beamline_eval.files import lines
from beamline_eval.sources.users import User
from beamline_eval.values import identifier, shifted


def read(path, offset=0):
    """S3-Rec / SASRec: `user item item ...`, oldest first."""
    users = []
    for number, line in lines(path):
        user, *items = line.split()
        if items:
            users.append(User(user, [shifted(item, offset, f"{path}:{number}") for item in items]))
    return users


def of_object(path, value, offset=0):
    """LC-Rec's `.inter.json`: one JSON object, user -> items oldest first."""
    if not isinstance(value, dict) or not all(isinstance(items, list) for items in value.values()):
        raise EvalError(f"{path}: expected one JSON object of lists, user -> items oldest first")
    return [
        User(identifier(user, path), [shifted(item, offset, f"{path}, user {user}") for item in items])
        for user, items in value.items()
    ]
