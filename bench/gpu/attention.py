"""Attention of branch rows to the context that all beams of a user share, and of context rows to each other.

Branch rows: the rows of all beams, and of all query heads that share a key head, are the rows of one product with that
head's keys. Nothing is masked and no key is repeated. What comes back with the output is the log-sum-exp of each row's
scores, by which the few keys of a beam's own ancestors are merged in (`fused.merge`).

Which of PyTorch's kernels is fastest depends on the sizes, so the ways are tried on the sizes at hand and the fastest
is kept (`choose`). Each must agree with the plain products first.

Layouts: query [users, key heads, rows, head_dim]; key, value [users, key heads, positions, head_dim], views of
[users, positions, key heads, head_dim]. Returned: output like query, log-sum-exp [users, key heads, rows] in float32.
"""
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from timing import seconds_of

aten = torch.ops.aten


def products(query, key, value):
    """Two matrix products with the scores in memory."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
    total = torch.logsumexp(scores, -1, keepdim=True)
    return torch.matmul((scores - total).exp().to(value.dtype), value), total.squeeze(-1)


def flash(query, key, value):
    out, total, *_ = aten._scaled_dot_product_flash_attention(query, key, value)
    return out, total[..., : query.shape[2]]


def cudnn(query, key, value):
    out, total, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    return out, total.reshape(query.shape[:3])


def efficient(query, key, value):
    out, total, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True)
    return out, total[..., : query.shape[2]]


def flash_on_cpu(query, key, value):
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def in_parts(way, parts):
    """The context in `parts` equal parts as if each were a user's: for few rows, which would not fill the device."""

    def attend(query, key, value):
        users, heads, rows, width = query.shape
        cut = lambda t: t.transpose(1, 2).unflatten(1, (parts, -1)).flatten(0, 1).transpose(1, 2)  # noqa: E731
        repeated = query[:, None].expand(-1, parts, -1, -1, -1).reshape(users * parts, heads, rows, width)
        out, total = way(repeated, cut(key), cut(value))
        out, total = out.unflatten(0, (users, parts)), total.unflatten(0, (users, parts))
        whole = torch.logsumexp(total, 1)
        shares = (total - whole[:, None]).exp()
        return (out.float() * shares[..., None]).sum(1).to(query.dtype), whole

    return attend


def ways(device, positions):
    """Name -> way of branch attention."""
    found = {"products": products}
    if device.type == "cpu":
        return found | {"flash for CPU": flash_on_cpu}
    for name, way in (("flash", flash), ("cudnn", cudnn), ("efficient", efficient)):
        found[name] = way
        for parts in (2, 4, 8):
            if positions % parts == 0 and positions // parts >= 128:
                found[f"{name} in {parts} parts"] = in_parts(way, parts)
    return found


def choose(query, key, value, limit_bytes):
    """(name, way): the fastest that agrees with plain products; plain products where their scores fit `limit_bytes`.

    Agreement is tested on one user, because the scores of all may not fit, and with float32 products: the output within 2 %
    in the mean square (bf16 rounds by up to 0.4 %), the log-sum-exp within 0.02.
    """
    one = slice(0, 1)
    scores_bytes = 8 * query.shape[1] * query.shape[2] * key.shape[2]
    sample = slice(0, max(1, min(query.shape[2], limit_bytes * query.shape[2] // max(1, scores_bytes))))
    expected = products(query[one, :, sample].float(), key[one].float(), value[one].float())
    best = None
    for name, way in ways(query.device, key.shape[2]).items():
        if name == "products" and scores_bytes * query.shape[0] > limit_bytes:
            continue
        try:
            out, total = way(query, key, value)
            seconds = seconds_of(lambda: way(query, key, value), query.device)
        except (RuntimeError, NotImplementedError):
            continue  # not for this device, precision, size or memory
        error = (out[one, :, sample].float() - expected[0]).norm() / expected[0].norm()
        agrees = float(error) < 0.02 and torch.allclose(total[one, :, sample].float(), expected[1], atol=0.02, rtol=0)
        if agrees and (best is None or seconds < best[0]):
            best = (seconds, name, way)
    if best is None:
        raise RuntimeError("no way of attention works for these sizes")
    return best[1], best[2]


def causal(backend):
    """Causal attention of whole contexts with that backend; query [users, heads, positions, head_dim]."""

    def attend(query, key, value):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])

    return attend


def choose_causal(query, key, value):
    """(name, way) of causal attention, the fastest on these sizes."""
    backends = [SDPBackend.MATH] if query.device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    best = None
    for backend in backends:
        way = causal(backend)
        try:
            seconds = seconds_of(lambda: way(query, key, value), query.device)
        except RuntimeError:
            continue
        if best is None or seconds < best[0]:
            best = (seconds, backend.name.lower(), way)
    if best is None:
        raise RuntimeError("no way of causal attention works for these sizes")
    return best[1], best[2]
