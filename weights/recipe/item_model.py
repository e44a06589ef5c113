#!/usr/bin/env python3
"""A linear next-item model, fitted in closed form: the teacher of distill.py. Needs numpy and scipy, minutes, no gradient.

The score of item y after a history x_1 ... x_t is sum_j w_j B[x_j, y] with w_j = exp(-(t - j) / decay): recent items count
more. B is the ridge regression from such decayed histories (rows of S) to the items that came next (one-hot rows of T),

    B = (S'S + ridge I)^-1 S'T,

one row pair per next item of the training part. (The family: EASE, Steck 2019, for sets; SLIT, Choi et al. 2021, for sequences.)
With few observations an item, `ridge` matters more than anything else: it keeps the scores of pairs seen once small. It also makes
the scores on the training sequences, which the decoder learns from, behave like those on new ones, because no single example moves B much.

In:  train.jsonl and catalog.jsonl of prepare.py
Out: item_model.npz: the `--keep` largest entries of each row of B (`items` and `scores`, [items, keep]), and `decay_predict`.
     An item's number is its line in catalog.jsonl.

  python3 weights/recipe/item_model.py --data build/beauty --out build/beauty/item_model.npz
"""

import argparse
import json
import os
import time

import numpy
import scipy.linalg
import scipy.sparse

from tokens import read_lines

# An item further back than this has next to no weight.
REACH = 20


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder that prepare.py wrote")
    add("--out", required=True)
    add("--ridge", type=float, default=50.0, help="(default %(default)s)")
    add("--decay-fit", type=float, default=1.0, help="items over which weights fall by e when fitting (default %(default)s)")
    add("--decay-predict", type=float, default=2.0, help="the same when scoring (default %(default)s)")
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


def fit(sequences, items, ridge, decay):
    """B, dense [items, items] in float32."""
    histories, targets = examples(sequences)
    source = decayed(histories, items, decay)
    target = scipy.sparse.csr_matrix((numpy.ones(len(targets), dtype=numpy.float32), (range(len(targets)), targets)), shape=(len(targets), items))
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
        self.items, kept = columns.shape
        self.decay = float(stored["decay_predict"])
        self.matrix = scipy.sparse.csr_matrix((values.ravel(), columns.ravel(), numpy.arange(0, columns.size + 1, kept)), shape=(self.items, self.items))

    def best(self, histories, count, exclude_history=True):
        """Items and scores, [histories, count], best first. Missing entries (too few scored items) have score 0; only positive scores count.
        Items of the history are left out, unless asked for: in most data sets of this kind they hardly ever come again."""
        scores = (decayed(histories, self.items, self.decay) @ self.matrix).tocsr()
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


def main():
    args = arguments()
    start = time.time()
    number = {entry["item_id"]: at for at, entry in enumerate(read_lines(os.path.join(args.data, "catalog.jsonl")))}
    sequences = [[number[item] for item in user["items"]] for user in read_lines(os.path.join(args.data, "train.jsonl"))]
    items, scores = largest(fit(sequences, len(number), args.ridge, args.decay_fit), args.keep)
    numpy.savez(args.out, items=items.astype(numpy.int32), scores=scores.astype(numpy.float32), decay_predict=args.decay_predict)
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
