"""In which numbers it computes: fp32, bf16, fp16; Transformer Engine's linears on GPUs, faithful ones on CPUs."""

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.precision.linears import use_cpu_arithmetic
from vishwamai_mp.precision.policy import PrecisionPolicy, use_transformer_engine

__all__ = ["PrecisionPolicy", "use_cpu_arithmetic", "use_transformer_engine"]
