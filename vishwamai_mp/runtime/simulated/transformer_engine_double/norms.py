"""RMSNorm, and quantization of its output where a product follows."""

import math
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.runtime.simulated.kernel import DTYPES, launch
from vishwamai_mp.runtime.simulated.transformer_engine_double.quantizing import create, quantize_into


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """The output, None (layer norm's mean) and the reciprocal of the root mean square of each row, fp32."""
    shape, dtype = list(input.shape), DTYPES[int(otype)]
    reciprocal = torch.empty(math.prod(shape[:-1]), dtype=torch.float32, device=input.device)
    out = create(quantizer, shape, dtype, input.device) if ln_out is None else ln_out
    # The kernel writes 16 bits, or codes by the scale that delayed scaling knows; the others need the amax first.
    fused = quantizer is None or type(quantizer).__name__ == "Float8Quantizer"
    wide = out if fused else torch.empty(shape, dtype=dtype, device=input.device)
    launch("rmsnorm_fwd", input, weight, wide, reciprocal)
    if not fused:
        quantize_into(wide, quantizer, out, amax_is_known=type(quantizer).__name__ == "Float8CurrentScalingQuantizer")
    return [out, None, reciprocal]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """Gradients of input and weight."""
    dz, x = dz.contiguous(), x.contiguous()
    dx, dgamma = torch.empty_like(x), torch.empty_like(gamma)
    launch("rmsnorm_bwd", dz, x, rsigma, gamma, dx, dgamma)
    return [dx, dgamma]
