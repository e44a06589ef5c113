"""Writes prompts for a checkpoint of make_checkpoint.py: one JSON line a visit, {"user", "visit", "history", "token_ids"}.

A user comes back `--visits` times, each time with `--new` more items. The first visit is cold; later visits extend a history
that was seen before. Histories prefer items that come early in the catalog.
"""
import argparse
import json
import pathlib

import numpy as np
from transformers import AutoTokenizer

from common import first_codes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--history", type=int, default=64, help="items of a first visit")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--visits", type=int, default=1)
    parser.add_argument("--new", type=int, default=4, help="items between two visits")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    first = first_codes(tokenizer)
    begin, end = tokenizer.convert_tokens_to_ids(["<|sid_begin|>", "<|sid_end|>"])
    with open(options.checkpoint / "catalog.jsonl", encoding="utf-8") as lines:
        catalog = [json.loads(line) for line in lines]

    random = np.random.default_rng(options.seed)
    total = options.history + options.new * (options.visits - 1)
    histories = [(len(catalog) * random.random(total) ** 2).astype(int) for _ in range(options.users)]
    with open(options.out, "w", encoding="utf-8") as lines:
        for visit in range(options.visits):
            for user, history in enumerate(histories):
                items = [catalog[index] for index in history[:options.history + options.new * visit]]
                tokens = []
                for item in items:
                    tokens += [begin, *(start + code for start, code in zip(first, item["sid"])), end]
                line = {"user": f"user-{user}", "visit": visit, "history": [item["item_id"] for item in items],
                        "token_ids": tokens + [begin]}
                lines.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
