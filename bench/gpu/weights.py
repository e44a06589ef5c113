"""Weights of a shape under Hugging Face's names: random from a seed, made on the device, or read from a checkpoint.

Both baselines take their weights from here, so that on one device, in one precision and with one seed they compute the
same function. Values are normal; nothing about speed depends on them, except that a multiplication of zeros draws less
power, which is why they are not zeros.
"""
import glob
import os

import torch


def tensor_sizes(shape):
    """Name -> size, in the order in which they are drawn."""
    sizes = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        sizes |= {
            prefix + "input_layernorm.weight": (shape.hidden,),
            prefix + "self_attn.q_proj.weight": (shape.queries, shape.hidden),
            prefix + "self_attn.k_proj.weight": (shape.keys, shape.hidden),
            prefix + "self_attn.v_proj.weight": (shape.keys, shape.hidden),
            prefix + "self_attn.q_norm.weight": (shape.head_dim,),
            prefix + "self_attn.k_norm.weight": (shape.head_dim,),
            prefix + "self_attn.o_proj.weight": (shape.hidden, shape.queries),
            prefix + "post_attention_layernorm.weight": (shape.hidden,),
            prefix + "mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
            prefix + "mlp.up_proj.weight": (shape.intermediate, shape.hidden),
            prefix + "mlp.down_proj.weight": (shape.hidden, shape.intermediate),
        }
    sizes["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        sizes["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return sizes


def random_weights(shape, device, dtype, seed=0, spread=0.02):
    """Normal with standard deviation `spread`; norms around one."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, size in tensor_sizes(shape).items():
        tensor = torch.empty(size, device=device, dtype=dtype)
        if len(size) == 1:
            tensor.normal_(1.0, 0.1, generator=generator)
        else:
            tensor.normal_(0.0, spread, generator=generator)
        weights[name] = tensor
    return weights


def checkpoint_weights(shape, directory, device, dtype):
    """From *.safetensors of a directory. Every tensor of the shape must be there in its size; more are ignored."""
    from safetensors import safe_open

    wanted, weights = tensor_sizes(shape), {}
    for path in sorted(glob.glob(os.path.join(directory, "*.safetensors"))):
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in wanted.keys() & set(file.keys()):
                weights[name] = file.get_tensor(name).to(dtype)
    for name, size in wanted.items():
        if name not in weights:
            raise SystemExit(f"{directory}: no tensor {name}")
        if tuple(weights[name].shape) != size:
            raise SystemExit(f"{directory}: {name} is {tuple(weights[name].shape)}, the shape says {size}")
    return weights
