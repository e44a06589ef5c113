"""HSTU, the research variant, as a torch module: what is trained, and what the reference for decoding runs in double precision.

    x[i]  = (item[id_i] (+ action[a_i])) * sqrt(D) + position[i];  zero where id_i is padding
    u, v, q, k = split(silu(LN(x) W))                               LN without weights, W [D, 2 H dv + 2 H dqk]
    s     = q.k + pos_w[N-1 + j-i] + ts_w[bucket(t[i+1] - t[j])]    the bias is the same for all heads
    a     = sum over j <= i of silu(s) / N * v[j]                   no softmax; N is a constant of the checkpoint
    x     = (u * LN(a)) Wo^T + bo + x
    state = x / max(|x|, eps)

(Zhai et al. 2024, "Actions Speak Louder than Words", in the form of the public research code: see docs/HSTU.md.) Row i reads
the time of the event after it, which for the last row is the time of the query: the model knows when it is asked.

Parameters carry the names of the research repository, so `state_dict()` is what the server loads. All sizes come from
config.json. Users lie in a batch with padding on the right; rows see nothing to their right, so padding reaches no row that
counts. What must not be here: data, losses, files. """

import math

import torch
from torch.nn.functional import dropout, layer_norm, normalize, silu

from time_buckets import time_buckets


class Lookup(torch.autograd.Function):
    """table[index] for a short table and a very large index: the gradient is one weighted count, far cheaper than scattered
    additions."""

    @staticmethod
    def forward(context, table, index):
        context.save_for_backward(index)
        context.rows = len(table)
        return table[index]

    @staticmethod
    def backward(context, gradient):
        (index,) = context.saved_tensors
        return torch.bincount(index.flatten(), weights=gradient.flatten(), minlength=context.rows).to(gradient.dtype), None


class RelativeBias(torch.nn.Module):
    """Weights by distance in rows and by bucket of time."""

    def __init__(self, config):
        super().__init__()
        self.positions = config["positions"]
        self._ts_w = torch.nn.Parameter(torch.randn(config["time_buckets"] + 1) * 0.02)
        self._pos_w = torch.nn.Parameter(torch.randn(2 * self.positions - 1) * 0.02)

    def forward(self, buckets):
        """buckets [users, n, n] -> bias of the same shape; [i, j] belongs to row i looking at row j."""
        row = torch.arange(buckets.shape[1])
        # Columns to the right of a row are masked, whatever is read for them.
        distance = (self.positions - 1 + row[None, :] - row[:, None]).clamp(0, 2 * self.positions - 2)
        return Lookup.apply(self._pos_w, distance) + Lookup.apply(self._ts_w, buckets)


class Layer(torch.nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.stack = stack
        width, values, keys = stack["model_dim"], stack["heads"] * stack["value_dim"], stack["heads"] * stack["key_dim"]
        self.parts = [values, values, keys, keys]
        self._uvqk = torch.nn.Parameter(torch.randn(width, sum(self.parts)) * 0.02)
        self._o = torch.nn.Linear(values, width)
        torch.nn.init.xavier_uniform_(self._o.weight)
        torch.nn.init.zeros_(self._o.bias)
        if stack["relative_bias"]:
            self._rel_attn_bias = RelativeBias(stack["relative_bias"])

    def project(self, x):
        """u [users, n, H dv], and v, q, k [users, H, n, width of a head], of rows x [users, n, D]."""
        h = silu(layer_norm(x, x.shape[-1:], eps=self.stack["input_norm"]["eps"]) @ self._uvqk)
        u, *others = h.split(self.parts, -1)
        return u, *(part.unflatten(-1, (self.stack["heads"], -1)).transpose(1, 2) for part in others)

    def weigh(self, logits, seen):
        """Attention weights; `seen` is 1 where a row sees another."""
        return silu(logits) * (seen / self.stack["attention_divisor"])

    def finish(self, x, u, a, rate):
        """Rows after the layer, of the attention's output a [users, H, n, dv]; `rate` of dropout."""
        a = a.transpose(1, 2).flatten(2)
        y = u * layer_norm(a, a.shape[-1:], eps=self.stack["output_norm"]["eps"])
        return x + self._o(dropout(y, rate, self.training))

    def forward(self, x, buckets, seen, rate):
        """x [users, n, D]; `seen` [n, n] is 1 where row i sees row j."""
        u, v, q, k = self.project(x)
        logits = q @ k.transpose(2, 3)
        if self.stack["relative_bias"]:
            logits = logits + self._rel_attn_bias(buckets)[:, None]
        return self.finish(x, u, self.weigh(logits, seen) @ v, rate)


def container(**modules):
    """A module that only names others."""
    outer = torch.nn.Module()
    for name, module in modules.items():
        outer.add_module(name, module)
    return outer


def table(rows, width):
    embedding = torch.nn.Embedding(rows, width)
    torch.nn.init.trunc_normal_(embedding.weight, std=0.02, a=-0.04, b=0.04)
    return embedding


class Hstu(torch.nn.Module):
    """The model of a configuration; `dropout` acts while training only."""

    def __init__(self, config, dropout=0.0):
        super().__init__()
        check(config)
        self.config, self.dropout = config, dropout
        stack, entry, self.head = config["stack"], config["input"], config["output"]["head"]
        width = stack["model_dim"]
        embeddings = {"_item_emb": table(entry["num_items"] + 1, width)}
        if entry["actions"]:
            embeddings["_action_emb"] = table(entry["actions"]["count"], width)
        self._embedding_module = container(**embeddings)
        self._input_features_preproc = container(_pos_emb=table(entry["position"]["rows"], width))
        self._hstu = container(_attention_layers=torch.nn.ModuleList(Layer(stack) for _ in range(stack["layers"])))
        if self.head["kind"] == "tokens" and not self.head["tied"]:
            self._token_head = torch.nn.Linear(width, self.head["vocab_size"], bias=False)

    def rows(self, ids, actions=None):
        """Rows before the first layer, [users, n, D]."""
        entry = self.config["input"]
        if (actions is None) != (entry["actions"] is None):
            raise ValueError("actions must be given exactly if the model reads them")
        x = self._embedding_module._item_emb(ids)
        if actions is not None:
            x = x + self._embedding_module._action_emb(actions)
        x = x * math.sqrt(self.config["stack"]["model_dim"]) + self._input_features_preproc._pos_emb.weight[: ids.shape[1]]
        return dropout(x, self.dropout, self.training) * (ids != entry["padding_id"])[..., None]

    def forward(self, ids, times, actions=None):
        """Normalised states [users, n, D] of ids [users, n] and, if the model reads them, actions [users, n]. `times` [users, n
        + 1] in seconds: those of the rows, then that of the query."""
        x, buckets, seen = self.rows(ids, actions), self.buckets(times), self.seen(ids.shape[1])
        for layer in self._hstu._attention_layers:
            x = layer(x, buckets, seen, self.dropout)
        return self.normalized(x)

    def buckets(self, times):
        """Time buckets [users, n, n] of times [users, n + 1], or None: row i reads the time of row i + 1."""
        bias = self.config["stack"]["relative_bias"]
        return time_buckets(times[:, 1:, None] - times[:, None, :-1], bias["time_buckets"]) if bias else None

    def seen(self, rows):
        return torch.ones(rows, rows, dtype=self._input_features_preproc._pos_emb.weight.dtype).tril()

    def normalized(self, x):
        return normalize(x, dim=-1, eps=self.config["output"]["normalization"]["eps"])

    def items(self):
        """Unit vectors of all items, [num_items, D], from row 1 on: what states of an item head are compared with."""
        return normalize(self._embedding_module._item_emb.weight[1:], dim=-1, eps=self.head["eps"])

    def token_logits(self, states):
        """[.., vocab_size] of states [.., D] of a token head."""
        rows = (
            self._embedding_module._item_emb.weight[: self.head["vocab_size"]] if self.head["tied"] else self._token_head.weight
        )
        return states @ rows.T * self.head["logit_scale"]


def check(config):
    """Refuses what this module does not compute."""
    stack, entry, output = config["stack"], config["input"], config["output"]
    found = {
        "hstu_variant": config["hstu_variant"],
        "stack.silu": stack["silu"],
        "stack.logit_scale": stack["logit_scale"],
        "stack.output_parts": stack["output_parts"],
        "stack.residual": stack["residual"],
        "stack.mask": sum(stack["mask"].values()),
        "input.position.scale": entry["position"]["scale"],
        "input.actions.combine": entry["actions"]["combine"] if entry["actions"] else "add",
        "output.normalization.kind": output["normalization"]["kind"],
    }
    known = {
        "hstu_variant": "research", "stack.silu": "uvqk", "stack.logit_scale": 1.0, "stack.output_parts": "gated", "stack.residual": True,
        "stack.mask": 0, "input.position.scale": "sqrt_model_dim", "input.actions.combine": "add", "output.normalization.kind": "l2",
    }  # fmt: skip
    for name, value in found.items():
        if value != known[name]:
            raise ValueError(f"{name} is {value!r}, this module computes {known[name]!r}")
