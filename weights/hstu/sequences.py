"""From lines of `prepare.py` to rows of the model: the one place that knows how an event is spelled.

    item head    one row an event: the item's row number
    token head   one row a level: first_token[level] + code; all rows of an event carry its action and its time

A training sequence is rows 0 .. R-1; row i predicts row i + 1 and reads its time, so inputs are the first R - 1 rows and all R
times. For the last row of an event that is the time of the next event, as it is the time of the query when the model is asked.
What must not be here: losses, files, models.
"""

import random

import torch


class Spelling:
    """Ids of an item, and how many of them fit."""

    def __init__(self, config, catalog):
        head, self.entry = config["output"]["head"], config["input"]
        first = [level["first_token"] for level in head["semantic_id_levels"]] if head["kind"] == "tokens" else [0]
        self.levels = len(first)
        self.ids = {line["item_id"]: [start + code for start, code in zip(first, line["sid"], strict=True)] for line in catalog}
        self.most_events = self.entry["max_sequence_length"] // self.levels
        self.reads_actions = self.entry["actions"] is not None

    def rows(self, line, start=0, stop=None):
        """(ids, times, actions) of events start to stop of a line. Without actions in the model, all of them are 0."""
        events = range(len(line["items"]))[start:stop]
        ids = [number for event in events for number in self.ids[line["items"][event]]]
        times = [line["times"][event] for event in events for _ in range(self.levels)]
        given = line["actions"] if self.reads_actions else None
        return ids, times, [given[event] if given else 0 for event in events for _ in range(self.levels)]

    def question(self, line):
        """The newest events that fit, with the time of the query behind their times."""
        ids, times, actions = self.rows(line, start=-self.most_events)
        return ids, times + [line["target_time"]], actions


def windows(events, most, rng):
    """(start, stop) that cover a history of `events`, so that every event but the first is predicted once. Longer ones than
    `most` + 1 are cut at places that differ from pass to pass; neighbours share an event, which one predicts and the other
    begins with."""
    if events <= most + 1:
        return [(0, events)]
    cuts = list(range(rng.randint(1, most), events - 1, most))
    return [(start, stop + 1) for start, stop in zip([0] + cuts, cuts + [events - 1])]


def batches(lines, spelling, rows, hidden, seed):
    """One pass over the training lines in random order: batches of about `rows` rows, sequences of like length together.

    `hidden`: share of events whose action is replaced by the generated one. When a token is generated its event's action is not
    known, so a model that reads actions has to see such rows in training."""
    rng, sequences = random.Random(seed), []
    generated = (spelling.entry["actions"] or {}).get("generated")
    for line in lines:
        for start, stop in windows(len(line["items"]), spelling.most_events, rng):
            ids, times, actions = spelling.rows(line, start, stop)
            if len(ids) < 2:
                continue
            if generated is not None and hidden:
                masked = [rng.random() < hidden for _ in range(stop - start)]
                actions = [generated if masked[row // spelling.levels] else action for row, action in enumerate(actions)]
            sequences.append((ids, times, actions))
    sequences.sort(key=lambda sequence: len(sequence[0]) * (1 + 0.2 * rng.random()))
    plan, batch = [], []
    for sequence in sequences:
        batch.append(sequence)
        if sum(len(other[0]) for other in batch) >= rows:
            plan.append(batch)
            batch = []
    plan += [batch] if batch else []
    rng.shuffle(plan)
    return plan


def padded(batch, spelling):
    """(ids, times, actions or None, targets) of a batch; row and target 0 where there is none. Times go on unchanged to the
    right."""
    width = max(len(ids) for ids, _, _ in batch)
    fill = lambda values, last: values + [last] * (width - len(values))  # noqa: E731
    ids = torch.tensor([fill(ids, 0) for ids, _, _ in batch])
    times = torch.tensor([fill(times, times[-1]) for _, times, _ in batch])
    actions = torch.tensor([fill(actions, 0) for _, _, actions in batch])[:, :-1] if spelling.reads_actions else None
    targets = ids[:, 1:]
    return ids[:, :-1] * (targets > 0), times, actions, targets
