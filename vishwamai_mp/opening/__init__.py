"""From a run folder, a checkpoint or a configuration to a model that trains or answers: one way for all programs."""

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.opening.loaded_model import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
