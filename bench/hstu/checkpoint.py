"""Random checkpoints of both variants, of a size at which every part of the model matters to the result."""
import json

import safetensors.torch
import torch

from shapes import ACTIONS, CANDIDATES, SIZES, TASKS


def stack_config(sizes, variant):
    research = variant == "research"
    return {
        "model_dim": sizes.width, "layers": sizes.layers, "heads": sizes.heads, "key_dim": sizes.head, "value_dim": sizes.head,
        "input_norm": {"affine": not research, "eps": 1e-6 if research else 1e-5},
        "uvqk_bias": not research, "uvqk_layout": "in_out", "silu": "uvqk",
        "logit_scale": 1.0 if research else "inverse_sqrt_key_dim", "attention_divisor": sizes.divisor(variant),
        "relative_bias": {"positions": sizes.positions, "time_buckets": 128, "time_divisor": 0.301} if research else None,
        "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
        "output_norm": {"kind": "layer", "affine": not research, "eps": 1e-6 if research else 1e-5},
        "output_parts": "gated", "output_bias": research,
        "output_layout": "out_in" if research else "in_out", "residual": True,
    }


def research_config(sizes):
    return {
        "model_type": "hstu", "hstu_variant": "research", "stack": stack_config(sizes, "research"),
        "input": {
            "num_items": sizes.items, "padding_id": 0, "max_sequence_length": sizes.longest,
            "position": {"direction": "forward", "rows": sizes.positions, "scale": "sqrt_model_dim"}, "actions": None,
        },
        "output": {"normalization": {"kind": "l2", "eps": 1e-6}, "head": {"kind": "items", "eps": 1e-6}},
    }


def nvidia_config(sizes):
    return {
        "model_type": "hstu", "hstu_variant": "nvidia", "stack": stack_config(sizes, "nvidia"),
        "input": {
            "tables": [
                {"name": "item", "rows": sizes.items + 1, "unknown_ids": "refuse"},
                {"name": "action", "rows": ACTIONS, "unknown_ids": "refuse"},
            ],
            "item_table": "item", "action_table": "action", "contextual": [],
            "position": {"direction": "forward", "rows": 2 * sizes.longest + 1, "scale": "sqrt_model_dim"},
            "preprocessing_mlp": None, "time_encoding": False,
            "max_history": sizes.longest, "max_candidates": CANDIDATES[-1],
        },
        "output": {
            "normalization": {"kind": "l2", "eps": 1e-6}, "head": [512, TASKS], "head_bias": True,
            "activation": "relu", "prediction": "sigmoid", "tasks": [f"task{task}" for task in range(TASKS)],
        },
    }


def tensors(sizes, variant):
    """Random weights, of a size at which every part of the model matters to the result."""
    make = torch.Generator().manual_seed(1 if variant == "research" else 2)

    def normal(*shape, scale):
        return torch.randn(*shape, generator=make) * scale

    found = {}
    if variant == "research":
        found["_embedding_module._item_emb.weight"] = normal(sizes.items + 1, sizes.width, scale=1 / 16)
        found["_input_features_preproc._pos_emb.weight"] = normal(sizes.positions, sizes.width, scale=0.2)
    else:
        tables = "_embedding_collection._data_parallel_embedding_collection.embeddings."
        found[f"{tables}item.weight"] = normal(sizes.items + 1, sizes.width, scale=1 / 16)
        found[f"{tables}action.weight"] = normal(ACTIONS, sizes.width, scale=1 / 16)
        positions = "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight"
        found[positions] = normal(2 * sizes.longest + 1, sizes.width, scale=0.2)
        found["_mlp._mlp.0.weight"], found["_mlp._mlp.0.bias"] = normal(512, sizes.width, scale=1.0), normal(512, scale=0.1)
        found["_mlp._mlp.2.weight"] = normal(TASKS, 512, scale=1 / 12)
        found["_mlp._mlp.2.bias"] = normal(TASKS, scale=0.1)
    for layer in range(sizes.layers):
        matrix = normal(sizes.width, 4 * sizes.values, scale=1 / 16)
        if variant == "research":
            prefix = f"_hstu._attention_layers.{layer}."
            found[f"{prefix}_uvqk"] = matrix
            found[f"{prefix}_o.weight"] = normal(sizes.width, sizes.values, scale=1 / 16)
            found[f"{prefix}_o.bias"] = normal(sizes.width, scale=0.1)
            found[f"{prefix}_rel_attn_bias._ts_w"] = normal(129, scale=0.5)
            found[f"{prefix}_rel_attn_bias._pos_w"] = normal(2 * sizes.positions - 1, scale=0.5)
            continue
        prefix = f"_hstu_block._attention_layers.{layer}."
        found[f"{prefix}_linear_uvqk_weight"] = matrix
        found[f"{prefix}_linear_uvqk_bias"] = normal(4 * sizes.values, scale=0.1)
        found[f"{prefix}_linear_proj_weight"] = normal(sizes.values, sizes.width, scale=1 / 16)
        for norm, width in (("input", sizes.width), ("output", sizes.values)):
            found[f"{prefix}_{norm}_layernorm_weight"] = 1 + normal(width, scale=0.2)
            found[f"{prefix}_{norm}_layernorm_bias"] = normal(width, scale=0.1)
    return found


def write_checkpoint(directory, variant, sizes=SIZES):
    directory.mkdir(parents=True, exist_ok=True)
    config = research_config(sizes) if variant == "research" else nvidia_config(sizes)
    (directory / "config.json").write_text(json.dumps(config))
    weights = tensors(sizes, variant)
    safetensors.torch.save_file(weights, str(directory / "model.safetensors"))
    rows = range(1, sizes.items + 1)
    lines = (json.dumps({"item_id": f"i{row}", "sid": [row]}) for row in rows)
    (directory / "catalog.jsonl").write_text("\n".join(lines) + "\n")
    return weights
