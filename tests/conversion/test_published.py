"""Configurations as published are imported with the published sizes, and presets come back as they are exported."""

from pathlib import Path
from typing import Any

import pytest

from vishwamai_mp.config import load_config, preset_names, resolve
from vishwamai_mp.conversion import model_config
from vishwamai_mp.conversion.families import family_holding, family_of
from vishwamai_mp.planning import parameter_count

_SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings"),
)
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# By architecture: billions of parameters, shape, the rest of `config.json`, and what our section `model` then says.
PUBLISHED: dict[str, tuple[float, tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "GraniteForCausalLM": (  # 3.3 8B
        8.17,
        (4096, 40, 32, 8, 12800, 49159, 131072),
        {
            "tie_word_embeddings": True,
            "rope_theta": 10000000.0,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 16.0,
        },
        {"embedding_multiplier": 12, "residual_multiplier": 0.22, "logit_multiplier": 0.0625},
    ),
    "SmolLM3ForCausalLM": (  # 3B
        3.08,
        (2048, 36, 16, 4, 11008, 128256, 65536),
        {
            "tie_word_embeddings": True,
            "rope_theta": 5000000.0,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 28,
            "layer_types": ["full_attention"] * 36,
        },
        {"rotary_pattern": "RRRN", "sliding_window": None, "rope_theta": 5e6},
    ),
    "Olmo3ForCausalLM": (  # 7B
        7.30,
        (4096, 32, 32, 32, 11008, 100278, 65536),
        {
            "rope_theta": 500000,
            "rope_scaling": _YARN,
            "sliding_window": 4096,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
        },
        {"layer_pattern": "SSSF", "window_rope_theta": 5e5, "max_position_embeddings": 65536},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_the_published_size(name: str) -> None:
    billions, shape, more, said = PUBLISHED[name]
    config = {"architectures": [name], "attention_bias": False, "hidden_act": "silu"}
    config |= dict(zip(_SHAPE, shape, strict=True)) | more
    model = model_config.from_hf(config, Path(name), family_of(config, Path(name))).model
    assert round(parameter_count(model) / 1e9, 2) == billions
    assert {key: getattr(model, key) for key in said} == said
    again = model_config.to_hf(model, "bfloat16", {})
    assert again["architectures"] == [name]
    assert model_config.from_hf(again, Path(name), family_holding(model)).model == model


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_comes_back_as_it_is_exported(name: str) -> None:
    model = resolve(load_config(name)).model
    config = model_config.to_hf(model, "bfloat16", {})
    assert model_config.from_hf(config, Path(name), family_holding(model)).model == model
