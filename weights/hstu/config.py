"""config.json of a research HSTU, every constant spelled out: what the trainer decides once and the server reads.

Place in the flow: `train.py` and `fixture.py` build one, `model.py` computes what it says,
`crates/model/src/families/hstu/config.rs` documents every field. Nothing has a default there, so nothing is left out here. What
must not be here: weights, training constants that the forward pass does not read (dropout, negatives); the temperature is in it
for a token head, because scores depend on it. """

from time_buckets import DIVISOR

EPSILON = 1e-6
TIME_BUCKETS = 128
PADDING = 0


def research_config(
    *,
    model_dim,
    layers,
    heads,
    key_dim,
    value_dim,
    num_items,
    max_sequence_length,
    positions,
    head,
    actions=None,
    relative_bias=True,
):
    """The whole configuration.

    num_items            highest row of the item table: of items, or of tokens for a token head; row 0 is padding
    max_sequence_length  rows of a history: events for an item head, events * levels for a token head
    positions            rows of the position table and N of the relative bias; the attention is divided by it
    head                 `items_head()` or `tokens_head(..)`
    actions              None, or {"count", "generated"}: rows of the action table, and the action of rows whose event is not known yet
    """
    return {
        "model_type": "hstu",
        "hstu_variant": "research",
        "stack": {
            "model_dim": model_dim,
            "layers": layers,
            "heads": heads,
            "key_dim": key_dim,
            "value_dim": value_dim,
            "input_norm": {"affine": False, "eps": EPSILON},
            "uvqk_bias": False,
            "uvqk_layout": "in_out",
            "silu": "uvqk",
            "logit_scale": 1.0,
            "attention_divisor": positions,
            "relative_bias": {"positions": positions, "time_buckets": TIME_BUCKETS, "time_divisor": DIVISOR}
            if relative_bias
            else None,
            "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
            "output_norm": {"kind": "layer", "affine": False, "eps": EPSILON},
            "output_parts": "gated",
            "output_bias": True,
            "output_layout": "out_in",
            "residual": True,
        },
        "input": {
            "num_items": num_items,
            "padding_id": PADDING,
            "max_sequence_length": max_sequence_length,
            "position": {"direction": "forward", "rows": positions, "scale": "sqrt_model_dim"},
            "actions": actions
            and {"count": actions["count"], "dim": model_dim, "combine": "add", "generated": actions["generated"]},
        },
        "output": {"normalization": {"kind": "l2", "eps": EPSILON}, "head": head},
    }


def items_head():
    return {"kind": "items", "eps": EPSILON}


def tokens_head(codes, logit_scale, tied):
    """codes: how many codes each level has. Levels lie one after the other behind the padding row: code c of level l is token
    first_token + c."""
    levels, first = [], PADDING + 1
    for count in codes:
        levels.append({"first_token": first, "codes": count})
        first += count
    return {"kind": "tokens", "vocab_size": first, "tied": tied, "logit_scale": logit_scale, "semantic_id_levels": levels}
