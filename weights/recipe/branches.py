"""Histories with a branch after every item: the layout that lets one pass train on any next item at every place of a history.

    stream  <|bos|> a1 a2 .. aL  b1 b2 .. bL  c1 ..        the history, as a server will see it
    branch after item 1:        x1 x2 .. xL-1              an item that could have come next; in the stream b did

A branch token sees the stream up to its item and the earlier tokens of its own branch, nothing else, and has the position the item that
really came next has. So its outputs are exactly those of a history that ended there and went on with the other item, and n branches cost
n (L - 1) tokens where separate examples would cost n histories. The last item has a branch too: what comes after the whole history.
Shapes: T items, L levels; the stream has 1 + T L tokens, the branches T (L - 1).
"""

import torch


def layout(items, levels):
    """Attention mask (bool [N, N], True = may look) and positions ([N]) of a stream of `items` items and its branches, in that order."""
    stream = torch.arange(1 + items * levels)
    branch_item = torch.arange(items).repeat_interleave(levels - 1)
    branch_level = torch.arange(levels - 1).repeat(items)
    start = 1 + (branch_item + 1) * levels
    size, rest = len(stream), len(branch_item)
    mask = torch.zeros(size + rest, size + rest, dtype=torch.bool)
    mask[:size, :size] = stream[:, None] >= stream[None]
    mask[size:, :size] = stream[None] < start[:, None]
    mask[size:, size:] = (branch_item[:, None] == branch_item[None]) & (branch_level[:, None] >= branch_level[None])
    return mask, torch.cat([stream, start + branch_level])
