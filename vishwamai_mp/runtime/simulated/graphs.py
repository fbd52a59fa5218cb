"""CUDA graphs on the simulated accelerator: what `torch.cuda` has for them, with the refusals of a capture.

A graph has kernels, FLOPs, exchanges and the memory of its pool; a replay adds all but the memory, which stays, and is
one launch. Nothing is computed, here as elsewhere in the simulation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from vishwamai_mp.runtime.simulated.memory import GraphPool
from vishwamai_mp.runtime.simulated.recorder import Captured, Recorder


def _recorder() -> Recorder | None:
    modes = (mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Recorder))
    return next(modes, None)


class CUDAGraph:
    """As torch.cuda's.

    Attributes:
        captured: what it holds; None: nothing was captured yet.
    """

    captured: Captured | None = None

    def replay(self) -> None:
        recorder = _recorder()
        assert recorder is not None
        if self.captured is None:
            raise RuntimeError("a CUDA graph is replayed that holds nothing")
        recorder.replay(self.captured)


@contextmanager
def graph(
    cuda_graph: CUDAGraph, pool: GraphPool | None = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """Meanwhile nothing runs: it is captured."""
    recorder = _recorder()
    assert recorder is not None
    with recorder.capturing(pool or GraphPool()) as captured:
        yield
    cuda_graph.captured = captured


def graph_pool_handle() -> GraphPool:
    return GraphPool()


def is_current_stream_capturing() -> bool:
    recorder = _recorder()
    return recorder is not None and recorder.captured is not None


def refuse_in_capture(what: str) -> None:
    """Raise where CUDA would, if a graph is being captured."""
    if recorder := _recorder():
        recorder.refuse_in_capture(what)
