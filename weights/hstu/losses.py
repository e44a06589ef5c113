"""What training minimises: the cross-entropy of the next row, in three forms.

items, all      softmax over all items of cos(user, item) / temperature
items, sampled  the same over the target and some items drawn evenly, the same for all rows of a batch; a drawn item that is a row's target does
                not count against it
tokens          softmax over all rows of the head: what `full_vocab` scores are
"""

import torch
from torch.nn.functional import cross_entropy


def item_loss(model, states, targets, temperature, negatives=0):
    """states [rows, D], targets [rows] from 1 on; negatives 0 for all items."""
    vectors = model.items()
    if not negatives:
        return cross_entropy(states @ vectors.T / temperature, targets - 1)
    drawn = torch.randint(len(vectors), (negatives,))
    others = (states @ vectors[drawn].T).masked_fill(drawn[None] == (targets - 1)[:, None], -torch.inf)
    right = (states * vectors[targets - 1]).sum(-1, keepdim=True)
    return cross_entropy(torch.cat([right, others], 1) / temperature, torch.zeros_like(targets))


def token_loss(model, states, targets):
    return cross_entropy(model.token_logits(states), targets)
