"""Quantizers of the four FP8 recipes: what their tensors consist of, and the kernels that fill them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.runtime.simulated.kernel import DTYPES, launch

_BLOCK, _MX_BLOCK = 128, 32


def create(quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor that `quantizer` (None: 16 or 32 bits) could fill."""
    if quantizer is None:
        return torch.empty(list(shape), dtype=dtype, device=device)
    kind = type(quantizer).__name__
    if kind not in _CREATE:
        raise NotImplementedError(f"{kind} is no part of the simulation of Transformer Engine")
    return _CREATE[kind](quantizer, list(shape), dtype, device)


def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """As `create`."""
    return create(quantizer, shape, dtype, torch.device(device))


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`tensor` in 8 bits, as `quantizer` does it; into `output` where there is one."""
    tensor = tensor.contiguous()
    out = create(quantizer, tensor.shape, tensor.dtype, tensor.device) if output is None else output
    quantize_into(tensor, quantizer, out, noop=noop)
    return out


def quantize_into(
    tensor: Tensor, quantizer: Any, out: Any, amax_is_known: bool = False, noop: Tensor | None = None
) -> None:
    """The kernels of a quantization; `amax_is_known`: the one before has measured it."""
    kind = type(quantizer).__name__
    if kind == "Float8CurrentScalingQuantizer":
        scale = torch.empty(2, dtype=torch.float32, device=tensor.device)  # and the amax
        if not amax_is_known:
            launch("compute_amax", tensor, scale)
        if quantizer.with_amax_reduction:
            dist.all_reduce(scale[:1], dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        launch("compute_scale_from_amax", scale)
        launch("quantize", tensor, out, scale, noop)
    elif kind == "Float8Quantizer":
        launch("quantize", tensor, out, quantizer.scale, quantizer.amax, noop)
    else:
        launch("quantize", tensor, out, noop)


def bgrad_quantize(grad_output: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The bias's gradient, and the output's in 8 bits."""
    bias = torch.empty(grad_output.shape[-1], dtype=grad_output.dtype, device=grad_output.device)
    launch("bgrad", grad_output, bias)
    return bias, quantize(grad_output, quantizer)


def dequantize(input: Any, otype: Any) -> Tensor:
    """The numbers that codes and scales stand for."""
    out = torch.empty(list(input.size()), dtype=DTYPES[int(otype)], device=input.device)
    launch("dequantize", input, out)
    return out


def fp8_transpose(input: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """Codes with the last dimension first."""
    if out is None:
        out = torch.empty([input.shape[-1], *input.shape[:-1]], dtype=torch.uint8, device=input.device)
    launch("fp8_transpose", input, out)
    return out


def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The first two dimensions exchanged: transposed codes that several ranks gave, side by side."""
    second, first, *others = tensor.shape
    if out is None:
        out = torch.empty([first, second, *others], dtype=tensor.dtype, device=tensor.device)
    elif list(out.shape[:2]) != [first, second] or out.numel() != tensor.numel():
        raise RuntimeError(f"swap_first_dims: the output is {list(out.shape)} of {list(tensor.shape)}")
    launch("swap_first_dims", tensor, out)
    return out


def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor,
    amax_histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    amax_compute_algo: str,
    fp8_dtype: Any,
    margin: float,
) -> None:
    """Delayed scaling: histories move on by a step, and scales follow them."""
    launch("amax_and_scale_update", amax_reduction_buffer, *amax_histories, *scales)


def _per_tensor(quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor, Float8TensorStorage
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    untransposed = is_non_tn_fp8_gemm_supported()
    held = {
        "data": _codes(shape, device) if quantizer.rowwise_usage or untransposed else None,
        "data_transpose": _codes(_transposed(shape), device)
        if quantizer.columnwise_usage and not untransposed
        else None,
        "fp8_scale_inv": torch.empty(1, dtype=torch.float32, device=device),
    }
    return _assemble(Float8Tensor, Float8TensorStorage, quantizer, held, shape, dtype, device)


def _blockwise(quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (
        Float8BlockwiseQTensor,
        Float8BlockwiseQTensorStorage,
    )

    rows, columns, square = math.prod(shape[:-1]), shape[-1], quantizer.block_scaling_dim == 2

    def scales(m: int, k: int) -> Tensor:
        """Of m × k codes, quantized along k; those of 1 × 128 blocks lie as the product reads them."""
        blocks = _up(k, _BLOCK) // _BLOCK
        size = (_up(m, _BLOCK) // _BLOCK, _up(blocks, 4)) if square else (blocks, _up(m, 4))
        return torch.empty(size, dtype=torch.float32, device=device)

    held = {
        "rowwise_data": _codes(shape, device) if quantizer.rowwise_usage else None,
        "rowwise_scale_inv": scales(rows, columns) if quantizer.rowwise_usage else None,
        "columnwise_data": _codes(_transposed(shape), device) if quantizer.columnwise_usage else None,
        "columnwise_scale_inv": scales(columns, rows) if quantizer.columnwise_usage else None,
        "is_2D_scaled": square,
    }
    return _assemble(Float8BlockwiseQTensor, Float8BlockwiseQTensorStorage, quantizer, held, shape, dtype, device)


def _mx(quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device) -> Any:
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor, MXFP8TensorStorage

    rows, columns = math.prod(shape[:-1]), shape[-1]
    if rows % _MX_BLOCK or columns % _MX_BLOCK:
        raise RuntimeError(f"MXFP8 requires dimensions that are divisible by {_MX_BLOCK} (got {shape})")

    def scales(m: int, k: int) -> Tensor:
        return torch.empty(m, k, dtype=torch.uint8, device=device)

    row, column = quantizer.rowwise_usage, quantizer.columnwise_usage
    held = {
        "rowwise_data": _codes(shape, device) if row else None,
        "rowwise_scale_inv": scales(_up(rows, 128), _up(columns // _MX_BLOCK, 4)) if row else None,
        "columnwise_data": _codes(shape, device) if column else None,
        "columnwise_scale_inv": scales(_up(rows // _MX_BLOCK, 4), _up(columns, 128)) if column else None,
        "with_gemm_swizzled_scales": quantizer.optimize_for_gemm,
    }
    return _assemble(MXFP8Tensor, MXFP8TensorStorage, quantizer, held, shape, dtype, device)


def _assemble(
    cls: type,
    storage: type,
    quantizer: Any,
    held: dict[str, Any],
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """A tensor, or inside a layer only what it consists of."""
    held |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if quantizer.internal:
        return storage(**held, fake_dtype=dtype)
    return cls(**held, shape=shape, dtype=dtype, device=device)


_CREATE = {
    "Float8Quantizer": _per_tensor,
    "Float8CurrentScalingQuantizer": _per_tensor,
    "Float8BlockQuantizer": _blockwise,
    "MXFP8Quantizer": _mx,
}


def _codes(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(list(shape), dtype=torch.uint8, device=device)


def _transposed(shape: Sequence[int]) -> list[int]:
    return [shape[-1], *shape[:-1]]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
