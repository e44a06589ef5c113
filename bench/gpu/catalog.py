"""A random catalog, and the trie over its semantic IDs as arrays: what both baselines are constrained by.

Nodes of a depth are numbered in the order of their paths, so the children of a node are a range of the next depth (CSR).
Depth 0 is the root alone, depth `levels` are the leaves. Several items may share a leaf (a collision).
Symbols are token ids. Made with numpy; `on` moves the arrays to a device.
"""
from dataclasses import dataclass

import numpy as np
import torch


def random_codes(items, levels, codebook, seed=0):
    """[items, levels] codes, uniform. Collisions happen as often as chance has it."""
    return np.random.default_rng(seed).integers(0, codebook, size=(items, levels), dtype=np.int64)


@dataclass
class Trie:
    """Lists run over depths. `first[d]`: [nodes of depth d + 1] where the children of each node begin, and the end.
    `token[d]`: [nodes of depth d + 1] the last token of each. `widest[d]`: most children of a node of depth d."""

    first: list
    token: list
    widest: list
    leaf: object  # [items] of each item
    vocabulary: int

    @property
    def levels(self):
        return len(self.first)

    def nodes(self, depth):
        return 1 if depth == 0 else len(self.token[depth - 1])

    def on(self, device):
        """The same with tensors on the device: 64-bit, because that is what indexing takes without a conversion."""
        move = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
        return Trie([move(a) for a in self.first], [move(a) for a in self.token], self.widest, self.leaf, self.vocabulary)

    def bytes(self):
        return sum(8 * len(array) for array in self.first + self.token)

    def keys(self, depth):
        """parent * vocabulary + token of every node of depth + 1: ascending, so a child is found by bisection."""
        parents = np.repeat(np.arange(self.nodes(depth)), np.diff(self.first[depth]))
        return parents * self.vocabulary + self.token[depth]

    def leaves_of(self, paths):
        """[n, levels] tokens -> [n] leaves, -1 for a path that is not in the catalog."""
        node = np.zeros(len(paths), dtype=np.int64)
        for depth in range(self.levels):
            keys, wanted = self.keys(depth), node * self.vocabulary + paths[:, depth]
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            node = np.where((node >= 0) & (keys[place] == wanted), place, -1)
        return node

    def paths(self):
        """[leaves, levels] tokens of every leaf."""
        columns, node = [], np.arange(self.nodes(self.levels))
        for depth in reversed(range(self.levels)):
            columns.append(self.token[depth][node])
            node = np.searchsorted(self.first[depth], node, side="right") - 1
        return np.stack(columns[::-1], axis=1)


def build_trie(codes, shape):
    """The trie over [items, levels] codes; tokens as the shape spells them."""
    if codes.shape[1] != shape.levels or shape.codebook**shape.levels >= 2**62:
        raise ValueError("codes do not fit the shape, or are too long to be packed into 64 bits")
    packed = np.zeros(len(codes), dtype=np.int64)
    for level in range(shape.levels):
        packed = packed * shape.codebook + codes[:, level]
    leaves, leaf = np.unique(packed, return_inverse=True)
    depths = [leaves]
    for _ in range(shape.levels):
        above = depths[0] // shape.codebook
        depths.insert(0, above[np.concatenate(([True], above[1:] != above[:-1]))])
    first, token = [], []
    for level in range(shape.levels):
        parents = depths[level + 1] // shape.codebook
        first.append(np.append(np.searchsorted(parents, depths[level]), len(parents)))
        token.append(depths[level + 1] % shape.codebook + shape.first_token(level))
    widest = [int(np.diff(starts).max()) for starts in first]
    return Trie(first, token, widest, leaf.reshape(-1), shape.vocabulary)
