#!/usr/bin/env python3
"""Write a tiny random HSTU with a token head and the answers that `reference.py` gives: what the server's tests compare
themselves with.

    fixture.py --out crates/server/tests/fixtures/hstu-semantic-ids

Out: config.json, model.safetensors, catalog.jsonl (64 items, some sharing a semantic ID), and reference.json:

    {"tolerance", "recommend": [{"body", "expected": [{"item_id", "score"}]}],
     "rank": [{"body", "log_probabilities": [..], "among_candidates": [..] under allowed_set only}]}

`body` is a whole request. Everything follows from one seed. Weights are large enough that answers depend on items, actions,
times and positions (`main` checks it), and a request is drawn again if two scores that decide anything lie within three times
the tolerance, so single precision cannot turn it around. """

import argparse
import json
import os
import random

import torch

from config import research_config, tokens_head
from directory import write
from model import Hstu
from reference import Reference

SEED = 20
LEVELS = [8, 8, 8]
ITEMS, EVENTS, ACTIONS, GENERATED = 64, 20, 5, 0
TOLERANCE = 1e-4
# Seconds between events, from none to weeks: all kinds of time buckets.
PAUSES = [0, 0, 1, 2, 5, 20, 60, 300, 3_600, 40_000, 86_400, 600_000, 2_000_000]


def made_catalog(rng):
    """Items in an order that is not that of their paths. Every tenth shares a path with an earlier one, and one path has three
    items."""
    paths, lines = [], []
    for number in range(ITEMS):
        if number % 10 == 9 or number == 60:
            path = paths[9] if number == 60 else rng.choice(paths)
        else:
            # First codes 1 to 5 only, so that beams are wider than the first level.
            path = next(
                path for path in iter(lambda: (rng.randint(1, 5), rng.randrange(8), rng.randrange(8)), None) if path not in paths
            )
        paths.append(path)
        lines.append({"item_id": f"item-{number}", "sid": list(path)})
    rng.shuffle(lines)
    return lines


def made_model(seed):
    torch.manual_seed(seed)
    config = research_config(
        model_dim=16, layers=2, heads=2, key_dim=8, value_dim=8, num_items=sum(LEVELS), max_sequence_length=EVENTS * len(LEVELS), positions=64,
        head=tokens_head(LEVELS, logit_scale=2.5, tied=False), actions={"count": ACTIONS, "generated": GENERATED},
    )  # fmt: skip
    model = Hstu(config)
    deviations = {
        "_item_emb": 0.3, "_action_emb": 0.2, "_pos_emb": 0.5, "_uvqk": 0.45, "_ts_w": 1.5, "_pos_w": 1.0, "_o.weight": 0.4, "_o.bias": 0.2,
        "_token_head": 0.9,
    }  # fmt: skip
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.normal_(0, next(value for part, value in deviations.items() if part in name))
    return model


def made_history(rng, catalog, events):
    moment, history = 1_760_000_000 + rng.randrange(100_000), []
    for _ in range(events):
        history.append({"item_id": rng.choice(catalog)["item_id"], "action": str(rng.randrange(1, ACTIONS)), "timestamp": moment})
        moment += rng.choice(PAUSES)
    return history, history[-1]["timestamp"] + rng.choice(PAUSES)


def decided(draw, answer, reference):
    """The first drawn request whose answer no rounding turns around."""
    while True:
        request = draw()
        expected = answer(request)
        if reference.smallest_gap > 3 * TOLERANCE:
            return request, expected


def recommend_cases(rng, reference):
    lengths, widths = [1, 2, 3, 5, 8, 13, 19, 20], [4, 8, 16, 64]
    for number in range(24):
        normalization = "full_vocab" if number % 2 == 0 else "allowed_set"
        width = widths[number // 2 % len(widths)]

        def draw(number=number, normalization=normalization, width=width):
            history, asked = made_history(rng, reference.catalog, lengths[number % len(lengths)])
            body = {"history": history, "query_time": asked, "num_items": min(width, [4, 10, 40][number % 3])}
            body |= {"beam_width": width, "normalization": normalization}
            if number % 3 == 2:
                # The second half of these excludes whole branches of the trie.
                chosen = [line["item_id"] for line in reference.catalog if number < 12 or line["sid"][0] in (2, 3)]
                body["filters"] = {"exclude_items": rng.sample(chosen, min(len(chosen), 12)) if number < 12 else chosen}
            return body

        body, expected = decided(draw, reference.recommend, reference)
        yield {"body": body, "expected": expected}


def rank_cases(rng, reference):
    for number, length in enumerate([1, 4, 9, 20, 6, 20]):

        def draw(number=number, length=length):
            history, asked = made_history(rng, reference.catalog, length)
            candidates = [{"item_id": line["item_id"]} for line in rng.sample(reference.catalog, [1, 7, 20][number % 3])]
            return {
                "history": history,
                "query_time": asked,
                "candidates": candidates,
                "normalization": ["full_vocab", "allowed_set"][number % 2],
            }

        body, expected = decided(draw, reference.rank, reference)
        yield {"body": body, **expected}


def what_matters(reference, case):
    """Changes of the scores when one input changes: none of them may be small, or the fixture would not notice its absence."""
    body = case["body"]
    scores = lambda **changed: dict(reference.search({**body, **changed}, set(reference.path.values()), 1000))  # noqa: E731
    before = scores()
    events = body["history"]
    changed = {
        "query time": scores(query_time=body["query_time"] + 5_000_000),
        "times": scores(
            history=[
                {**event, "timestamp": event["timestamp"] - 3_000_000 * (len(events) - at)} for at, event in enumerate(events)
            ]
        ),
        "actions": scores(history=[{**event, "action": str(int(event["action"]) % (ACTIONS - 1) + 1)} for event in events]),
        "last item": scores(history=events[:-1] + [{**events[-1], "item_id": reference.catalog[0]["item_id"]}]),
        "oldest item": scores(history=[{**events[0], "item_id": reference.catalog[1]["item_id"]}] + events[1:]),
    }
    return {name: max(abs(after[path] - before[path]) for path in before) for name, after in changed.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rng = random.Random(SEED)
    write(options.out, made_model(SEED), made_catalog(rng))
    reference = Reference(options.out)
    cases = {"tolerance": TOLERANCE, "recommend": list(recommend_cases(rng, reference)), "rank": list(rank_cases(rng, reference))}
    effects = [what_matters(reference, case) for case in cases["recommend"][2::4]]
    for name in effects[0]:
        least = min(effect[name] for effect in effects)
        print(f"another {name} changes a score by {least:.3g} at least")
        if least < 100 * TOLERANCE:
            raise SystemExit("which is too little")
    with open(os.path.join(options.out, "reference.json"), "w", encoding="utf-8") as file:
        json.dump(cases, file, indent=1)
        file.write("\n")
    print(f"{len(cases['recommend'])} requests for items, {len(cases['rank'])} rankings -> {options.out}")


if __name__ == "__main__":
    main()
