"""A cache module of a small model, built in a worker."""

import torch

from tests.model.builds import build
from vishwamai_mp.cache_augmentation import DifferentiableCacheAugmentation

SETTINGS = (
    "cache.enabled=true",
    "cache.layers=[1]",
    "cache.num_heads=8",
    "cache.segment_length=4",
    "cache.latents_per_segment=2",
    "cache.dropout=0.0",
)


def cache_module(*overrides: str, seed: int = 0) -> DifferentiableCacheAugmentation:
    """In fp64 and evaluation mode, with random values in every parameter, so that nothing is hidden by a zero."""
    _, _, (model,) = build(*SETTINGS, *overrides)
    module = model.decoder.layers[1].cache
    module.norm = torch.nn.RMSNorm(module.norm.weight.shape[0], eps=1e-5)  # ours computes in fp32, whatever it is given
    module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module


def hidden_states(tokens: int, rows: int, seed: int = 1, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, rows, width, generator=generator, dtype=torch.float64)
