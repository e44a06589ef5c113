#!/usr/bin/env python3
"""A simple semantic-ID index: residual k-means of the item vectors of a trained item head. Items that are visited alike share
codes.

    semantic_ids.py build/hstu --codes 64 64 64 --out build/sids.json

Level by level: cluster what is left of the unit vectors, note the nearest centre, subtract it. Items that end with equal codes
share their semantic ID; how many do is printed. A better index gives a better model, and this one is only a start:
weights/README.md says what mattered for decoders.
"""

import argparse
import json

import torch

from directory import read


def clusters(points, count, rounds=50):
    """(cluster of each point, centres): k-means, begun at points drawn in proportion to their distance from those drawn
    before."""
    centres = points[torch.randint(len(points), (1,))]
    while len(centres) < count:
        distance = torch.cdist(points, centres).min(1).values.square()
        centres = torch.cat([centres, points[torch.multinomial(distance + 1e-12, 1)]])
    for _ in range(rounds):
        chosen = torch.cdist(points, centres).argmin(1)
        sizes = torch.bincount(chosen, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, chosen, points)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centres)
    return torch.cdist(points, centres).argmin(1), centres


def semantic_ids(vectors, codes, seed):
    """[items, levels] as lists."""
    torch.manual_seed(seed)
    left, levels = vectors.clone(), []
    for count in codes:
        chosen, centres = clusters(left, min(count, len(vectors)))
        left = left - centres[chosen]
        levels.append(chosen.tolist())
    return [list(sid) for sid in zip(*levels)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a trained item head")
    parser.add_argument("--codes", type=int, nargs="+", default=[64, 64, 64], help="of each level (default %(default)s)")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=1, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, catalog = read(options.directory, torch.float32)
    with torch.no_grad():
        vectors = model.items()[[line["sid"][0] - 1 for line in catalog]]
    sids = semantic_ids(vectors, options.codes, options.seed)
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump({line["item_id"]: sid for line, sid in zip(catalog, sids)}, file)
        file.write("\n")
    distinct, used = len(set(map(tuple, sids))), [len(set(level)) for level in zip(*sids)]
    print(f"{len(sids):,} items, {distinct:,} distinct semantic IDs, codes used per level {used} -> {options.out}")


if __name__ == "__main__":
    main()
