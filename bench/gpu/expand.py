"""Exact constrained top-k on the device: one level of a beam search over the trie.

Every beam is met with all its children, padded to the most children that any node of its depth has (never more than a
codebook), and the best of all of a user's candidates survive. Sizes do not depend on values, so it can be captured in
a CUDA graph. A beam that does not exist has the score -inf; its node and parent are then meaningless but in range.
"""
import torch
import torch.nn.functional as F


def children(trie, depth, node):
    """node [...] -> (child [..., widest], exists [..., widest]); where none exists, `child` is some node in range."""
    begin = trie.first[depth][node]
    offsets = torch.arange(trie.widest[depth], device=node.device)
    exists = offsets < (trie.first[depth][node + 1] - begin)[..., None]
    child = (begin[..., None] + offsets).clamp_(max=len(trie.token[depth]) - 1)
    return child, exists


def best(score, step, child, exists, beams):
    """The best `beams` candidates of every user, best first.

    score [users, n] of the beams so far; step, child, exists [users, n, width]: log-probability of each child.
    Returns score, parent (0..n), node, each [users, beams].
    """
    users, n, width = child.shape
    total = (score[..., None] + step).masked_fill(~exists, float("-inf")).flatten(1)
    if total.shape[1] < beams:
        total = F.pad(total, (0, beams - total.shape[1]), value=float("-inf"))
    score, place = total.topk(beams, dim=1)
    # Padding lies behind the real candidates.
    place = place.clamp(max=n * width - 1)
    return score, place // width, child.flatten(1).gather(1, place)


def scored_tokens(logits, tokens):
    """Log-probabilities [rows, n] of tokens [rows, n] over the whole vocabulary, in float32.

    The fused kernel of log_softmax reads bf16 and accumulates in float32, but writes all of it.
    """
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(1, tokens)


def scored_tokens_reduced(logits, tokens):
    """The same for a compiler that fuses: reads the logits, and writes what is asked for only."""
    total = torch.logsumexp(logits.float(), -1, keepdim=True)
    return logits.gather(1, tokens).float() - total


def expand(trie, depth, hidden, head, score, node, beams, rows_at_once, scorer=scored_tokens):
    """One level. hidden [users, n, width] of the beams, head [vocabulary, width]; n is 1 at depth 0.

    Logits are made for at most `rows_at_once` beams at a time, because all of them can be larger than the model.
    Returns score, parent, node, token, each [users, beams].
    """
    users, n, _ = hidden.shape
    child, exists = children(trie, depth, node)
    tokens = trie.token[depth][child].flatten(0, 1)
    rows = hidden.flatten(0, 1)
    parts = [
        scorer(F.linear(rows[at : at + rows_at_once], head), tokens[at : at + rows_at_once])
        for at in range(0, users * n, rows_at_once)
    ]
    step = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(users, n, -1)
    score, parent, node = best(score, step, child, exists, beams)
    return score, parent, node, trie.token[depth][node]
