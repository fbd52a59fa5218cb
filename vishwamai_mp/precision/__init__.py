"""In which numbers it computes: fp32, bf16, fp16, FP8, NVFP4; Transformer Engine's linears on GPUs, ours elsewhere."""

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.precision.linears import use_arithmetic
from vishwamai_mp.precision.policy import (
    PrecisionPolicy,
    check_fp8_hardware,
    lacking_hardware,
    use_transformer_engine,
)

__all__ = ["PrecisionPolicy", "check_fp8_hardware", "lacking_hardware", "use_arithmetic", "use_transformer_engine"]
