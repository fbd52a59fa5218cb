"""Rotary position embeddings (arXiv 2104.09864) for given positions, scaled for texts longer than those trained on.

Shapes: B batch, T tokens (local), N tokens, R width of a head that is turned, A kinds of layers that turn differently.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from vishwamai_mp.config import ModelConfig, RopeScaling

_MOST_LENGTHS = 16  # whose frequencies are kept


def rotary_width(model: ModelConfig) -> int:
    """Numbers of a head that are turned, the first ones: R."""
    assert model.head_dim is not None
    return int(model.head_dim * model.rotary_fraction)


def attention_factors(model: ModelConfig) -> list[float]:
    """What turned queries and keys are multiplied by: longer texts flatten attention, and this sharpens it.

    Of each of the kinds of layers that `layer_frequencies` tells: those with a window of another base are not scaled.
    """
    factor = (model.rope_scaling.attention_factor if model.rope_scaling else None) or 1.0
    return [factor, 1.0] if model.window_rope_theta else [factor]


def frequency_length(model: ModelConfig, length: int) -> int:
    """A number that is the same for all texts with the same frequencies as a text of `length` tokens."""
    scaling = model.rope_scaling
    if scaling is None or length <= scaling.original_max_position_embeddings:
        return 0
    return {"dynamic": length, "longrope": scaling.original_max_position_embeddings + 1}.get(scaling.rope_type, 0)


def inverse_frequencies(model: ModelConfig, length: int = 0) -> Tensor:
    """Radians per position of each pair in a text of `length` tokens, scaled as `model.rope_scaling` says.

    fp32, shape (R/2,).
    """
    width, scaling = rotary_width(model), model.rope_scaling
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    theta, is_long = model.rope_theta, frequency_length(model, length) > 0
    if is_long and scaling and scaling.rope_type == "dynamic":
        excess = scaling.factor * (length / scaling.original_max_position_embeddings - 1)
        theta *= (1 + excess) ** (width / (width - 2))
    frequencies = 1.0 / theta**exponents
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.rope_type == "yarn":
        return _yarn(frequencies, scaling, model.rope_theta)
    return frequencies / torch.tensor(scaling.long_factor if is_long else scaling.short_factor, device="cpu")


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Wavelengths below original/high_factor stay, those above original/low_factor are stretched.

    Between the two the frequency is interpolated.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def _yarn(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Pairs that turn more than beta_fast times in the original context stay, fewer than beta_slow are stretched."""
    pairs = len(frequencies)

    def pair(turns: float) -> float:
        """Number of the pair that turns so many times."""
        return pairs * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)  # the paper's own code clamps to the width, not to pairs
    width = last - first or 0.001
    stretched = ((torch.arange(pairs, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def layer_frequencies(model: ModelConfig, length: int) -> Tensor:
    """`inverse_frequencies` of all layers alike, or of layers without the window and of those with it, (A, R/2)."""
    kinds = [inverse_frequencies(model, length)]
    if model.window_rope_theta:
        kinds.append(inverse_frequencies(replace(model, rope_theta=model.window_rope_theta, rope_scaling=None)))
    return torch.stack(kinds)


def angles_of_layer(x: Tensor, kind: int) -> Tensor:
    """Of angles, or what was made of them, (T, 1 or B, A, R), those of a layer: (T, 1 or B, 1, R).

    Args:
        x: of all kinds of layers.
        kind: 1 of a layer with the window, where others have none.
    """
    return x if x.shape[2] == 1 else x[:, :, kind : kind + 1].contiguous()


class RotaryEmbedding(nn.Module):
    """Angles for positions, in megatron-core's layout."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model_config = model
        # No buffers: never cast with the model, never in checkpoints.
        self.frequencies: dict[int, Tensor] = {}

    def forward(self, positions: Tensor, length: int) -> Tensor:
        """Angles of `positions`, (T,) or (B, T) integers → (T, 1 or B, A, R) fp32.

        Args:
            positions: in the text.
            length: of the whole text in tokens, on which `dynamic` and `longrope` scaling depend.
        """
        angles = positions.float()[..., None, None] * self._frequencies(length, positions.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles[:, None] if positions.dim() == 1 else angles.transpose(0, 1)

    def _frequencies(self, length: int, device: torch.device) -> Tensor:
        """Copied to the device once: a copy in each pass would hold the host up."""
        key = frequency_length(self.model_config, length)
        found = self.frequencies.get(key)
        if found is None or found.device != device:
            if len(self.frequencies) == _MOST_LENGTHS:
                self.frequencies.clear()
            found = self.frequencies[key] = layer_frequencies(self.model_config, length).to(device)
        return found
