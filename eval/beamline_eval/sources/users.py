"""What every source is read into."""

import dataclasses


@dataclasses.dataclass
class User:
    """Events oldest first; `times` is None for sources without them. `target` is set for sources that come already split."""

    id: str
    items: list
    times: list | None = None
    target: str | None = None


def grouped(events, timed=True):
    """Users in order of first appearance, their events sorted by time. `events`: (user, item, time) in file order.

    Without times the file's order is kept. Both sorts are stable.
    """
    found = {}
    for user, item, time in events:
        found.setdefault(user, []).append((time, item))
    users = []
    for user, pairs in found.items():
        if timed:
            pairs.sort(key=lambda pair: pair[0])
        users.append(User(user, [item for _, item in pairs], [time for time, _ in pairs] if timed else None))
    return users
