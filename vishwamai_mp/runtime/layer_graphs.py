"""CUDA graphs of layers: a layer's forward pass and its backward pass are launched at once each.

The first step runs as ever and tells what layers are given and how many micro-batches are under way at a time. Then
each layer is captured once for each of these places: a micro-batch's forward passes in their order, then its backward
passes in theirs, which is the order that graphs of one memory pool must be replayed in. A place is taken by a
micro-batch's first forward pass and free again after its last backward pass.

Not megatron-core's own graphs. In 0.16.1 `_CudaGraphRunner.create_fwd_graph` gives the buffer that a first layer reads
back to `tensor_reuse_pool` after the forward pass is captured; a gradient is then written there before the layer's
backward pass reads it. 0.19.2 has no such pool, and another DistributedDataParallel to go with it.

Shapes: S tokens (local), B micro-batch, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import cuda_graphs
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vishwamai_mp.runtime.device import device

LayerPass = Callable[[Tensor], Tensor]  # of hidden states (S, B, D); all else that it reads is the same in each pass


@dataclass
class _Captured:
    """One layer's graphs, of one place."""

    given: Tensor
    made: Tensor
    forward: Any
    gradient: Tensor | None = None  # of `made`
    passed_on: Tensor | None = None  # of `given`
    backward: Any = None


@dataclass
class _Layer:
    """A layer that is captured.

    Attributes:
        follows: whether the layer before it is captured too, and its output this one's input.
        run: the pass, from the first step: it holds what the graphs read beside hidden states, such as angles.
        given: shape and type of its hidden states.
        captured: by place.
    """

    module: nn.Module
    follows: bool
    run: LayerPass | None = None
    given: tuple[torch.Size, torch.dtype] | None = None
    captured: list[_Captured] = field(default_factory=list)


class LayerGraphs:
    """Those of the layers of one model chunk.

    Args:
        chunk: whose gradients are summed and reduced.
        layers: of the chunk, in order; each has a `graphs`, None by default, that its forward pass goes through.
        is_captured: which of them are.
    """

    def __init__(
        self, chunk: DistributedDataParallel, layers: Sequence[nn.Module], is_captured: Sequence[bool]
    ) -> None:
        self.chunk = chunk
        follows = [False, *is_captured[:-1]]
        self.layers = [
            _Layer(layer, after) for layer, after, wanted in zip(layers, follows, is_captured, strict=True) if wanted
        ]
        for index, layer in enumerate(self.layers):
            layer.module.graphs = _Entrance(self, index)  # type: ignore[assignment]
        self._under_way = self._most = 0
        self._free: list[int] = []
        self._place: int | None = None  # of the micro-batch whose forward pass runs
        self.is_ready = False

    def run(self, index: int, run: LayerPass, hidden: Tensor) -> Tensor:
        """A layer's forward pass, in training."""
        layer = self.layers[index]
        if not self.is_ready:
            return self._watched(layer, run, hidden) if index == 0 else self._noted(layer, run, hidden)
        if index == 0:
            self._place = self._free.pop(0) if self._free else None
        if self._place is None or layer.captured[self._place].given.shape != hidden.shape:
            return run(hidden)
        return _Replay.apply(hidden, self, index, self._place)

    def _watched(self, layer: _Layer, run: LayerPass, hidden: Tensor) -> Tensor:
        """The first layer's pass, by which micro-batches are counted."""
        self._under_way += 1
        self._most = max(self._most, self._under_way)
        made = self._noted(layer, run, hidden)

        def passed(_: Tensor) -> None:
            self._under_way -= 1

        made.register_hook(passed)
        return made

    def _noted(self, layer: _Layer, run: LayerPass, hidden: Tensor) -> Tensor:
        layer.run, layer.given = run, (hidden.shape, hidden.dtype)
        return run(hidden)

    def capture(self) -> None:
        """Capture what the steps before have shown, between two steps; once."""
        if self.is_ready or not self._most:
            return
        on = torch.get_device_module(device().type)
        with _hooks_silent():
            self._run_once(on)
            on.synchronize()
            for _ in range(self._most):
                self._capture_place(on)
        self._free = list(range(self._most))
        self.is_ready = True

    def _run_once(self, on: Any) -> None:
        """Each layer beside the stream that computes: what libraries allocate at first use must not be captured."""
        on.synchronize()
        with on.stream(on.Stream()):
            for layer in self.layers:
                given = self._zeros(layer).requires_grad_()
                made = layer.run(given)  # type: ignore[misc]
                torch.autograd.grad(made, [given, *layer.module.parameters()], torch.zeros_like(made))

    def _capture_place(self, on: Any) -> None:
        pool, made = on.graph_pool_handle(), None
        for layer in self.layers:
            given = made.detach() if layer.follows and made is not None else self._zeros(layer)
            given.requires_grad_()
            graph = on.CUDAGraph()
            with on.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL's thread goes on beside it
                made = layer.run(given)  # type: ignore[misc]
            layer.captured.append(_Captured(given, made, graph))
        passed_on = None
        for layer in reversed(self.layers):
            captured = layer.captured[-1]
            captured.gradient = torch.zeros_like(captured.made) if passed_on is None else passed_on
            parameters, graph = list(layer.module.parameters()), on.CUDAGraph()
            with on.graph(graph, pool=pool, capture_error_mode="thread_local"):
                passed_on, *gradients = torch.autograd.grad(
                    captured.made, [captured.given, *parameters], captured.gradient
                )
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if not getattr(parameter, "grad_added_to_main_grad", False):  # Transformer Engine's products may
                        parameter.main_grad.add_(gradient)  # type: ignore[attr-defined]
                del gradients, gradient
            captured.passed_on, captured.backward, captured.made = passed_on, graph, captured.made.detach()
            passed_on = passed_on if layer.follows else None

    @staticmethod
    def _zeros(layer: _Layer) -> Tensor:
        assert layer.given is not None
        shape, dtype = layer.given
        return torch.zeros(shape, dtype=dtype, device=device())

    def leave(self, index: int, place: int) -> None:
        """A layer's backward pass is launched: its gradients may be reduced."""
        if stream := getattr(self.chunk, "stream_of_gradients", None):  # a bucket may hold other layers' as well
            torch.get_device_module(device().type).current_stream().wait_stream(stream)
        for parameter in self.layers[index].module.parameters():
            if self.chunk.ddp_config.overlap_grad_reduce:
                group = self.chunk.param_to_bucket_group[parameter]
                group.register_grad_ready(parameter, self.chunk.force_all_reduce)
        if index == 0:
            self._free.append(place)


class _Entrance:
    """What a layer has in `graphs`: not a module, so that it is in no checkpoint."""

    def __init__(self, graphs: LayerGraphs, index: int) -> None:
        self._graphs, self._index = graphs, index

    def __call__(self, run: LayerPass, hidden: Tensor) -> Tensor:
        return self._graphs.run(self._index, run, hidden)


class _Replay(torch.autograd.Function):
    """A layer's passes as graphs. Gradients of parameters go to their sums within the graph."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, graphs: LayerGraphs, index: int, place: int) -> Tensor:
        layer = graphs.layers[index]
        captured = layer.captured[place]
        for module in layer.module.modules():
            if module is not layer.module:  # whose own have run
                for hook in module._forward_pre_hooks.values():  # megatron-core's, which wait for gathered weights
                    hook(module, ())
        if not _same(captured.given, hidden):
            captured.given.detach().copy_(hidden)
        captured.forward.replay()
        ctx.graphs, ctx.index, ctx.place = graphs, index, place
        return captured.made.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer = ctx.graphs.layers[ctx.index]
        captured = layer.captured[ctx.place]
        if not _same(captured.gradient, gradient):
            captured.gradient.copy_(gradient)
        captured.backward.replay()
        ctx.graphs.leave(ctx.index, ctx.place)
        # What leaves the graphs may be on its way to another stage when the next micro-batch writes here.
        return (captured.passed_on.detach() if layer.follows else captured.passed_on.clone()), None, None, None


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are the same memory."""
    storages = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return storages and one.storage_offset() == other.storage_offset() and one.stride() == other.stride()


@contextmanager
def _hooks_silent() -> Iterator[None]:
    """Meanwhile megatron-core's hooks of parameters neither gather nor reduce."""
    cuda_graphs._set_capture_start()
    try:
        yield
    finally:
        cuda_graphs._set_capture_end()


@contextmanager
def gradients_can_be_captured() -> Iterator[Any]:
    """Meanwhile a stream of its own, which this gives, is the current one: DistributedDataParallel is to be built so.

    It looks up the nodes of autograd that take parameters' gradients, which stay with the stream of that moment, and
    the default stream cannot take part in a capture. Gradients of layers that are not captured are summed there, too.
    """
    on = torch.get_device_module(device().type)
    stream = on.Stream()
    stream.wait_stream(on.current_stream())
    with on.stream(stream):
        yield stream
    on.current_stream().wait_stream(stream)
