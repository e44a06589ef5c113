"""Which column of a table says what: found by the names of the field, or given with --columns."""

import dataclasses

from beamline_eval.errors import EvalError

USERS = ("user_id",)
ITEMS = ("item_id",)
TIMES = ("timestamp", "ts", "time")
# Lists of a user's earlier items, in files whose rows come with their target: RecBole's and LC-Rec's, MiniOneRec's.
HISTORIES = ("item_id_list", "history_item_id", "history")
RATING = "rating"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of a table's columns. `history` is set where rows come with their target, and then `time` is not."""

    user: str
    item: str
    time: str | None = None
    history: str | None = None


@dataclasses.dataclass(frozen=True)
class Columns:
    """What was given with --columns; empty: find them by name."""

    names: tuple = ()

    @classmethod
    def given(cls, text):
        """From the option's text, or a tuple of names."""
        names = tuple(name.strip() for name in text.split(",")) if isinstance(text, str) else tuple(text or ())
        if len(names) not in (0, 2, 3) or not all(names):
            raise EvalError(
                "--columns takes three names, user,item,time; or two, user,item, if the file's order is the order of events"
            )
        return cls(names)

    def layout(self, path, header):
        """The layout of a table with these columns."""
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise EvalError(f"{path}: two columns are called {twice[0]}; rename one")
        if self.names:
            missing = [name for name in self.names if name not in header]
            if missing:
                raise EvalError(f"{path}: there is no column {', '.join(missing)}; the columns are {', '.join(header)}")
            return Layout(*self.names)
        user, item = found(path, header, USERS), found(path, header, ITEMS)
        history, time = found(path, header, HISTORIES), found(path, header, TIMES)
        missing = [kind for kind, name in (("user_id", user), ("item_id", item), ("timestamp", history or time)) if name is None]
        if missing:
            raise EvalError(
                f"{path}: there is no column {', '.join(missing)}; the columns are {', '.join(header)}. Name those that count with "
                "--columns user,item,time, or --columns user,item if the file's order is the order of events"
            )
        return Layout(user, item, history=history) if history else Layout(user, item, time)


def found(path, header, names):
    """The one column that is called by one of these names."""
    known = [name for name in names if name in header]
    if len(known) > 1:
        raise EvalError(f"{path}: both {' and '.join(known)} could be meant; say which with --columns user,item,time")
    return known[0] if known else None
