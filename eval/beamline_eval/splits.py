"""What is asked and what is right: one Case per question, and the part of the data that a model may have learned from.

Leave-one-out keeps each user's last item (test) or last but one (validation) as target. It is what papers report, and it leaks
the future: one user's training items may be newer than another user's target. The temporal split cuts everybody at one moment, as
production does; items and users that appear only after the cut are then really new.
"""

import dataclasses

from beamline_eval.errors import EvalError


@dataclasses.dataclass
class Case:
    """One question: who, after what, and which items would be right."""

    user: str
    history: list
    targets: list


def leave_one_out(users, part="test"):
    """(cases, training sequences, notes). Training is everything but the last two items, for validation and test alike."""
    back = {"test": 1, "valid": 2}[part]
    cases, short = [], 0
    for user in users:
        if len(user.items) <= back:
            short += 1
            continue
        cases.append(Case(user.id, user.items[:-back], [user.items[-back]]))
    return cases, [user.items[:-2] for user in users], {"users_too_short": short}


def as_given(users):
    """Rows that come with their target. There is no training part in them."""
    missing = [user.id for user in users if user.target is None]
    if missing:
        raise EvalError(f"user {missing[0]} has no target; --split given is for rows of history and target")
    return [Case(user.id, user.items, [user.target]) for user in users], [], {}


def moment(users, cut):
    """The time of a cut: a number as it stands, or `80%`: the time before which 80 % of all events happened."""
    if any(user.times is None for user in users):
        raise EvalError("a temporal split needs times; this source has none")
    if not str(cut).endswith("%"):
        try:
            return float(cut)
        except ValueError as error:
            known = [time for user in users for time in user.times] or [0]
            raise EvalError(
                f"--cut {cut}: neither a time as the source writes it ({min(known):.15g} to {max(known):.15g}) nor a share such as 80%"
            ) from error
    try:
        share = float(str(cut)[:-1]) / 100
    except ValueError as error:
        raise EvalError(f"--cut {cut}: not a share") from error
    if not 0 < share < 1:
        raise EvalError(f"--cut {cut}: must lie between 0% and 100%")
    times = sorted(time for user in users for time in user.times)
    if not times:
        raise EvalError("no events")
    return times[min(int(len(times) * share), len(times) - 1)]


def temporal(users, cut="80%", targets="next"):
    """Events before the cut are history, later ones targets: the `next` one, or `all` distinct ones.

    Users without a history are left out and counted, and so are targets that nobody touched before the cut: no model of
    identifiers can find those, and hiding them would flatter nobody honestly.
    """
    at = moment(users, cut)
    cases, training, cold_users = [], [], 0
    for user in users:
        history = [item for item, time in zip(user.items, user.times) if time < at]
        after = [item for item, time in zip(user.items, user.times) if time >= at]
        if history:
            training.append(history)
        if not after:
            continue
        if not history:
            cold_users += 1
            continue
        cases.append(Case(user.id, history, after[:1] if targets == "next" else list(dict.fromkeys(after))))
    known = {item for items in training for item in items}
    cold_items = sum(item not in known for case in cases for item in case.targets)
    return (
        cases,
        training,
        {"cut": at, "targets": targets, "users_without_history": cold_users, "targets_unknown_before_cut": cold_items},
    )


def unique_ids(cases):
    """Several rows of one user become `user`, `user:2`, `user:3`: an id is one question."""
    seen, taken = {}, {case.user for case in cases}
    for case in cases:
        seen[case.user] = number = seen.get(case.user, 0) + 1
        if number > 1:
            name = f"{case.user}:{number}"
            if name in taken:
                raise EvalError(f"user id {name} is both a user and the name of {case.user}'s question {number}")
            case.user = name
    return cases
