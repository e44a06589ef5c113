"""The floor: the work of a model at the rate of large matrix products, which is measured in the same run, as it is not the same
every day."""

import time

import torch

from shapes import ITEMS, LAYERS, NEW_EVENTS, RANK_HISTORY, TASKS, VALUES, WIDTH


def rate():
    """GFLOP/s of a product of two large matrices in single precision: the best of some."""
    size, best = 2048, float("inf")
    left, right = torch.randn(size, size), torch.randn(size, size)
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def flops(rows, last_rows, pairs, last_pairs):
    """Of the stack: rows through every layer and pairs of a query and a key, the last layer apart."""
    products = (
        LAYERS * rows * WIDTH * 2 * VALUES + ((LAYERS - 1) * rows + last_rows) * (WIDTH * 2 * VALUES + VALUES * WIDTH)
    ) * 2
    attention = ((LAYERS - 1) * pairs + last_pairs) * 2 * VALUES * 2
    return products, attention


def causal_pairs(first, end):
    return (first + 1 + end) * (end - first) // 2


def floor(products, attention, gflops):
    return {"products_mflop": round(products / 1e6, 1), "attention_mflop": round(attention / 1e6, 1),
            "floor_ms": round((products + attention) / gflops / 1e6, 3)}


def floors_retrieval(events, gflops):
    end = events + NEW_EVENTS

    def of(first):
        products, attention = flops(end - first, 1, causal_pairs(first, end), end)
        return floor(products + 2 * ITEMS * WIDTH, attention, gflops)

    return {"recomputed": of(0), "warm": of(events - 1)}


def floors_ranking(candidates, gflops):
    end = 2 * (RANK_HISTORY + NEW_EVENTS)

    def of(first):
        seen = candidates * (end + 1)
        products, attention = flops(end - first + candidates, candidates, causal_pairs(first, end) + seen, seen)
        return floor(products + 2 * candidates * (WIDTH * 512 + 512 * TASKS), attention, gflops)

    return {"recomputed": of(0), "warm": of(2 * RANK_HISTORY)}
