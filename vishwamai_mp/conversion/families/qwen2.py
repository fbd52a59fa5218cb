"""Qwen 2 and 2.5: biases of queries, keys and values; later layers may attend within a window."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ModelConfig
from vishwamai_mp.conversion.families.family import Family
from vishwamai_mp.conversion.layer_types import with_switched_windows
from vishwamai_mp.conversion.value_kinds import check_kinds

_FIRST_WINDOWED = 28  # where `max_window_layers` is not said


class Qwen2(Family):
    """See the module. `max_window_layers` says how many layers attend to all tokens: the first ones."""

    architecture = "Qwen2ForCausalLM"
    model_type = "qwen2"
    title = "Qwen 2"
    has = {"attention_bias": True}
    defaults = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
    neutral = frozenset({"use_sliding_window", "max_window_layers"})  # read below
    default_pattern = "F"

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """As all families, when it is said which layers have the window."""
        check_kinds(config, {"max_window_layers": (int,)}, path)
        first = config.get("max_window_layers")
        first = _FIRST_WINDOWED if first is None else first
        return super().read(with_switched_windows(config, path, lambda layer: layer >= first), path)

    @classmethod
    def write(cls, model: ModelConfig) -> dict[str, Any]:
        """`layer_types` is left out where no layer has a window: earlier readers know none."""
        found = {**super().write(model), "use_sliding_window": model.sliding_window is not None}
        types = found["layer_types"]
        if model.sliding_window is None:
            del found["layer_types"]
        elif types == sorted(types):  # "full" before "sliding": what earlier readers have it from
            found["max_window_layers"] = types.count("full_attention")
        return found
