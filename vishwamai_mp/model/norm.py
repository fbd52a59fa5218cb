"""RMSNorm (arXiv 1910.07467) that works under sequence parallelism. On GPUs with Triton, two kernels.

Shapes: N tokens, D width.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from vishwamai_mp.runtime.device import row_blocks
from vishwamai_mp.runtime.fusion import fuses, fusible
from vishwamai_mp.runtime.triton_kernels import kernels_take, power_of_two, run_kernel, sum_parts

_WIDEST = 8192  # that a kernel holds in registers
_PROGRAMS = 512  # of the backward pass at most: each leaves a sum over its rows


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor, in two thirds of the time for bf16 on a CPU.

    Marks its weight so that megatron-core sums its gradient over the tensor parallel ranks, each of which sees a part
    of the sequence. Zero-centered, as megatron-core's configuration may say, it multiplies by 1 + weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma
        if self.zero_centered:
            torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x / √(mean(x²) + eps) · weight over the last dimension, computed in fp32."""
        return self.beside(x)[0]

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`, and x for a residual connection: on a GPU their gradients are summed in the norm's own kernel."""
        arguments = x, self.weight, self.eps, float(self.zero_centered)
        return NormOnGpu.apply(*arguments) if supports(x, self.weight) else (_RMSNorm.apply(*arguments), x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x_ND, scale = x.flatten(0, -2), weight.float() + offset
        if fuses():
            out, inverse_N1 = _normed(x_ND, scale, eps)
        else:
            out = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
            inverse_N1 = torch.empty(len(x_ND), 1, device=x.device)
            for block in row_blocks(x_ND):
                out[block], inverse_N1[block] = _normed(x_ND[block], scale, eps)
        ctx.save_for_backward(x, weight, inverse_N1)
        ctx.offset = offset
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_N1 = ctx.saved_tensors
        x_ND, grad_ND, scale = x.flatten(0, -2), grads[0].flatten(0, -2), weight.float() + ctx.offset
        if fuses():
            dx, dweight = _differentiated(x_ND, grad_ND, inverse_N1, scale)
        else:
            dx, dweight = torch.empty_like(x_ND, memory_format=torch.contiguous_format), torch.zeros_like(scale)
            for block in row_blocks(x_ND):
                dx[block], part = _differentiated(x_ND[block], grad_ND[block], inverse_N1[block], scale)
                dweight += part
        return dx.view(x.shape), dweight.to(weight.dtype), None, None


@fusible
def _normed(x_ND: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows, and what each was multiplied by, (N, 1)."""
    rows = x_ND.float()
    squares = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()
    inverse_N1 = squares.div_(rows.shape[-1]).add_(eps).rsqrt_()
    return rows.mul(inverse_N1).mul_(scale).to(x_ND.dtype), inverse_N1


@fusible
def _differentiated(x_ND: Tensor, grad_ND: Tensor, inverse_N1: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the rows and of the scale."""
    normed, grad = x_ND.float() * inverse_N1, grad_ND.float()
    product = normed * grad
    along_N1 = (product @ scale).div_(x_ND.shape[-1])[:, None]
    return (grad * scale).sub_(normed.mul_(along_N1)).mul_(inverse_N1).to(x_ND.dtype), product.sum(0)


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels compute this case; if not, torch's operators do, on any device."""
    return kernels_take(x, weight) and x.shape[-1] <= _WIDEST and x.numel() > 0


class NormOnGpu(torch.autograd.Function):
    """`_RMSNorm` by kernels, and x beside it: same arguments and gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        x_ND = x.contiguous().flatten(0, -2)
        rows, width = x_ND.shape
        out, inverse = torch.empty_like(x_ND), torch.empty(rows, dtype=torch.float32, device=x.device)
        _launch("norm", rows, [x_ND, weight], [out, inverse], [width, eps, offset])
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return out.view(x.shape), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, beside: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return beside, None, None, None
        x, weight, inverse = ctx.saved_tensors
        x_ND, grad_ND = (tensor.contiguous().flatten(0, -2) for tensor in (x, grad))
        beside_ND = grad_ND if beside is None else beside.contiguous().flatten(0, -2)
        rows, width = x_ND.shape
        dx = torch.empty_like(x_ND)
        parts = torch.empty(min(rows, _PROGRAMS), width, dtype=torch.float32, device=x.device)
        inputs, sizes = [x_ND, weight, inverse, grad_ND, beside_ND], [rows, width, ctx.offset]
        _launch("norm_back", len(parts), inputs, [dx, parts], sizes, BESIDE=beside is not None)
        return dx.view(x.shape), sum_parts(parts, weight.dtype), None, None


def _launch(
    name: str, programs: int, inputs: list[Tensor], outputs: list[Tensor], sizes: list[float], **constants: Any
) -> None:
    wide = power_of_two(inputs[0].shape[1])
    warps = 8 if wide > 2048 else 4
    run_kernel("model.norm_kernels", name, (programs,), inputs, outputs, sizes, {"DP": wide} | constants, warps=warps)
