"""GGUF files of exported folders, read with the library's own reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion import models
from tests.conversion.test_third_party import LLAMA3, tensors_of_folder, write_folder
from vishwamai_mp.config import UserError
from vishwamai_mp.conversion import to_gguf
from vishwamai_mp.conversion.dtypes import FP8
from vishwamai_mp.conversion.families import family_named
from vishwamai_mp.conversion.folder import open_folder
from vishwamai_mp.conversion.gguf_form import metadata
from vishwamai_mp.conversion.gguf_tokenizer import read_tokenizer
from vishwamai_mp.conversion.source import open_source
from vishwamai_mp.conversion.to_gguf import neighbours, write_gguf
from vishwamai_mp.data.byte_level_training import train_byte_level
from vishwamai_mp.data.tokenizer_training import train_tokenizer

gguf = pytest.importorskip("gguf")
_TEXTS = [Path(__file__).read_text()] * 3
_GEMMA = {
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 8,
    "head_dim": 8,
    "sliding_window": 9,
    "num_hidden_layers": 2,
}
_SMOLLM = {"num_hidden_layers": 2, "num_key_value_heads": 2, "no_rope_layers": [1, 0], "pad_token_id": None}
_PHI = {"pad_token_id": None, "eos_token_id": 2}
# name: family, settings, keys that the file has to have behind the architecture's name
WRITTEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama": (
        "Llama",
        {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
        {"attention.head_count_kv": 2, "attention.key_length": 8},
    ),
    "Qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 3}, {"rope.freq_base": 10000.0}),
    "Mistral, yarn": (
        "Mistral",
        {
            "sliding_window": None,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
        },
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 32.0},
    ),
    "Qwen3": ("Qwen3", {"head_dim": 20, "num_key_value_heads": 2}, {"attention.key_length": 20}),
    "Phi3": (
        "Phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.5, 2.0],
                "long_factor": [1.0, 3.0, 9.0],
            },
            **_PHI,
        },
        {"rope.dimension_count": 6, "rope.scaling.original_context_length": 64, "attention.sliding_window": 0},
    ),
    "Olmo3, tied": (
        "Olmo3",
        {"tie_word_embeddings": True, "sliding_window": 9, "num_hidden_layers": 2},
        {"attention.sliding_window": 9, "attention.sliding_window_pattern": [True, True]},
    ),
    "Granite": (
        "Granite",
        {"residual_multiplier": 0.4, "logits_scaling": 8.0, "attention_multiplier": 0.25, "head_dim": 8},
        {"residual_scale": 0.4, "logit_scale": 8.0, "attention.scale": 0.25},
    ),
    "Gemma2": ("Gemma2", _GEMMA, {"attn_logit_softcapping": 50.0, "attention.sliding_window_pattern": [True, False]}),
    "Gemma3": (
        "Gemma3",
        {
            **_GEMMA,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}},
        },
        {"rope.freq_base": 1e6, "rope.freq_base_swa": 500.0},
    ),
}


def write(folder: Path, family: str, kind: str, **options: Any) -> Any:
    """A reader of the file that a folder of transformers is written as."""
    write_folder(folder, family, **{"num_hidden_layers": 1, **options})
    own = family_named(f"{family}ForCausalLM")
    write_gguf(folder, own, open_folder(folder).config.model, kind, folder / "model.gguf")
    return gguf.GGUFReader(folder / "model.gguf")


def numbers(reader: Any) -> dict[str, torch.Tensor]:
    """Tensors in fp32, shaped as torch has them."""
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(
            [int(length) for length in reversed(tensor.shape)]
        )
        for tensor in reader.tensors
    }


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_holds_the_folders_numbers(tmp_path: Path, name: str) -> None:
    family, options, expected = WRITTEN[name]
    reader = write(tmp_path / "hf", family, "f32", **options)
    found, original = numbers(reader), tensors_of_folder(tmp_path / "hf")
    own = open_folder(tmp_path / "hf").config.model
    extra = {called: found.pop(called) for called in list(found) if called.startswith("rope_")}
    if options.get("tie_word_embeddings") and family == "Olmo3":
        assert found.pop("output.weight").equal(found["token_embd.weight"])
    assert len(found) == len(original)
    architecture = reader.get_field("general.architecture").contents()
    for key, value in expected.items():
        assert reader.get_field(f"{architecture}.{key}").contents() == pytest.approx(value), key
    names = gguf.get_tensor_name_map(
        next(i for i, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture), own.num_layers
    )
    for called, tensor in original.items():
        mine = found[names.get_name(called, (".weight", ".bias"))]
        if family in ("Llama", "Mistral", "Granite") and (".q_proj" in called or ".k_proj" in called):
            heads = mine.reshape(-1, 8, 48)  # rows 0, 1 are the first of both halves
            mine = torch.cat((heads[:, 0::2], heads[:, 1::2]), 1).reshape(tensor.shape)
        assert mine.equal(tensor + (family.startswith("Gemma") and "norm" in called)), called
    if family == "Llama":
        assert extra["rope_freqs.weight"][[0, -1]].tolist() == [1, 4]
    if family == "Phi3":
        assert extra["rope_factors_long.weight"].tolist() == [1, 3, 9]


@pytest.mark.parametrize(("kind", "most"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_kinds_of_numbers(tmp_path: Path, kind: str, most: float) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 80}
    reader = write(tmp_path / "hf", "Qwen2", kind, **sizes)
    found, original = numbers(reader), tensors_of_folder(tmp_path / "hf")
    wide = original["model.layers.0.mlp.up_proj.weight"]
    difference = (found["blk.0.ffn_up.weight"] - wide).abs() / wide.abs().amax(1, keepdim=True)
    assert 0 < difference.max() <= most
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    assert kinds["blk.0.ffn_up.weight"] == kind.upper()
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if kind == "q8_0" else kind.upper())  # 80 is no multiple of 32


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ("Mistral", {"sliding_window": 9, "num_key_value_heads": 2}, "llama has no model.sliding_window=9"),
        ("Gemma3", {**_GEMMA, "query_pre_attn_scalar": 5}, "gemma3 has no model.attention_multiplier="),
        ("Gemma2", {**_GEMMA, "attn_logit_softcapping": None}, "model.attention_softcap=null"),
        ("SmolLM3", _SMOLLM, "smollm3 has no model.rotary_pattern=RN"),
        ("Olmo2", {"head_dim": 16}, "olmo2 has no model.head_dim=16"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path / "hf", family, "f16", **options)
    assert not list((tmp_path / "hf").glob("*.gguf*"))


def test_an_export_with_a_file_continues_and_refuses_components(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "hf", num_hidden_layers=1)
    models.import_(tmp_path / "hf", tmp_path / "run")

    def fails(*_: Any) -> None:
        raise OSError("the disk has gone")

    with monkeypatch.context() as patched:
        patched.setattr(to_gguf, "_check", fails)
        with pytest.raises(UserError, match="the disk has gone"):
            models.export(tmp_path / "run", tmp_path / "out", gguf="f32")
    assert not list((tmp_path / "out").glob("*.gguf*"))
    models.export(tmp_path / "run", tmp_path / "out", gguf="f32")
    (file,) = (tmp_path / "out").glob("*.gguf*")
    assert file.name == "out-f32.gguf"
    assert len(gguf.GGUFReader(file).tensors) == 12
    source = open_source(tmp_path / "run")
    with pytest.raises(UserError, match="--gguf with --dtype fp8"):
        to_gguf.check_gguf(source, FP8)
    object.__setattr__(source, "value_head", True)
    with pytest.raises(UserError, match=r"llama\.cpp has no value head"):
        to_gguf.check_gguf(source, None)


def test_rows_of_heads_come_as_neighbours() -> None:
    rows = torch.arange(12.0)[:, None]
    assert neighbours(rows, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_windows_that_never_act_are_no_windows() -> None:
    config = models.configure([f"model.sliding_window={models.CONTEXT}"], 1)
    form = to_gguf.form_of(family_named("MistralForCausalLM"), config.model)
    assert "attention.sliding_window" not in metadata(form, config.model)


def test_tokenizers(tmp_path: Path) -> None:
    train_tokenizer(_TEXTS, 400, tmp_path / "tokenizer")
    keys = read_tokenizer(tmp_path, 410).keys
    assert keys["ggml.model"] == "llama"
    assert len(keys["ggml.tokens"]) == len(keys["ggml.scores"]) == len(keys["ggml.token_type"]) == 410
    assert keys["ggml.tokens"][-1] == b"[PAD409]"
    assert keys["ggml.tokens"][keys["ggml.eos_token_id"]] == b"</s>"
    assert not keys["ggml.add_bos_token"]
    (tmp_path / "tokenizer.model").unlink()
    assert read_tokenizer(tmp_path, 410).keys == {"ggml.model": "none"}
    train_byte_level(_TEXTS, 300, tmp_path / "tokenizer")
    keys = read_tokenizer(tmp_path, 300).keys
    assert (keys["ggml.model"], keys["ggml.pre"]) == ("gpt2", "smollm")
    assert all(len(merge.split(" ")) == 2 for merge in keys["ggml.merges"])
    step = keys["ggml.tokens"].index(b"[STEP]")
    assert keys["ggml.token_type"][step] == 4  # the user's own
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace('"individual_digits": true', '"individual_digits": false'))
    with pytest.raises(UserError, match=r"cuts texts in a way that is not known .* leave it out with --tokenizer none"):
        read_tokenizer(tmp_path, 300)


def test_all_chat_templates_and_ends_of_texts_go_along(tmp_path: Path) -> None:
    train_byte_level(_TEXTS, 300, tmp_path / "tokenizer")
    eos = read_tokenizer(tmp_path, 300).keys["ggml.eos_token_id"]

    def write(name: str, content: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / name).write_text(json.dumps(content))
        return read_tokenizer(tmp_path, 300).keys

    plain = {"name": "default", "template": "plain"}
    keys = write("tokenizer_config.json", {"chat_template": [plain, {"name": "tool-use", "template": "tools"}]})
    found = {key: value for key, value in keys.items() if key.startswith("chat_template")}
    assert found == {"chat_template": "plain", "chat_templates": ["tool_use"], "chat_template.tool_use": "tools"}
    named = write("tokenizer_config.json", {"chat_template": {"default": "plain", "tool-use": "tools"}})
    assert {key: value for key, value in named.items() if key.startswith("chat_template")} == found
    assert "chat_templates" not in write("tokenizer_config.json", {"chat_template": "plain"})
    assert "ggml.eot_token_id" not in write("generation_config.json", {"eos_token_id": eos})
    keys = write("generation_config.json", {"eos_token_id": [eos, 7, 9999, 8]})
    assert [keys[f"ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [eos, 7, 8]
    write("generation_config.json", {"eos_token_id": [5, 6, 7, eos]})
    assert "tokens [7] of generation_config.json end no text there" in read_tokenizer(tmp_path, 300).notes[0]
