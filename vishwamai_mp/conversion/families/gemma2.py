"""Gemma 2: gated GELU, norms on both sides, soft caps, a scaled embedding, windows of every other layer."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.conversion.families.family import Family, Key
from vishwamai_mp.conversion.mapping import WeightNames
from vishwamai_mp.conversion.value_kinds import NUMBER, check_kinds

_GELU = ("gelu_pytorch_tanh", "the gates here are GELU as approximated by tanh")


class Gemma2(Family):
    """See the module. Its embedding is multiplied by √hidden_size, its scores by 1 / √query_pre_attn_scalar."""

    architecture = "Gemma2ForCausalLM"
    model_type = "gemma2"
    title = "Gemma 2"
    has = {"norm_position": "sandwich", "norm_zero_centered": True, "activation": "geglu"}
    keys: ClassVar[tuple[Key, ...]] = (
        Key("attn_logit_softcapping", "attention_softcap"),
        Key("final_logit_softcapping", "logit_softcap"),
    )
    defaults = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    only = {
        "hidden_act": _GELU,
        "hidden_activation": _GELU,
        "use_bidirectional_attention": (False, "tokens here see none behind them"),
    }
    neutral = frozenset({"query_pre_attn_scalar", "cache_implementation"})  # the former is read below
    default_pattern = "SF"
    written = {"hidden_act": _GELU[0], "hidden_activation": _GELU[0], "attention_bias": False}
    weights = WeightNames(
        attention_output_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """As all families; what is multiplied is computed from two keys of `config.json`."""
        check_kinds(config, {"hidden_size": (int,), "query_pre_attn_scalar": NUMBER}, path)
        model = super().read(config, path)
        scalar = {**cls.defaults, **config}["query_pre_attn_scalar"]
        for key, value in (("query_pre_attn_scalar", scalar), ("hidden_size", model["hidden_size"])):
            if value is None or value <= 0:
                raise UserError(f"{path}: {key}={value} is no number above 0")
        return {
            **model,
            "embedding_multiplier": math.sqrt(model["hidden_size"]),
            "attention_multiplier": 1 / math.sqrt(scalar),
        }

    @classmethod
    def write(cls, model: ModelConfig) -> dict[str, Any]:
        return {**super().write(model), "query_pre_attn_scalar": round(_scalar(model))}

    @classmethod
    def lacks(cls, model: ModelConfig) -> list[str]:
        found = super().lacks(replace(model, embedding_multiplier=None, attention_multiplier=None))
        if not math.isclose(model.embedding_multiplier or 1, math.sqrt(model.hidden_size)):
            found.append(f"model.embedding_multiplier={model.embedding_multiplier}")
        if not math.isclose(_scalar(model), round(_scalar(model))):
            found.append(f"model.attention_multiplier={model.attention_multiplier}")
        return found


def _scalar(model: ModelConfig) -> float:
    """`query_pre_attn_scalar`, which has to be a whole number."""
    assert model.head_dim is not None
    return model.attention_multiplier**-2 if model.attention_multiplier else float(model.head_dim)
