"""cuDNN's fused attention, and turning by position.

Shapes: S tokens of a row, B rows, H heads (local), G key-value heads (local), K head width; "thd" lays the tokens of
all documents end to end: (T, H, K).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from vishwamai_mp.runtime.simulated.kernel import launch
from vishwamai_mp.runtime.simulated.transformer_engine_double.gpu import GPU

_NO_BACKEND, _ANY_LENGTH = -1, 1  # of the enumeration NVTE_Fused_Attn_Backend
_AXES = {"NVTE_SBHD": (1, 2, 0), "NVTE_BSHD": (0, 2, 1), "NVTE_BHSD": (0, 1, 2)}  # of rows, heads, tokens


def get_fused_attn_backend(parameters: Any) -> tuple[int, str]:
    """The kernel for any length, of 16 bits; or none, and why. cuDNN 9.24's rules for causal attention in training."""
    width, dropout = parameters.head_dim_qk, parameters.dropout
    reasons = {
        "not of 16 bits": int(parameters.qkv_dtype) not in (5, 6),
        f"head width {width}": width % 8 > 0 or width > 256 or (128 < width < 256 and GPU.capability >= (10, 0)),
        "a window with dropout": parameters.window_size_left >= 0 and dropout > 0,
    }
    refused = ", ".join(reason for reason, holds in reasons.items() if holds)
    return (_NO_BACKEND, refused) if refused else (_ANY_LENGTH, "")


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    dropout: float,
    set_zero: bool,
    qkv_layout: Any,
    o_format: Any,
    qkv_scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window_size: Any,
    bottom_right_diagonal: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    page_table_k: Tensor | None,
    page_table_v: Tensor | None,
    s_quantizer: Any,
    o_quantizer: Any,
    bias: Tensor | None,
    softmax_offset: Tensor | None,
    generator: Any,
    elements_per_thread: int,
    *options: bool,
) -> list[Tensor]:
    """The output, the logarithms of the softmax's sums (fp32), and the random state that dropout was drawn from."""
    _check(bias, softmax_offset, page_table_k, s_quantizer, o_quantizer, *options)
    layout = _query_format(qkv_layout)
    out = torch.empty([*q.shape[:-1], v.shape[-1]], dtype=q.dtype, device=q.device)
    if layout == "NVTE_THD":
        out.zero_()
        sums = [*q.shape[:-1], 1]
    else:
        rows, heads, tokens = (q.shape[axis] for axis in _AXES[layout])
        sums = [rows, heads, tokens, 1]
    kept = torch.empty(sums, dtype=torch.float32, device=q.device)
    state = torch.empty(2, dtype=torch.int64, device=q.device)
    flops = sdpa_flop_count(*_matrices(layout, max_seqlen_q, max_seqlen_kv, q, k, v))
    launch("fused_attn_fwd", q, k, v, out, kept, state, cu_seqlens_q, cu_seqlens_kv, flops=flops)
    return [out, kept, state]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    dropout: float,
    set_zero: bool,
    qkv_layout: Any,
    o_format: Any,
    do_format: Any,
    dqkv_layout: Any,
    qkv_scale_inv_format: Any,
    do_scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window_size: Any,
    bottom_right_diagonal: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    d_o: Tensor,
    fake_dtype: torch.dtype,
    aux_ctx_tensors: list[Tensor],
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    s_quantizer: Any,
    dp_quantizer: Any,
    dqkv_quantizer: Any,
    *options: bool,
) -> list[Tensor | None]:
    """Gradients of queries, keys, values; and of bias and softmax offset, which there are not."""
    _check(s_quantizer, dp_quantizer, dqkv_quantizer, *options)
    layout = _query_format(qkv_layout)
    gradients = _gradients(str(getattr(dqkv_layout, "name", dqkv_layout)), q, k, v)
    if layout == "NVTE_THD":
        for gradient in gradients:
            gradient.zero_()
    matrices = _matrices(layout, max_seqlen_q, max_seqlen_kv, q, k, v)
    flops = sdpa_backward_flop_count(matrices[0], *matrices)
    launch("fused_attn_bwd", q, k, v, o, d_o, *aux_ctx_tensors, *gradients, cu_seqlens_q, cu_seqlens_kv, flops=flops)
    return [*gradients, None, None]


def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Queries or keys turned by their positions; `freqs`: (S, 1, 1, K) fp32."""
    if freqs.dim() != 4 or freqs.shape[1:3] != (1, 1) or freqs.dtype != torch.float32:
        raise RuntimeError(f"fused_rope: frequencies {list(freqs.shape)} {freqs.dtype}, not (S, 1, 1, K) fp32")
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    launch("fused_rope", input, freqs, cu_seqlens, out)
    return out


fused_rope_backward = fused_rope_forward  # turns back


def _check(*unknown: Any) -> None:
    if any(part is not None and part is not False for part in unknown):
        raise NotImplementedError(
            "fused attention of the simulated Transformer Engine: bias, softmax offset, pages, FP8, maxima, CUDA graphs"
        )


def _query_format(layout: Any) -> str:
    return "NVTE_" + layout.name.removeprefix("NVTE_").split("_")[0].translate({ord(digit): None for digit in "23"})


def _matrices(layout: str, queries: int, keys: int, q: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
    """Shapes (rows, heads, tokens, width) of queries, keys and values as they are multiplied.

    Nothing is left out for the mask, as torch counts its own. Documents laid end to end are as many as fit, each as
    long as the longest.
    """
    heads = q.shape[-2]
    if layout == "NVTE_THD":
        documents = -(-q.shape[0] // queries)
        tokens = (queries, keys, keys)
        return [[documents, heads, length, x.shape[-1]] for x, length in zip((q, k, v), tokens, strict=True)]
    rows, _, at = _AXES[layout]
    return [[x.shape[rows], heads, x.shape[at], x.shape[-1]] for x in (q, k, v)]


def _gradients(layout: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Each of its own, or parts of one tensor where the layout interleaves them."""
    name = layout.removeprefix("NVTE_")
    if "3" not in name and "2" not in name:
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    together = [q, k, v] if "3" in name else [k, v]
    at = -2 if "H3D" in name or "H2D" in name else -3
    shape = list(together[0].shape)
    shape.insert(len(shape) + at + 1, len(together))
    parts = torch.empty(shape, dtype=q.dtype, device=q.device).unbind(at)
    alone = [] if len(together) == 3 else [torch.empty(q.shape, dtype=q.dtype, device=q.device)]
    return [*alone, *parts]
