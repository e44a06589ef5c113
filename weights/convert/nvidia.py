#!/usr/bin/env python3
"""From a checkpoint of NVIDIA's HSTU (recsys-examples) to a directory beamline loads.

    nvidia.py model.0.pth [model.1.pth ..] --layout fused --constants constants.json --out DIR
        [--dynamicemb dynamicemb_module] [--catalog] [--check FILE]

The files are those of the ranks of ONE tensor-parallel group, in order (`torch_module/model.{rank}.pth`): a single one without
tensor parallelism, and never the copies that data parallelism makes. Pickles {model_state_dict, ..}, or state dicts, or
safetensors.

--layout says what the layers are; the shapes are the same in all and do not tell:
    fused       layer type FUSED: `_linear_uvqk_weight` [in, out], columns u | v | q | k. Kept as it is
    inference   the inference module: `_linear_uvqk.weight` [out, in], rows u | v | q | k. Kept as it is. Also NATIVE of the versions
                before tensor parallelism, which split u | v | q | k first
    native      NATIVE and DEBUG: `_linear_uvqk.weight` [out, in], rows head by head, (u, v, q, k) within each. Permuted to `fused`; ranks
                of tensor parallelism hold heads and are joined

--dynamicemb: the model-parallel tables, raw binaries of all ranks below that directory (`dynamicemb.py`). Row numbers are not
keys: where a key ended up is written to {table}.rows.jsonl, lines {"key", "row"}; with --catalog the items' go to
catalog.jsonl, item id = key (or its name by --item-ids), sid = [row]. Requests must use row numbers for the other tables.

From shapes: width, layers, width of a head (with `heads`), rows of all tables, positions, widths of the head. Written by the
author into constants.json, every field:

    heads                num_attention_heads
    attention_divisor    scaling_seqlen of training; where that was -1, the longest sequence of a training batch, all tokens counted
    layernorm_epsilon    1e-5 in the shipped configurations
    residual             true or false
    item_table           table of the items; action_table: that of the actions, or null
    contextual           [{"name", "table", "slots"}] in the order of the sequence
    unknown_ids          {table: "refuse" or "clamp"}
    activation           "relu" or "gelu" between the layers of the head
    prediction           "sigmoid": an output a task; "softmax": one task of several classes
    tasks                names
    max_history          most events; max_candidates

Constants of the source: positions forward, rows times the root of the width, final states divided by their length (1e-6), a
causal mask (training must have had `disable_contextual_mask = True`, else contextual rows saw more than they do at inference),
no time encoding, no relative bias, target groups of one. Preprocessing MLPs are refused: beamline does not have them. """

import argparse
import json
import os

import torch

import check
import dynamicemb
from checkpoint import State, add_catalog_options, divide, fields, load, read_json, refuse, write, write_catalog

LAYERS = "_hstu_block._attention_layers."
POSITIONS = "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight"
TABLES = "_embedding_collection._data_parallel_embedding_collection.embeddings."
HEAD = "_mlp._mlp."
REQUIRED = (
    "heads",
    "attention_divisor",
    "layernorm_epsilon",
    "residual",
    "item_table",
    "action_table",
    "contextual",
    "unknown_ids",
    "activation",
    "prediction",
    "tasks",
    "max_history",
    "max_candidates",
)
# Older and newer versions.
OUTPUT_NORMS = (
    "_output_layernorm_weight",
    "_output_layernorm_bias",
    "_output_ln_dropout_mul.weight",
    "_output_ln_dropout_mul.bias",
)


def fused_order(heads, dim):
    """For every column of u | v | q | k, head by head, its row in a per-head layout (u, v, q, k within each head)."""
    return torch.arange(heads * 4 * dim).reshape(heads, 4, dim).permute(1, 0, 2).flatten()


def state_dict(path):
    """Tensors by name, without what Transformer Engine keeps beside its weights and what dynamic embeddings leave behind."""
    loaded = load(path)
    state = loaded["model_state_dict"] if "model_state_dict" in loaded else loaded
    state = {name: tensor for name, tensor in state.items() if not name.endswith("._extra_state")}
    # Placeholders: the rows of model-parallel tables are in the files of the dynamic embeddings.
    return State({name: tensor for name, tensor in state.items() if "_model_parallel_embedding_collection" not in name}).tensors


def equal(name, parts):
    if any(part.shape != parts[0].shape or not torch.equal(part, parts[0]) for part in parts):
        refuse(
            f"{name} differs between the files: not the ranks of one tensor-parallel group, or a tensor this converter cannot join"
        )
    return parts[0]


def native_to_fused(ranks, heads):
    """The state dict of one file in the fused layout, from per-head layers of all ranks."""
    if any(set(rank) != set(ranks[0]) for rank in ranks):
        refuse("the files do not hold the same names")
    fused = {}
    heads_here = divide("heads, files", heads, len(ranks))
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        layer, _, rest = name.removeprefix(LAYERS).partition(".")
        if not name.startswith(LAYERS):
            fused[name] = equal(name, parts)
            continue
        prefix = f"{LAYERS}{layer}."
        if rest in ("_linear_uvqk.weight", "_linear_uvqk.bias"):
            joined = torch.cat(parts)
            dim = divide(f"{name}, heads", divide(name, parts[0].shape[0], 4), heads_here)
            joined = joined[fused_order(heads, dim)]
            fused[prefix + rest.replace(".", "_")] = joined.T.contiguous() if joined.dim() == 2 else joined
        elif rest == "_linear_proj.weight":
            fused[prefix + "_linear_proj_weight"] = torch.cat(parts, dim=1).T.contiguous()
        elif rest in OUTPUT_NORMS:
            # Ranks hold the whole of it or their heads' share; the projection's inputs tell which.
            width = ranks[0][prefix + "_linear_proj.weight"].shape[1] * len(ranks)
            whole = equal(name, parts) if parts[0].shape[0] == width else torch.cat(parts)
            fused[f"{prefix}_output_layernorm_{'weight' if rest.endswith('weight') else 'bias'}"] = whole
        elif rest in ("_input_layernorm_weight", "_input_layernorm_bias"):
            fused[name] = equal(name, parts)
        else:
            refuse(f"{name} has no place in the layout native")
    return fused


def joined(ranks, layout, heads):
    if layout == "native":
        return native_to_fused(ranks, heads)
    if len(ranks) > 1:
        refuse(f"{len(ranks)} files: only --layout native is tensor-parallel; give the file of one rank")
    return ranks[0]


def stack_of(state, constants, layout):
    out_in, mark = layout == "inference", "." if layout == "inference" else "_"
    layers, first, heads = state.numbers(LAYERS), f"{LAYERS}0.", constants["heads"]
    if first + f"_linear_uvqk{mark}weight" not in state:
        refuse(f"there is no {first}_linear_uvqk{mark}weight: not --layout {layout}")
    uvqk, width = state.shape(first + f"_linear_uvqk{mark}weight")[:: 1 if out_in else -1]
    values = divide("width of the uvqk projection", uvqk, 4)
    dim = divide("width of all heads, heads", values, heads)
    bias, affine = first + f"_linear_uvqk{mark}bias" in state, first + "_input_layernorm_weight" in state
    shape = lambda inputs, outputs: (outputs, inputs) if out_in else (inputs, outputs)  # noqa: E731
    for layer in range(layers):
        prefix = f"{LAYERS}{layer}."
        state.keep(prefix + f"_linear_uvqk{mark}weight", *shape(width, uvqk))
        state.keep(prefix + f"_linear_proj{mark}weight", *shape(values, width))
        if bias:
            state.keep(prefix + f"_linear_uvqk{mark}bias", uvqk)
        for part in ("weight", "bias"):
            if affine:
                state.keep(f"{prefix}_input_layernorm_{part}", width)
            state.keep(f"{prefix}_output_layernorm_{part}", values)
    order = "out_in" if out_in else "in_out"
    return {
        "model_dim": width,
        "layers": layers,
        "heads": heads,
        "key_dim": dim,
        "value_dim": dim,
        "input_norm": {"affine": affine, "eps": constants["layernorm_epsilon"]},
        "uvqk_bias": bias,
        "uvqk_layout": order,
        "silu": "uvqk",
        "logit_scale": "inverse_sqrt_key_dim",
        "attention_divisor": constants["attention_divisor"],
        "relative_bias": None,
        "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
        "output_norm": {"kind": "layer", "affine": True, "eps": constants["layernorm_epsilon"]},
        "output_parts": "gated",
        "output_bias": False,
        "output_layout": order,
        "residual": constants["residual"],
    }


def input_of(state, constants, width, dynamic):
    """Configuration of the input; `dynamic` is {table: directory}. Returns (configuration, {table: keys})."""
    contextual = [
        {**fields("contextual", feature, ("name", "table", "slots")), "min_tokens": 0} for feature in constants["contextual"]
    ]
    named = [constants["item_table"]] + [constants["action_table"]] * (constants["action_table"] is not None)
    used = list(dict.fromkeys(named + [feature["table"] for feature in contextual]))
    if sorted(constants["unknown_ids"]) != sorted(used):
        refuse(f"unknown_ids names {sorted(constants['unknown_ids'])}, the model uses {sorted(used)}")
    unused = sorted(set(dynamic) - set(used))
    if unused:
        refuse(f"dynamic embedding tables that nothing uses: {', '.join(unused)}")
    if any("_item_mlp" in name or "_contextual_mlp" in name for name in state.tensors):
        refuse("preprocessing MLPs: beamline does not have them")
    tables, keys = [], {}
    for name in used:
        tensor = f"{TABLES}{name}.weight"
        if name in dynamic:
            if tensor in state:
                refuse(f"table {name} is both in the state dict and a dynamic embedding")
            keys[name], values = dynamicemb.read(dynamic[name], name, width)
            state.tensors[tensor] = torch.from_numpy(values)
        rows = state.shape(tensor)[0]
        state.keep(tensor, rows, width)
        tables.append({"name": name, "rows": rows, "unknown_ids": constants["unknown_ids"][name]})
    positions = state.shape(POSITIONS)[0]
    state.keep(POSITIONS, positions, width)
    given = {
        "tables": tables,
        "item_table": constants["item_table"],
        "action_table": constants["action_table"],
        "contextual": contextual,
        "position": {"direction": "forward", "rows": positions, "scale": "sqrt_model_dim"},
        "preprocessing_mlp": None,
        "time_encoding": False,
        "max_history": constants["max_history"],
        "max_candidates": constants["max_candidates"],
    }
    return given, keys


def output_of(state, constants, width):
    numbers = sorted({int(name[len(HEAD) :].split(".")[0]) for name in state.tensors if name.startswith(HEAD)})
    if not numbers or numbers != list(range(0, 2 * len(numbers), 2)):
        refuse(f"layers {HEAD}: found {numbers}, expected 0, 2, ..")
    head, inputs, bias = [], width, f"{HEAD}0.bias" in state
    for number in numbers:
        outputs = state.shape(f"{HEAD}{number}.weight")[0]
        state.keep(f"{HEAD}{number}.weight", outputs, inputs)
        if bias:
            state.keep(f"{HEAD}{number}.bias", outputs)
        head.append(outputs)
        inputs = outputs
    expected = {"sigmoid": head[-1], "softmax": 1}.get(constants["prediction"])
    if expected is None or constants["activation"] not in ("relu", "gelu"):
        refuse(f"prediction {constants['prediction']!r}, activation {constants['activation']!r}")
    if len(constants["tasks"]) != expected:
        refuse(f"tasks: {len(constants['tasks'])} names; a {constants['prediction']} head of {head[-1]} outputs has {expected}")
    return {
        "normalization": {"kind": "l2", "eps": 1e-6},
        "head": head,
        "head_bias": bias,
        "activation": constants["activation"],
        "prediction": constants["prediction"],
        "tasks": constants["tasks"],
    }


def convert(ranks, layout, constants, dynamic):
    """config.json, tensors, and the keys of dynamic tables in the order of their rows."""
    fields("constants", constants, REQUIRED)
    state = State(joined(ranks, layout, constants["heads"]))
    stack = stack_of(state, constants, layout)
    given, keys = input_of(state, constants, stack["model_dim"], dynamic)
    output = output_of(state, constants, stack["model_dim"])
    return (
        {"model_type": "hstu", "hstu_variant": "nvidia", "stack": stack, "input": given, "output": output},
        state.finish(),
        keys,
    )


def write_keys(directory, keys):
    for table, values in keys.items():
        with open(os.path.join(directory, f"{table}.rows.jsonl"), "w", encoding="utf-8") as file:
            for row, key in enumerate(values.tolist()):
                file.write(json.dumps({"key": key, "row": row}) + "\n")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+", help="ranks of one tensor-parallel group, in order")
    parser.add_argument("--layout", choices=("fused", "inference", "native"), required=True)
    parser.add_argument("--constants", required=True, help="JSON file: see above")
    parser.add_argument("--dynamicemb", help="directory with raw tables, at any depth")
    parser.add_argument("--out", required=True, help="directory to write; must not hold anything")
    add_catalog_options(parser, "key")
    check.add_options(parser)
    options = parser.parse_args(arguments)
    if options.item_ids and not options.catalog:
        parser.error("--item-ids is for --catalog")
    constants = read_json(options.constants)
    dynamic = dynamicemb.tables(options.dynamicemb) if options.dynamicemb else {}
    config, tensors, keys = convert([state_dict(path) for path in options.checkpoint], options.layout, constants, dynamic)
    write(options.out, config, tensors)
    write_keys(options.out, keys)
    stack = config["stack"]
    print(f"{options.out}: {stack['layers']} layers, width {stack['model_dim']}, {stack['heads']} heads of {stack['key_dim']}")
    if options.catalog:
        item_table = constants["item_table"]
        rows = next(table["rows"] for table in config["input"]["tables"] if table["name"] == item_table)
        item_keys = keys[item_table].tolist() if item_table in keys else range(rows)
        write_catalog(options.out, {key: row for row, key in enumerate(item_keys)}, options.item_ids)
    check.after_conversion(options)


if __name__ == "__main__":
    main()
