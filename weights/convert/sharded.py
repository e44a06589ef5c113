"""A directory of torch.distributed.checkpoint as whole tensors, on one machine and without a process group.

Place in the flow: `dlrm.py` reads the embedding tables of the production model with it. Types are kept. Whole tables are held
in memory, so this needs as much of it as the checkpoint is large. Invariant: the description of such a directory (`.metadata`)
is a pickle, which torch reads without any restriction; here only the classes that a description consists of may be in it. The
tensors themselves torch reads with `weights_only`. """

import os
import pickle
import warnings

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoint import refuse

PLAIN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "builtins": {"set", "frozenset"},
}


class _Description(pickle.Unpickler):
    def find_class(self, module, name):
        dtype = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.memory_format))
        if dtype or name in PLAIN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


class _Reader(FileSystemReader):
    def read_metadata(self, *arguments, **named):
        path = os.path.join(self.path, ".metadata")
        try:
            with open(path, "rb") as file:
                metadata = _Description(file).load()
        except (OSError, pickle.UnpicklingError, AttributeError, EOFError, ValueError, IndexError, KeyError, TypeError) as error:
            refuse(f"{path}: {error}")
        if getattr(metadata, "storage_meta", None) is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def load_tensors(directory):
    """Every tensor by name; whatever else there is is left alone and named."""
    reader = _Reader(directory)
    tensors = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        else:
            print(f"note: {directory}: {name} is no tensor, left out")
    if not tensors:
        refuse(f"{directory} holds no tensor")
    with warnings.catch_warnings():
        # That there is no process group is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
