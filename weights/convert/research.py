#!/usr/bin/env python3
"""From a checkpoint of the research repository (generative-recommenders, research/) to a directory beamline loads.

    research.py CHECKPOINT --out DIR --heads 2 --max-sequence-length 200 --activation silu --normalization l2 [--catalog]
    [--check FILE]

CHECKPOINT is what the trainer saves: a pickle {epoch, model_state_dict, optimizer_state_dict}, names prefixed `module.`; or a
state dict alone, pickled or as safetensors. Names and layout of the tensors stay as they are; `_attn_mask` is dropped.

From shapes: width, layers, items, positions N (which also divides the attention), time buckets, and with --heads the widths of
keys and values. Not in the checkpoint, so asked for: heads, the longest history, the activation after the uvqk projection
(`linear_activation`), what is done to the final state, and whether the output projection reads [u, norm, u * norm]
(`concat_ua`). Constants of the source, the same in every configuration of the repository: every epsilon 1e-6, the divisor 0.301
of the time buckets, item rows times the root of the width, item 0 for padding. A fork that changed them has to change
config.json.

Not converted: SASRec, the MoL similarity, the preprocessor with ratings (its final state is wider than an item), normalizations
with a softmax.
"""

import argparse

import check
from checkpoint import State, add_catalog_options, divide, load, refuse, write, write_catalog

ITEMS = "_embedding_module._item_emb.weight"
POSITIONS = "_input_features_preproc._pos_emb.weight"
LAYERS = "_hstu._attention_layers."
MASK = "_attn_mask"
EPSILON = 1e-6


def state_dict(path):
    loaded = load(path)
    return loaded["model_state_dict"] if "model_state_dict" in loaded else loaded


def positions_of(state):
    """N, from everything that says it."""
    positions, width = state.shape(POSITIONS)
    if MASK in state:
        mask = state.drop(MASK, positions, positions)
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows) != positions * (positions - 1) // 2 or not (columns > rows).all():
            refuse(f"{MASK} does not hide exactly what comes later: a model this converter does not know")
    return positions, width


def convert(tensors, options):
    """config.json and tensors."""
    state = State(tensors)
    positions, width = positions_of(state)
    if not 1 <= options.max_sequence_length < positions:
        refuse(
            f"--max-sequence-length {options.max_sequence_length}: the checkpoint has {positions} positions, one at least for the query"
        )
    if options.gr_output_length is not None and options.max_sequence_length + options.gr_output_length + 1 != positions:
        lengths = f"--max-sequence-length {options.max_sequence_length} + --gr-output-length {options.gr_output_length} + 1"
        refuse(f"{lengths} is not the checkpoint's {positions} positions")
    rows, item_width = state.shape(ITEMS)
    if "_input_features_preproc._rating_emb.weight" in state:
        refuse("the preprocessor with ratings: its final states are wider than its items")
    if item_width != width:
        refuse(f"{ITEMS} is {item_width} wide, {POSITIONS} {width}: an embedding that is projected is not known here")
    layers = state.numbers(LAYERS)
    first = f"{LAYERS}0."
    read, uvqk = state.shape(first + "_o.weight")[1], state.shape(first + "_uvqk")[1]
    values = divide("width the output projection reads, --concat-ua", read, 3 if options.concat_ua else 1)
    keys = divide("width of the uvqk projection", uvqk, 2) - values
    if keys < 1:
        refuse(
            f"the uvqk projection gives {uvqk}, of which u and v take {2 * values}: --concat-ua is wrong, or this is another layer"
        )
    value_dim, key_dim = (
        divide("width of all values, --heads", values, options.heads),
        divide("width of all keys, --heads", keys, options.heads),
    )
    for name, given, found in (("--value-dim", options.value_dim, value_dim), ("--key-dim", options.key_dim, key_dim)):
        if given not in (None, found):
            refuse(f"{name} {given}: with --heads {options.heads} the checkpoint has {found}")
    biased = first + "_rel_attn_bias._pos_w" in state
    buckets = state.shape(first + "_rel_attn_bias._ts_w")[0] - 1 if biased else None
    for layer in range(layers):
        prefix = f"{LAYERS}{layer}."
        state.keep(prefix + "_uvqk", width, uvqk)
        state.keep(prefix + "_o.weight", width, read)
        state.keep(prefix + "_o.bias", width)
        if biased:
            state.keep(prefix + "_rel_attn_bias._ts_w", buckets + 1)
            state.keep(prefix + "_rel_attn_bias._pos_w", 2 * positions - 1)
    state.keep(ITEMS, rows, width)
    state.keep(POSITIONS, positions, width)
    config = {
        "model_type": "hstu",
        "hstu_variant": "research",
        "stack": {
            "model_dim": width,
            "layers": layers,
            "heads": options.heads,
            "key_dim": key_dim,
            "value_dim": value_dim,
            "input_norm": {"affine": False, "eps": EPSILON},
            "uvqk_bias": False,
            "uvqk_layout": "in_out",
            "silu": "uvqk" if options.activation == "silu" else "none",
            "logit_scale": 1.0,
            "attention_divisor": positions,
            "relative_bias": {"positions": positions, "time_buckets": buckets, "time_divisor": 0.301} if biased else None,
            "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
            "output_norm": {"kind": "layer", "affine": False, "eps": EPSILON},
            "output_parts": "concat_normed" if options.concat_ua else "gated",
            "output_bias": True,
            "output_layout": "out_in",
            "residual": True,
        },
        "input": {
            "num_items": rows - 1,
            "padding_id": 0,
            "max_sequence_length": options.max_sequence_length,
            "position": {"direction": "forward", "rows": positions, "scale": "sqrt_model_dim"},
            "actions": None,
        },
        "output": {"normalization": {"kind": options.normalization, "eps": EPSILON}, "head": {"kind": "items", "eps": EPSILON}},
    }
    return config, state.finish()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--out", required=True, help="directory to write; must not hold anything")
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument(
        "--max-sequence-length", type=int, required=True, help="longest history, `max_sequence_length` in training"
    )
    parser.add_argument("--gr-output-length", type=int, help="if known: length + this + 1 must be the checkpoint's positions")
    parser.add_argument("--key-dim", type=int, help="if known, compared: `dqk`, attention_dim")
    parser.add_argument("--value-dim", type=int, help="if known, compared: `dv`, linear_dim")
    parser.add_argument("--activation", choices=("silu", "none"), required=True, help="`linear_activation`")
    parser.add_argument(
        "--normalization", choices=("l2", "layer_norm"), required=True, help="`user_embedding_norm`: of final states"
    )
    parser.add_argument("--concat-ua", action="store_true", help="`concat_ua=True`")
    add_catalog_options(parser, "row")
    check.add_options(parser)
    options = parser.parse_args(arguments)
    if options.item_ids and not options.catalog:
        parser.error("--item-ids is for --catalog")
    config, tensors = convert(state_dict(options.checkpoint), options)
    write(options.out, config, tensors)
    stack, items = config["stack"], config["input"]["num_items"]
    print(
        f"{options.out}: {stack['layers']} layers, width {stack['model_dim']}, {items} items, {stack['attention_divisor']} positions"
    )
    if options.catalog:
        write_catalog(options.out, {row: row for row in range(1, items + 1)}, options.item_ids)
    check.after_conversion(options)


if __name__ == "__main__":
    main()
