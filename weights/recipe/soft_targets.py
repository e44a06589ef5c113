"""An item-level distribution as targets for the codes of a semantic ID.

A teacher says q(item) for what comes next; a decoder predicts codes, one after another. The chain rule connects the two:

    q(c_1) = sum of q over the items whose first code is c_1
    q(c_l | c_1 .. c_{l-1}) = the same over the items that begin with c_1 .. c_{l-1}, divided by the mass of that prefix

and the cross-entropy between q and the decoder's distribution over whole semantic IDs is

    H(q, p) = sum over l of  E_{path ~ q} [ H( q(. | prefix), p(. | prefix) ) ].

So drawing one path from q, and using the full conditional distribution at each of its levels, gives an unbiased estimate of the whole
at the cost of one path (`conditionals`). The first level needs no draw.

Nothing is ever written as dense vectors over codes: items with the same code are entries with the same token, and their weights add up
in the loss by themselves. Shapes: P positions, K candidate items each, L levels.
"""

import torch


def conditionals(tokens, probabilities, path):
    """Weights of the candidates at each level, given the prefix of `path` before that level.

    tokens [P, K, L] token of each candidate at each level, probabilities [P, K] (need not sum to 1), path [P, L].
    Returns [P, L, K]: at level l, zero for candidates that do not begin with the path's first l tokens; the rest sum to 1. Where no
    candidate begins that way all are zero: such a level teaches nothing.
    """
    weights, levels = probabilities, []
    for level in range(tokens.shape[2]):
        total = weights.sum(1, keepdim=True)
        levels.append(weights / total.clamp_min(1e-20))
        weights = weights * (tokens[:, :, level] == path[:, None, level])
    return torch.stack(levels, 1)


def soft_cross_entropy(log_probabilities, tokens, weights):
    """Cross-entropy per position and level, [P, L], from log_probabilities [P, L, V], tokens [P, K, L] and weights [P, L, K]."""
    return -(log_probabilities.gather(2, tokens.transpose(1, 2)) * weights).sum(2)


def draw(probabilities, generator=None):
    """One candidate per position, [P], with probability proportional to its entry."""
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
