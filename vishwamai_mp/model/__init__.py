"""`VishwamAILayer`, `VishwamAIModel`, layer specs: how the parts become a megatron-core model."""

from vishwamai_mp.model.build import build_model
from vishwamai_mp.model.layer import VishwamAILayer
from vishwamai_mp.model.model import VishwamAIModel

__all__ = ["VishwamAILayer", "VishwamAIModel", "build_model"]
