"""A memory inside a small model, in the workers."""

import re
from unittest import mock

import torch

from tests.model.builds import build
from vishwamai_mp.model import initialization
from vishwamai_mp.neural_memory import ReasoningMemoryTransformer

SETTINGS = [
    "memory.enabled=true",
    "memory.layers=[1]",
    "memory.memory_size=32",
    "memory.head_dim=8",
    "memory.num_memory_layers=2",
    "memory.chunk_size=8",
    "memory.dropout=0.0",
]


def memory_module(*overrides: str) -> ReasoningMemoryTransformer:
    """In fp64 and evaluation mode, with random values in every parameter, so that nothing is hidden by a zero."""
    _, _, (model,) = build(*SETTINGS, *overrides)
    module = model.decoder.layers[1].memory.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return module


def hidden_states(tokens: int, rows: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, rows, 32, generator=generator, dtype=torch.float64)


def drawn_outputs() -> mock._patch:
    """Output projections of components drawn like those of attention: from the first step on they are felt."""
    drawn = re.compile(initialization._DRAWN_RESIDUAL.pattern.replace("(", r"(memory\.output|", 1))
    return mock.patch.object(initialization, "_DRAWN_RESIDUAL", drawn)
