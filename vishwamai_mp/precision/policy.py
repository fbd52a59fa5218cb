"""One setting, `precision`, and everything that follows from it."""

import importlib.util
from dataclasses import dataclass

import torch

from vishwamai_mp.runtime import device

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PrecisionPolicy:
    """Data types of one run.

    `compute` is what parameters and activations are; the optimizer keeps fp32 copies of 16-bit parameters and the
    gradients are accumulated in fp32.
    """

    name: str
    compute: torch.dtype

    @classmethod
    def of(cls, precision: str) -> "PrecisionPolicy":
        """The policy for the setting `precision`."""
        return cls(precision, _DTYPES[precision])

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a dynamic loss scale (fp16's range is narrow)."""
        return self.compute == torch.float16


def use_transformer_engine() -> bool:
    """Whether the layers are Transformer Engine's: there is a GPU and the package is installed."""
    return device().type == "cuda" and importlib.util.find_spec("transformer_engine") is not None
