"""The directory that a trained HSTU is served from: config.json, model.safetensors, catalog.jsonl. Reading and writing, nothing
else."""

import json
import os

import torch
from safetensors.torch import load_file, save

from model import Hstu


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def write_lines(path, lines):
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write(path, model, catalog):
    """Weights in single precision. A directory that is there is overwritten file by file, weights last."""
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as file:
        json.dump(model.config, file, indent=1)
        file.write("\n")
    write_lines(os.path.join(path, "catalog.jsonl"), catalog)
    tensors = {name: tensor.detach().float().contiguous().clone() for name, tensor in model.state_dict().items()}
    # Not `save_file`, which lets nobody but the owner read the file.
    with open(os.path.join(path, "model.safetensors"), "wb") as file:
        file.write(save(tensors))


def read(path, dtype=torch.float64):
    """(model, lines of the catalog)."""
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        model = Hstu(json.load(file)).to(dtype)
    model.load_state_dict(load_file(os.path.join(path, "model.safetensors")))
    return model.eval(), read_lines(os.path.join(path, "catalog.jsonl"))
