#!/usr/bin/env python3
"""Turn an interaction file and a semantic-ID index into what the recipe trains on and beamline serves. Standard library only.

In:
  --sequences   one user a line, `user item item ...`, oldest first (the S3-Rec / SASRec preparation), or JSON lines
                {"user_id": ..., "items": [...]}
  --sids        JSON object {item: [one code or one token string per level]}. Codes are whole numbers; token strings end in their code,
                as in "<a_183>"
  --item-offset what to add to an item number of the sequences to find its key in the index. Index files often count from 0 where
                sequence files count from 1 (then -1). A wrong offset still trains, and gives nonsense, so check it on items you know
Out (--out DIR):
  catalog.jsonl, convention.json   the two files that stand beside the weights; see weights/README.md
  train.jsonl                      {"user_id", "items"}: everything but each user's last two items
  validation.jsonl, test.jsonl     {"user_id", "history", "target"}: the last item but one after the training part; the last item after
                                   all the others

Leave-one-out: the training part is the same for both targets, and no later file holds less history than an earlier one. Users with fewer
than three items train and are not asked about. An item id here is its key in the index. The catalog is in the order of the index's
numbers, so item sharing a semantic ID are listed in that order.

  python3 weights/recipe/prepare.py --sequences sequences.txt --sids sids.json --item-offset -1 --out build/beauty
"""

import argparse
import json
import os
import re
import string


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", required=True)
    parser.add_argument("--sids", required=True)
    parser.add_argument("--item-offset", type=int, default=0, help="added to item numbers of the sequences (default %(default)s)")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def read_sequences(path, offset):
    """[(user, [item ids])]; an item id is a key of the index."""
    users = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if line.lstrip().startswith("{"):
                entry = json.loads(line)
                user, items = entry["user_id"], entry["items"]
            else:
                user, *items = line.split()
            try:
                items = [str(int(item) + offset) for item in items] if offset else [str(item) for item in items]
            except ValueError:
                raise SystemExit(f"{path}:{number}: --item-offset needs whole numbers as items") from None
            users.append((str(user), items))
    return users


def in_index_order(keys):
    """Numbers by value, other ids as they come."""
    keys = list(keys)
    return sorted(keys, key=int) if all(re.fullmatch(r"\d+", key) for key in keys) else keys


def split_token(token):
    """"<a_183>" is pattern "<a_{}>" and code 183."""
    found = re.fullmatch(r"(.*?)(\d+)(\D*)", token)
    if not found:
        raise SystemExit(f"no code at the end of the token {token!r}")
    return found.group(1) + "{}" + found.group(3), int(found.group(2))


def catalog_and_convention(sids):
    """Lines of catalog.jsonl and the fields of convention.json for an index {item: codes or tokens}.

    A history is `<|bos|>` and the items, nothing between them: every token but the first one is a code, and the begin token gives an
    empty history something to start from. Only codes that occur become tokens.
    """
    order = in_index_order(sids)
    depths = {len(sids[item]) for item in order}
    if len(depths) != 1:
        raise SystemExit(f"semantic IDs of different lengths: {sorted(depths)}")
    levels = depths.pop()
    if levels > len(string.ascii_lowercase):
        raise SystemExit(f"{levels} levels")
    written = {item: [code if isinstance(code, str) else f"<{string.ascii_lowercase[level]}_{code}>" for level, code in enumerate(sids[item])]
               for item in order}
    patterns, counts, used = [], [], set()
    for level in range(levels):
        parts = [split_token(written[item][level]) for item in order]
        if len(pattern := {pattern for pattern, _ in parts}) != 1:
            raise SystemExit(f"level {level}: tokens of several patterns, {sorted(pattern)[:3]}")
        patterns.append(pattern.pop())
        counts.append(max(code for _, code in parts) + 1)
        used |= {written[item][level] for item in order}
    if len(set(patterns)) != levels:
        raise SystemExit(f"two levels share a pattern: {patterns}. The tokens of one level have to differ from those of another")
    # The tokenizer's own tokens: <pad>, <unk>, <|endoftext|>, <|bos|> (see tokens.py).
    size = 4 + len(used)
    convention = {
        "format": 1,
        "model": "decoder",
        "levels": levels,
        "level_token_patterns": patterns,
        "level_code_counts": counts,
        "codes_with_tokens": "used",
        "item_begin_token": None,
        "item_end_token": None,
        "item_separator": "",
        "prompt_prefix": "<|bos|>",
        "prompt_suffix": "",
        "generation_begin": None,
        "add_special_tokens": False,
        "tail_tokens": [],
        "decoder_start_token": None,
        "generated_steps": levels,
        "history_order": "oldest first",
        "catalog_sid_form": "tokens",
        "vocab_size": size,
        "tokenizer_size": size,
    }
    return [{"item_id": item, "sid": written[item]} for item in order], convention


def leave_one_out(users):
    """Training, validation and test lines."""
    train, validation, test = [], [], []
    for user, items in users:
        if len(items) < 3:
            train.append({"user_id": user, "items": items})
            continue
        train.append({"user_id": user, "items": items[:-2]})
        validation.append({"user_id": user, "history": items[:-2], "target": items[-2]})
        test.append({"user_id": user, "history": items[:-1], "target": items[-1]})
    return train, validation, test


def write_lines(path, lines):
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main():
    args = arguments()
    users = read_sequences(args.sequences, args.item_offset)
    with open(args.sids, encoding="utf-8") as file:
        sids = json.load(file)
    catalog, convention = catalog_and_convention(sids)
    if unknown := {item for _, items in users for item in items} - sids.keys():
        raise SystemExit(f"{len(unknown)} items of the sequences are not in the index, such as {sorted(unknown)[:3]}; is --item-offset right?")
    train, validation, test = leave_one_out(users)
    os.makedirs(args.out, exist_ok=True)
    write_lines(os.path.join(args.out, "catalog.jsonl"), catalog)
    write_lines(os.path.join(args.out, "train.jsonl"), train)
    write_lines(os.path.join(args.out, "validation.jsonl"), validation)
    write_lines(os.path.join(args.out, "test.jsonl"), test)
    with open(os.path.join(args.out, "convention.json"), "w", encoding="utf-8") as file:
        json.dump(convention, file, indent=1)
        file.write("\n")
    distinct = len({tuple(item["sid"]) for item in catalog})
    print(f"{len(catalog):,} items ({distinct:,} distinct semantic IDs), {len(train):,} users, {sum(len(u['items']) for u in train):,} training "
          f"interactions, {len(test):,} test targets -> {args.out}")


if __name__ == "__main__":
    main()
