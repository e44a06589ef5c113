"""Recall of a decoder over the whole catalog, by exact beam search: for validation while training, many users at once.

The search is the one a server runs: only prefixes of catalog items are ever expanded, and scores are sums of log-probabilities
(`full_vocab`, or `allowed_set`: renormalised over the continuations that exist). Beams are not copies of the history: each new
token is appended to the cache once, and a mask says which of the appended tokens are a beam's own ancestors.
Excluding the history happens at the last level here (the server does it inside the search, where it costs no beams), so a narrow
beam can come out a little lower than there.
"""

import torch

FORBIDDEN = -1e9


class Trie:
    """The catalog's semantic IDs. A node of depth d is a number; nodes of a depth are numbered in order of their paths."""

    def __init__(self, paths):
        """paths: one list of token ids per item."""
        self.levels = len(paths[0])
        order = sorted(range(len(paths)), key=lambda item: (tuple(paths[item]), item))
        self.token, self.children = [], []  # per level: [nodes] token of a node; [parents, most children] nodes, -1 where there is none
        above = {(): 0}
        for depth in range(1, self.levels + 1):
            nodes = {}
            for item in order:
                nodes.setdefault(tuple(paths[item][:depth]), len(nodes))
            children = [[] for _ in above]
            for path, node in nodes.items():
                children[above[path[:-1]]].append(node)
            width = max(map(len, children))
            self.token.append(torch.tensor([path[-1] for path in nodes]))
            self.children.append(torch.tensor([row + [-1] * (width - len(row)) for row in children]))
            above = nodes
        self.leaf = [above[tuple(path)] for path in paths]  # of each item
        self.items = [[] for _ in above]  # of each leaf, in catalog order
        for item, leaf in enumerate(self.leaf):
            self.items[leaf].append(item)


def children_of(trie, level, node, score, logits, normalization="full_vocab"):
    """Every beam's children in the trie and their scores, [users, beams, most children]; FORBIDDEN where there is none.

    `node`, `score`: of the beams, [users, beams]; `logits`: of the next token of each, [users, beams, vocabulary]."""
    children = trie.children[level][node]
    exists = (children >= 0) & (score > FORBIDDEN / 2)[..., None]
    chosen = logits.gather(2, trie.token[level][children.clamp(0)])
    if normalization == "allowed_set":
        step = chosen.masked_fill(~exists, FORBIDDEN).log_softmax(-1)
    else:
        step = chosen - logits.logsumexp(-1, keepdim=True)
    return children, (score[..., None] + step).masked_fill(~exists, FORBIDDEN)


def forbid(trie, histories, children, total):
    """Takes the leaves away whose items all stand in the history."""
    for user, history in enumerate(histories):
        seen = set(history)
        gone = [leaf for leaf in {trie.leaf[item] for item in seen} if seen.issuperset(trie.items[leaf])]
        total[user][torch.isin(children[user], torch.tensor(gone))] = FORBIDDEN


def keep(children, total, beam_width):
    """The best children of all beams: the beams they come from, their nodes and scores, each [users, beams]."""
    score, best = total.flatten(1).topk(min(beam_width, total[0].numel()), 1)
    return best // total.shape[2], children.flatten(1).gather(1, best).clamp(0), score


@torch.no_grad()
def search(model, trie, prefix, paths, histories, beam_width=50, normalization="full_vocab", exclude_history=False):
    """Leaves [users, beams] and their scores, best first. `prefix`: token ids before a history; `paths`: token ids of each item.
    Beams that do not exist have scores of FORBIDDEN or less."""
    from transformers import DynamicCache

    prompts = [prefix + [token for item in history for token in paths[item]] for history in histories]
    users, width = len(prompts), max(map(len, prompts))
    padding = torch.tensor([width - len(prompt) for prompt in prompts])
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    place = torch.arange(width)
    real = place[None] >= padding[:, None]
    # Padding is on the left. A padded row sees itself only, because a row that sees nothing has no softmax.
    mask = ((place[:, None] >= place[None])[None] & real[:, None]) | torch.eye(width, dtype=torch.bool)[None]
    cache = DynamicCache(config=model.config)
    positions = (place[None] - padding[:, None]).clamp(0)
    run = lambda ids, mask, positions: model.model(  # noqa: E731
        input_ids=ids, attention_mask=mask[:, None], position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
    hidden = run(ids, mask, positions)[:, -1:]
    node, score, visible = torch.zeros(users, 1, dtype=torch.long), torch.zeros(users, 1), real[:, None]
    for level in range(trie.levels):
        logits = model.lm_head(hidden)
        children, total = children_of(trie, level, node, score, logits, normalization)
        if exclude_history and level == trie.levels - 1:
            forbid(trie, histories, children, total)
        parent, node, score = keep(children, total, beam_width)
        if level < trie.levels - 1:
            beams = node.shape[1]
            own = torch.eye(beams, dtype=torch.bool)[None].expand(users, -1, -1)
            visible = torch.cat([visible.gather(1, parent[..., None].expand(-1, -1, visible.shape[2])), own], 2)
            hidden = run(trie.token[level][node], visible, (width - padding + level)[:, None].expand(users, beams))
    return node, score


def slate(trie, leaves, scores, excluded=(), cut=10):
    """The first items of the leaves that a user's beams ended in. Items that share a semantic ID stand in catalog order."""
    found = [item for leaf, score in zip(leaves, scores) if score > FORBIDDEN / 2 for item in trie.items[leaf] if item not in excluded]
    return found[:cut]


def recall(model, trie, prefix, paths, users, beam_width=50, normalization="full_vocab", exclude_history=False, max_items=50, cut=10,
           batch_tokens=6000, by=search):  # fmt: skip
    """Recall and NDCG at `cut` over users [(history, target)], items as numbers. `by`: the search of another kind of model."""
    was_training = model.training
    model.eval()
    users = sorted(users, key=lambda user: len(user[0]))
    at, hits, gain = 0, 0, 0.0
    while at < len(users):
        tokens = len(prefix) + trie.levels * min(max_items, len(users[at][0])) + (trie.levels - 1) * beam_width
        batch = users[at : at + max(8, batch_tokens // tokens)]
        at += len(batch)
        leaves, scores = by(model, trie, prefix, paths, [history[-max_items:] for history, _ in batch], beam_width, normalization, exclude_history)
        for row, score, (history, target) in zip(leaves.tolist(), scores.tolist(), batch):
            found = slate(trie, row[: 2 * cut], score, set(history) if exclude_history else (), cut)
            if target in found:
                hits += 1
                gain += 1 / float(torch.log2(torch.tensor(found.index(target) + 2.0)))
    model.train(was_training)
    return hits / len(users), gain / len(users)
