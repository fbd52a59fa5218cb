"""Which layers attend within the window, and which to all tokens before."""

from vishwamai_mp.config.errors import ConfigError, leave_out
from vishwamai_mp.config.schema import ModelConfig

WINDOWED = "S"  # a letter of `model.layer_pattern`


def layer_window(model: ModelConfig, layer: int) -> int | None:
    """Tokens that a token sees in layer number `layer` (from 0 in the whole model), itself included; None: all before.

    Args:
        model: resolved or not.
        layer: its number.
    """
    pattern = model.layer_pattern
    return model.sliding_window if pattern is None or pattern[layer % len(pattern)] == WINDOWED else None


def layer_windows(model: ModelConfig) -> list[int | None]:
    """`layer_window` of each layer."""
    return [layer_window(model, layer) for layer in range(model.num_layers)]


def check_layer_pattern(model: ModelConfig) -> None:
    """Raises `ConfigError` for a pattern that says nothing, or says it of no window."""
    pattern = model.layer_pattern
    if pattern is None:
        return
    if set(pattern) != {"S", "F"} or len(pattern) > model.num_layers:
        raise ConfigError(
            f"model.layer_pattern={pattern}: write S for each layer with the window and F for each without, up to"
            f" model.num_layers={model.num_layers} letters and both of them, such as SSSF; for layers that are all"
            f" alike {leave_out('model.layer_pattern')}"
        )
    if model.sliding_window is None:
        raise ConfigError(
            f"model.layer_pattern={pattern} without model.sliding_window: no layer would have a window; set"
            " model.sliding_window"
        )
