#!/usr/bin/env python3
"""Build a semantic-ID index from the training sequences alone: items that follow each other share codes. Needs numpy and scipy.

An index made from texts puts items that *look* alike next to each other. A small decoder then has to learn by heart, item by item, which codes
follow which. Here the first code names a neighbourhood in the item-item matrix of item_model.py, so most of what comes next has the first code of
something in the history, and that is quickly learned.

  1. Embedding: eigenvectors of the symmetric, degree-normalised graph of each item's strongest successors, rows scaled to length 1.
  2. First level: k-means by cosine, with a capacity per cluster, so that no code is nearly everything or nearly nothing.
  3. Further levels but the last: the same on what the levels before left over (residuals), the codebook shared by all prefixes.
  4. Last level: a number that tells apart the items with equal codes so far, the most frequent item first. No two items share a semantic ID.

In:  --data DIR (catalog.jsonl and train.jsonl of prepare.py; the semantic IDs in that catalog are not looked at), --item-model F
Out: a JSON object {item id: codes}, to be given to prepare.py as --sids, with --item-offset as before

  python3 weights/recipe/build_index.py --data build/beauty --item-model build/beauty/item_model.npz --codes 1024 --out build/own_sids.json
"""

import argparse
import collections
import json
import os

import numpy
import scipy.sparse
import scipy.sparse.linalg

from tokens import read_lines


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True)
    add("--item-model", required=True)
    add("--out", required=True)
    add("--codes", type=int, nargs="+", default=[256, 256], help="codes of each level but the last (default %(default)s)")
    add("--neighbours", type=int, default=30, help="strongest successors of an item in the graph (default %(default)s)")
    add("--dimensions", type=int, default=96, help="(default %(default)s)")
    add("--slack", type=float, default=1.5, help="capacity of a cluster, in mean sizes (default %(default)s)")
    add("--seed", type=int, default=1, help="(default %(default)s)")
    return parser.parse_args()


def embed(columns, scores, neighbours, dimensions, seed):
    """[items, dimensions], rows of length 1."""
    items = len(columns)
    columns, scores = columns[:, :neighbours], numpy.maximum(scores[:, :neighbours], 0)
    # Every item has the same weight to give, whatever its number of observations.
    scores = scores / numpy.maximum(scores.sum(1, keepdims=True), 1e-9)
    rows = numpy.repeat(numpy.arange(items), columns.shape[1])
    graph = scipy.sparse.csr_matrix((scores.ravel(), (rows, columns.ravel())), shape=(items, items))
    graph = graph + graph.T + scipy.sparse.identity(items) * 1e-3
    scale = scipy.sparse.diags(1 / numpy.sqrt(numpy.asarray(graph.sum(1)).ravel()))
    start = numpy.random.default_rng(seed).standard_normal(items)
    values, vectors = scipy.sparse.linalg.eigsh(scale @ graph @ scale, k=dimensions, which="LA", v0=start, tol=1e-3)
    vectors = vectors * numpy.sqrt(numpy.maximum(values, 0))
    return unit(vectors)


def unit(rows):
    return rows / numpy.maximum(numpy.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def within_capacity(likeness, capacity):
    """A cluster for every row of likeness [items, clusters], at most `capacity` rows each: the surest rows choose first."""
    free = numpy.full(likeness.shape[1], capacity)
    order = numpy.argsort(-likeness, axis=1)
    chosen = numpy.empty(len(likeness), dtype=numpy.int64)
    for row in numpy.argsort(-likeness.max(1), kind="stable"):
        for cluster in order[row]:
            if free[cluster]:
                chosen[row], free[cluster] = cluster, free[cluster] - 1
                break
    return chosen


def cluster(points, codes, slack, rng, rounds=25):
    """Codes [items] and centres [codes, dimensions]: k-means by squared distance, the last rounds with a capacity."""
    capacity = max(1, int(numpy.ceil(slack * len(points) / codes)))
    centres = points[rng.choice(len(points), codes, replace=False)].copy()
    for turn in range(rounds):
        # Nearest centre, as the largest 2 x.c - |c|^2.
        likeness = 2 * points @ centres.T - (centres**2).sum(1)
        chosen = within_capacity(likeness, capacity) if turn >= rounds - 5 else likeness.argmax(1)
        size = numpy.bincount(chosen, minlength=codes)
        sums = scipy.sparse.csr_matrix((numpy.ones(len(points)), (chosen, numpy.arange(len(points)))), shape=(codes, len(points))) @ points
        centres = sums / numpy.maximum(size, 1)[:, None]
        if turn < rounds - 5 and (size == 0).any():
            centres[size == 0] = points[rng.choice(len(points), int((size == 0).sum()), replace=False)]
    return chosen, centres


def semantic_ids(points, codes, frequency, slack, seed):
    """[[code per level]] for every item; all different."""
    rng = numpy.random.default_rng(seed)
    left, levels = points, []
    for count in codes:
        chosen, centres = cluster(left, count, slack, rng)
        left = left - centres[chosen]
        levels.append(chosen)
    taken, sids = collections.Counter(), [None] * len(points)
    for item in sorted(range(len(points)), key=lambda item: (-frequency[item], item)):
        prefix = tuple(int(level[item]) for level in levels)
        sids[item] = [*prefix, taken[prefix]]
        taken[prefix] += 1
    return sids


def main():
    args = arguments()
    ids = [entry["item_id"] for entry in read_lines(os.path.join(args.data, "catalog.jsonl"))]
    number = {item: at for at, item in enumerate(ids)}
    frequency = numpy.zeros(len(ids))
    pairs = []
    for user in read_lines(os.path.join(args.data, "train.jsonl")):
        items = [number[item] for item in user["items"]]
        numpy.add.at(frequency, items, 1)
        pairs += zip(items, items[1:])
    stored = numpy.load(args.item_model)
    points = embed(stored["items"][0], stored["scores"][0], args.neighbours, args.dimensions, args.seed)
    sids = semantic_ids(points, args.codes, frequency, args.slack, args.seed)
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(dict(zip(ids, sids)), file)
        file.write("\n")
    same = sum(sids[one][0] == sids[other][0] for one, other in pairs) / len(pairs)
    print(f"{len(ids):,} items, last level up to {max(sid[-1] for sid in sids) + 1} codes; {100 * same:.1f} % of consecutive training items share the first code")


if __name__ == "__main__":
    main()
