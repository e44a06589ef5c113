#!/usr/bin/env python3
"""Turn a log of interactions with times into what the trainer learns from and what beamline is asked. Standard library only.

    prepare.py ml-100k.inter --item-tags ml-100k.item:class --out build/ml-100k

In, by the file's name:
  *.inter   RecBole: tab separated, header such as `user_id:token item_id:token rating:float timestamp:float`, columns in any order
  else      JSON lines {"user_id", "item_id", "timestamp", "action"}, one an interaction; `action` may be absent
Times are whole seconds; a fraction is cut off. With `--actions` every interaction has an action, a whole number from 1 on: the
rating of a `.inter` file, the field `action` of JSON lines. Action 0 is what `train.py` keeps for rows whose event is not known
yet.

A user's events are ordered by time; of equal times, the file's order counts. Leave-one-out: the last event is the test target,
the one before it the validation target, all earlier ones the training part of both. Users with fewer than --least events (3 or
more) train and are not asked about. Lines that cannot be read are an error that names them; nothing is skipped.

Out (--out DIR):
  catalog.jsonl                  {"item_id", "sid": [row], "tags"}: an item's row of the item table, from 1 on, ids that are numbers in their order
  train.jsonl                    {"user_id", "items", "times", "actions"}: `actions` only with --actions, here and below
  validation.jsonl, test.jsonl   the same, the history, and {"target", "target_time"}
  validation_requests.jsonl, test_requests.jsonl
                                 the same questions for `beamline batch`: `query_time` is the time of the target, `id` the user
"""

import argparse
import json
import math
import os
import re

REQUIRED = ("user_id", "item_id", "timestamp")


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log")
    parser.add_argument("--out", required=True)
    parser.add_argument("--actions", action="store_true", help="read the rating or action of every interaction")
    parser.add_argument("--least", type=int, default=3, help="fewest events of a user who is asked about (default %(default)s)")
    parser.add_argument("--item-tags", metavar="FILE:COLUMN", help="tags of items: a RecBole .item file and a column of words")
    parser.add_argument("--num-items", type=int, default=50, help="items that a request asks for (default %(default)s)")
    parser.add_argument("--exclude-seen", action="store_true", help="requests ask for items that are not in the history")
    options = parser.parse_args(given)
    if options.least < 3:
        parser.error("--least: a question needs a target, a history, and the same again for validation: 3 at least")
    return options


def refuse(path, number, why):
    raise SystemExit(f"{path}:{number}: {why}")


def columns(path):
    """(line number, {name: text}) of a RecBole file."""
    with open(path, encoding="utf-8") as file:
        header = [name.split(":")[0] for name in file.readline().rstrip("\n").split("\t")]
        for number, line in enumerate(file, 2):
            fields = line.rstrip("\n").split("\t")
            if fields == [""]:
                continue
            if len(fields) != len(header):
                refuse(path, number, f"{len(fields)} fields, the header names {len(header)}")
            yield number, dict(zip(header, fields))


def objects(path):
    """(line number, {name: value}) of JSON lines."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                refuse(path, number, f"not JSON: {error}")
            if not isinstance(entry, dict):
                refuse(path, number, "not an object")
            yield number, entry


def number_of(value):
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def read_log(path, actions):
    """{user: [(time, item, action)]}, ordered; the action is None without `actions`."""
    recbole, users = path.endswith(".inter"), {}
    action_field = "rating" if recbole else "action"
    for number, entry in columns(path) if recbole else objects(path):
        for field in REQUIRED + ((action_field,) if actions else ()):
            if entry.get(field) in (None, ""):
                refuse(path, number, f"no {field}")
        time, action = number_of(entry["timestamp"]), None
        if time is None:
            refuse(path, number, f"timestamp {entry['timestamp']!r} is no number")
        if actions:
            action = number_of(entry[action_field])
            if action is None or action != int(action) or action < 1:
                refuse(path, number, f"{action_field} {entry[action_field]!r} is no whole number from 1 on")
            action = int(action)
        users.setdefault(str(entry["user_id"]), []).append((math.floor(time), str(entry["item_id"]), action))
    if not users:
        raise SystemExit(f"{path}: no interactions")
    for events in users.values():
        events.sort(key=lambda event: event[0])  # stable: equal times stay in the file's order
    return users


def read_tags(argument):
    """{item: [tags]} of FILE:COLUMN."""
    path, _, column = argument.rpartition(":")
    tags = {}
    for number, entry in columns(path):
        if not {"item_id", column} <= entry.keys():
            refuse(path, number, f"no column item_id or {column}")
        tags[entry["item_id"]] = entry[column].split()
    return tags


def made_catalog(users, tags):
    """An item's row is its place in the catalog, from 1 on: row 0 is padding."""
    items = {item for events in users.values() for _, item, _ in events}
    order = sorted(items, key=int) if all(re.fullmatch(r"\d+", item) for item in items) else sorted(items)
    lines = [{"item_id": item, "sid": [row]} for row, item in enumerate(order, 1)]
    for line in lines:
        if tags.get(line["item_id"]):
            line["tags"] = tags[line["item_id"]]
    return lines


def part(user, events):
    line = {"user_id": user, "items": [item for _, item, _ in events], "times": [time for time, _, _ in events]}
    if events[0][2] is not None:
        line["actions"] = [action for _, _, action in events]
    return line


def leave_one_out(users, least):
    """Training, validation and test lines."""
    train, validation, test = [], [], []
    for user, events in users.items():
        if len(events) < least:
            train.append(part(user, events))
            continue
        train.append(part(user, events[:-2]))
        for lines, at in ((validation, len(events) - 2), (test, len(events) - 1)):
            lines.append({**part(user, events[:at]), "target": events[at][1], "target_time": events[at][0]})
    return train, validation, test


def request(line, num_items, exclude_seen):
    """The body of POST /v1/recommend that asks for a line's target."""
    history = [{"item_id": item, "timestamp": time} for item, time in zip(line["items"], line["times"])]
    for event, action in zip(history, line.get("actions", [])):
        event["action"] = str(action)
    body = {"id": line["user_id"], "history": history, "query_time": line["target_time"], "num_items": num_items}
    return {**body, "filters": {"exclude_seen": True}} if exclude_seen else body


def write_lines(path, lines):
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main(given=None):
    options = arguments(given)
    users = read_log(options.log, options.actions)
    tags = read_tags(options.item_tags) if options.item_tags else {}
    train, validation, test = leave_one_out(users, options.least)
    os.makedirs(options.out, exist_ok=True)
    catalog = made_catalog(users, tags)
    write_lines(os.path.join(options.out, "catalog.jsonl"), catalog)
    write_lines(os.path.join(options.out, "train.jsonl"), train)
    for name, lines in (("validation", validation), ("test", test)):
        write_lines(os.path.join(options.out, f"{name}.jsonl"), lines)
        write_lines(
            os.path.join(options.out, f"{name}_requests.jsonl"),
            (request(line, options.num_items, options.exclude_seen) for line in lines),
        )
    repeated = sum(line["target"] in line["items"] for line in test)
    print(f"{len(catalog):,} items, {len(users):,} users, {sum(len(line['items']) for line in train):,} training events, {len(test):,} test targets, "
          f"{repeated:,} of them in their own history -> {options.out}")  # fmt: skip


if __name__ == "__main__":
    main()
