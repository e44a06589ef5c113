"""Tables of NVIDIA's dynamic embeddings, from their raw files to rows.

Place in the flow: `nvidia.py` puts the rows into the converted directory and the keys into the catalog. A table is a hash table
from int64 keys to rows, dumped by every rank into

    {table}_emb_keys.rank_R.world_size_W      int64, little endian
    {table}_emb_values.rank_R.world_size_W    float32, one row a key, in the order of the keys
    {table}_emb_scores.., _opt_args.json      for going on with training: not read

Rows of the result are in ascending order of the keys, so that the same table gives the same rows however many ranks held it.
"""

import glob
import os
import re

import numpy as np

from checkpoint import refuse

NAME = re.compile(r"(?P<table>.+)_emb_keys\.rank_(?P<rank>\d+)\.world_size_(?P<world>\d+)")


def tables(directory):
    """{table: directory of its files}, anywhere below a directory."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), "**", "*_emb_keys.rank_*"), recursive=True)):
        matched = NAME.fullmatch(os.path.basename(path))
        if matched:
            home = found.setdefault(matched["table"], os.path.dirname(path))
            if home != os.path.dirname(path):
                refuse(f"table {matched['table']} is in {home} and in {os.path.dirname(path)}")
    if not found:
        refuse(f"no dynamic embedding tables under {directory}")
    return found


def read(directory, table, width):
    """(keys [rows] int64 ascending, values [rows, width] float32), of all ranks."""
    files = glob.glob(os.path.join(glob.escape(directory), f"{glob.escape(table)}_emb_keys.rank_*"))
    matches = [matched for matched in (NAME.fullmatch(os.path.basename(path)) for path in files) if matched]
    worlds, ranks = {int(matched["world"]) for matched in matches}, sorted(int(matched["rank"]) for matched in matches)
    if len(worlds) != 1 or ranks != list(range(max(worlds))):
        refuse(f"table {table} in {directory}: ranks {ranks} of {sorted(worlds)}, expected all of one number of ranks")
    world, keys, values = max(worlds), [], []
    for rank in ranks:
        suffix = f"rank_{rank}.world_size_{world}"
        paths = [os.path.join(directory, f"{table}_emb_{kind}.{suffix}") for kind in ("keys", "values")]
        if not os.path.exists(paths[1]):
            refuse(f"{paths[1]} is missing")
        sizes = [os.path.getsize(path) for path in paths]
        if sizes[0] % 8 or sizes[1] != sizes[0] // 8 * width * 4:
            refuse(
                f"{paths[1]}: {sizes[1]} bytes for {sizes[0] / 8:g} keys of width {width}, expected {sizes[0] // 8 * width * 4}"
            )
        keys.append(np.fromfile(paths[0], dtype="<i8"))
        values.append(np.fromfile(paths[1], dtype="<f4").reshape(-1, width))
    keys, values = np.concatenate(keys), np.concatenate(values)
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        refuse(f"table {table}: key {keys[twice[0]]} is there twice")
    if not len(keys):
        refuse(f"table {table} is empty")
    return keys, values
