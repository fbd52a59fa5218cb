"""What governs a level of the memory: how fast it writes and forgets, and how its momentum is released.

The gates are functions of the token and differ from token to token, which alone would let a malicious or unlucky
sequence of them blow the memory up: momentum saved under one rate of release and released under another is multiplied.
Here it cannot happen. Let R be what was written and is still to be released, W = M + R, and η the share held back:

    W_t = α_t W_{t−1} + β_t k_t e_tᵀ      R_t = η_t (α_t R_{t−1} + β_t k_t e_tᵀ)      e_t = v_t − M_{t−1}ᵀ k_t

With S_t = R_t (1 − η_t)/η_t this is the momentum delta rule with rate β_t (1 − η_t) and momentum
α_t (1 − η_t) η_{t−1}/(1 − η_{t−1}); every write arrives in full, whatever η does meanwhile. With values of zero,
‖W‖² + ‖R‖²/η̄ never grows, for any keys of length ≤ 1, α in [0, 1] and η in [0, η̄], if

    β ≤ 2 (1 − η²) / ((1 + η²/η̄)(1 + η̄))    and    β² ≤ 1 / ((1 + η²/η̄)(1 + η̄)).

(Along a key, with w, r for W, R and d = w − r: (αw − βd)² + (αr − βd)² η²/η̄ ≤ w² + r²/η̄. The left side is convex in
α; the two conditions are those of α = 1 and α = 0.) So the memory is bounded by what was written, at any length.

Shapes: T tokens, B batch, H heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_MOMENTUM = 0.9  # η̄
_LIMIT = 30.0  # of a gate's logit: beyond, nothing changes in fp32 but infinities come near
_WRITE_BIAS = 1.0


@dataclass(frozen=True)
class Gates:
    """One level's gates, (T, B, H) each, fp32 (fp64 for fp64 logits).

    Attributes:
        rate: θ.
        log_forget: ln α.
        log_momentum: ln of the momentum coefficient; None without momentum.
        write: β.
        ratio: ln η/(1 − η) of the last token, (B, H): the next token's momentum depends on it. None without momentum.
    """

    rate: Tensor
    log_forget: Tensor
    log_momentum: Tensor | None
    write: Tensor
    ratio: Tensor | None


def gate_count(momentum: bool) -> int:
    """Logits per level, head and token."""
    return 3 if momentum else 2


def initial_biases(levels: int, momentum: bool) -> list[float]:
    """Of one head's logits, level by level: forget half-lives of 2⁷, 2¹¹, 2¹⁵, … tokens."""
    biases = []
    for level in range(levels):
        decay = math.log(2) / 2 ** (7 + 4 * level)  # per token; softplus of the logit
        biases += [_WRITE_BIAS, math.log(math.expm1(decay))] + [0.0] * momentum
    return biases


def open_gates(logits: Tensor, ratio: Tensor | None = None) -> Gates:
    """From logits (T, B, H, 2 or 3), bias included: write, forget and, with momentum, η.

    `ratio` (B, H) is that of the token before the first; None: there is none.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(-_LIMIT, _LIMIT)
    write, log_forget = logits[..., 0].sigmoid(), -F.softplus(logits[..., 1])
    if logits.shape[-1] == 2:
        return Gates(write, log_forget, None, write, None)
    held = MAX_MOMENTUM * logits[..., 2].sigmoid()
    log_released = torch.log1p(-held)
    ratios = math.log(MAX_MOMENTUM) + F.logsigmoid(logits[..., 2]) - log_released
    # Before the first token nothing is held back, so its momentum is of no account: any finite number will do.
    before = torch.zeros_like(ratios[:1]) if ratio is None else ratio[None]
    log_momentum = log_forget + log_released + torch.cat((before, ratios[:-1]))
    write = write * write_limit(held)
    return Gates(write * (1 - held), log_forget, log_momentum, write, ratios[-1])


def write_limit(held: Tensor) -> Tensor:
    """The largest β that cannot make the memory grow, for momentum η."""
    share = 1 / ((1 + held.square() / MAX_MOMENTUM) * (1 + MAX_MOMENTUM))
    return torch.minimum(2 * (1 - held.square()) * share, share.sqrt())
