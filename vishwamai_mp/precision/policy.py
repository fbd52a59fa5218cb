"""One setting, `precision`, and everything that follows from it."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from vishwamai_mp.config import ConfigError, Fp8Config, PretrainConfig
from vishwamai_mp.config.resolve_fp8 import MULTIPLE
from vishwamai_mp.config.wording import lacks
from vishwamai_mp.runtime import device, has_transformer_engine, is_accelerator

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# megatron-core's names of recipe and format: "hybrid" is E4M3 forward, E5M2 for gradients.
_RECIPES = {
    "fp8_delayed": ("delayed", "hybrid"),
    "fp8_current": ("tensorwise", "hybrid"),
    "fp8_blockwise": ("blockwise", "e4m3"),
    "fp8_mx": ("mxfp8", "e4m3"),
    "nvfp4": ("nvfp4", "e2m1"),
}
# Transformer Engine's questions to the hardware; check_fp8_support for the others.
HARDWARE_CHECKS = {
    "mxfp8": "check_mxfp8_support",
    "blockwise": "check_fp8_block_scaling_support",
    "nvfp4": "check_nvfp4_support",
}
# Beginnings of environment variables by which Transformer Engine would compute another NVFP4.
_SWITCHES = ("NVTE_NVFP4_", "NVTE_BACKWARD_OVERRIDE", "NVTE_USE_FAST_MATH")


@dataclass(frozen=True)
class Fp8Policy:
    """How the linear layers of the decoder compute in FP8 or NVFP4. Embedding, output layer and heads stay in bf16.

    Attributes:
        recipe: megatron-core's name: delayed, tensorwise, blockwise, mxfp8 or nvfp4.
        format: megatron-core's name: hybrid, e4m3 or e2m1.
        amax_history_length: passes whose amaxes delayed scaling remembers; 1 where nothing is remembered.
        amax_algorithm: max or most_recent.
        bf16_layers_at_start: first layers that stay in bf16.
        bf16_layers_at_end: last layers that do.
        multiple: a linear layer whose widths (per rank) are not multiples of it stays in bf16.
    """

    recipe: str
    format: str
    amax_history_length: int
    amax_algorithm: str
    bf16_layers_at_start: int
    bf16_layers_at_end: int
    multiple: int

    def applies_to(self, layer: int, num_layers: int) -> bool:
        """Whether transformer layer number `layer` of the whole model, from 0, computes in fewer bits than 16."""
        return self.bf16_layers_at_start <= layer < num_layers - self.bf16_layers_at_end

    def megatron_fields(self) -> dict[str, Any]:
        """All that megatron-core's `TransformerConfig` has to say about FP8 or FP4; none is left to its defaults."""
        layers = {
            "tp_only_amax_red": False,
            "first_last_layers_bf16": bool(self.bf16_layers_at_start or self.bf16_layers_at_end),
            "num_layers_at_start_in_bf16": self.bf16_layers_at_start,
            "num_layers_at_end_in_bf16": self.bf16_layers_at_end,
        }
        if self.recipe == "nvfp4":
            return {"fp4": self.format, "fp4_recipe": self.recipe, "fp4_param": False, **layers}
        return {
            "fp8": self.format,
            "fp8_recipe": self.recipe,
            "fp8_param": False,  # parameters are bf16, each product rounds them anew
            "fp8_margin": 0,
            "fp8_amax_history_len": self.amax_history_length,
            "fp8_amax_compute_algo": self.amax_algorithm,
            "fp8_wgrad": True,
            "fp8_dot_product_attention": False,
            "fp8_multi_head_attention": False,
            **layers,
        }


@dataclass(frozen=True)
class PrecisionPolicy:
    """Data types of one run.

    `compute` is what parameters and activations are; the optimizer keeps fp32 copies of 16-bit parameters and the
    gradients are accumulated in fp32. `fp8` says more where matrices are multiplied in 8 or 4 bits.
    """

    name: str
    compute: torch.dtype
    fp8: Fp8Policy | None = None

    @classmethod
    def of(cls, precision: str, options: Fp8Config | None = None) -> "PrecisionPolicy":
        """The policy for the setting `precision` and the resolved section `fp8` (None: its defaults)."""
        if precision in _DTYPES:
            return cls(precision, _DTYPES[precision])
        options = options or Fp8Config()
        recipe, formats = _RECIPES[precision]
        fp8 = Fp8Policy(
            recipe,
            formats,
            options.amax_history_length or 1,
            options.amax_algorithm or "max",
            options.bf16_layers_at_start,
            options.bf16_layers_at_end,
            MULTIPLE[precision],
        )
        return cls(precision, torch.bfloat16, fp8)

    @classmethod
    def of_run(cls, config: PretrainConfig) -> "PrecisionPolicy":
        """The policy of a resolved configuration."""
        return cls.of(config.precision, config.fp8)

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a dynamic loss scale (fp16's range is narrow)."""
        return self.compute == torch.float16


def use_transformer_engine(policy: PrecisionPolicy) -> bool:
    """Whether the layers are Transformer Engine's: there is a GPU, real or simulated, that has the policy's arithmetic,
    and the package."""
    return has_transformer_engine() and not lacking_hardware(policy)


def lacking_hardware(policy: PrecisionPolicy) -> str:
    """Why this GPU cannot compute a policy's FP8 or NVFP4, in Transformer Engine's words; empty where it can."""
    if policy.fp8 is None or not has_transformer_engine():
        return ""
    from transformer_engine.pytorch import fp8

    supported, reason = getattr(fp8, HARDWARE_CHECKS.get(policy.fp8.recipe, "check_fp8_support"))()
    return "" if supported else str(reason).strip().rstrip(".") or "Transformer Engine says no more"


def check_fp8_hardware(policy: PrecisionPolicy) -> None:
    """Refuse FP8 and NVFP4 that would be another than was asked for.

    A CPU emulates every recipe, and so does a GPU whose hardware lacks it: Transformer Engine knows which do.

    Raises:
        ConfigError: there is a GPU, but no Transformer Engine, or the environment changes the recipe.
    """
    if policy.fp8 is None or not is_accelerator(device()):
        return
    if not has_transformer_engine():
        raise ConfigError(f"{lacks(f'precision={policy.name} on a GPU', 'transformer_engine')}; or use precision=bf16")
    if policy.fp8.recipe == "nvfp4" and use_transformer_engine(policy):
        switches = sorted(name for name in os.environ if name.startswith(_SWITCHES))
        if switches:
            raise ConfigError(
                f"precision=nvfp4: {switches[0]}={os.environ[switches[0]]} in the environment changes what Transformer"
                " Engine computes; unset it"
            )
