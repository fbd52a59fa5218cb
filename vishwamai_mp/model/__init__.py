"""`VishwamAILayer`, `VishwamAIModel`, layer specs: how the parts become a megatron-core model."""

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.model.build import build_model
from vishwamai_mp.model.layer import VishwamAILayer
from vishwamai_mp.model.model import VishwamAIModel

__all__ = ["VishwamAILayer", "VishwamAIModel", "build_model"]
