"""CUDA graphs without CUDA, for tests: records operations as they run and runs them again on the same memory.

Stands in for what `shared_prefix` uses of torch.cuda, so that the wiring of graphs (what each reads of the one before,
where inputs are written, what is returned) is tested where there is no GPU. It does not show that CUDA can capture an
operation, only that replaying the recorded ones computes the answer.
"""
import contextlib
import unittest.mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """A graph: operations, arguments and outputs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, recorded in self.calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(function(*args, **kwargs))):
                # Views and results in place are in their memory already.
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def stand_in():
    """While it lasts, torch.cuda's graphs are recordings."""
    names = {
        "CUDAGraph": Recording,
        "graph": lambda graph, pool: graph,
        "graph_pool_handle": lambda: None,
        "Stream": unittest.mock.MagicMock,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": unittest.mock.MagicMock,
        "synchronize": lambda *_: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(unittest.mock.patch.object(torch.cuda, name, value))
        yield
