"""Quantizers of the FP8 recipes and of NVFP4: what their tensors consist of, and the kernels that fill them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.runtime.simulated.kernel import DTYPES, launch

_BLOCK, _MX_BLOCK, _NV_BLOCK = 128, 32, 16


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
    """`tensor` in 8 or 4 bits, as `quantizer` does it; into `output` where there is one."""
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
        amax = quantizer.amax if quantizer.amax.numel() else None  # an empty tensor says that none is wanted
        launch("quantize", tensor, out, quantizer.scale, amax, noop)
    elif kind == "NVFP4Quantizer":
        _quantize_nvfp4(tensor, quantizer, out, noop)
    else:
        launch("quantize", tensor, out, noop)


def _quantize_nvfp4(tensor: Tensor, quantizer: Any, out: Any, noop: Tensor | None) -> None:
    """Amaxes, of rotated numbers if it rotates; then both directions in one kernel, or in three at some sizes."""
    rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    rotates, row, column = quantizer.with_rht, quantizer.rowwise_usage, quantizer.columnwise_usage
    if rotates and tensor.dtype != torch.bfloat16:
        raise RuntimeError(f"RHT is only supported for bfloat16 input, got {tensor.dtype}")
    fused = _fits_rotating_kernel(tensor.shape)
    states = [
        torch.empty(2, dtype=torch.int64, device=tensor.device)
        for needed in (True, rotates and column and not fused)
        if quantizer.stochastic_rounding and needed
    ]
    launch("hadamard_transform_amax" if rotates else "compute_amax", tensor, out)
    if quantizer.with_amax_reduction:
        for amax in (out._amax_rowwise if row else None, out._amax_columnwise if column else None):
            if amax is not None:
                dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    if not rotates:
        launch("quantize", tensor, out, noop, *states)
    elif fused:
        launch("quantize_with_hadamard_transform", tensor, out, quantizer.rht_matrix, noop, *states)
    else:
        if row:
            launch("quantize", tensor, out._rowwise_data, out._rowwise_scale_inv, noop, *states[:1])
        if column:
            rotated = torch.empty(columns, rows, dtype=tensor.dtype, device=tensor.device)
            launch("hadamard_transform", tensor, rotated)
            launch("quantize", rotated, out._columnwise_data, out._columnwise_scale_inv, noop, *states[1:])


def _fits_rotating_kernel(shape: Sequence[int]) -> bool:
    return math.prod(shape[:-1]) % 64 == 0 and shape[-1] % 128 == 0


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """The largest magnitude in a tensor, fp32."""
    if amax.dtype != torch.float32 or amax.numel() != 1:
        raise RuntimeError(f"compute_amax: amax must be one fp32 number, got {list(amax.shape)} {amax.dtype}")
    launch("compute_amax", tensor.contiguous(), amax)


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


def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """The largest magnitudes in blocks of a weight, h × w, of which `tensor` is a part from `start_offset` on."""
    _check_part(tensor, amax, h, w, start_offset, block_len)
    launch("fp8_block_scaling_compute_partial_amax", tensor, amax)


def fp8_block_scaling_partial_cast(
    inp: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start_offset: int, block_len: int, out_dtype: Any
) -> None:
    """Codes of that part, by the scales of all blocks."""
    _check_part(inp, scale, h, w, start_offset, block_len)
    if out.dtype != torch.uint8 or out.numel() != inp.numel():
        raise RuntimeError(f"fp8_block_scaling_partial_cast: {out.numel()} {out.dtype} codes of {inp.numel()} numbers")
    launch("fp8_block_scaling_partial_cast", inp, scale, out)


def _check_part(part: Tensor, blocks: Tensor, h: int, w: int, start: int, block: int) -> None:
    if block != _BLOCK or blocks.dim() != 2 or blocks.dtype != torch.float32:
        raise RuntimeError(f"blocks of a weight: {list(blocks.shape)} {blocks.dtype} of {block}, not of {_BLOCK}")
    if part.dtype not in (torch.float32, torch.bfloat16) or start + part.numel() > h * w:
        raise RuntimeError(f"part of a weight: {part.numel()} {part.dtype} from {start} on, of {h} × {w}")


def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The first two dimensions exchanged: transposed codes that several ranks gave, side by side."""
    second, first, *others = tensor.shape
    if out is None:
        out = torch.empty([first, second, *others], dtype=tensor.dtype, device=tensor.device)
    elif list(out.shape[:2]) != [first, second] or out.numel() != tensor.numel():
        raise RuntimeError(f"swap_first_dims: the output is {list(out.shape)} of {list(tensor.shape)}")
    launch("swap_first_dims", tensor, out)
    return out


def pad_columnwise_scale_inv(inp: Tensor) -> Tensor:
    """Scales that were gathered, filled up to what a product reads: multiples of 128 rows and of 4 columns."""
    rows, columns = inp.shape
    out = torch.empty(_up(rows, 128), _up(columns, 4), dtype=inp.dtype, device=inp.device)
    launch("zero_pad_kernel", inp, out)
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


def _nv(quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device) -> Any:
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Tensor, NVFP4TensorStorage

    rows, columns = math.prod(shape[:-1]), shape[-1]
    if rows % _NV_BLOCK or columns % _NV_BLOCK:
        raise RuntimeError(f"NVFP4 requires tensor dims that are divisible by {_NV_BLOCK} (got shape={shape})")
    if quantizer.row_scaled_nvfp4 or quantizer.nvfp4_use_4over6:
        raise NotImplementedError("NVFP4 with scales of rows, or with 4 over 6, is no part of the simulation")

    def pairs(size: list[int]) -> Tensor:
        return _codes([*size[:-1], size[-1] // 2], device)

    def scales(m: int, k: int) -> Tensor:
        return torch.empty(_up(m, 128), _up(k // _NV_BLOCK, 4), dtype=torch.uint8, device=device)

    def amax() -> Tensor:
        return torch.empty(1, dtype=torch.float32, device=device)

    row, column = quantizer.rowwise_usage, quantizer.columnwise_usage
    square = quantizer.with_2d_quantization and rows % 128 == 0 and columns % 128 == 0
    held = {
        "rowwise_data": pairs(shape) if row else None,
        "rowwise_scale_inv": scales(rows, columns) if row else None,
        "columnwise_data": pairs([columns, rows]) if column else None,
        "columnwise_scale_inv": scales(columns, rows) if column else None,
        "amax_rowwise": amax() if row else None,
        "amax_columnwise": amax() if column else None,
        "with_gemm_swizzled_scales": quantizer.optimize_for_gemm
        and (_fits_rotating_kernel(shape) if quantizer.with_rht else square),
        "fp4_dtype": quantizer.dtype,
    }
    return _assemble(NVFP4Tensor, NVFP4TensorStorage, quantizer, held, shape, dtype, device)


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
    held["quantizer"] = quantizer
    if "fp4_dtype" not in held:
        held["fp8_dtype"] = quantizer.dtype
    if quantizer.internal:
        return storage(**held, fake_dtype=dtype)
    return cls(**held, shape=shape, dtype=dtype, device=device)


_CREATE = {
    "Float8Quantizer": _per_tensor,
    "Float8CurrentScalingQuantizer": _per_tensor,
    "Float8BlockQuantizer": _blockwise,
    "MXFP8Quantizer": _mx,
    "NVFP4Quantizer": _nv,
}


def _codes(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(list(shape), dtype=torch.uint8, device=device)


def _transposed(shape: Sequence[int]) -> list[int]:
    return [shape[-1], *shape[:-1]]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
