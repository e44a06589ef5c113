#!/usr/bin/env python3
"""How good a directory is, by full ranking: every item of the catalog competes for every question.

    evaluate.py DIR --data DATA --part test
    evaluate.py DIR --data DATA --part test --answers answers.jsonl      the same for what beamline answered, and where the two differ

An item head compares a user with all items. A token head is searched with `--beam-width` beams, so an item beyond the beam is a
miss; items that share a semantic ID stand in the order of the catalog, and only the target itself is a hit. HR@k is the share
of targets among the first k, NDCG@k the mean of 1 / log2(rank + 1), 0 beyond k. Both are given with the items of the history in
the ranking and without them: they answer different questions, see docs/EVALUATION.md. Prints one JSON object. """

import argparse
import json
import math
import os

import torch

from decode import Context, Trie, search
from directory import read, read_lines
from sequences import Spelling, padded

CUTS = (10, 50)
MOST = max(CUTS)


@torch.no_grad()
def item_slates(model, catalog, lines, count, exclude_history):
    """[(item id, score)] of each line, best first; equal scores in the order of rows."""
    spelling, vectors = Spelling(model.config, catalog), model.items()
    item_of = {line["sid"][0]: line["item_id"] for line in catalog}
    absent = torch.tensor([row not in item_of for row in range(1, len(vectors) + 1)])
    order, slates = sorted(range(len(lines)), key=lambda at: len(lines[at]["items"])), [None] * len(lines)
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        questions = [spelling.question(lines[at]) for at in batch]
        # `padded` takes one id more than rows, the target; its value does not matter here.
        ids, times, actions, _ = padded([(ids + [1], times, actions + [0]) for ids, times, actions in questions], spelling)
        states = model(ids, times, actions)
        users = torch.stack([states[place, len(question[0]) - 1] for place, question in enumerate(questions)])
        scores = (users @ vectors.T).masked_fill(absent, -math.inf)
        for place, at in enumerate(batch):
            if exclude_history:
                scores[place, [spelling.ids[item][0] - 1 for item in lines[at]["items"]]] = -math.inf
        best, rows = scores.sort(dim=-1, descending=True, stable=True)
        for place, at in enumerate(batch):
            pairs = zip(rows[place, :count].tolist(), best[place, :count].tolist())
            slates[at] = [(item_of[row + 1], score) for row, score in pairs if score > -math.inf]
    return slates


@torch.no_grad()
def token_slates(model, catalog, lines, count, exclude_history, beam_width, normalization="full_vocab"):
    """[(item id, score)] of each line by beam search."""
    spelling, items = Spelling(model.config, catalog), {}
    for line in catalog:
        items.setdefault(tuple(spelling.ids[line["item_id"]]), []).append(line["item_id"])
    whole, slates = Trie(items), []
    for line in lines:
        seen = set(line["items"]) if exclude_history else set()
        trie = Trie(path for path, named in items.items() if not seen.issuperset(named)) if seen else whole
        found = search(Context(model, *spelling.question(line)), trie, spelling.levels, beam_width, normalization)
        slates.append([(item, score) for path, score in found for item in items[path] if item not in seen][:count])
    return slates


def slates(model, catalog, lines, count=MOST, exclude_history=False, beam_width=50):
    if model.config["output"]["head"]["kind"] == "items":
        return item_slates(model, catalog, lines, count, exclude_history)
    return token_slates(model, catalog, lines, count, exclude_history, beam_width)


def metrics(slates, lines, cuts=CUTS):
    """HR and NDCG at each cut, over all lines."""
    found = {}
    ranks = [
        next((rank for rank, (item, _) in enumerate(slate, 1) if item == line["target"]), math.inf)
        for slate, line in zip(slates, lines, strict=True)
    ]
    for cut in cuts:
        found[f"HR@{cut}"] = sum(rank <= cut for rank in ranks) / len(ranks)
        found[f"NDCG@{cut}"] = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= cut) / len(ranks)
    return found


def answered(path, lines):
    """Slates of a file of `beamline batch`, in the order of the lines."""
    answers = {answer["id"]: answer for answer in read_lines(path)}
    if failed := [answer for answer in answers.values() if "error" in answer]:
        raise SystemExit(f"{path}: {len(failed)} errors, such as {json.dumps(failed[0])}")
    return [[(item["item_id"], item["score"]) for item in answers[line["user_id"]]["items"]] for line in lines]


def differences(ours, theirs, cut=10):
    """How far two sets of slates agree: first `cut` items in the same order, and the largest difference of an item's scores."""
    same = sum([item for item, _ in one[:cut]] == [item for item, _ in other[:cut]] for one, other in zip(ours, theirs))
    gaps = [abs(score - dict(other)[item]) for one, other in zip(ours, theirs) for item, score in one if item in dict(other)]
    return {f"same_top_{cut}": same, "of": len(ours), "largest_score_difference": max(gaps)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--data", required=True, help="folder of prepare.py")
    parser.add_argument("--part", choices=("validation", "test"), default="test", help="(default %(default)s)")
    parser.add_argument("--beam-width", type=int, default=50, help="of a token head (default %(default)s)")
    parser.add_argument("--users", type=int, help="only so many, evenly spaced")
    parser.add_argument("--answers", help="answers of `beamline batch` to this part's requests")
    parser.add_argument("--threads", type=int, default=1, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, catalog = read(options.directory, torch.float32)
    lines = read_lines(os.path.join(options.data, f"{options.part}.jsonl"))
    if options.users and options.users < len(lines):
        lines = [lines[number * len(lines) // options.users] for number in range(options.users)]
    result = {"part": options.part, "users": len(lines)}
    both = {
        name: slates(model, catalog, lines, exclude_history=name == "excluded", beam_width=options.beam_width)
        for name in ("not excluded", "excluded")
    }
    result |= {f"history {name}": metrics(found, lines) for name, found in both.items()}
    if options.answers:
        asked = {request["id"]: request for request in read_lines(os.path.join(options.data, f"{options.part}_requests.jsonl"))}
        excluded = any("exclude_seen" in request.get("filters", {}) for request in asked.values())
        found = answered(options.answers, lines)
        result["answers"] = {
            "metrics": metrics(found, lines),
            **differences(both["excluded" if excluded else "not excluded"], found),
        }
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
