"""Beam search over semantic IDs that computes a history once: the same answers as `reference.py`, fast enough to evaluate with.

A token generated at step d = 0, 1, .. after n context rows is row n + d: at position n + d, with the generated action and the
time of the query. It sees all context rows, the tokens of its own beam before it, and itself. So context rows never change, and
their keys and values are kept. """

import math

import torch


class Trie:
    """Which tokens may follow a prefix."""

    def __init__(self, paths):
        self.following = {}
        for path in paths:
            for depth, token in enumerate(path):
                self.following.setdefault(path[:depth], set()).add(token)
        self.following = {prefix: sorted(tokens) for prefix, tokens in self.following.items()}


class Context:
    """Keys and values of a history, and of the tokens generated after it."""

    def __init__(self, model, ids, times, actions):
        """ids [n], times [n + 1] (the last is the time of the query), actions [n]: lists, of one user."""
        self.model, self.entry = model, model.config["input"]
        self.rows, self.query_time = len(ids), times[-1]
        moments = torch.tensor([times])
        x = model.rows(torch.tensor([ids]), torch.tensor([actions]) if self.entry["actions"] else None)
        buckets, seen = model.buckets(moments), model.seen(self.rows)
        self.keys_and_values = []
        for layer in model._hstu._attention_layers:
            _, v, _, k = layer.project(x)
            self.keys_and_values.append([(k[0], v[0])])
            x = layer(x, buckets, seen, 0.0)
        self.state = model.normalized(x)[0, -1:]
        # How far the query lies behind each context row; between generated tokens lies no time.
        self.ages = (
            model.buckets(torch.cat([moments[:, :-1], moments[:, -1:].expand(1, 2)], 1))[0, -1, :-1]
            if buckets is not None
            else None
        )

    def generate(self, tokens, parents):
        """States [beams, D] after one more token per beam; `parents`: the place of each beam's predecessor in the call before."""
        model, depth = self.model, len(self.keys_and_values[0]) - 1
        x = model._embedding_module._item_emb(torch.tensor(tokens))
        if self.entry["actions"]:
            x = x + model._embedding_module._action_emb.weight[self.entry["actions"]["generated"]]
        position = self.rows + depth
        x = (x * math.sqrt(x.shape[-1]) + model._input_features_preproc._pos_emb.weight[position])[:, None]
        for layer, stored in zip(model._hstu._attention_layers, self.keys_and_values):
            u, v, q, k = layer.project(x)  # a beam is a "user" of one row
            stored[1:] = [(keys[parents], values[parents]) for keys, values in stored[1:]] + [(k, v)]
            context_k, context_v = stored[0]
            own_k, own_v = (torch.cat([pair[which] for pair in stored[1:]], 2) for which in (0, 1))
            to_context = torch.einsum("bhid,hjd->bhj", q, context_k)
            to_own = torch.einsum("bhid,bhjd->bhj", q, own_k)
            if layer.stack["relative_bias"]:
                bias, at = layer._rel_attn_bias, layer._rel_attn_bias.positions - 1 - position
                to_context = to_context + bias._pos_w[at : at + self.rows] + bias._ts_w[self.ages]
                to_own = to_own + bias._pos_w[at + self.rows : at + position + 1] + bias._ts_w[0]
            a = torch.einsum("bhj,hjd->bhd", layer.weigh(to_context, 1.0), context_v) + torch.einsum(
                "bhj,bhjd->bhd", layer.weigh(to_own, 1.0), own_v
            )
            x = layer.finish(x, u, a[:, :, None], 0.0)
        return model.normalized(x)[:, 0]


@torch.no_grad()
def search(context, trie, levels, width, normalization="full_vocab"):
    """[(path, score)], best first, at most `width`: see `reference.py` for what is searched."""
    beams, states = [((), 0.0)], context.state
    for level in range(levels):
        rows, expanded = context.model.token_logits(states).double(), []
        norms = torch.logsumexp(rows, -1).tolist()
        for place, ((path, score), row) in enumerate(zip(beams, rows)):
            following = trie.following.get(path, [])
            chosen = row[following]
            norm = norms[place] if normalization == "full_vocab" else float(torch.logsumexp(chosen, -1))
            expanded += [(path + (token,), score + logit - norm, place) for token, logit in zip(following, chosen.tolist())]
        expanded.sort(key=lambda beam: (-beam[1], beam[0]))
        kept = expanded[:width]
        beams = [(path, score) for path, score, _ in kept]
        if level < levels - 1 and kept:
            states = context.generate([path[-1] for path, _, _ in kept], [place for _, _, place in kept])
    return beams
