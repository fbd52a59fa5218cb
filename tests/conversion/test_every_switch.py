"""Every key of the sections that make up a model: what an export makes of it.

A key that is new has no line here, and the first test fails: say whether the folder carries it, and if it does, the
last test computes with it on both sides.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.conversion import models
from tests.workers import WorkerPool
from vishwamai_mp.config import CacheConfig, ConfigError, MemoryConfig, ModelConfig, UserError
from vishwamai_mp.conversion import components, model_config
from vishwamai_mp.conversion.families import family_holding

_SECTIONS = {"model": ModelConfig, "memory": MemoryConfig, "cache": CacheConfig}
TRAINING = "only training asks for it: a trained model computes the same with any value"
REFUSED = "code of the user's own is not exported: see the test of that name"
ALONE = "only without components: see the tests of other families"
WIDTH = "the model's width, or the configuration is refused"

SWITCHES = {
    "model.hidden_size": 48,
    "model.num_layers": 3,
    "model.num_attention_heads": 6,
    "model.num_key_value_heads": 3,
    "model.head_dim": 12,
    "model.intermediate_size": 88,
    "model.activation": ALONE,
    "model.vocab_size": 251,
    "model.max_position_embeddings": 256,
    "model.tie_word_embeddings": True,
    "model.embedding_multiplier": ALONE,
    "model.residual_multiplier": ALONE,
    "model.rms_norm_eps": 1e-3,
    "model.norm_zero_centered": ALONE,
    "model.rope_theta": 500.0,
    "model.rope_scaling": "{rope_type: llama3, factor: 8, original_max_position_embeddings: 64}",
    "model.rotary_fraction": ALONE,
    "model.rotary_pattern": ALONE,
    "model.sliding_window": 24,
    "model.layer_pattern": ALONE,
    "model.window_rope_theta": ALONE,
    "model.attention_multiplier": ALONE,
    "model.attention_softcap": ALONE,
    "model.logit_multiplier": ALONE,
    "model.logit_softcap": ALONE,
    "model.attention_dropout": TRAINING,
    "model.hidden_dropout": TRAINING,
    "model.attention": REFUSED,
    "model.initializer_range": TRAINING,
    "model.attention_bias": ALONE,
    "model.qk_norm": ALONE,
    "model.norm_position": ALONE,
    "memory.enabled": True,
    "memory.hidden_size": WIDTH,
    "memory.memory_size": 36,
    "memory.num_memory_layers": 2,
    "memory.dropout": TRAINING,
    "memory.head_dim": 12,
    "memory.chunk_size": 8,
    "memory.momentum": False,
    "memory.layers": [1, 2],
    "memory.carry_state": TRAINING,
    "memory.loss_weight": TRAINING,
    "cache.enabled": True,
    "cache.hidden_size": WIDTH,
    "cache.num_heads": 6,
    "cache.max_cache_length": 66,
    "cache.dropout": TRAINING,
    "cache.retrieval_factor": 0.5,
    "cache.segment_length": 8,
    "cache.latents_per_segment": 3,
    "cache.retrieve_segments": 2,
    "cache.layers": [0, 1],
    "cache.before_memory": True,
    "cache.carry_state": TRAINING,
}
CARRIED = [f"{key}={value}" for key, value in SWITCHES.items() if value not in (TRAINING, WIDTH, REFUSED, ALONE)]


def config_json(overrides: list[str]) -> dict[str, Any]:
    config = models.configure(overrides, 1)
    own = components.to_hf(config, False)
    family = family_holding(config.model, components=bool(own))
    return {**model_config.to_hf(config.model, "float32", {}, family), **own}


def test_every_key_has_a_line() -> None:
    keys = {f"{section}.{field.name}" for section, kind in _SECTIONS.items() for field in fields(kind)}
    assert keys == SWITCHES.keys()


@pytest.mark.parametrize("override", CARRIED, ids=[override.partition("=")[0] for override in CARRIED])
def test_the_folder_carries_it(override: str) -> None:
    """`config.json` differs, whatever else is set."""
    key = override.partition("=")[0]
    # Widths come with what divides them; one alone could not be changed.
    small = [models.MEMORY, models.CACHE, "model.num_layers=4", "cache.before_memory=false"]
    alone = {
        "model.hidden_size": ["model.hidden_size=64"],
        "model.num_layers": ["model.num_layers=3"],
        "model.num_attention_heads": ["model.num_attention_heads=4"],
        "model.num_key_value_heads": ["model.num_key_value_heads=2"],
        "memory.enabled": ["memory.enabled=false"],
        "memory.memory_size": ["memory.memory_size=64"],
        "memory.head_dim": ["memory.head_dim=16"],
        "cache.enabled": ["cache.enabled=false"],
        "cache.num_heads": ["cache.num_heads=8"],
        "cache.max_cache_length": ["cache.max_cache_length=64"],
        "cache.latents_per_segment": ["cache.latents_per_segment=4"],
    }.get(key, [override])
    assert config_json([*small, *alone]) != config_json(small)


@pytest.mark.parametrize("override", ["model.attention_bias=true", "model.qk_norm=head", "model.rotary_fraction=0.5"])
def test_what_the_exported_code_has_not_is_refused_by_name(override: str) -> None:
    assert config_json([override]) != config_json([])
    with pytest.raises(UserError, match=f"{override.partition('=')[0]}=.* with a memory, cache or value head"):
        config_json([override, models.MEMORY])


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("layer_pattern=SF", ["model.sliding_window=8", "model.layer_pattern=SF"]),
        ("norm_position=post", ["model.qk_norm=full", "model.norm_position=post"]),
        ("embedding_multiplier=2.0", ["model.embedding_multiplier=2"]),
        ("rotary_pattern=RN", ["model.rotary_pattern=RN"]),
        ("residual_multiplier=0.3", ["model.residual_multiplier=0.3"]),
        ("logit_multiplier=0.3", ["model.logit_multiplier=0.3"]),
        ("attention_multiplier=0.3", ["model.attention_multiplier=0.3"]),
        (
            "window_rope_theta=7.0",
            ["model.sliding_window=8", "model.layer_pattern=SF", "model.window_rope_theta=7"],
        ),
        ("attention_softcap=5.0", ["model.attention_softcap=5"]),
        ("logit_softcap=5.0", ["model.logit_softcap=5"]),
        ("activation=geglu", ["model.activation=geglu"]),
        ("norm_zero_centered=True", ["model.norm_zero_centered=true"]),
    ],
)
def test_the_exported_code_has_not_what_only_other_families_have(key: str, overrides: list[str]) -> None:
    with pytest.raises(UserError, match=f"model.{key}.* with a memory, cache or value head"):
        config_json([*overrides, models.MEMORY])


def test_what_no_family_has_together_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"model\.attention_bias and model\.qk_norm together"):
        config_json(["model.attention_bias=true", "model.qk_norm=head"])


@pytest.mark.parametrize("section", ["memory", "cache"])
def test_components_of_another_width_than_the_model_are_refused(section: str) -> None:
    with pytest.raises(ConfigError, match=f"{section}.hidden_size"):
        models.configure([models.MEMORY, models.CACHE, f"{section}.hidden_size=64"], 1)


def test_code_of_the_users_own_is_not_exported(workers: WorkerPool, tmp_path: Path) -> None:
    own = "model.attention=examples.extensions.cosine_attention:CosineAttention"
    workers.run(models.save_run, 1, tmp_path / "run", [own])
    with pytest.raises(UserError, match=r"has model\.attention=examples.*cannot be exported"):
        models.export(tmp_path / "run", tmp_path / "hf")


def test_both_sides_compute_the_same_with_all_of_them(workers: WorkerPool, tmp_path: Path) -> None:
    """The folder's own code, far enough that a cache has to choose; and the import has the same configuration."""
    workers.run(models.save_run, 1, tmp_path / "run", CARRIED)
    models.export(tmp_path / "run", tmp_path / "hf")
    # Random prompts: a greedy text soon repeats itself, and of equal segments rounding decides which one is read.
    prompts = models.random_rows(2, 88, 250)
    (result,) = workers.run(models.compare_both, 1, tmp_path / "run", tmp_path / "hf", prompts, 2)
    assert result.is_equal, result.describe()
    models.import_(tmp_path / "hf", tmp_path / "back")
    back, run = (models.step_config(tmp_path / name) for name in ("back", "run"))
    for section in _SECTIONS:
        for field in fields(_SECTIONS[section]):
            if SWITCHES[f"{section}.{field.name}"] not in (TRAINING, REFUSED):
                assert getattr(getattr(back, section), field.name) == getattr(getattr(run, section), field.name)
