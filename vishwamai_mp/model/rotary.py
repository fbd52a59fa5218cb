"""Rotary position embeddings (arXiv 2104.09864) for given positions, with linear and Llama 3 scaling.

Shapes: B batch, T tokens (local), K head width.
"""

import math

import torch
from torch import Tensor, nn

from vishwamai_mp.config import ModelConfig, RopeScaling


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Radians per position of each pair, scaled as `model.rope_scaling` says. fp32, shape (K/2,)."""
    assert model.head_dim is not None
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32, device="cpu") / model.head_dim
    frequencies = 1.0 / model.rope_theta**exponents
    return _scale(frequencies, model.rope_scaling) if model.rope_scaling else frequencies


def _scale(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: wavelengths below original/high_factor stay, those above original/low_factor are stretched, and
    # between the two the frequency is interpolated.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


class RotaryEmbedding(nn.Module):
    """Angles for positions, in megatron-core's layout."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.frequencies = inverse_frequencies(model)  # not a buffer: never cast with the model, never in checkpoints

    def forward(self, positions: Tensor) -> Tensor:
        """Angles of `positions`, (T,) or (B, T) integers → (T, 1 or B, 1, K) fp32."""
        if self.frequencies.device != positions.device:  # once: a copy in each pass would hold the host up
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions.float()[..., None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles[:, None, None] if positions.dim() == 1 else angles.transpose(0, 1)[:, :, None]
