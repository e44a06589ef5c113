"""What the converters share: reading state dicts without running what is in them, and writing a directory beamline loads.

Place in the flow: `research.py`, `dlrm.py` and `nvidia.py` read with `load`, take every tensor they know out of a `State`, and
`write`. Invariants: nothing is unpickled but tensors and plain containers; a tensor nobody took is an error, not a loss;
config.json is written last, so that a conversion that was cut off does not load. What must not be here: the names and constants
of one format. """

import json
import os
import pickle

import torch
from safetensors.torch import load_file, save_file

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHARD_BYTES = 8 << 30


def refuse(message):
    raise SystemExit(f"refused: {message}")


def load(path):
    """A state dict, or whatever dictionary holds it, from a safetensors file or a pickle of tensors and plain containers."""
    if not os.path.isfile(path):
        refuse(f"{path}: no such file")
    if path.endswith(".safetensors"):
        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()
        named = [line.strip() for line in reason if "GLOBAL" in line or "global" in line]
        refuse(
            f"{path}: not a pickle of tensors and plain containers alone, and nothing else is unpickled, since a pickle can run any program. "
            f"Save the state dict by itself where it was trained. ({(named or reason or ['damaged'])[0]})"
        )
    if not isinstance(loaded, dict):
        refuse(f"{path} holds no dictionary")
    return loaded


def unprefixed(tensors):
    """Without the `module.` that wrappers for parallel training put in front of every name."""
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name[len("module.") :]: tensor for name, tensor in tensors.items()}
    return dict(tensors)


class State:
    """Tensors by name, each to be taken once."""

    def __init__(self, tensors):
        if not isinstance(tensors, dict) or not tensors:
            refuse("no state dict, or an empty one")
        self.tensors = unprefixed(tensors)
        other = [name for name, tensor in self.tensors.items() if not isinstance(tensor, torch.Tensor)]
        if other:
            refuse(f"not tensors: {', '.join(map(str, other[:5]))}")
        self.taken = {}

    def __contains__(self, name):
        return name in self.tensors

    def shape(self, name):
        if name not in self.tensors:
            refuse(f"there is no {name}: not a checkpoint of this format")
        return list(self.tensors[name].shape)

    def keep(self, name, *shape):
        """Takes a tensor into the result; its shape must be this one."""
        self.taken[name] = self.drop(name, *shape)

    def drop(self, name, *shape):
        """Takes a tensor out and returns it."""
        if self.shape(name) != list(shape):
            refuse(f"{name} has shape {self.shape(name)}, expected {list(shape)}: the options or other tensors contradict it")
        return self.tensors.pop(name)

    def numbers(self, prefix):
        """How many layers there are: the numbers that follow a prefix, which must be 0, 1, .."""
        found = {name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix)}
        count = len(found)
        if not count or found != {str(number) for number in range(count)}:
            refuse(f"layers {prefix}: found {sorted(found)}, expected 0, 1, ..")
        return count

    def finish(self):
        """The tensors that were kept, when none is left."""
        if self.tensors:
            left = sorted(self.tensors)
            more = f" and {len(left) - 8} more" if len(left) > 8 else ""
            refuse(f"tensors that this converter does not know: {', '.join(left[:8])}{more}")
        return self.taken


def divide(name, total, parts):
    """Equal parts of a width."""
    if parts < 1 or total < 1 or total % parts:
        refuse(f"{name}: {total} is not {parts} equal parts")
    return total // parts


def fields(what, values, required, optional=()):
    """The fields of a JSON object that an author writes: all there, none unknown."""
    if not isinstance(values, dict):
        refuse(f"{what}: expected an object")
    missing = [name for name in required if name not in values]
    unknown = [name for name in values if name not in required and name not in optional]
    if missing or unknown:
        refuse(
            f"{what}: "
            + "; ".join(f"{kind} {', '.join(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names)
        )
    return values


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        refuse(f"{path}: {error}")


def write(directory, config, tensors, shard_bytes=SHARD_BYTES):
    """model.safetensors, or shards and their index, then config.json. Types are kept; double precision becomes single."""
    make_directory(directory)
    stored, seen = {}, set()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach()
        if tensor.dtype == torch.float64:
            print(f"note: {name} is rounded from double to single precision")
            tensor = tensor.float()
        if tensor.dtype not in FLOATS:
            refuse(f"{name} has type {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            refuse(f"{name} holds NaN or infinity")
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    shards, size = [{}], 0
    for name, tensor in stored.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += bytes_
    if len(shards) == 1:
        save_file(shards[0], os.path.join(directory, "model.safetensors"))
    else:
        names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
        for name, shard in zip(names, shards):
            save_file(shard, os.path.join(directory, name))
        index = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        with open(os.path.join(directory, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
            json.dump({"metadata": {}, "weight_map": index}, file, indent=1)
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)
        file.write("\n")


def make_directory(directory):
    if os.path.isdir(directory) and os.listdir(directory):
        refuse(f"{directory} is not empty")
    os.makedirs(directory, exist_ok=True)


def write_catalog(directory, rows, item_ids=None):
    """catalog.jsonl: the semantic ID of an HSTU item is its row. `rows` says the row of each number the checkpoint knows an
    item by; the item id is that number, or what a file of names says. With a file, items without a name are left out."""
    named = read_item_ids(item_ids) if item_ids else {number: {"item_id": str(number)} for number in rows}
    unknown = [number for number in named if number not in rows]
    if unknown:
        print(f"note: {len(unknown)} items of {item_ids} have no row, as {unknown[0]}")
    known = sorted(((rows[number], item) for number, item in named.items() if number in rows), key=lambda pair: pair[0])
    ids = set()
    path = os.path.join(directory, "catalog.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for row, item in known:
            item_id = item.pop("item_id")
            if item_id in ids:
                refuse(f"item id {item_id!r} of row {row} is there twice")
            ids.add(item_id)
            item.pop("sid", None)
            file.write(json.dumps({"item_id": item_id, "sid": [row], **item}) + "\n")
    print(f"{path}: {len(ids)} items")


def add_catalog_options(parser, what):
    parser.add_argument("--catalog", action="store_true", help="also write catalog.jsonl, one line an item")
    parser.add_argument(
        "--item-ids",
        metavar="FILE",
        help=f"names for the catalog, lines `{what}<TAB>item id` or JSON lines with number (the {what}), item_id, tags ..; items without are left out",
    )


def read_item_ids(path):
    """{number: fields} from lines `number<TAB>item id`, or JSON objects with `number`, `item_id` and whatever else the catalog
    shall hold."""
    items = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                if line.lstrip().startswith("{"):
                    item = json.loads(line)
                    row = int(item.pop("number"))
                    item["item_id"] = str(item["item_id"])
                else:
                    row, item_id = line.rstrip("\r\n").split("\t")
                    row, item = int(row), {"item_id": item_id}
            except (ValueError, KeyError) as error:
                refuse(f"{path}:{number}: {error}")
            if row in items:
                refuse(f"{path}:{number}: {row} is there twice")
            items[row] = item
    return items
