"""Generation: shared key-value blocks, choices over vocabulary-parallel logits, sampling, beam search, scoring."""

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.inference.beam import BeamCompletion, beam_search
from vishwamai_mp.inference.engine import ContextLengthError, Engine
from vishwamai_mp.inference.generation import Completion, Generator
from vishwamai_mp.inference.options import BeamOptions, SamplingOptions

__all__ = [
    "BeamCompletion",
    "BeamOptions",
    "Completion",
    "ContextLengthError",
    "Engine",
    "Generator",
    "SamplingOptions",
    "beam_search",
]
