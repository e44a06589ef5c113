"""Floating-point operations and bytes that a request cannot do without, from the shape alone.

The names below: U users, B beams per user, S context tokens, s = 1 .. levels - 1 the branch step; h hidden, L layers,
q = heads * head_dim, k = kv_heads * head_dim, f intermediate, V vocabulary. A multiplication and an addition are two
operations. A value of weights, keys and values is `value_bytes` wide.

Prefill, in which the last layer needs only the last row beyond keys and values:
  products    2 U S (L h 2k + (L - 1) (h q + q h + 3 h f)) + 2 U (h q + q h + 3 h f)
  attention   4 q U ((L - 1) S (S + 1) / 2 + S)           causal: row i sees i keys; scores and weighted sum
  head        2 U h V
  read        all weights once: L (h (q + 2k) + q h + 3 h f) + h V values
  written     2 k L U S values of keys and values

Branch step s, one row per beam:
  products    2 U B L (h (q + 2k) + q h + 3 h f)
  attention   4 q L U B (S + s)                           the context, the ancestors, and the row itself
  head        2 U B h V
  read        all weights once; 2 k L U S values of context, once per user; 2 k L U B (s - 1) of ancestors
  written     2 k L U B values

Left out because an implementation can avoid or hide it: activations and logits in memory, the embedding's few rows,
norms, rotations, softmax, the trie. So this is a lower bound, more so the more beams there are.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Of one phase."""

    products: int
    attention: int
    head: int
    bytes: int

    @property
    def operations(self):
        return self.products + self.attention + self.head


def layer_products(shape):
    """Weights of one layer: of queries and what follows attention, and of keys and values."""
    rest = 2 * shape.hidden * shape.queries + 3 * shape.hidden * shape.intermediate
    return rest, 2 * shape.hidden * shape.keys


def weight_values(shape):
    rest, keys_values = layer_products(shape)
    return shape.layers * (rest + keys_values) + shape.hidden * shape.vocabulary


def prefill(shape, users, context, value_bytes=2):
    rest, keys_values = layer_products(shape)
    layers = shape.layers
    return Work(
        products=2 * users * context * (layers * keys_values + (layers - 1) * rest) + 2 * users * rest,
        attention=4 * shape.queries * users * ((layers - 1) * context * (context + 1) // 2 + context),
        head=2 * users * shape.hidden * shape.vocabulary,
        bytes=value_bytes * (weight_values(shape) + 2 * shape.keys * layers * users * context),
    )


def branch_step(shape, users, beams, context, step, value_bytes=2):
    rest, keys_values = layer_products(shape)
    rows, cached = users * beams, 2 * shape.keys * shape.layers
    return Work(
        products=2 * rows * shape.layers * (rest + keys_values),
        attention=4 * shape.queries * shape.layers * rows * (context + step),
        head=2 * rows * shape.hidden * shape.vocabulary,
        bytes=value_bytes * (weight_values(shape) + cached * (users * context + rows * (step - 1) + rows)),
    )


def request(shape, users, beams, context, value_bytes=2):
    """The phases of one batch of requests: the prefill, then the branch steps."""
    steps = [branch_step(shape, users, beams, context, step, value_bytes) for step in range(1, shape.levels)]
    return [prefill(shape, users, context, value_bytes)] + steps


def floor_ms(work, tflops, gigabytes):
    """Milliseconds of a phase at that matrix rate and bandwidth (GB/s), perfectly overlapped."""
    return max(work.operations / (tflops * 1e9), work.bytes / (gigabytes * 1e6))
