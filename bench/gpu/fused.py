"""What lies between the matrix products: norms, rotations, the activation, the merge of attention's two parts.

Written as plain functions. `Pieces(compiled=True)` has torch.compile fuse each into one or few kernels: seconds, where
compiling whole models would take minutes for every size. Sizes that change from call to call (rows) become variables of
the compiled kernel, those that never do (widths) stay constants. `Pieces(compiled=False)` runs them as they stand.
"""
import torch
import torch.nn.functional as F

import expand


def rms_norm(x, weight, epsilon):
    return F.rms_norm(x, weight.shape, weight, epsilon)


def add_norm(residual, update, weight, epsilon):
    """(residual + update, its norm)."""
    residual = residual + update
    return residual, F.rms_norm(residual, weight.shape, weight, epsilon)


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotate(x, cosine, sine):
    """x [.., heads, head_dim], cosine and sine [.., 1, head_dim / 2] in float32: rotary position, halves paired."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)


def heads_of(qkv, query_norm, key_norm, cosine, sine, heads, kv_heads, epsilon):
    """The product of one row with the three matrices, [.., (heads + 2 kv_heads) head_dim] -> query, key, value
    [.., heads, head_dim], normed and rotated."""
    qkv = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))
    query, key, value = qkv.split((heads, kv_heads, kv_heads), -2)
    query = rotate(F.rms_norm(query, query_norm.shape, query_norm, epsilon), cosine, sine)
    key = rotate(F.rms_norm(key, key_norm.shape, key_norm, epsilon), cosine, sine)
    return query, key, value


def merge(out, total, query, keys, values, rows, scale):
    """Adds a beam's own ancestors to its attention.

    out [users, kv_heads, beams * group, head_dim] and total [users, kv_heads, beams * group]: attention to the context.
    query [users, beams, kv_heads, group, head_dim]. keys, values [slots, kv_heads, head_dim]; rows [users, beams, n] are
    the slots of the ancestors, the beam itself included. Returns [users, beams, kv_heads * group * head_dim].
    """
    beams, group = query.shape[1], query.shape[3]
    out = out.unflatten(2, (beams, group)).transpose(1, 2).float()  # whatever layout the kernel chose
    total = total.unflatten(2, (beams, group)).transpose(1, 2)[..., None]
    key = keys[rows].transpose(2, 3)[:, :, :, None].float()  # [users, beams, kv_heads, 1, n, head_dim]
    value = values[rows].transpose(2, 3)[:, :, :, None].float()
    scores = (query[..., None, :].float() * key).sum(-1) * scale
    most = torch.maximum(total, scores.amax(-1, keepdim=True))
    context, own = (total - most).exp(), (scores - most).exp()
    mixed = out * context + (own[..., None] * value).sum(-2)
    return (mixed / (context + own.sum(-1, keepdim=True))).to(query.dtype).flatten(2)


class Pieces:
    """The functions above, as they stand or compiled."""

    def __init__(self, compiled):
        self.compiled = compiled
        build = torch.compile if compiled else (lambda function: function)
        if compiled:
            # Ones and strides are constants of a kernel, too, so a sweep needs more variants than the default allows.
            torch._dynamo.config.recompile_limit = 64
        self.rms_norm = build(rms_norm)
        self.add_norm = build(add_norm)
        self.swiglu = build(swiglu)
        self.heads_of = build(heads_of)
        self.merge = build(merge)
        self.scored_tokens = build(expand.scored_tokens_reduced) if compiled else expand.scored_tokens
