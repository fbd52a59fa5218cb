"""The module `transformer_engine_torch`, put together."""

import types
from typing import Any

from vishwamai_mp.runtime.simulated.transformer_engine_double import (
    fused_attention,
    gemm,
    multi_tensor,
    norms,
    quantizing,
    userbuffers,
)
from vishwamai_mp.runtime.simulated.transformer_engine_double.enums import enumerations
from vishwamai_mp.runtime.simulated.transformer_engine_double.imports import Absent

_FUNCTIONS: list[Any] = [
    gemm.generic_gemm,
    norms.rmsnorm_fwd,
    norms.rmsnorm_bwd,
    quantizing.quantize,
    quantizing.compute_amax,
    quantizing.bgrad_quantize,
    quantizing.dequantize,
    quantizing.create_empty_quantized_tensor,
    quantizing.fp8_transpose,
    quantizing.fp8_block_scaling_compute_partial_amax,
    quantizing.fp8_block_scaling_partial_cast,
    quantizing.swap_first_dims,
    quantizing.fused_amax_and_scale_update_after_reduction,
    fused_attention.get_fused_attn_backend,
    fused_attention.fused_attn_fwd,
    fused_attention.fused_attn_bwd,
    fused_attention.fused_rope_forward,
    multi_tensor.multi_tensor_adam,
    multi_tensor.multi_tensor_l2norm,
    multi_tensor.multi_tensor_scale,
    multi_tensor.multi_tensor_compute_scale_and_scale_inv,
    userbuffers.CommOverlapHelper,
    userbuffers.CommOverlap,
    userbuffers.CommOverlapP2P,
    userbuffers.bulk_overlap_ag_with_external_gemm,
]


class _Extension(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        """A function that our layers do not reach: there, and an error when it is called."""
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"transformer_engine_torch.{name}")


def extension() -> types.ModuleType:
    """The functions and enumerations that are doubled; any other name raises NotImplementedError when called."""
    module = _Extension("transformer_engine_torch")
    vars(module).update(enumerations())
    vars(module).update({function.__name__: function for function in _FUNCTIONS})
    vars(module).update(
        fused_rope_backward=fused_attention.fused_rope_backward,
        get_cudnn_version=lambda: 92400,
        get_cublasLt_version=lambda: 130200,
        get_num_cublas_streams=lambda: 4,
        get_stream_priority_range=lambda: (0, -5),
        device_supports_multicast=lambda: True,
        ubuf_built_with_mpi=lambda: False,
    )
    return module
