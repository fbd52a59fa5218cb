"""Activations that wait for their backward pass in the host's memory (`training.offload_layers`).

A layer's activations are copied while the next layer computes, and let go at its end; in the backward pass they come
back while that of the layer behind computes.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vishwamai_mp.runtime import device, is_accelerator
from vishwamai_mp.runtime.host_copies import HostCopies

_SMALLEST = 2**16  # bytes of a tensor that is worth a copy


def offload_layers(layers: Sequence[nn.Module], count: int) -> None:
    """Let the first `count` layers of a chunk offload their activations."""
    offloading = Offloading(count, device())
    for index, layer in enumerate(layers):
        layer.offloading = partial(offloading.layer, index, layer)  # type: ignore[assignment]


class Offloading:
    """Follows forward passes through the layers of a chunk.

    Args:
        count: how many layers, from the first, are offloaded.
        where: the accelerator.
    """

    def __init__(self, count: int, where: torch.device) -> None:
        self.count, self.copies = count, HostCopies(where)
        self._latest: _Pass | None = None

    @contextmanager
    def layer(self, index: int, layer: nn.Module) -> Iterator[None]:
        """The forward pass of the chunk's layer `index`, from 0."""
        before, self._latest = (self._latest if index else None), None
        if not torch.is_grad_enabled():
            yield
            return
        if index < self.count:
            weights = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
            self._latest = _Pass(self.copies, weights, before)
            with torch.autograd.graph.saved_tensors_hooks(self._latest.pack, _unpack):
                yield
        else:
            yield
        if before:
            before.let_go()


class _Pass:
    """One forward pass of one layer: what it keeps, and the pass before it in the same micro-batch.

    Args:
        copies: of the accelerator.
        weights: storage of what stays where it is.
        before: the pass of the layer before; None: the first.
    """

    def __init__(self, copies: HostCopies, weights: set[int], before: "_Pass | None") -> None:
        self.copies, self.weights, self.before = copies, weights, before
        self.kept: weakref.WeakSet[_Kept] = weakref.WeakSet()  # the graph holds them until they are used
        self._by_place: dict[Any, weakref.ref[_Kept]] = {}
        self._comes = self._arrived = False

    def pack(self, tensor: Tensor) -> Any:
        """In place of what autograd saves. What is saved twice, perhaps in another shape, is copied once."""
        storage = tensor.untyped_storage()
        if (
            not is_accelerator(tensor)
            or tensor.nbytes < _SMALLEST
            or storage._cdata in self.weights
            or not tensor.is_contiguous()
        ):
            return tensor
        place = storage._cdata, tensor.storage_offset(), tensor.numel(), tensor.dtype
        known = self._by_place.get(place, lambda: None)()
        if known is None or known.there is None:
            known = _Kept(self, tensor.detach().view(-1))
            self.kept.add(known)
            self._by_place[place] = weakref.ref(known)
        return known, tensor.shape

    def let_go(self) -> None:
        """Once copies have arrived, the host has all."""
        self.copies.wait()
        self._by_place.clear()
        for kept in self.kept:
            kept.there = None

    def fetch(self) -> None:
        """Begin to bring back what is still needed."""
        if not self._comes:
            self._comes = True
            for kept in self.kept:
                if kept.there is None:
                    kept.there = self.copies.to_device(kept.host)

    def arrive(self) -> None:
        """All of it is there, and the pass before begins to come."""
        if self._arrived:
            return
        self._arrived = True
        self.fetch()
        self.copies.wait()
        if self.before:
            self.before.fetch()


class _Kept:
    """Numbers that a layer's backward pass needs.

    Attributes:
        there: on the accelerator; None: not now.
        host: in the host's memory.
    """

    def __init__(self, owner: _Pass, numbers: Tensor) -> None:
        self.owner, self.host = owner, owner.copies.to_host(numbers)
        self.there: Tensor | None = numbers


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    kept, shape = saved
    kept.owner.arrive()
    return kept.there.view(shape)
