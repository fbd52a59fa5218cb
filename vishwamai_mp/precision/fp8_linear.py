"""FP8 and NVFP4 linear layers on a CPU: the operands are rounded as Transformer Engine rounds them on a GPU.

Products of the rounded operands are accumulated in fp32 and rounded once to the data type of the activations. What
differs from a GPU is the order of that accumulation. Shapes: T tokens (local under sequence parallelism), B batch,
I in, O out (local).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.precision.collectives import gather_sequence, reduce_input_gradient
from vishwamai_mp.precision.delayed import DelayedScaling
from vishwamai_mp.precision.formats import E4M3, hybrid_format
from vishwamai_mp.precision.nvfp4 import BLOCK, nvfp4_operand, rotate_tokens
from vishwamai_mp.precision.rounding_bits import GradientPlaces, RoundingBits, layer_key
from vishwamai_mp.precision.scaling import (
    Operand,
    block_operand,
    largest_absolute,
    multiply,
    quantize_blocks,
    quantize_mx,
    scale_from_amax,
    scaled_operand,
    working_dtype,
)

Observer = Callable[[str, Tensor, Operand], None]


class Scaling:
    """How one linear layer's operands are scaled.

    `one_scale`: one per tensor, so the operand serves the products along both of its dimensions.
    """

    one_scale: ClassVar[bool]

    def quantize(self, x_MN: Tensor, role: str, along: int) -> Operand:
        """An operand ("input", "weight" or "gradient") of a product that sums along dimension `along`."""
        raise NotImplementedError

    def begin_step(self, seed: int, step: int) -> None:
        """Called before a training step, of the run's seed and from 0: what is drawn at random follows from them."""

    def begin_backward(self, shape: torch.Size) -> None:
        """Called before the operands of a backward pass are rounded, with the shape of the output's gradient."""


class CurrentScaling(Scaling):
    """One scale per tensor, from its own amax: E4M3, gradients E5M2 (`fp8_current`)."""

    one_scale = True

    def quantize(self, x_MN: Tensor, role: str, along: int) -> Operand:
        to = hybrid_format(role)
        return scaled_operand(x_MN, to, scale_from_amax(largest_absolute(x_MN), to, x_MN.dtype))


class DelayedLayerScaling(Scaling):
    """One scale per tensor, from earlier passes (`fp8_delayed`): layer `index` of a `DelayedScaling`."""

    one_scale = True

    def __init__(self, shared: DelayedScaling, index: int) -> None:
        self.shared, self.index = shared, index

    def quantize(self, x_MN: Tensor, role: str, along: int) -> Operand:
        # A copy: the shared scales change before the backward pass needs this one.
        return scaled_operand(x_MN, hybrid_format(role), self.shared.scale_of(self.index, role, x_MN).clone())


class BlockScaling(Scaling):
    """One scale per 1 × 128 numbers of inputs and gradients and per 128 × 128 of weights (`fp8_blockwise`)."""

    one_scale = False

    def quantize(self, x_MN: Tensor, role: str, along: int) -> Operand:
        rows, columns = (128, 128) if role == "weight" else (1, 128) if along == 1 else (128, 1)
        return block_operand(quantize_blocks, x_MN, E4M3, rows, columns)


class MXScaling(Scaling):
    """One scale per 32 numbers along the sum (`fp8_mx`)."""

    one_scale = False

    def quantize(self, x_MN: Tensor, role: str, along: int) -> Operand:
        rows, columns = (1, 32) if along == 1 else (32, 1)
        return block_operand(quantize_mx, x_MN, E4M3, rows, columns)


class Nvfp4Scaling(Scaling):
    """E2M1 numbers in blocks of 16, weights of 16 × 16; gradients are rounded stochastically (`nvfp4`).

    Args:
        layer: its name in the whole model.
        places: where its gradients' numbers stand.
    """

    one_scale = False

    def __init__(self, layer: str, places: GradientPlaces) -> None:
        self.layer, self.places = layer, places
        self._seed = self._step = self._passes = 0
        self._shape = torch.Size()

    def begin_step(self, seed: int, step: int) -> None:
        self._seed, self._step, self._passes = seed, step, 0

    def begin_backward(self, shape: torch.Size) -> None:
        self._shape, self._passes = shape, self._passes + 1

    def quantize(self, x_MN: Tensor, role: str, along: int) -> Operand:
        if role == "weight":
            return nvfp4_operand(x_MN, BLOCK, BLOCK)
        bits = self._bits(along) if role == "gradient" else None
        if along == 1:
            return nvfp4_operand(x_MN, 1, BLOCK, bits)
        return nvfp4_operand(rotate_tokens(x_MN), BLOCK, 1, bits)

    def _bits(self, along: int) -> RoundingBits:
        """Of the product that gives the input's gradient (along 1) or the weight's (along 0)."""
        key = layer_key(self._seed, self._step, self.layer, "input" if along else "weight")
        return RoundingBits(key, *self.places.of_pass(self._passes - 1, self._shape))


def emulate_fp8(linear: Any, scaling: Scaling) -> None:
    """Give a parallel linear layer of megatron-core FP8 or NVFP4 arithmetic.

    `linear.fp8_observer`, if set, is called with each operand's role, high-precision values and rounded ones. While
    `linear.emulates_fp8` is False it computes as it did before.
    """
    linear.fp8_scaling = scaling
    linear.fp8_observer = None
    linear.emulates_fp8 = True
    exact = linear._forward_impl
    replace_product(linear, _Fp8Linear.apply, linear)
    rounded = linear._forward_impl

    def forward(*args: Any, **options: Any) -> Tensor:
        return (rounded if linear.emulates_fp8 else exact)(*args, **options)

    linear._forward_impl = forward


def replace_product(linear: Any, apply: Callable[..., Tensor], *first: Any) -> None:
    """Have a parallel linear layer of megatron-core compute y = x Wᵀ and its collectives by `apply`.

    Args:
        apply: called with x, W, what is in `first`, whether the input's gradient is reduced, whether the sequence is
            split, and the tensor parallel group.
    """
    linear._forward_impl = partial(_forward, apply, first)


def _forward(
    apply: Callable[..., Tensor],
    first: tuple[Any, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    allreduce_dgrad: bool = False,
    sequence_parallel: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    **_: Any,
) -> Tensor:
    output = apply(input, weight, *first, allreduce_dgrad, sequence_parallel, tp_group)
    return output if bias is None else output + bias


class _Fp8Linear(torch.autograd.Function):
    """y = x Wᵀ of rounded operands, with megatron-core's collectives."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TBI: Tensor,
        w_OI: Tensor,
        linear: Any,
        reduce: bool,
        sequence_parallel: bool,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.linear, ctx.reduce, ctx.sequence_parallel, ctx.group = linear, reduce, sequence_parallel, group
        ctx.shape = x_TBI.shape
        full = gather_sequence(x_TBI, group) if sequence_parallel else x_TBI
        x = _quantize(linear, full.flatten(0, -2), "input", 1)
        w = _quantize(linear, w_OI, "weight", 1)
        ctx.save_for_backward(*_to_save(x_TBI, x, ctx), w_OI, w.scale)
        return multiply(x, w.t(), x_TBI.dtype).view(*full.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_saved, x_scale, w_OI, w_scale = ctx.saved_tensors
        linear, scaling = ctx.linear, ctx.linear.fp8_scaling
        grad = grads[0].flatten(0, -2)
        scaling.begin_backward(grads[0].shape)
        g = _quantize(linear, grad, "gradient", 1)
        w = scaled_operand(w_OI, E4M3, w_scale) if scaling.one_scale else scaling.quantize(w_OI, "weight", 0)
        dx = multiply(g, w, grad.dtype).view(*grads[0].shape[:-1], -1)
        dx, pending = reduce_input_gradient(dx, ctx.shape, ctx.reduce, ctx.sequence_parallel, ctx.group)
        dw = None
        if ctx.needs_input_grad[1]:
            full = gather_sequence(x_saved, ctx.group) if ctx.sequence_parallel else x_saved
            full = full.flatten(0, -2)
            if scaling.one_scale:
                x = Operand(full.to(working_dtype(grad.dtype)), x_scale)
            else:
                x, g = scaling.quantize(full, "input", 0), scaling.quantize(grad, "gradient", 0)
            dw = multiply(g.t(), x, w_OI.dtype)
        if pending:
            pending.wait()
        return dx, dw, None, None, None, None


def _quantize(linear: Any, x_MN: Tensor, role: str, along: int) -> Operand:
    operand = linear.fp8_scaling.quantize(x_MN, role, along)
    if linear.fp8_observer is not None:
        linear.fp8_observer(role, x_MN, operand)
    return operand


def _to_save(x_TBI: Tensor, x: Operand, ctx: Any) -> tuple[Tensor, Tensor | None]:
    """This rank's part of the input for the backward pass: rounded already where the rounding serves there too."""
    if not ctx.linear.fp8_scaling.one_scale:
        return x_TBI, None
    codes = x.values.to(x_TBI.dtype).view(-1, *x_TBI.shape[1:])  # exact
    if ctx.sequence_parallel:
        codes = codes.chunk(ctx.group.size())[ctx.group.rank()].clone()  # a view would keep the whole sequence
    return codes, x.scale
