"""Gemma 3, of text alone: a Gemma 2 with norms of queries and keys in place of soft caps, and two rotary bases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.conversion.families.family import Key
from vishwamai_mp.conversion.families.gemma2 import Gemma2
from vishwamai_mp.conversion.value_kinds import NUMBER, check_kinds

_PERIOD = 6  # layers: all but the last of each six attend within the window
_BASES = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}


class Gemma3(Gemma2):
    """See the module."""

    architecture = "Gemma3ForCausalLM"
    model_type = "gemma3_text"
    title = "Gemma 3"
    has = {**Gemma2.has, "qk_norm": "head"}
    keys = (Key("final_logit_softcapping", "logit_softcap"),)
    defaults = {**Gemma2.defaults, "max_position_embeddings": 131072, "final_logit_softcapping": None}
    # transformers does not cap scores here, whatever the first key says; the others are read below.
    neutral = Gemma2.neutral | {
        *("attn_logit_softcapping", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
    }
    default_pattern = "SSSSSF"
    rotary_by_type = True

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """As of a Gemma 2; keys of transformers 4 become those of 5 first."""
        kinds = {"sliding_window_pattern": (int,), "_sliding_window_pattern": (int,), "num_hidden_layers": (int,)}
        objects = dict.fromkeys(("rope_parameters", "rope_scaling"), (dict,))
        check_kinds(config, {**kinds, "rope_theta": NUMBER, "rope_local_base_freq": NUMBER, **objects}, path)
        found = dict(config)
        if not config.get("layer_types"):
            period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or _PERIOD
            if period < 1:
                raise UserError(f"{path}: sliding_window_pattern={period} is no number of layers")
            numbers = range(1, (config.get("num_hidden_layers") or 0) + 1)
            found["layer_types"] = [f"{'sliding' if number % period else 'full'}_attention" for number in numbers]
        rope = config.get("rope_parameters") or {}
        if rope and not rope.keys() & _BASES.keys():
            raise UserError(
                f"{path}: rope_parameters={rope} does not say which layers it is of; expected {list(_BASES)}"
            )
        check_kinds(rope, dict.fromkeys(_BASES, (dict,)), path)
        found["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": config.get(key) or base, **(rope.get(kind) or {})}
            for kind, (key, base) in _BASES.items()
        }
        found["rope_parameters"]["full_attention"] |= found.pop("rope_scaling", None) or {}
        return super().read({key: value for key, value in found.items() if key != "rope_theta"}, path)

    @classmethod
    def write(cls, model: ModelConfig) -> dict[str, Any]:
        """With transformers 4's name for the base of layers with the window."""
        return {**super().write(model), "rope_local_base_freq": model.window_rope_theta or model.rope_theta}
