"""What a rank does, seen at torch's dispatcher: every operator, collective and read by the host."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vishwamai_mp.runtime.simulated.memory import GraphPool, Memory

_aten = torch.ops.aten
# Operators that make or describe a tensor without running a kernel, views aside.
_NO_KERNEL = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten.lift_fresh.default,
    _aten._unsafe_view.default,
    _aten.set_.source_Storage_storage_offset,
    _aten.set_.source_Storage,
    _aten.set_.source_Tensor,
}
_READS = {_aten._local_scalar_dense.default, _aten.equal.default}
_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "recv_": "receive",
}
_PLAIN = {"FakeTensor", "Tensor", "Parameter"}
_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Communication:
    """Collectives of a kind.

    Attributes:
        operation: all_reduce, all_gather, reduce_scatter, broadcast, all_to_all, send, receive, barrier, ….
        group: megatron-core's name of the process group, or "WORLD".
        size: its ranks.
        count: how many there were.
        bytes: of this rank's tensors in all of them; where one side is the whole and the other a part, of the whole.
    """

    operation: str
    group: str
    size: int
    count: int
    bytes: int


@dataclass
class Captured:
    """What a CUDA graph holds: as of `Recorder`, of one replay."""

    flops: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    launches_within: Counter[tuple[str, ...]] = field(default_factory=Counter)
    sent: dict[tuple[str, str, int], list[int]] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """Counts what is dispatched for a device.

    Args:
        device: whose tensors count.
        simulates: there are no peers and no values: collectives are noted and leave tensors as they are, and what the
            host reads is 1 (True, 1.0). Otherwise everything is done as without the recorder.

    Attributes:
        memory: bytes in use.
        flops: of matrix products and attention, a multiply-add counted as two; by operator.
        launches: operators that ran a kernel on the device, by operator; "graph": replays of CUDA graphs.
        replayed: kernels within those, by operator.
        captured: the graph that is being captured, if one is.
        launches_within: the same by the classes of the modules in whose forward pass they ran, outermost first; of
            backward passes by none.
        waits: reads of the device by the host, by place in the program ("file:line").
        host_copies: copies from the host to the device, by place.
    """

    def __init__(self, device: torch.device, simulates: bool) -> None:
        super().__init__()
        self.device, self.simulates, self.memory = device, simulates, Memory(device)
        self.captured: Captured | None = None
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, except which memory is in use."""
        self.memory.restart()
        self.flops: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.launches_within: Counter[tuple[str, ...]] = Counter()
        self.replayed: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.host_copies: Counter[str] = Counter()
        self._sent: dict[tuple[str, str, int], list[int]] = {}

    @property
    def communications(self) -> list[Communication]:
        """By operation and group."""
        return [Communication(*key, count, size) for key, (count, size) in sorted(self._sent.items())]

    def note_wait(self) -> None:
        """The host waits for the device, in the program's line that is running."""
        if self.device.type != "cpu":
            self.refuse_in_capture("the host waits for the device")
            self.waits[_place()] += 1

    @contextmanager
    def capturing(self, pool: GraphPool) -> Iterator[Captured]:
        """What is dispatched meanwhile is of a CUDA graph, and what is allocated is of its pool."""
        self.refuse_in_capture("another graph is to be captured")
        outside = self.flops, self.launches, self.launches_within, self._sent
        self.captured = one = Captured()
        self.flops, self.launches, self.launches_within, self._sent = (
            one.flops,
            one.launches,
            one.launches_within,
            one.sent,
        )
        try:
            with self.memory.allocating_from(pool):
                yield one
        finally:
            self.captured = None
            self.flops, self.launches, self.launches_within, self._sent = outside

    def replay(self, graph: Captured) -> None:
        """Count what a graph holds, as one launch."""
        self.refuse_in_capture("a graph is replayed")
        self._launched("graph")
        self.flops.update(graph.flops)
        self.replayed.update(graph.launches)
        for key, (count, size) in graph.sent.items():
            entry = self._sent.setdefault(key, [0, 0])
            entry[0] += count
            entry[1] += size

    def refuse_in_capture(self, what: str) -> None:
        """Raise as CUDA does where a capture would have to be left, and say in which line."""
        if self.captured is not None:
            raise RuntimeError(f"{_place()}: operation not permitted while a CUDA graph is captured: {what}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(cls.__name__ not in _PLAIN for cls in types):
            return NotImplemented  # of several tensors, which it takes apart: their operators come here
        if func.namespace == "simulated_accelerator":
            name, _, workspaces, flops = args
            self.memory.claim("workspaces", *workspaces)
            self._launched(name)
            self.flops.update({name: flops} if flops else {})
            return None
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if func in _READS and self._is_here(args[0]):
            self.note_wait()
        if func in _READS and self.simulates and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():  # of the host, made before the simulation began
                return func(*args, **kwargs)
        if func in _READS and self.simulates and args[0].constant is None:
            is_bool = func is _aten.equal.default or args[0].dtype == torch.bool
            return True if is_bool else 1.0 if args[0].is_floating_point() else 1
        if func is _aten.nonzero.default and self._is_here(args[0]):
            self.note_wait()  # its result's size
            if self.simulates:  # as if all were chosen
                return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        self._note_copy(func, args, kwargs)
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _is_here(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.device.type == self.device.type

    def _note_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        if self.device.type == "cpu":
            return
        if func is _aten._to_copy.default:
            to, source = torch.device(kwargs.get("device") or args[0].device).type, args[0]
            waits = not kwargs.get("non_blocking")
        elif func is _aten.copy_.default:
            to, source = args[0].device.type, args[1]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            return
        if self._is_here(source) and to == "cpu" and waits:
            self.note_wait()
        elif source.device.type == "cpu" and to == self.device.type:
            self.refuse_in_capture("a copy from the host")
            self.host_copies[_place()] += 1
            if isinstance(source, FakeTensor):
                source.constant = None  # a number that torch remembers; it would try to copy it to the device

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        made = [leaf for leaf in tree_leaves(out) if self._is_here(leaf)]
        for tensor in made:
            self.memory.see(tensor)
        name = str(func._overloadpacket).removeprefix("aten.")
        if func._overloadpacket in flop_registry:
            self.flops[name] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        elif name == "mkldnn._linear_pointwise":
            self.flops[name] += 2 * args[0].numel() * args[1].shape[0]
        if func.is_view or func in _NO_KERNEL or func.namespace == "prim":
            return
        if made or any(self._is_here(leaf) for leaf in tree_leaves((args, kwargs))):
            self._launched(name)

    def _launched(self, name: str) -> None:
        self.launches[name] += 1
        self.launches_within[self.memory.within] += 1

    def _communicate(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._overloadpacket.__name__
        group = ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
        size = max(_bytes(arg) for arg in args[:2])
        if group.size() > 1:
            described = group.group_desc if group.group_desc not in ("", "undefined") else "WORLD"
            key = (_NAMES.get(name, name), described.removesuffix("_GROUP").lower(), group.size())
            entry = self._sent.setdefault(key, [0, 0])
            entry[0] += 1
            entry[1] += 0 if name == "barrier" else size
        if not self.simulates:
            return func(*args, **kwargs)
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)


def _bytes(tensors: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


def _place() -> str:
    """The innermost line of this package, of megatron-core or of Transformer Engine that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if _PACKAGE in path.parents and Path(__file__).parent not in path.parents:
            return f"{path.relative_to(_PACKAGE.parent)}:{frame.f_lineno}"
        for package in ("megatron", "transformer_engine"):
            if package in path.parts:
                return f"{'/'.join(path.parts[path.parts.index(package) :])}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
