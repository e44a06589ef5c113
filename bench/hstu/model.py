"""The same models in PyTorch, as well as they could be written."""
import contextlib
import math
import signal

import torch
import torch.nn.functional as F

from shapes import HEAD, HEADS, LAYERS, LONGEST, POSITIONS, SIZES, TOP, VALUES, WIDTH, say
from users import User


def between_biased(scores, position, time_weights, buckets):
    """What stands between the two products of attention with relative bias, to be fused."""
    return F.silu(scores + position + time_weights[buckets])


def between(scores, scale):
    return F.silu(scores * scale)


class Torch:
    """A stack of layers, and what both variants have in common."""

    BLOCK = 256

    def __init__(self, variant, weights):
        self.research = variant == "research"
        self.eps = 1e-6 if self.research else 1e-5
        self.scale = 1.0 if self.research else 1 / math.sqrt(HEAD)
        self.divisor = SIZES.divisor(variant)
        self.fused = None
        rows = LONGEST if self.research else 2 * LONGEST
        self.layers = []
        for layer in range(LAYERS):
            if self.research:
                prefix = f"_hstu._attention_layers.{layer}."
                position = weights[f"{prefix}_rel_attn_bias._pos_w"]
                # [i, j] -> position[N - 1 + j - i], the same for every request.
                difference = torch.arange(LONGEST)[None, :] - torch.arange(LONGEST)[:, None] + POSITIONS - 1
                self.layers.append({
                    "norm": (None, None), "uvqk": weights[f"{prefix}_uvqk"].t().contiguous(), "uvqk_bias": None,
                    "output_norm": (None, None), "output": weights[f"{prefix}_o.weight"],
                    "output_bias": weights[f"{prefix}_o.bias"], "position": position[difference],
                    "time": weights[f"{prefix}_rel_attn_bias._ts_w"],
                })
                continue
            prefix = f"_hstu_block._attention_layers.{layer}."
            norm = {part: (weights[f"{prefix}_{part}_layernorm_weight"], weights[f"{prefix}_{part}_layernorm_bias"])
                    for part in ("input", "output")}
            self.layers.append({
                "norm": norm["input"], "uvqk": weights[f"{prefix}_linear_uvqk_weight"].t().contiguous(),
                "uvqk_bias": weights[f"{prefix}_linear_uvqk_bias"], "output_norm": norm["output"],
                "output": weights[f"{prefix}_linear_proj_weight"].t().contiguous(), "output_bias": None,
            })
        # Keys and values of the one user that is remembered.
        self.keys = torch.zeros(LAYERS, HEADS, rows + 1, HEAD)
        self.values = torch.zeros(LAYERS, HEADS, rows + 1, HEAD)
        if self.research:
            table = weights["_embedding_module._item_emb.weight"]
            self.items, self.positions = table, weights["_input_features_preproc._pos_emb.weight"]
            self.unit = F.normalize(table, eps=1e-6)
            self.mask = torch.ones(LONGEST, LONGEST).tril_()
        else:
            tables = "_embedding_collection._data_parallel_embedding_collection.embeddings."
            self.items, self.actions = weights[f"{tables}item.weight"], weights[f"{tables}action.weight"]
            self.positions = weights["_hstu_block._preprocessor._positional_encoder._position_embeddings_weight"]
            self.head = [(weights[f"_mlp._mlp.{i}.weight"], weights[f"_mlp._mlp.{i}.bias"]) for i in (0, 2)]
            self.masks = {}

    def compile(self):
        """Fuses what stands between the products of attention."""
        self.fused = torch.compile(between_biased if self.research else between, dynamic=True)

    def heads(self, rows):
        return rows.view(-1, HEADS, HEAD).transpose(0, 1)

    def project(self, layer, x):
        h = F.layer_norm(x, (WIDTH,), *layer["norm"], eps=self.eps)
        return F.silu(F.linear(h, layer["uvqk"], layer["uvqk_bias"]), inplace=True).split(VALUES, dim=1)

    def leave(self, layer, x, u, attended):
        attended = attended.transpose(0, 1).reshape(-1, VALUES) / self.divisor
        gated = F.layer_norm(attended, (VALUES,), *layer["output_norm"], eps=self.eps).mul_(u)
        return F.linear(gated, layer["output"], layer["output_bias"]).add_(x)

    def weigh(self, layer, q, k, rows, buckets):
        """silu of logits; q are rows of the context, k are keys from the first on."""
        keys = k.transpose(1, 2)
        if not self.research:
            if self.fused:
                return self.fused(torch.bmm(q, keys), self.scale)
            shape = (HEADS, q.shape[1], k.shape[1])
            return F.silu(torch.baddbmm(q.new_empty(()).expand(shape), q, keys, beta=0, alpha=self.scale), inplace=True)
        position = layer["position"][rows, : k.shape[1]]
        if self.fused:
            return self.fused(torch.bmm(q, keys), position, layer["time"], buckets)
        return F.silu(torch.bmm(q, keys).add_(position + layer["time"][buckets]), inplace=True)

    def causal(self, layer, q, k, v, first, buckets):
        """Attention of rows from `first` on, in blocks that stop at the diagonal."""
        count = q.shape[1]
        out = q.new_empty(HEADS, count, HEAD)
        for start in range(0, count, self.BLOCK):
            end = min(start + self.BLOCK, count)
            past = first + start
            near = None if buckets is None else buckets[start:end, : first + end]
            weights = self.weigh(layer, q[:, start:end], k[:, : first + end], slice(past, first + end), near)
            weights[:, :, past:].tril_()
            torch.bmm(weights, v[:, : first + end], out=out[:, start:end])
        return out

    def buckets(self, times, first):
        """Buckets of time differences, the same in every layer."""
        difference = (times[first + 1 :, None] - times[None, :-1]).abs_().clamp_(min=1)
        return (difference.float().log_() / 0.301).long().clamp_(0, 128)

    # Retrieval.

    def retrieve(self, items, times, way, first=0):
        """Scores and items of a history; rows before `first` are remembered."""
        count = len(items)
        x = self.items[items[first:]] * math.sqrt(WIDTH) + self.positions[first:count]
        buckets = self.buckets(times, first)
        for index, layer in enumerate(self.layers):
            u, v, q, k = self.project(layer, x)
            if way == "plain":
                weights = self.weigh(layer, self.heads(q), self.heads(k), slice(0, count), buckets)
                x = self.leave(layer, x, u, torch.bmm(weights.mul_(self.mask[:count, :count]), self.heads(v)))
                continue
            keys, values = self.keys[index], self.values[index]
            keys[:, first:count], values[:, first:count] = self.heads(k), self.heads(v)
            at, near = first, buckets
            if index + 1 == LAYERS:
                at, x, u, q, near = count - 1, x[-1:], u[-1:], q[-1:], buckets[-1:]
            x = self.leave(layer, x, u, self.causal(layer, self.heads(q), keys, values, at, near))
        user = F.normalize(x[-1], dim=0, eps=1e-6)
        scores = self.unit[1:] @ user
        best = torch.topk(scores, TOP)
        return best.values, best.indices + 1

    # Ranking.

    def interleaved(self, items, actions, first):
        x = torch.stack((self.items[items[first // 2 :]], self.actions[actions[first // 2 :]]), dim=1)
        return x.view(-1, WIDTH) * math.sqrt(WIDTH) + self.positions[first : 2 * len(items)]

    def predict(self, x):
        x = F.normalize(x, eps=1e-6)
        (first, first_bias), (second, second_bias) = self.head
        return F.linear(F.relu(F.linear(x, first, first_bias), inplace=True), second, second_bias).sigmoid_()

    def target_mask(self, history, candidates):
        if (history, candidates) not in self.masks:
            mask = torch.ones(history + candidates, history + candidates).tril_()
            mask[history:, history:] = torch.eye(candidates)
            self.masks = {(history, candidates): mask}
        return self.masks[history, candidates]

    def rank(self, items, actions, candidates, way, first=0):
        """Predictions of candidates; rows of the history before `first` are remembered."""
        count = 2 * len(items)
        targets = self.items[candidates] * math.sqrt(WIDTH) + self.positions[min(count, 2 * LONGEST)]
        x = torch.cat((self.interleaved(items, actions, first), targets))
        fresh = count - first
        for index, layer in enumerate(self.layers):
            u, v, q, k = self.project(layer, x)
            q, k, v = self.heads(q), self.heads(k), self.heads(v)
            if way == "plain":
                weights = self.weigh(layer, q, k, None, None).mul_(self.target_mask(count, len(candidates)))
                x = self.leave(layer, x, u, torch.bmm(weights, v))
                del weights
                continue
            keys, values = self.keys[index], self.values[index]
            keys[:, first:count], values[:, first:count] = k[:, :fresh], v[:, :fresh]
            last = index + 1 == LAYERS
            parts = [] if last else [self.causal(layer, q[:, :fresh], keys, values, first, None)]
            own = F.silu((q[:, fresh:] * k[:, fresh:]).sum(-1, keepdim=True) * self.scale) * v[:, fresh:]
            for start in range(0, len(candidates), self.BLOCK):
                part = slice(start, start + self.BLOCK)
                weights = self.weigh(layer, q[:, fresh:][:, part], keys[:, :count], None, None)
                parts.append(torch.baddbmm(own[:, part], weights, values[:, :count]))
            if last:
                x, u = x[fresh:], u[fresh:]
            x = self.leave(layer, x, u, torch.cat(parts, dim=1))
        return self.predict(x[-len(candidates) :])


@contextlib.contextmanager
def limit(seconds):
    def over(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def compiled(variant, weights, results):
    """A model that compiles what it fuses, or none where that does not work within a minute."""
    model = Torch(variant, weights)
    try:
        with limit(60):
            model.compile()
            user = User(0, 700)
            for events in (300, 700):
                items, times = torch.from_numpy(user.items[:events]), torch.from_numpy(user.times[: events + 1])
                if variant == "research":
                    model.retrieve(items, times, "tuned")
                    model.retrieve(items, times, "tuned", first=events - 6)
                else:
                    actions = torch.from_numpy(user.actions[:events])
                    model.rank(items, actions, torch.arange(1, 300), "tuned")
                    model.rank(items, actions, torch.arange(1, 300), "tuned", first=2 * events - 10)
    except Exception as error:  # whatever the compiler finds wrong, the other ways are measured
        say(f"torch.compile does not work here: {type(error).__name__}: {str(error)[:300]}")
        results["compile_error"] = f"{type(error).__name__}: {str(error)[:300]}"
        return None
    return model
