"""Damaged Hugging Face folders: imported, or refused in one line with no checkpoint written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.data.test_tokenizer_kinds import byte_level
from tests.fuzz.mutations import damaged, emptied, fuzzed, outcome
from vishwamai_mp.conversion.families.llama import Llama
from vishwamai_mp.conversion.folder import open_folder
from vishwamai_mp.conversion.from_hf import import_folder
from vishwamai_mp.conversion.mapping import plain_mapping
from vishwamai_mp.conversion.model_config import from_hf
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.opening.prompts import PromptTokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    **SIZES,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
FILES = [
    *("config.json", INDEX, *SHARDS, "tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("generation_config.json", "special_tokens_map.json", "chat_template.jinja"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "hf"
    folder.mkdir()
    parts = [part for mapped in plain_mapping(from_hf(LLAMA, folder, Llama).model) for part in mapped.parts]
    halves = parts[::2], parts[1::2]
    for name, half in zip(SHARDS, halves, strict=True):
        save_file({part.name: torch.ones(part.shape) for part in half}, folder / name, {"format": "pt"})
    places = {part.name: name for name, half in zip(SHARDS, halves, strict=True) for part in half}
    described = {
        "config.json": LLAMA,
        INDEX: {"metadata": {}, "weight_map": places},
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True},
        "generation_config.json": {"eos_token_id": [2, 3], "temperature": 0.5},
        "special_tokens_map.json": {"eos_token": "</s>"},
    }
    for name, content in described.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['role'] }}>{{ m.content }}{% endfor %}")
    shutil.copy(train_tokenizer(["one two three"] * 9, 370, folder.parent / "small").path, folder / "tokenizer.model")
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def imported(folder: Path, output: Path) -> None:
    """Import and open what was imported as a server does."""
    messages = [{"role": "user", "content": "one"}]
    emptied(output)
    found = outcome(lambda: import_folder(open_folder(folder), output, None))
    if isinstance(found, str):
        assert not list(output.glob("checkpoints/step_????????"))
        return
    assert (output / "checkpoints/step_00000000/manifest.json").is_file()
    if any((output / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        prompts = outcome(lambda: PromptTokenizer(output, 10**6))
        if isinstance(prompts, PromptTokenizer):
            outcome(lambda: prompts.decode(prompts.encode("one")))
            outcome(lambda: prompts.chat(messages))


def test_the_whole_folder_is_imported(whole: Path, tmp_path: Path) -> None:
    assert not isinstance(outcome(lambda: import_folder(open_folder(whole), tmp_path / "run", None)), str)


@pytest.mark.parametrize("name", FILES)
@fuzzed
@given(data=st.data())
def test_damaged_files(whole: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    folder = tmp_path / "damaged"
    if not folder.exists():
        shutil.copytree(whole, folder)
    (folder / name).write_bytes(data.draw(damaged((whole / name).read_bytes())))
    imported(folder, tmp_path / "run")


KEYS = [
    *(
        "architectures",
        "model_type",
        *SIZES,
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "rope_type",
    ),
    *("max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling"),
    *("rope_parameters", "rope_theta", "factor", "low_freq_factor", "attention_bias", "mlp_bias", "hidden_act"),
    *("sliding_window", "layer_types", "partial_rotary_factor", "quantization_config", "auto_map", "attention_dropout"),
    *("initializer_range", "memory", "cache", "layers", "heads", "torch_dtype", "made_up", "quant_method"),
]
WORDS = [
    *(
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen3ForCausalLM",
        "VishwamAIForCausalLM",
        "llama3",
        "linear",
        "a",
        "",
    ),
    *("full_attention", "\ud800", "\0"),
]
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([0, 1, 2, -1, 3.5, 32, 10**6, 10**12, 10**400, float("inf"), float("nan")]),
        st.sampled_from(WORDS),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=6,
)


@fuzzed
@given(change=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), left_out=st.sampled_from(["", *KEYS]))
def test_strange_configurations(whole: Path, tmp_path: Path, change: dict[str, Any], left_out: str) -> None:
    folder = tmp_path / "strange"
    if not folder.exists():
        shutil.copytree(whole, folder)
    config = {**LLAMA, **change}
    config.pop(left_out, None)
    (folder / "config.json").write_text(json.dumps(config))
    imported(folder, tmp_path / "run")


SETTINGS = [
    *("bos_token", "eos_token", "add_bos_token", "tokenizer_class", "added_tokens_decoder", "chat_template", "content"),
    *("eos_token_id", "temperature", "legacy", "add_prefix_space", "default", "name", "template", "7", "999"),
]
SETTING_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.sampled_from([0, 2, -1, 10**6, 10**400, 0.5]), st.sampled_from(WORDS)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(SETTINGS), inner, max_size=3)),
    max_leaves=6,
)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
@fuzzed
@given(content=SETTING_VALUES)
def test_strange_settings(whole: Path, tmp_path: Path, name: str, content: Any) -> None:
    folder = tmp_path / "strange"
    if not folder.exists():
        shutil.copytree(whole, folder)
    (folder / name).write_text(json.dumps(content))
    imported(folder, tmp_path / "run")


TEMPLATES = [
    *(
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 2 ** 99999 }}",
    ),
    *(
        "{{ messages | join }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ '%s' % {} | tojson }}",
        "{{ x.y.z }}",
    ),
    *(
        "{{ raise_exception('no') }}",
        "{% include 'a' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ '{}'.format(1) | int }}",
        "\0{{",
    ),
    *("{{ messages[0]['content'] + 1 }}", "{{ [1] | map('b') | list }}", "{{ 'a' | b }}", "{{ strftime_now(1) }}", ""),
    *("{{ 'x' * 10 ** 10 }}", "{{ 'x' * 9999 * 9999 }}", "{{ '\\ud800' }}"),
    *("{{ 'a' | center(9999999999) }}", "{{ '%9999999999d' % 1 }}", "{{ ('a\n' * 10 ** 6) | indent(10 ** 4) }}"),
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates(whole: Path, tmp_path: Path, template: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((whole / "tokenizer.model").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    prompts = outcome(lambda: PromptTokenizer(tmp_path, 384))
    if isinstance(prompts, PromptTokenizer):
        outcome(lambda: prompts.chat([{"role": "user", "content": "one"}]))
