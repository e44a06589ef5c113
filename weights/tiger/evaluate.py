#!/usr/bin/env python3
"""How good a directory of train.py is on held-out users, by beam search in PyTorch; and whether a server answers alike.

    evaluate.py DIR --data DATA --users 1000
    evaluate.py DIR --data DATA --users 20 --server http://127.0.0.1:8080

The second asks a running `beamline serve --checkpoint DIR --history-cut exact` the same questions, and counts the users for whom
it lists the same ten items in the same order. Two items whose scores are closer than the tolerance may change places: such users
count as alike. The exit status is 1 if any user's lists are not alike. Prints one JSON object.
"""

import argparse
import json
import os
import sys
import urllib.request

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "recipe"), os.path.join(HERE, "..")]
import training  # noqa: E402

import beam  # noqa: E402
import layout  # noqa: E402
from search import search  # noqa: E402
from tokens import read_lines, sid_tokens  # noqa: E402

CUT = 10


class Directory:
    """A directory of train.py: its model, its items, and its trie."""

    def __init__(self, path):
        from transformers import AutoTokenizer, T5ForConditionalGeneration

        self.model = T5ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer, catalog = AutoTokenizer.from_pretrained(path), read_lines(os.path.join(path, "catalog.jsonl"))
        with open(os.path.join(path, "convention.json"), encoding="utf-8") as file:
            self.convention = layout.all_fields(json.load(file))
        self.items = [line["item_id"] for line in catalog]
        self.number = {item: at for at, item in enumerate(self.items)}
        self.paths = [tokenizer.convert_tokens_to_ids(sid_tokens(self.convention, line["sid"])) for line in catalog]
        self.trie = beam.Trie(self.paths)

    def answer(self, history, beam_width):
        """[(item id, score)], best first, of a history of item ids."""
        kept = [self.number[item] for item in history][-self.convention["max_history_items"] :]
        found = search(self.model, self.trie, [], self.paths, [kept], beam_width)
        pairs = zip(*(values[0].tolist() for values in found))
        return [(self.items[item], score) for leaf, score in pairs for item in beam.slate(self.trie, [leaf], [score])]


def ask(url, history, beam_width):
    """The same of a server."""
    events = [{"item_id": item} for item in history]
    body = json.dumps({"history": events, "num_items": CUT, "beam_width": beam_width, "normalization": "full_vocab"})
    call = urllib.request.Request(url.rstrip("/") + "/v1/recommend", body.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=60) as reply:
        return [(item["item_id"], item["score"]) for item in json.load(reply)["items"]]


def alike(ours, theirs, tolerance):
    """Whether two lists agree: each of their items has the score that it has here, and that of the item at its place here."""
    known, near = dict(ours), lambda one, other: one is not None and abs(one - other) <= tolerance
    pairs = zip(ours, theirs)
    same = all(near(known.get(item), score) and near(place, score) for (_, place), (item, score) in pairs)
    return same and len(theirs) == len(ours[:CUT])


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--data", required=True, help="folder of recipe/prepare.py")
    parser.add_argument("--part", choices=("validation", "test"), default="test", help="(default %(default)s)")
    parser.add_argument("--users", type=int, default=1000, help="evenly spaced over the file (default %(default)s)")
    parser.add_argument("--beam-width", type=int, default=50, help="(default %(default)s)")
    parser.add_argument("--server", help="a running server to compare with")
    parser.add_argument("--tolerance", type=float, default=2e-4, help="of a score (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    directory = Directory(options.directory)
    lines = training.even(read_lines(os.path.join(options.data, f"{options.part}.jsonl")), options.users)
    users = [([directory.number[item] for item in line["history"]], directory.number[line["target"]]) for line in lines]
    longest = directory.convention["max_history_items"]
    told = directory.model, directory.trie, [], directory.paths
    values = beam.recall(*told, users, options.beam_width, max_items=longest, by=search)
    result = {"part": options.part, "users": len(lines), "recall@10": values[0], "NDCG@10": values[1]}
    if options.server:
        width, histories = options.beam_width, [line["history"] for line in lines]
        both = [(directory.answer(history, width), ask(options.server, history, width)) for history in histories]
        gaps = [abs(dict(ours)[item] - score) for ours, theirs in both for item, score in theirs if item in dict(ours)]
        result["server"] = {
            "same top 10": sum([item for item, _ in ours[:CUT]] == [item for item, _ in theirs] for ours, theirs in both),
            "alike": sum(alike(ours, theirs, options.tolerance) for ours, theirs in both),
            "largest score difference": max(gaps, default=None),
        }
    print(json.dumps(result, indent=1))
    return 0 if "server" not in result or result["server"]["alike"] == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
