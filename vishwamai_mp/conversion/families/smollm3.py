"""SmolLM 3: a Llama, one of whose four layers is not turned by positions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.config.resolve_rotary import layer_is_turned
from vishwamai_mp.conversion.families.family import Family, Key
from vishwamai_mp.conversion.layer_types import shortest_pattern, with_switched_windows
from vishwamai_mp.conversion.value_kinds import check_kinds

_BASE, _INTERVAL = 2e6, 4


def _pattern(turned: list[int]) -> str | None:
    return shortest_pattern("".join("R" if one else "N" for one in turned)) if 0 in turned else None


class SmolLM3(Family):
    """See the module. The list `no_rope_layers` has a 1 for each layer that is turned."""

    architecture = "SmolLM3ForCausalLM"
    model_type = "smollm3"
    title = "SmolLM 3"
    keys: ClassVar[tuple[Key, ...]] = (Key("no_rope_layers", "rotary_pattern", _pattern),)
    defaults = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True}
    # The first two are read below; transformers does not read the last.
    neutral = frozenset({"no_rope_layer_interval", "use_sliding_window", "max_window_layers"})
    default_pattern = "F"
    written = {"attention_bias": False, "mlp_bias": False}

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """As all families, when what transformers derives from other keys is said."""
        kinds = {"num_hidden_layers": (int,), "no_rope_layer_interval": (int,), "rope_parameters": (dict,)}
        check_kinds(config, {**kinds, "rope_scaling": (dict,)}, path)
        turned, layers = config.get("no_rope_layers"), config.get("num_hidden_layers") or 0
        if turned is None:
            interval = config.get("no_rope_layer_interval", _INTERVAL)
            if interval is None or interval < 1:
                raise UserError(f"{path}: no_rope_layer_interval={interval} is no number of layers")
            turned = [int(number % interval != 0) for number in range(1, layers + 1)]
        if not isinstance(turned, list) or any(one not in (0, 1) for one in turned) or len(turned) < layers:
            raise UserError(f"{path}: no_rope_layers={turned} is not a list of {layers} numbers 0 or 1, one a layer")
        found = {"sliding_window": None, **config, "no_rope_layers": [int(one) for one in turned[:layers]]}
        if config.get("rope_theta") is None:
            rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
            found["rope_theta"] = rope.get("rope_theta", _BASE)
        return super().read(with_switched_windows(found, path, lambda layer: not turned[layer]), path)

    @classmethod
    def write(cls, model: ModelConfig) -> dict[str, Any]:
        turned = [int(layer_is_turned(model, layer)) for layer in range(model.num_layers)]
        has_windows = model.sliding_window is not None
        return {**super().write(model), "no_rope_layers": turned, "use_sliding_window": has_windows}
