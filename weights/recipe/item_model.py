#!/usr/bin/env python3
"""A linear next-item model, fitted in closed form: the teacher of distill.py. Needs numpy and scipy, minutes, no gradient.

The score of item y after a history x_1 ... x_t is a weighted sum over components, each of them

    sum_j w_j B[x_j, y]    with w_j = exp(-(t - j) / decay_predict): recent items count more,

where B is the ridge regression from decayed histories (rows of S, the same w with decay_fit) to what came next (rows of T),

    B = (S'S + ridge I)^-1 S'T,

one row pair per next item of the training part. (The family: EASE, Steck 2019, for sets; SLIT, Choi et al. 2021, for sequences.)
Two components: one predicts exactly the next item from mostly the last one, the other all items to come (weights exp(-(k - t) /
decay_future)) from more of the history. The first has the better NDCG, the second adds recall.

With few observations an item, `ridge` matters more than anything else: it keeps the scores of pairs seen once small. It also makes
the scores on the training sequences, which the decoder learns from, behave like those on new ones, because no single example moves B much.

In:  train.jsonl and catalog.jsonl of prepare.py
Out: item_model.npz: per component the `--keep` largest entries of each row of B (`items` and `scores`, [components, items, keep]),
     `decay_predict` and `weight` ([components]). An item's number is its line in catalog.jsonl.

  python3 weights/recipe/item_model.py --data build/beauty --out build/beauty/item_model.npz

Memory: three dense [items, items] matrices of float32 (1.8 GB for 12,000 items); time grows with the cube.
"""

import argparse
import os
import time

import numpy
import scipy.linalg
import scipy.sparse

from tokens import read_lines

# An item further back, or further ahead, than this has next to no weight.
REACH = 20
AHEAD = 10


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder that prepare.py wrote")
    add("--out", required=True)
    add("--ridge", type=float, default=50.0, help="(default %(default)s)")
    add("--next", type=float, nargs=3, default=[1.0, 2.0, 1.0], metavar=("FIT", "PREDICT", "WEIGHT"),
        help="first component: decays in items, and its weight (default %(default)s)")
    add("--later", type=float, nargs=4, default=[2.0, 3.0, 3.0, 0.3], metavar=("FIT", "FUTURE", "PREDICT", "WEIGHT"),
        help="second component; weight 0 leaves it out (default %(default)s)")
    add("--keep", type=int, default=400, help="entries kept per item (default %(default)s)")
    return parser.parse_args()


def decayed(histories, items, decay):
    """Sparse [histories, items]: the weights w_j of each history's last items. An item that occurs twice counts twice."""
    rows, columns, weights = [], [], []
    fall = [float(numpy.exp(-back / decay)) for back in range(REACH)]
    for number, history in enumerate(histories):
        for back, item in enumerate(reversed(history[-REACH:])):
            rows.append(number)
            columns.append(item)
            weights.append(fall[back])
    return scipy.sparse.csr_matrix((numpy.array(weights, dtype=numpy.float32), (rows, columns)), shape=(len(histories), items))


def examples(sequences):
    """All (history, next item) of the sequences, in their order."""
    histories, targets = [], []
    for items in sequences:
        for at in range(1, len(items)):
            histories.append(items[max(0, at - REACH) : at])
            targets.append(items[at])
    return histories, targets


def to_come(sequences, items, decay):
    """Sparse [next items, items], in the order of `examples`: what came next (decay 0), or all that came later, decayed."""
    rows, columns, weights, number = [], [], [], 0
    for sequence in sequences:
        for at in range(1, len(sequence)):
            for ahead, item in enumerate(sequence[at : at + AHEAD] if decay else sequence[at : at + 1]):
                rows.append(number)
                columns.append(item)
                weights.append(numpy.exp(-ahead / decay) if decay else 1.0)
            number += 1
    return scipy.sparse.csr_matrix((numpy.array(weights, dtype=numpy.float32), (rows, columns)), shape=(number, items))


def fit(sequences, items, ridge, decay, decay_future=0.0):
    """B, dense [items, items] in float32."""
    source = decayed(examples(sequences)[0], items, decay)
    target = to_come(sequences, items, decay_future)
    gram = (source.T @ source).toarray()
    gram[numpy.diag_indices(items)] += ridge
    right = (source.T @ target).toarray()
    factor = scipy.linalg.cho_factor(gram, overwrite_a=True, check_finite=False)
    return scipy.linalg.cho_solve(factor, right, overwrite_b=True, check_finite=False)


def largest(dense, keep):
    """The `keep` largest entries of each row: columns and values, [rows, keep], largest first."""
    keep = min(keep, dense.shape[1])
    columns = numpy.argpartition(dense, -keep, axis=1)[:, -keep:]
    values = numpy.take_along_axis(dense, columns, axis=1)
    order = numpy.argsort(-values, axis=1, kind="stable")
    return numpy.take_along_axis(columns, order, axis=1), numpy.take_along_axis(values, order, axis=1)


class ItemModel:
    """Scores next items from the kept entries of B."""

    def __init__(self, path):
        stored = numpy.load(path)
        columns, values = stored["items"], stored["scores"].astype(numpy.float32)
        components, self.items, kept = columns.shape
        self.decays, self.matrices = stored["decay_predict"].tolist(), []
        rows = numpy.arange(0, self.items * kept + 1, kept)
        for part in range(components):
            weighted = values[part].ravel() * stored["weight"][part]
            self.matrices.append(scipy.sparse.csr_matrix((weighted, columns[part].ravel(), rows), shape=(self.items, self.items)))

    def best(self, histories, count, exclude_history=True):
        """Items and scores, [histories, count], best first. Missing entries (too few scored items) have score 0; only positive scores count.
        Items of the history are left out, unless asked for: in most data sets of this kind they hardly ever come again."""
        scores = sum(decayed(histories, self.items, decay) @ matrix for decay, matrix in zip(self.decays, self.matrices)).tocsr()
        found, value = numpy.zeros((len(histories), count), dtype=numpy.int32), numpy.zeros((len(histories), count), dtype=numpy.float32)
        for number, history in enumerate(histories):
            part = slice(scores.indptr[number], scores.indptr[number + 1])
            items, row = scores.indices[part], scores.data[part]
            use = row > 0
            if exclude_history:
                use &= ~numpy.isin(items, history)
            items, row = items[use], row[use]
            if len(row) > count:
                top = numpy.argpartition(row, -count)[-count:]
                items, row = items[top], row[top]
            order = numpy.lexsort((items, -row))
            found[number, : len(row)], value[number, : len(row)] = items[order], row[order]
        return found, value


def save(path, items, scores, decay_predict, weight):
    numpy.savez(path, items=items.astype(numpy.int32), scores=scores.astype(numpy.float32), decay_predict=decay_predict, weight=weight)


def main():
    args = arguments()
    start = time.time()
    number = {entry["item_id"]: at for at, entry in enumerate(read_lines(os.path.join(args.data, "catalog.jsonl")))}
    sequences = [[number[item] for item in user["items"]] for user in read_lines(os.path.join(args.data, "train.jsonl"))]
    components = [(args.next[0], 0.0, *args.next[1:]), tuple(args.later)]
    kept = []
    for decay, future, predict, weight in components:
        if weight:
            kept.append((*largest(fit(sequences, len(number), args.ridge, decay, future), args.keep), predict, weight))
    items, scores, predict, weight = (numpy.array(column) for column in zip(*kept))
    save(args.out, items, scores, predict, weight)
    print(f"fitted in {time.time() - start:.0f} s -> {args.out}", flush=True)

    model = ItemModel(args.out)
    validation = read_lines(os.path.join(args.data, "validation.jsonl"))
    target = numpy.array([number[user["target"]] for user in validation])
    histories = [[number[item] for item in user["history"]] for user in validation]
    for exclude in (False, True):
        found, value = model.best(histories, 10, exclude)
        user, place = numpy.nonzero((found == target[:, None]) & (value > 0))
        gain = (1 / numpy.log2(place + 2)).sum() / len(target)
        print(f"validation, history {'excluded' if exclude else 'not excluded'}: recall@10 {len(user) / len(target):.4f}  NDCG@10 {gain:.4f}", flush=True)


if __name__ == "__main__":
    main()
