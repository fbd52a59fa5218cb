"""Weights of linear layers rounded to 8 or 4 bits, for decoding on CPUs.

A CPU that writes few texts waits for weights from memory, so a token is as fast as they are small. torch multiplies
packed integers in bf16 with few rows; a batch of many, such as a prompt, is multiplied by the same rounded weights in
bf16, which are kept for it. Shapes: N rows, O outputs (local), I inputs (local), G groups of 32 inputs.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor

from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.model import VishwamAIModel
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.runtime import Runtime, is_accelerator
from vishwamai_mp.runtime.choices import Choice, decide
from vishwamai_mp.runtime.products import skinny_linear

Kind = Literal["int8", "int4"]
_GROUP = 32  # inputs that share a scale in 4 bits: the smallest that torch packs
_FEW, _SOME = 8, 32  # rows; with more, weights in bf16 are multiplied faster everywhere
_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


class PackedWeight:
    """A weight that has been rounded, packed and not.

    Args:
        weight: (O, I) in bf16. It is overwritten by what it is rounded to.
        kind: `int8`: 255 values for each output, symmetric; `int4`: 16 for each group, from least to largest.
        group: tensor parallel ranks that hold the other inputs of the same outputs, if any: they share scales.
    """

    def __init__(self, weight: Tensor, kind: Kind, group: dist.ProcessGroup | None = None) -> None:
        self.whole, self.kind = weight, kind
        self._values, self._scales = _to_int4(weight) if kind == "int4" else _to_int8(weight, group)

    @staticmethod
    def supports(weight: Tensor, kind: Kind) -> bool:
        """Whether torch can pack a weight of this shape."""
        return kind == "int8" or (weight.shape[0] % 16 == 0 and weight.shape[1] % _GROUP == 0)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """x Wᵀ, (N, O)."""
        if len(x_NI) > _SOME:
            return self.by_whole(x_NI)
        few, some = _PRODUCTS[self.kind]
        return (few if len(x_NI) <= _FEW else some)(x_NI, self)

    def by_packed(self, x_NI: Tensor) -> Tensor:
        """The same by torch's product with packed integers."""
        x = x_NI.contiguous()
        if self.kind == "int8":
            return torch._weight_int8pack_mm(x, self._values, self._scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._values, _GROUP, self._scales)

    def by_whole(self, x_NI: Tensor) -> Tensor:
        """The same by the rounded weights in bf16."""
        return skinny_linear(x_NI, self.whole)


def _to_int8(weight: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    wide = weight.float()
    largest = wide.abs().amax(1)
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    scales = (largest / 127).clamp_(min=1e-30).to(weight.dtype)
    values = (wide / scales.float()[:, None]).round_().clamp_(-127, 127)
    weight.copy_(values * scales.float()[:, None])
    return values.to(torch.int8), scales


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    wide_OGI = weight.float().unflatten(1, (-1, _GROUP))
    least, largest = wide_OGI.amin(-1), wide_OGI.amax(-1)
    # As the numbers that the product reads: value = (integer − 8) · step + middle, step and middle in bf16.
    step = ((largest - least) / 15).clamp_(min=1e-30).to(weight.dtype)
    middle = (least + 8 * step.float()).to(weight.dtype)
    integers = ((wide_OGI - middle.float()[..., None]) / step.float()[..., None]).round_().add_(8).clamp_(0, 15)
    weight.copy_(((integers - 8) * step.float()[..., None] + middle.float()[..., None]).flatten(1))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.flatten(1).int(), 1)
    return packed, torch.stack((step.t(), middle.t()), -1).contiguous()


@torch.no_grad()
def pack_weights(model: VishwamAIModel, config: PretrainConfig, runtime: Runtime, kind: Kind) -> list[str]:
    """Round a stage's linear layers to `kind`, for good: those of attention, of MLPs and the output layer.

    Embeddings, norms, the in-layer components, adapters and heads stay as they are, and so does an output layer that is
    the embedding. What 4 bits do not fit, and the output layer, is rounded to 8 bits instead.

    Returns:
        what of this the user may not expect.

    Raises:
        UserError: the model does not compute in bf16, is not on a CPU, or this CPU would not be faster.
    """
    if is_accelerator(runtime.device):
        raise UserError(f"weights={kind} is for decoding on CPUs; leave it out on {runtime.device.type}")
    if PrecisionPolicy.of_run(config).compute != torch.bfloat16:
        raise UserError(
            f"weights={kind} multiplies in bf16, and the model computes in {config.precision}; add precision=bf16"
        )
    few, _ = _PRODUCTS[kind]
    if decide([few])[few.name] == "whole":
        raise UserError(f"weights={kind} is not faster than bf16 on this CPU (tools/ways.py measures); leave it out")
    notes = []
    linears = [
        (getattr(part, name), f"layer {layer.layer_number}'s {name}")
        for layer in model.decoder.layers
        for part in (layer.self_attention, layer.mlp)
        for name in _TARGETS
        if hasattr(part, name)
    ]
    for linear, name in linears:
        fits = PackedWeight.supports(linear.weight, kind)
        _pack(linear, kind if fits else "int8", runtime)
        if not fits:
            rows, columns = linear.weight.shape
            notes.append(f"{name} is rounded to int8: {rows} × {columns} is no whole number of groups of {_GROUP}")
    if model.post_process and model.share_embeddings_and_output_weights:
        notes.append("the output layer is the embedding, which is not rounded")
    elif model.post_process:
        _pack(model.output_layer, "int8", runtime)
    return notes


def _pack(linear: Any, kind: Kind, runtime: Runtime) -> None:
    group = runtime.groups.tp if isinstance(linear, RowParallelLinear) and runtime.groups.tp.size() > 1 else None
    packed = linear.packed_weight = PackedWeight(linear.weight.data, kind, group)
    by_whole = linear._forward_impl

    def multiply(*, input: Tensor, bias: Tensor | None = None, **others: Any) -> Tensor:
        if input.numel() > _SOME * input.shape[-1] or torch.is_grad_enabled():
            return by_whole(input=input, bias=bias, **others)
        out = packed(input.flatten(0, -2)).unflatten(0, input.shape[:-1])
        return out if bias is None else out + bias

    linear._forward_impl = multiply


def _trial(kind: Kind, rows: int) -> list[tuple[Tensor, PackedWeight]]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 1024, generator=random).bfloat16()
    return [(torch.randn(rows, 1024, generator=random).bfloat16(), PackedWeight(weight, kind))]


def _ways(*names: str) -> dict[str, Callable[[Tensor, PackedWeight], Tensor]]:
    ways = {"packed": lambda x, weight: weight.by_packed(x), "whole": lambda x, weight: weight.by_whole(x)}
    return {name: ways[name] for name in names}


def _products(kind: Kind) -> tuple[Choice, Choice]:
    """With few rows packed weights are what was asked for; with some they have to be clearly faster."""
    return (
        Choice(f"few_rows_{kind}", _ways("packed", "whole"), lambda: _trial(kind, 4)),
        Choice(f"some_rows_{kind}", _ways("whole", "packed"), lambda: _trial(kind, 16)),
    )


_PRODUCTS: dict[Kind, tuple[Choice, Choice]] = {"int8": _products("int8"), "int4": _products("int4")}
