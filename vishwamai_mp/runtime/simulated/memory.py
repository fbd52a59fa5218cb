"""Memory of a device, counted tensor by tensor as storage comes and goes."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_ACTIVATIONS, _OPTIMIZER, _GRAPHS = "activations", "optimizer", "graphs"
_SPANS = 512  # of a step's course, at least, once there are as many events
_BLOCK = 512  # bytes: CUDA's allocator gives whole ones


class GraphPool:
    """Memory of CUDA graphs: what one of them lets go of another of the same pool may take, and nobody else.

    Attributes:
        live: bytes of tensors in it.
        held: the most of these that there ever were, which stay taken.
    """

    def __init__(self) -> None:
        self.live = self.held = 0


class Memory:
    """Bytes in use on a device.

    What is allocated is of a kind: `claim` says which tensors are parameters and gradients; what an optimizer makes in
    its step is the optimizer's; pools of CUDA graphs are "graphs"; all else are activations, told apart by the class of
    the module in whose forward pass they were made, or "backward".

    Args:
        device: whose tensors count.

    Attributes:
        now: bytes in use.
        peak: most bytes in use at once since `restart`.
        at_peak: what they consisted of, by kind.
        activations_at_peak: what the activations among them consisted of, by class of module.
        course: bytes in use since `restart`: the most in each of some equally long spans of allocations and releases.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.block = 1 if device.type == "cpu" else _BLOCK
        self.now = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.activations_at_peak: dict[str, int] = {}
        # By storage: reference, bytes, kind, class of module, pool.
        self._held: dict[int, tuple[Any, int, str, str, GraphPool | None]] = {}
        self._pool: GraphPool | None = None
        self._by_kind: Counter[str] = Counter()
        self._by_module: Counter[str] = Counter()
        self._kind = _ACTIVATIONS
        self._modules: list[str] = []
        self.course: list[int] = []
        self._span, self._events = 1, 0

    def restart(self) -> None:
        """Look for the peak from now on."""
        self.peak = 0
        self.course, self._span, self._events = [self.now], 1, 0
        self._note_peak()

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it is counted or another device's."""
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        reference = weakref.ref(storage, lambda _: self._drop(key))
        module = self._modules[-1] if self._modules else "backward"
        self._hold(key, reference, storage.nbytes(), self._kind, module, self._pool)

    def claim(self, kind: str, *tensors: Tensor) -> None:
        """Say what tensors are that were or were not seen before."""
        for tensor in tensors:
            self.see(tensor)
            entry = self._held.get(tensor.untyped_storage()._cdata)
            if entry:
                self._drop(tensor.untyped_storage()._cdata)
                self._hold(tensor.untyped_storage()._cdata, entry[0], entry[1], kind, *entry[3:])

    @contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """What is allocated meanwhile is of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def allocating_from(self, pool: GraphPool) -> Iterator[None]:
        """What is allocated meanwhile is of a pool of CUDA graphs."""
        self._pool = pool
        try:
            yield
        finally:
            self._pool = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile modules and optimizers tell where they are, and storage that changes its size is counted anew."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            key = storage._cdata
            result = resize(storage, size)
            entry = self._held.get(key)
            if entry is not None:
                self._drop(key)
                self._hold(key, entry[0], storage.nbytes(), *entry[2:])
            return result

        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            register_optimizer_step_pre_hook(lambda *_: self._set_kind(_OPTIMIZER)),
            register_optimizer_step_post_hook(lambda *_: self._set_kind(_ACTIVATIONS)),
        ]
        try:
            with mock.patch.object(torch.UntypedStorage, "resize_", counted):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def within(self) -> tuple[str, ...]:
        """Classes of the modules whose forward passes run, outermost first."""
        return tuple(self._modules)

    def _set_kind(self, kind: str) -> None:
        self._kind = kind

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._modules.append(type(module).__name__)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        # An error in a forward pass leaves modules behind that were never left.
        while self._modules and self._modules.pop() != type(module).__name__:
            pass

    def _hold(self, key: int, reference: Any, size: int, kind: str, module: str, pool: GraphPool | None) -> None:
        size = -(-size // self.block) * self.block
        self._held[key] = reference, size, kind, module, pool
        if pool:
            pool.live += size
            kind, size = _GRAPHS, max(0, pool.live - pool.held)
            pool.held += size
        self.now += size
        self._by_kind[kind] += size
        if kind == _ACTIVATIONS:
            self._by_module[module] += size
        if self.now > self.peak:
            self._note_peak()
        self._note_course()

    def _drop(self, key: int) -> None:
        _, size, kind, module, pool = self._held.pop(key)
        if pool:
            pool.live -= size
            return
        self.now -= size
        self._by_kind[kind] -= size
        if kind == _ACTIVATIONS:
            self._by_module[module] -= size
        self._note_course()

    def _note_course(self) -> None:
        """Spans grow twice as long whenever there are too many of them."""
        place, self._events = self._events // self._span, self._events + 1
        if place < len(self.course):
            self.course[place] = max(self.course[place], self.now)
            return
        self.course.append(self.now)
        if len(self.course) == 2 * _SPANS:
            self.course = [max(pair) for pair in zip(self.course[::2], self.course[1::2], strict=True)]
            self._span *= 2

    def _note_peak(self) -> None:
        self.peak = self.now
        self.at_peak, self.activations_at_peak = dict(self._by_kind), dict(self._by_module)
