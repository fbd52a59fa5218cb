"""Rotary embeddings: what is left unsaid, and what cannot work."""

import math
from dataclasses import fields, replace

from vishwamai_mp.config.errors import ConfigError, leave_out
from vishwamai_mp.config.layer_windows import layer_windows
from vishwamai_mp.config.schema import ModelConfig, RopeScaling

_WITHOUT = "N"  # a letter of `model.rotary_pattern`

_KEYS: dict[str, set[str]] = {  # beside rope_type, factor and original_max_position_embeddings
    "linear": set(),
    "dynamic": set(),
    "llama3": {"low_freq_factor", "high_freq_factor"},
    "yarn": {"beta_fast", "beta_slow", "truncate", "attention_factor"},
    "longrope": {"short_factor", "long_factor", "attention_factor"},
}


def layer_is_turned(model: ModelConfig, layer: int) -> bool:
    """Whether queries and keys of layer number `layer` (from 0 in the whole model) are turned by their positions."""
    pattern = model.rotary_pattern
    return pattern is None or pattern[layer % len(pattern)] != _WITHOUT


def resolve_scaling(scaling: RopeScaling) -> RopeScaling:
    """With the attention factor of the papers where none is set; `check_rotary` has seen it."""
    stretch = math.log(max(scaling.factor, 1.0))
    match scaling.rope_type:
        case "yarn":
            factor = 1 + 0.1 * stretch
        case "longrope":
            factor = math.sqrt(1 + stretch / math.log(scaling.original_max_position_embeddings))
        case _:
            return scaling
    return scaling if scaling.attention_factor else replace(scaling, attention_factor=factor)


def check_rotary(model: ModelConfig, head_dim: int) -> None:
    """Raises `ConfigError` where heads cannot be turned as the model says."""
    if head_dim % 2:
        raise ConfigError(f"model.head_dim={head_dim}: rotary embeddings turn pairs; use an even width")
    width = int(head_dim * model.rotary_fraction)
    if width < 2 or width > head_dim or width % 2:
        raise ConfigError(
            f"model.rotary_fraction={model.rotary_fraction} of model.head_dim={head_dim} is {width}: rotary embeddings"
            " turn pairs; use a fraction up to 1 that gives an even width"
        )
    if model.rope_scaling:
        _check_scaling(model.rope_scaling, width // 2)
    _check_pattern(model)
    if model.window_rope_theta is None:
        return
    if model.layer_pattern is None:
        raise ConfigError(
            f"model.window_rope_theta={model.window_rope_theta} without model.layer_pattern: all layers are of one"
            " kind; set model.rope_theta, or model.layer_pattern and model.sliding_window"
        )


def _check_pattern(model: ModelConfig) -> None:
    pattern = model.rotary_pattern
    if pattern is None:
        return
    if set(pattern) != {"R", "N"} or len(pattern) > model.num_layers:
        raise ConfigError(
            f"model.rotary_pattern={pattern}: write R for each layer with rotary positions and N for each without, up"
            f" to model.num_layers={model.num_layers} letters and both of them, such as RRRN; for layers that are all"
            f" turned {leave_out('model.rotary_pattern')}"
        )
    turned = [window for layer, window in enumerate(layer_windows(model)) if layer_is_turned(model, layer)]
    if model.window_rope_theta and len(set(turned)) == 1:
        raise ConfigError(
            f"model.window_rope_theta={model.window_rope_theta} with model.rotary_pattern={pattern} and"
            f" model.layer_pattern={model.layer_pattern}: all layers that are turned are of one kind; set"
            f" model.rope_theta, and {leave_out('model.window_rope_theta')}"
        )


def turns_alike(model: ModelConfig) -> bool:
    """Whether `model.window_rope_theta` says nothing that `model.rope_theta` does not say of all layers."""
    return model.window_rope_theta in (None, model.rope_theta) and model.rope_scaling is None


def _check_scaling(scaling: RopeScaling, pairs: int) -> None:
    kind = scaling.rope_type
    known = {"rope_type", "factor", "original_max_position_embeddings", *_KEYS[kind]}
    for item in fields(scaling):
        if item.name not in known and getattr(scaling, item.name) != item.default:
            raise ConfigError(f"model.rope_scaling.{item.name} has no effect with rope_type={kind}; take it out")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if getattr(scaling, low) >= getattr(scaling, high):
            raise ConfigError(
                f"model.rope_scaling.{low}={getattr(scaling, low)} must lie below"
                f" {high}={getattr(scaling, high)}; lower it"
            )
    if kind == "dynamic" and (pairs < 2 or scaling.factor < 1):
        raise ConfigError(
            f"model.rope_scaling: rope_type=dynamic needs two pairs that turn (here {pairs}) and a factor from 1 on"
            f" (here {scaling.factor}); use linear"
        )
    if kind == "longrope" and scaling.original_max_position_embeddings < 2:
        raise ConfigError("model.rope_scaling.original_max_position_embeddings=1: longrope needs 2 or more")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        count = len(getattr(scaling, name) or [])
        if count != pairs:
            raise ConfigError(f"model.rope_scaling.{name} has {count} numbers; give {pairs}, one for each pair")
