#!/usr/bin/env python3
"""Build a semantic-ID index from the training sequences alone: items that follow each other share codes. Needs numpy and scipy.

An index made from texts puts items that *look* alike next to each other. A small decoder then has to learn by heart, item by item, which codes
follow which. Here every code names a neighbourhood in the item-item matrix of item_model.py: a small one at the first level (about three items
with the default 4,096 codes), a larger one at the second (about twelve with 1,024).

  1. Embedding: eigenvectors of the symmetric, degree-normalised graph of each item's strongest successors, rows scaled to length 1.
  2. All levels but the first: k-means by squared distance, with a capacity per cluster, so that no code is nearly everything or nearly nothing.
  3. First level: the same with its own number of codes, and then the nearest codes that keep apart items with equal later codes
     (an optimal assignment within each group of them, a few rounds). So no two items share a semantic ID.

Every level clusters the points themselves, not what other levels left over. Both tokens of an item in a history then say where it is, and
the decoder's one prediction of where the next item lies serves at both levels. The fine level comes first because the second has then
little left to decide: given its first code, an item is one of about three. (Coarse first, the decoder has to learn by heart which few of the fine
codes exist under each coarse one.)

In:  --data DIR (catalog.jsonl and train.jsonl of prepare.py; the semantic IDs in that catalog are not looked at), --item-model F
Out: a JSON object {item id: codes}, to be given to prepare.py as --sids, with --item-offset as before

  python3 weights/recipe/build_index.py --data build/beauty --item-model build/beauty/item_model.npz --out build/own_sids.json
"""

import argparse
import collections
import json
import os

import numpy
import scipy.optimize
import scipy.sparse
import scipy.sparse.linalg

from tokens import read_lines


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True)
    add("--item-model", required=True)
    add("--out", required=True)
    add("--codes", type=int, nargs="+", default=[4096, 1024], help="codes of each level (default %(default)s)")
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
    return unit(vectors).astype(numpy.float32)


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


def likeness_to(centres, points):
    """Nearest centre, as the largest 2 x.c - |c|^2: [items, codes]."""
    return 2 * points @ centres.T - (centres**2).sum(1)


def means(points, chosen, codes, otherwise):
    """Centres [codes, dimensions] of the chosen clusters; `otherwise` where one is empty."""
    size = numpy.bincount(chosen, minlength=codes)
    sums = scipy.sparse.csr_matrix((numpy.ones(len(points)), (chosen, numpy.arange(len(points)))), shape=(codes, len(points))) @ points
    return numpy.where(size[:, None] > 0, sums / numpy.maximum(size, 1)[:, None], otherwise)


def cluster(points, codes, slack, rng, rounds=25):
    """Codes [items] and centres [codes, dimensions]: k-means by squared distance, the last rounds with a capacity."""
    capacity = max(1, int(numpy.ceil(slack * len(points) / codes)))
    centres = points[rng.choice(len(points), codes, replace=False)].copy()
    for turn in range(rounds):
        likeness = likeness_to(centres, points)
        chosen = within_capacity(likeness, capacity) if turn >= rounds - 5 else likeness.argmax(1)
        size = numpy.bincount(chosen, minlength=codes)
        centres = means(points, chosen, codes, 0.0)
        if turn < rounds - 5 and (size == 0).any():
            centres[size == 0] = points[rng.choice(len(points), int((size == 0).sum()), replace=False)]
    return chosen, centres


def all_different(groups, likeness):
    """A code for every row of likeness [items, codes], different codes for rows of the same group (any hashable): the best likeness in sum."""
    members, chosen = collections.defaultdict(list), numpy.empty(len(likeness), dtype=numpy.int64)
    for item, group in enumerate(groups):
        members[group].append(item)
    for name, group in members.items():
        if len(group) > likeness.shape[1]:
            raise SystemExit(f"{len(group)} items share the later codes {name}, and the first level has only {likeness.shape[1]} codes")
        row, code = scipy.optimize.linear_sum_assignment(likeness[group], maximize=True)
        chosen[numpy.array(group)[row]] = code
    return chosen


def semantic_ids(points, codes, slack, seed, rounds=8):
    """[[code per level]] for every item; all different."""
    rng = numpy.random.default_rng(seed)
    later = [cluster(points, count, slack, rng)[0] for count in codes[1:]]
    groups = list(zip(*(level.tolist() for level in later))) or [()] * len(points)
    first, centres = cluster(points, codes[0], slack, rng)
    for _ in range(rounds):
        first = all_different(groups, likeness_to(centres, points))
        centres = means(points, first, codes[0], centres)
    return [[int(code) for code in sid] for sid in zip(first, *later)]


def main():
    args = arguments()
    ids = [entry["item_id"] for entry in read_lines(os.path.join(args.data, "catalog.jsonl"))]
    number = {item: at for at, item in enumerate(ids)}
    stored = numpy.load(args.item_model)
    points = embed(stored["items"][0], stored["scores"][0], args.neighbours, args.dimensions, args.seed)
    sids = semantic_ids(points, args.codes, args.slack, args.seed)
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(dict(zip(ids, sids)), file)
        file.write("\n")
    used = [len(set(level)) for level in zip(*sids)]
    pairs = [pair for user in read_lines(os.path.join(args.data, "train.jsonl")) for pair in zip(user["items"], user["items"][1:])]
    same = [sum(sids[number[one]][level] == sids[number[other]][level] for one, other in pairs) / len(pairs) for level in range(len(used))]
    print(f"{len(ids):,} items; codes used per level {used}; consecutive training items that share a level's code "
          f"{' '.join(f'{100 * share:.1f} %' for share in same)}")


if __name__ == "__main__":
    main()
