"""Matrix products: cuBLAS with operands of 32, 16, 8 or 4 bits."""

import math
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.runtime.simulated.kernel import DTYPES, launch, shape_of
from vishwamai_mp.runtime.simulated.transformer_engine_double.userbuffers import exchange


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Any,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """As BLAS has it, column by column: seen row by row, D = op(B) @ op(A). Leading dimensions of B are kept.

    Returns:
        D, the bias's gradient, the input of GELU, the extra output.
    """
    if gelu or quantizer is not None:
        raise NotImplementedError("generic_gemm of the simulated Transformer Engine: GELU and quantized output")
    a, b = shape_of(A), shape_of(B)
    a_rows, a_columns, b_rows, b_columns = math.prod(a[:-1]), a[-1], math.prod(b[:-1]), b[-1]
    inner, width = (a_columns, a_rows) if transa else (a_rows, a_columns)
    if inner != (b_rows if transb else b_columns):
        raise RuntimeError(f"generic_gemm: {b} and {a} do not multiply (transposed: {transb}, {transa})")
    swizzled = [*_operand("A", A, transa), *_operand("B", B, not transb)]
    shape = [b_columns if transb else size for size in ([b_columns] if transb else b[:-1])] + [width]
    dtype = DTYPES[int(output_dtype)] if output_dtype is not None else A.dtype
    if D is None:
        D = torch.empty(shape, dtype=dtype, device=workspace.device)
    elif list(D.shape) != shape or (output_dtype is not None and D.dtype != dtype):
        raise RuntimeError(f"generic_gemm: the output is {list(D.shape)} {D.dtype}, not {shape} {dtype}")
    bias_gradient = torch.empty(b_columns, dtype=D.dtype, device=D.device) if bias is not None and grad else None
    flops = 2 * math.prod(shape) * inner
    if all(hasattr(operand, "_fp4_dtype") for operand in (A, B)):
        if inner % 32:
            raise RuntimeError(f"generic_gemm: FP4 operands are summed over multiples of 32, not {inner}")
        amaxes = (A._amax_rowwise if transa else A._amax_columnwise, B._amax_columnwise if transb else B._amax_rowwise)
        launch("nvfp4_compute_per_tensor_scale", *amaxes, workspaces=[workspace])
    pieces = 1
    if comm_overlap is not None:
        pieces = exchange(comm_overlap, comm_type, bulk_overlap, (A, B), transa, extra_output)
    for _ in range(pieces):
        launch("generic_gemm", A, B, D, bias, bias_gradient, *swizzled, workspaces=[workspace], flops=flops // pieces)
    return [D, bias_gradient, None, extra_output]


def _operand(name: str, operand: Any, rowwise: bool) -> list[Tensor]:
    """Check that the codes which the product reads are there; scales in the layout that it reads, where they are not.

    FP8 products of a Hopper take both operands with the summed dimension last, so a transpose has to be kept; block
    scaling quantizes each direction by itself.
    """
    if not hasattr(operand, "get_metadata"):
        return []
    held = operand.get_metadata()
    per_tensor = "data_transpose" in held or "data" in held
    if per_tensor:
        codes = operand._data if rowwise else operand._transpose
        if codes is None and not rowwise and _multiplies_untransposed():
            codes = operand._data
    else:
        codes = held["rowwise_data" if rowwise else "columnwise_data"]
    if codes is None:
        raise RuntimeError(f"generic_gemm: operand {name} holds no {'row' if rowwise else 'column'}-wise FP8 data")
    if "with_gemm_swizzled_scales" not in held or held["with_gemm_swizzled_scales"]:
        return []
    scales = held["rowwise_scale_inv" if rowwise else "columnwise_scale_inv"]
    swizzled = torch.empty_like(scales)
    launch("swizzle_scales_for_gemm", scales, swizzled)
    return [swizzled]


def _multiplies_untransposed() -> bool:
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    return is_non_tn_fp8_gemm_supported()
