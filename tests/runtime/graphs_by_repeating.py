"""CUDA graphs where there is no CUDA: a graph is the list of operators that ran, and to replay is to run them again.

Results go where they were during capture, so passes that were captured read and write the same memory each time, as a
GPU's do. What is not shown: memory that a pool gives to several graphs, and the rules of a capture.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork, Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_EMPTY = ("aten::empty", "aten::new_empty")


class _Recording(TorchDispatchMode):
    def __init__(self, graph: "CUDAGraph") -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":  # to wait is to copy, which must not be recorded: it is of this exchange only
            out = tree_map(_waited, out)
        if not func.is_view and not func.name().startswith(_EMPTY):
            self.graph.operators.append((func, args, kwargs or {}, out))
        return out


def _waited(made: Any) -> Any:
    if not isinstance(made, torch.ScriptObject):
        return made
    Work.unbox(made).wait()
    return FakeWork().boxed()


class CUDAGraph:
    def __init__(self) -> None:
        self.operators: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.operators:
            again = tree_map(_waited, func(*args, **kwargs))
            for made, place in zip(tree_leaves(again), tree_leaves(out), strict=True):
                if isinstance(made, torch.Tensor) and made.data_ptr() != place.data_ptr():
                    place.detach().copy_(made)


class Repeating:
    """What `torch.cuda` has for graphs."""

    CUDAGraph = CUDAGraph
    is_available = staticmethod(lambda: False)
    Stream = staticmethod(lambda: None)
    stream = staticmethod(lambda _: nullcontext())
    synchronize = staticmethod(lambda: None)
    graph_pool_handle = staticmethod(lambda: None)

    @staticmethod
    @contextmanager
    def graph(graph: Any, pool: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        with _Recording(graph):
            yield
