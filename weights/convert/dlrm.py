#!/usr/bin/env python3
"""From a checkpoint of the production model (generative-recommenders, DlrmHSTU) to a directory beamline loads.

    dlrm.py CHECKPOINT --constants constants.json --out DIR [--catalog] [--check FILE]

CHECKPOINT is the directory that training saves, `non_sparse.ckpt` (its `dense_dict`) beside `sparse/` of
torch.distributed.checkpoint; or a file with the whole state dict, pickled or as safetensors. Tables keep their type (fp16).
Tensors keep their names and layout; the buffers of action bits and periods go to config.json.

From shapes and buffers: width, layers, widths of keys and values (with `heads`), of the MLPs, of the tables, rows of all
tables, action bits, periods. The rest is not in the checkpoint and is written by the author into constants.json, every field:

    heads                 hstu_num_heads
    group_norm            hstu_group_norm: true or false
    attention_divisor     what divided the attention in training: the longest sequence of a training batch, all tokens counted. The
                          reference divides by the longest of each batch; the raw attention output enters the projection, so
                          this matters
    time_clamp            "rows" for a model trained on GPUs, "model_dim" to compute what the reference's PyTorch path computes
    features              [{"name", "table"}]: of events and candidates, the item (uih_post_id) first, then the paired id features in
                          the order of merge_uih_candidate_feature_mapping
    contextual            [{"name", "table", "slots", "min_tokens"}]: of users, in order: contextual_feature_to_max_length and
                          contextual_feature_to_min_uih_length (0 for none)
    item_tower_features   names from `features`: item_embedding_feature_names, in order
    postprocessor         "timestamp_layer_norm", "layer_norm" or "l2"
    tasks                 [{"name", "kind": "binary" or "regression"}] in the order of the outputs
    unknown_ids           {table: "refuse" or "clamp"}
    max_history, max_candidates
    action_weights        only if the checkpoint has no `_combined_action_weights`; otherwise compared with it

Constants of the source: norms of the layers 1e-6, all others 1e-5, of the L2 postprocessor 1e-6; time buckets of a minute; the
angle of a period 2 * 3.14; queries times keys by one over the root of the key's width (`attn_alpha` not set); a causal mask.
"""

import argparse
import os

import check
from checkpoint import State, add_catalog_options, divide, fields, load, read_json, refuse, write, write_catalog
from sharded import load_tensors

LAYERS = "_hstu_transducer._stu_module._stu_layers."
PREPROCESSOR = "_hstu_transducer._input_preprocessor."
ENCODER = "_hstu_transducer._positional_encoder."
POSTPROCESSOR = "_hstu_transducer._output_postprocessor."
TABLES = "_embedding_collection.embeddings."
TOWER = "_item_embedding_mlp"
PREDICTION = "_multitask_module._prediction_module"
REQUIRED = (
    "heads",
    "group_norm",
    "attention_divisor",
    "time_clamp",
    "features",
    "contextual",
    "item_tower_features",
    "postprocessor",
    "tasks",
    "unknown_ids",
    "max_history",
    "max_candidates",
)


def state_dict(path):
    """All tensors, dense and sparse."""
    if not os.path.isdir(path):
        loaded = load(path)
        return loaded["dense_dict"] if "dense_dict" in loaded else loaded
    loaded = load(os.path.join(path, "non_sparse.ckpt"))
    if not isinstance(loaded, dict) or "dense_dict" not in loaded:
        refuse(f"{path}/non_sparse.ckpt has no dense_dict")
    dense = {name.removeprefix("module."): tensor for name, tensor in loaded["dense_dict"].items()}
    sparse = load_tensors(os.path.join(path, "sparse"))
    sparse = {name.removeprefix("sparse_dict.").removeprefix("module."): tensor for name, tensor in sparse.items()}
    both = sorted(set(dense) & set(sparse))
    if both:
        refuse(f"both dense and sparse: {', '.join(both[:5])}")
    return {**dense, **sparse}


def keep_mlp(state, prefix, inputs, hidden, outputs, normed=True):
    state.keep(f"{prefix}.0.weight", hidden, inputs)
    state.keep(f"{prefix}.2.weight", outputs, hidden)
    for name, width in (("0.bias", hidden), ("1.weight", hidden), ("1.bias", hidden), ("2.bias", outputs)):
        state.keep(f"{prefix}.{name}", width)
    if normed:
        state.keep(f"{prefix}.3.weight", outputs)
        state.keep(f"{prefix}.3.bias", outputs)


def stack_of(state, constants):
    """The layers' tensors and configuration."""
    layers, first, heads = state.numbers(LAYERS), f"{LAYERS}0.", constants["heads"]
    width, uvqk = state.shape(first + "_uvqk_weight")
    read = state.shape(first + "_output_weight")[0]
    values = divide("width the output projection reads", read, 3)
    keys = divide("width of the uvqk projection", uvqk, 2) - values
    key_dim, value_dim = divide("width of all keys, heads", keys, heads), divide("width of all values, heads", values, heads)
    norm = heads if constants["group_norm"] else values
    for layer in range(layers):
        prefix = f"{LAYERS}{layer}."
        state.keep(prefix + "_uvqk_weight", width, uvqk)
        state.keep(prefix + "_uvqk_beta", uvqk)
        state.keep(prefix + "_output_weight", read, width)
        for part in ("weight", "bias"):
            state.keep(f"{prefix}_input_norm_{part}", width)
            state.keep(f"{prefix}_output_norm_{part}", norm)
    return {
        "model_dim": width,
        "layers": layers,
        "heads": heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "input_norm": {"affine": True, "eps": 1e-6},
        "uvqk_bias": True,
        "uvqk_layout": "in_out",
        "silu": "u",
        "logit_scale": "inverse_sqrt_key_dim",
        "attention_divisor": constants["attention_divisor"],
        "relative_bias": None,
        "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
        "output_norm": {"kind": "group" if constants["group_norm"] else "layer", "affine": True, "eps": 1e-6},
        "output_parts": "concat_raw",
        "output_bias": False,
        "output_layout": "in_out",
        "residual": True,
    }


def input_of(state, constants, width):
    features, contextual = constants["features"], constants["contextual"]
    for feature in features:
        fields("features", feature, ("name", "table"))
    for feature in contextual:
        fields("contextual", feature, ("name", "table", "slots", "min_tokens"))
    used = list(dict.fromkeys(feature["table"] for feature in features + contextual))
    if sorted(constants["unknown_ids"]) != sorted(used):
        refuse(f"unknown_ids names {sorted(constants['unknown_ids'])}, the features use {sorted(used)}")
    tables, embedding = [], state.shape(f"{TABLES}{features[0]['table']}.weight")[1]
    for name in used:
        rows = state.shape(f"{TABLES}{name}.weight")[0]
        state.keep(f"{TABLES}{name}.weight", rows, embedding)
        tables.append({"name": name, "rows": rows, "unknown_ids": constants["unknown_ids"][name]})
    encoder = PREPROCESSOR + "_action_encoder."
    actions, action_dim = state.shape(encoder + "_action_embedding_table")
    state.keep(encoder + "_action_embedding_table", actions, action_dim)
    state.keep(encoder + "_target_action_embedding_table", 1, actions * action_dim)
    bits = constants.get("action_weights")
    if encoder + "_combined_action_weights" in state:
        stored = state.drop(encoder + "_combined_action_weights", actions).tolist()
        if bits not in (None, stored):
            refuse(f"action_weights is {bits}, the checkpoint has {stored}")
        bits = stored
    if bits is None or len(bits) != actions:
        refuse(f"action_weights must name the bits of {actions} actions: the checkpoint does not")
    hidden = state.shape(PREPROCESSOR + "_content_embedding_mlp.0.weight")[0]
    keep_mlp(state, PREPROCESSOR + "_content_embedding_mlp", embedding, hidden, width)
    keep_mlp(state, PREPROCESSOR + "_additional_embedding_mlp", (len(features) - 1) * embedding, hidden, width)
    keep_mlp(state, PREPROCESSOR + "_action_embedding_mlp", actions * action_dim, hidden, width)
    slots = sum(feature["slots"] for feature in contextual)
    if slots:
        state.keep(PREPROCESSOR + "_batched_contextual_linear_weights", slots, embedding, width)
        state.keep(PREPROCESSOR + "_batched_contextual_linear_bias", slots, width)
    positions, times = (state.shape(f"{ENCODER}_{name}_embeddings_weight")[0] for name in ("position", "timestamp"))
    state.keep(ENCODER + "_position_embeddings_weight", positions, width)
    state.keep(ENCODER + "_timestamp_embeddings_weight", times, width)
    return {
        "embedding_dim": embedding,
        "tables": tables,
        "features": features,
        "contextual": contextual,
        "action_weights": bits,
        "action_dim": action_dim,
        "hidden_dim": hidden,
        "norm_eps": 1e-5,
        "position": {"direction": "backward", "rows": positions, "scale": "sqrt_model_dim"},
        "time": {"rows": times, "divisor": 60.0, "clamp": constants["time_clamp"]},
        "max_history": constants["max_history"],
        "max_candidates": constants["max_candidates"],
    }


def postprocessor_of(state, kind, width):
    if kind == "l2":
        return {"kind": "l2", "eps": 1e-6}
    if kind not in ("timestamp_layer_norm", "layer_norm"):
        refuse(f"postprocessor {kind!r}")
    post = {"kind": kind, "eps": 1e-5}
    if kind == "timestamp_layer_norm":
        periods = [[3600, 24], [86400, 7]]
        buffers = [POSTPROCESSOR + "_period_units", POSTPROCESSOR + "_units_per_period"]
        if any(name in state for name in buffers):
            count = state.shape(buffers[0])[1]
            stored = [state.drop(name, 1, count).flatten().tolist() for name in buffers]
            periods = [[int(period), int(units)] for period, units in zip(*stored)]
            if [[float(number) for number in column] for column in zip(*periods)] != stored:
                refuse(f"periods that are not whole numbers: {stored}")
        state.keep(POSTPROCESSOR + "_time_feature_combiner.weight", width, width + 2 * len(periods))
        state.keep(POSTPROCESSOR + "_time_feature_combiner.bias", width)
        post.update(periods=periods, cycle=6.28)
    state.keep(POSTPROCESSOR + "_layer_norm.weight", width)
    state.keep(POSTPROCESSOR + "_layer_norm.bias", width)
    return post


def output_of(state, constants, width, embedding):
    known = [feature["name"] for feature in constants["features"]]
    other = [name for name in constants["item_tower_features"] if name not in known]
    if other:
        refuse(f"item_tower_features: {other[0]} is not among features")
    for task in constants["tasks"]:
        if fields("tasks", task, ("name", "kind"))["kind"] not in ("binary", "regression"):
            refuse(f"tasks: kind {task['kind']!r}")
    tower, prediction = state.shape(TOWER + ".0.weight")[0], state.shape(PREDICTION + ".0.weight")[0]
    keep_mlp(state, TOWER, len(constants["item_tower_features"]) * embedding, tower, width)
    keep_mlp(state, PREDICTION, width, prediction, len(constants["tasks"]), normed=False)
    return {
        "postprocessor": postprocessor_of(state, constants["postprocessor"], width),
        "item_tower": {"features": constants["item_tower_features"], "hidden_dim": tower, "norm_eps": 1e-5},
        "prediction_hidden_dim": prediction,
        "prediction_norm_eps": 1e-5,
        "tasks": constants["tasks"],
    }


def convert(tensors, constants):
    """config.json and tensors."""
    fields("constants", constants, REQUIRED, ("action_weights",))
    if constants["time_clamp"] not in ("rows", "model_dim"):
        refuse(f"time_clamp {constants['time_clamp']!r}")
    state = State(tensors)
    stack = stack_of(state, constants)
    given = input_of(state, constants, stack["model_dim"])
    output = output_of(state, constants, stack["model_dim"], given["embedding_dim"])
    return {"model_type": "hstu", "hstu_variant": "dlrm", "stack": stack, "input": given, "output": output}, state.finish()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--constants", required=True, help="JSON file: see above")
    parser.add_argument("--out", required=True, help="directory to write; must not hold anything")
    add_catalog_options(parser, "row")
    check.add_options(parser)
    options = parser.parse_args(arguments)
    config, tensors = convert(state_dict(options.checkpoint), read_json(options.constants))
    write(options.out, config, tensors)
    stack = config["stack"]
    print(
        f"{options.out}: {stack['layers']} layers, width {stack['model_dim']}, keys {stack['key_dim']}, values {stack['value_dim']}"
    )
    if options.catalog:
        item_table = config["input"]["features"][0]["table"]
        rows = next(table["rows"] for table in config["input"]["tables"] if table["name"] == item_table)
        write_catalog(options.out, {row: row for row in range(rows)}, options.item_ids)
    check.after_conversion(options)


if __name__ == "__main__":
    main()
