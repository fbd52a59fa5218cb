"""Gemma 3, of text alone: a Gemma 2 with norms of queries and keys in place of soft caps, and two rotary bases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vishwamai_mp.config import UserError
from vishwamai_mp.conversion.families.family import Key
from vishwamai_mp.conversion.families.gemma2 import Gemma2
from vishwamai_mp.conversion.value_kinds import check_kinds

_PERIOD = 6  # layers: all but the last of each six attend within the window


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
    rotary_by_type = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """As of a Gemma 2, when it is said which layers have the window."""
        kinds = {"sliding_window_pattern": (int,), "_sliding_window_pattern": (int,), "num_hidden_layers": (int,)}
        check_kinds(config, kinds, path)
        if config.get("layer_types"):
            return super().read(config, path)
        period, private = (config.get(f"{mark}sliding_window_pattern") for mark in ("", "_"))
        if private not in (None, period or _PERIOD):
            raise UserError(
                f"{path}: _sliding_window_pattern={private} without layer_types is not read by transformers; write"
                f" sliding_window_pattern={private}"
            )
        period = _PERIOD if period is None else period
        if period < 1:
            raise UserError(f"{path}: sliding_window_pattern={period} is no number of layers")
        numbers = range(1, (config.get("num_hidden_layers") or 0) + 1)
        types = [f"{'sliding' if number % period else 'full'}_attention" for number in numbers]
        return super().read({**config, "layer_types": types}, path)
