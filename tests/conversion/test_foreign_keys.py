"""Keys of `config.json`: none that transformers reads is unknown here, and none changes a model without being said."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.conversion import models
from tests.conversion.test_third_party import FAMILIES, LLAMA3, assert_same_model, write_folder
from tests.workers import WorkerPool
from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.conversion import model_config
from vishwamai_mp.conversion.components import ARCHITECTURE
from vishwamai_mp.conversion.families import family_holding, family_named, model_types

ARCHITECTURES = sorted(model_types().keys() - {ARCHITECTURE})
_BUT_SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 3.0, 9.0, 27.0],
    "original_max_position_embeddings": 64,
}


def published(architecture: str) -> dict[str, Any]:
    """What transformers writes of a model of the family, nothing set."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_types()[architecture])
    return {**config.to_dict(), "architectures": [architecture]}


def read(config: dict[str, Any]) -> ModelConfig:
    return model_config.from_hf(config, Path("config.json"), family_named(config["architectures"][0])).model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_key_of_transformers_is_known(architecture: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_types()[architecture])
    family = family_named(architecture)
    unread = {"base_model_tp_plan", "base_model_pp_plan"}
    names = {field.name for field in fields(config)} | config.to_dict().keys()
    known = {name for name in names if model_config.is_neutral(name) or model_config.is_read(name, family)}
    assert names - known <= unread


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_not_said_is_as_in_transformers(architecture: str) -> None:
    config = published(architecture)
    alone = {key: config[key] for key in _BUT_SIZES | {"architectures", "model_type"}}
    assert read(alone) == read(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("value", [False, None])
def test_a_model_whose_tokens_see_those_behind_them_is_refused(architecture: str, value: Any) -> None:
    """The one switch of transformers' that null or false turns on, of any family."""
    with pytest.raises(UserError, match=f"is_causal={value} is not supported"):
        read({**published(architecture), "is_causal": value})


def _types(full: dict[str, Any] | None, windowed: dict[str, Any] | None) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": windowed}}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("Olmo3", {"rope_parameters": None, "rope_theta": 123.0}, "transformers 4 turns all by it, and 5 those with"),
        ("Olmo3", {**_types({"rope_theta": 77.0}, None), "rope_theta": 123.0}, "rope_theta=123.0 does not say which"),
        ("Olmo3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "with factor=2.0 does not say which"),
        ("Olmo3", _types({**_YARN, "truncate": False}, None), "truncate=false of full_attention is not supported"),
        ("Olmo3", _types({}, {"rope_theta": 5.0, "partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5 of layers"),
        ("Olmo3", _types({}, {"type": "linear", "factor": 2.0}), "'linear' of layers with a window is not supported"),
        ("Olmo3", {"sliding_window": None}, "sliding_window=null, and layers attend within a window"),
        ("Olmo3", {"layer_types": []}, "0 layer_types of 6 layers"),
        ("Gemma3", {"layer_types": None, "_sliding_window_pattern": 2}, "write sliding_window_pattern=2"),
        ("Gemma3", _types({**_YARN, "truncate": False}, None), "truncate=false of full_attention is not supported"),
        ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("Phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not supported (no Phi3For"),
        ("Phi3", {"rope_parameters": LLAMA3}, "'llama3' is not supported (no Phi3ForCausalLM has it)"),
        ("Phi3", {"rope_parameters": _YARN}, "'yarn' is not supported (no Phi3ForCausalLM has it)"),
        (
            "Phi3",
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0},
            "partial_rotary_factor is 1.0, and 0.5 with the scaling",
        ),
        (
            "Llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0},
            "partial_rotary_factor is 1.0, and 0.5 with the scaling",
        ),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(family: str, change: dict[str, Any], message: str) -> None:
    architecture = f"{family}ForCausalLM"
    sizes = {"num_hidden_layers": 6, "layer_types": None, "rope_scaling": None}
    with pytest.raises(UserError) as caught:
        read({**published(architecture), **sizes, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": None}),  # 4096, whatever the rule says
        ("Phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 48}),
        ("Olmo3, tied", {**_types(_YARN, None), "original_max_position_embeddings": 48}),  # not read there
        ("Olmo3, tied", {**_types({"rope_theta": 77.0}, {"rope_theta": 5.0}), "rope_theta": 123.0}),
        ("Olmo3, tied", {"rope_parameters": None, "rope_theta": 500000.0}),
        ("Qwen2, windows of later layers", {"sliding_window": None, "layer_types": None}),
    ],
)
def test_what_two_keys_say_is_read_as_transformers_reads_it(
    workers: WorkerPool, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    family, options = FAMILIES.get(name, (name, {"pad_token_id": None, "eos_token_id": 2}))
    write_folder(tmp_path / "hf", family, **options)
    path = tmp_path / "hf/config.json"
    config = {**json.loads(path.read_text()), **change}
    unsaid = {key for key, value in change.items() if value is None}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in unsaid}))
    models.import_(tmp_path / "hf", tmp_path / "run")
    assert_same_model(workers, tmp_path / "run", tmp_path / "hf")


def test_a_rotary_rule_that_a_family_does_not_take_is_not_exported_as_it() -> None:
    scaled = ["model.rope_scaling={rope_type: linear, factor: 2}"]
    assert family_holding(models.configure(scaled, 1).model).architecture == "LlamaForCausalLM"
    with pytest.raises(UserError, match=r"model\.rotary_fraction: transformers has no such model"):
        family_holding(models.configure([*scaled, "model.rotary_fraction=0.5"], 1).model)


@pytest.mark.parametrize(
    ("family", "pattern", "wanted"),
    [
        ("Gemma3", ["sliding_window=8"], {"rope_theta": 1e6, "rope_local_base_freq": 77.0}),
        ("Gemma3", ["sliding_window=8", "layer_pattern=SF"], {"rope_theta": 77.0, "rope_local_base_freq": 77.0}),
        ("Gemma3", [], {"rope_theta": 77.0, "rope_local_base_freq": 1e4, "sliding_window": 4096}),
        ("Olmo3", ["sliding_window=8"], {"rope_theta": 77.0}),
        ("Olmo3", ["sliding_window=8", "layer_pattern=SF", "window_rope_theta=5"], {"rope_theta": 77.0}),
    ],
)
def test_what_no_layer_has_is_the_default(family: str, pattern: list[str], wanted: dict[str, float]) -> None:
    """For transformers 4 in keys of its own, for 5 in `rope_parameters`; read again, the model is the same."""
    own = family_named(f"{family}ForCausalLM")
    multipliers = {"embedding_multiplier": 32**0.5} if family == "Gemma3" else {}
    settings = [f"model.{key}={value}" for key, value in {**own.has, **multipliers, "rope_theta": 77}.items()]
    model = models.configure([*settings, *(f"model.{key}" for key in pattern)], 1).model
    assert not own.lacks(model)
    written = {"architectures": [own.architecture], "model_type": own.model_type, **own.write(model)}
    assert {key: written[key] for key in wanted} == wanted
    types = {kind: own.rotary_by_type[kind][1] for kind in own.rotary_by_type.keys() - set(written["layer_types"])}
    assert {kind: written["rope_parameters"][kind]["rope_theta"] for kind in types} == types
    assert read(written) == model
