"""Folders that transformers itself wrote, with random weights: imported, they compute what transformers computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion import models
from tests.workers import WorkerPool
from vishwamai_mp.checkpoint import read_manifest
from vishwamai_mp.config import UserError, load_config, resolve
from vishwamai_mp.conversion import safetensors_files
from vishwamai_mp.conversion.dtypes import BF16, FP32
from vishwamai_mp.conversion.source import open_source
from vishwamai_mp.conversion.verify import compare
from vishwamai_mp.planning.parameters import parameter_count

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "vocab_size": 301,  # odd
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3, "num_key_value_heads": 3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.5}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
        },
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [1.0, 3.0, 9.0, 27.0],
            "original_max_position_embeddings": 64,
        },
    },
    "head_dim, eps": {"head_dim": 20, "rms_norm_eps": 1e-3, "num_key_value_heads": 1},
}


def write_folder(folder: Path, architecture: str = "Llama", shard: str = "50KB", **options: Any) -> None:
    import transformers

    torch.manual_seed(0)
    text = "Text" if architecture == "Gemma3" else ""
    config = getattr(transformers, f"{architecture}{text}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    model.save_pretrained(folder, max_shard_size=shard)


def change_config(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def assert_same_model(workers: WorkerPool, run: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = models.random_rows(2, 100, SIZES["vocab_size"])
    (ours,) = workers.run(models.our_logits, 1, run, rows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # in fp64: some families' own fp32 strays as far from it as ours does
        theirs = model.double()(torch.tensor(rows)).logits
    assert model.num_parameters() == parameter_count(resolve(load_config(run / "config.yaml")).model)
    largest = theirs.abs().max().item()
    assert largest > 0.5
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5 * max(1, largest), rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_llama_imports_exactly(workers: WorkerPool, tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "hf", **VARIANTS[name])
    models.import_(tmp_path / "hf", tmp_path / "run")
    assert_same_model(workers, tmp_path / "run", tmp_path / "hf")


def test_a_mistral_with_a_window_imports_exactly(workers: WorkerPool, tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", "Mistral", num_key_value_heads=2, sliding_window=20)
    models.import_(tmp_path / "hf", tmp_path / "run")
    assert load_config(tmp_path / "run/config.yaml").model.sliding_window == 20
    assert_same_model(workers, tmp_path / "run", tmp_path / "hf")


_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_PHI: dict[str, Any] = {"pad_token_id": None, "eos_token_id": 2}  # its own lie beyond a small vocabulary
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "Qwen2, tied": ("Qwen2", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 20}),
    "Qwen2, windows of later layers": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "Qwen3, windows of some layers": (
        "Qwen3",
        {
            "num_key_value_heads": 6,
            "head_dim": 20,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": _WINDOWS,
        },
    ),
    "Phi3, parts": (
        "Phi3",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}, **_PHI},
    ),
    "Phi3, parts, longrope": (
        "Phi3",
        {
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 64,
            "sliding_window": 50,
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.5, 2.0],
                "long_factor": [1.0, 3.0, 9.0],
            },
            **_PHI,
        },
    ),
    "Qwen3, tied": ("Qwen3", {"num_key_value_heads": 6, "head_dim": 8, "tie_word_embeddings": True}),
    "Olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "Olmo2, tied": ("Olmo2", {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-3}),
    "Olmo3": ("Olmo3", {"num_key_value_heads": 2, "num_hidden_layers": 5, "sliding_window": 20}),
    "Olmo3, yarn in layers without a window": (
        "Olmo3",
        {
            "num_key_value_heads": 3,
            "layer_types": _WINDOWS,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 500.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "Olmo3, tied": ("Olmo3", {"tie_word_embeddings": True, "layer_types": _WINDOWS, "sliding_window": 9}),
    "Gemma2, tied": (
        "Gemma2",
        {
            "num_key_value_heads": 2,
            "head_dim": 20,
            "query_pre_attn_scalar": 30,
            "sliding_window": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "Gemma2, without caps": (
        "Gemma2",
        {
            "num_key_value_heads": 6,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 9,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "Gemma3, tied": (
        "Gemma3",
        {
            "num_key_value_heads": 2,
            "head_dim": 20,
            "sliding_window": 20,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "Granite": (
        "Granite",
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 3.0,
        },
    ),
    "Granite, tied": (
        "Granite",
        {
            "head_dim": 20,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
            "residual_multiplier": 2.0,
            "attention_multiplier": 20**-0.5,  # as if it were not said
        },
    ),
    "SmolLM3, tied": ("SmolLM3", {"num_key_value_heads": 2, "num_hidden_layers": 5, **_PHI}),
    "SmolLM3, windows where nothing is turned": (
        "SmolLM3",
        {
            "num_key_value_heads": 3,
            "head_dim": 20,
            "tie_word_embeddings": False,
            "no_rope_layers": [0, 1, 1, 1],
            "use_sliding_window": True,
            "sliding_window": 9,
            "rope_parameters": LLAMA3,
            **_PHI,
        },
    ),
    "Gemma3, capped logits": (
        "Gemma3",
        {
            "num_key_value_heads": 3,
            "head_dim": 8,
            "query_pre_attn_scalar": 5,
            "sliding_window": 9,
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": False,
            "layer_types": _WINDOWS,
        },
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_imports_exactly_and_is_exported_as_it_was(workers: WorkerPool, tmp_path: Path, name: str) -> None:
    family, options = FAMILIES[name]
    write_folder(tmp_path / "hf", family, **options)
    models.import_(tmp_path / "hf", tmp_path / "run")
    assert_same_model(workers, tmp_path / "run", tmp_path / "hf")
    models.export(tmp_path / "run", tmp_path / "again")
    original, again = (tensors_of_folder(tmp_path / folder) for folder in ("hf", "again"))
    models.assert_equal(original, again)
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["architectures"] == [f"{family}ForCausalLM"]
    # Where frequencies change with a text's length, transformers keeps keys that were turned by the former ones.
    tokens = 16 if "longrope" in name else 64
    (result,) = workers.run(models.compare_both, 1, tmp_path / "run", tmp_path / "again", [], tokens)
    assert result.is_equal, result.describe()
    assert result.tokens == 3 * tokens
    if "longrope" in name:
        with pytest.raises(UserError, match="change their rotary frequencies beyond 64 tokens"):
            compare(open_source(tmp_path / "run"), tmp_path / "again", [[1] * 60], 16)


def tensors_of_folder(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def test_names_of_transformers_4_are_read(workers: WorkerPool, tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", shard="1GB", rope_parameters=LLAMA3)
    path = tmp_path / "hf/config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    path.write_text(json.dumps({**config, "rope_scaling": scaling}))
    models.import_(tmp_path / "hf", tmp_path / "run")
    assert_same_model(workers, tmp_path / "run", tmp_path / "hf")


def test_names_of_transformers_4_are_read_of_layers_that_turn_differently(workers: WorkerPool, tmp_path: Path) -> None:
    _, options = FAMILIES["Gemma3, tied"]
    write_folder(tmp_path / "hf", "Gemma3", shard="1GB", **options)
    path = tmp_path / "hf/config.json"
    config = json.loads(original := path.read_text())
    rope = config.pop("rope_parameters")
    del config["layer_types"]
    written = {
        "rope_theta": rope["full_attention"].pop("rope_theta"),
        "rope_scaling": rope["full_attention"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "sliding_window_pattern": 6,
        "cache_implementation": "hybrid",
    }
    path.write_text(json.dumps({**config, **written}))
    models.import_(tmp_path / "hf", tmp_path / "run")
    path.write_text(original)  # which the transformers of these tests reads
    assert_same_model(workers, tmp_path / "run", tmp_path / "hf")


def test_a_tied_folder_may_repeat_its_embedding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_folder(tmp_path / "hf", shard="1GB", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    notes = models.import_(tmp_path / "hf", tmp_path / "run")
    assert "output_layer.weight" not in read_manifest(models.step_zero(tmp_path / "run")).tensors
    assert "left behind: 1 tensor *.rotary_emb.inv_freq, computed from rope_theta" in notes[-1]


def test_another_head_than_the_embedding_is_not_tied_whatever_the_configuration_says(
    workers: WorkerPool, tmp_path: Path
) -> None:
    """As transformers has it."""
    from safetensors.torch import load_file, save_file

    write_folder(tmp_path / "hf", shard="1GB", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    notes = models.import_(tmp_path / "hf", tmp_path / "run")
    assert "lm_head.weight is not model.embed_tokens.weight: both are imported, untied" in notes[-1]
    assert_same_model(workers, tmp_path / "run", tmp_path / "hf")


def test_equal_tensors_are_told_from_others_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(safetensors_files, "_BLOCK_BYTES", 64)
    tensors = {"a": torch.arange(99.0), "same": torch.arange(99.0), "last": torch.arange(99.0)}
    tensors["last"][-1] = 0
    save_file({**tensors, "half": torch.arange(99.0).half()}, tmp_path / "x")
    entries = safetensors_files.read_header(tmp_path / "x")
    equal = [name for name in entries if safetensors_files.are_equal(entries["a"], entries[name])]
    assert sorted(equal) == ["a", "same"]


def test_windows_that_are_switched_off_are_refused_where_layers_have_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", "Qwen2", num_key_value_heads=2)
    change_config(tmp_path / "hf", {"layer_types": _WINDOWS})
    with pytest.raises(UserError, match="layer_types has 'sliding_attention' and use_sliding_window is not set"):
        models.import_(tmp_path / "hf", tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0] is not a list of 3 numbers"),
        ({"no_rope_layers": [0, 0, 0]}, "model.rotary_pattern=N: write R for each layer"),
        ({"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0 is no number of layers"),
    ],
)
def test_layers_without_positions_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_folder(tmp_path / "hf", "SmolLM3", num_key_value_heads=2, **_PHI)
    change_config(tmp_path / "hf", change)
    with pytest.raises(UserError) as caught:
        models.import_(tmp_path / "hf", tmp_path / "run")
    assert message in str(caught.value)


def test_what_is_left_behind_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", num_hidden_layers=1)
    change_config(tmp_path / "hf", {"rope_interleaved": False, "pretraining_tp": 2, "mystery": None})
    (tmp_path / "hf/README.md").write_text("a model")
    (tmp_path / "hf/original").mkdir()
    *_, note = models.import_(tmp_path / "hf", tmp_path / "run")
    keys = [f"{key} of config.json, which is unknown here and switched off" for key in ("mystery", "rope_interleaved")]
    assert note == f"{tmp_path / 'hf'}: left behind: {'; '.join([*keys, 'README.md', 'original'])}"


def test_a_mistral_without_all_keys_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", "Mistral", num_attention_heads=8, num_key_value_heads=8)
    path = tmp_path / "hf/config.json"
    config = json.loads(path.read_text())
    for key in ("sliding_window", "num_key_value_heads", "max_position_embeddings"):
        config.pop(key)
    path.write_text(json.dumps(config))
    models.import_(tmp_path / "hf", tmp_path / "run")
    model = load_config(tmp_path / "run/config.yaml").model
    assert (model.sliding_window, model.num_key_value_heads, model.max_position_embeddings) == (4096, 8, 131072)


def test_the_type_of_number_is_kept_or_chosen(tmp_path: Path) -> None:
    import transformers

    write_folder(tmp_path / "fp32")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "bf16"
    )
    models.import_(tmp_path / "bf16", tmp_path / "kept")
    models.import_(tmp_path / "fp32", tmp_path / "rounded", BF16)
    models.import_(tmp_path / "bf16", tmp_path / "widened", FP32)
    kept, rounded, widened = (models.tensors_of(tmp_path / run, 301) for run in ("kept", "rounded", "widened"))
    models.assert_equal(kept, rounded)
    models.assert_equal({name: tensor.float() for name, tensor in kept.items()}, widened)
    assert load_config(tmp_path / "kept/config.yaml").precision == "bf16"
    assert load_config(tmp_path / "widened/config.yaml").precision == "fp32"


def test_an_import_that_is_exported_is_the_folder_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_folder(tmp_path / "hf", shard="1GB", num_key_value_heads=2)
    models.import_(tmp_path / "hf", tmp_path / "run")
    models.export(tmp_path / "run", tmp_path / "again")
    models.assert_equal(load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "again/model.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["CohereForCausalLM"]}, "CohereForCausalLM, which has parallel attention and MLP"),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel, cannot be converted; Llama, Mistral, Qwen 2, Qwen 3, Phi 3 and 4, OLMo 2, OLMo 3, "
            "Gemma 2, Gemma 3, Granite 3, SmolLM 3 can",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "cannot be converted (nearest: Qwen3ForCausalLM)"),
        ({"architectures": ["LLamaForCausalLm"]}, "cannot be converted (nearest: LlamaForCausalLM)"),
        ({"architectures": ["LlamaForTokenClassification"]}, "cannot be converted (nearest: LlamaForCausalLM)"),
        ({"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM, cannot be converted; Llama"),
        ({"architectures": None}, "names no architecture"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported (the MLP here is SwiGLU)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "axial"}}, "rotary scaling 'axial' is not supported; dynamic, linear"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "'longrope' lacks short_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1]}}, "give 4, one for"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rotary scaling 'linear' lacks factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized (gptq)"),
        ({"rope_parameters": {"rope_type": "default", "truncate": 3}}, "'default' with truncate=3 is not supported"),
        ({"rope_theta": 7.0}, "rope_theta is 7.0, and 10000.0 with the scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "do not agree"),
        (
            {"residual_multiplier": 0.2},
            "residual_multiplier=0.2 is unknown here and may change what the model computes",
        ),
        ({"sliding_window": 16}, "sliding_window=16 is unknown here"),
        ({"model_type": "granite"}, "model_type=granite is not supported (it is a LlamaForCausalLM)"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "all layers here attend alike"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "the model is computed by Python code of its own"),
        ({"num_key_value_heads": 4}, "not a multiple of model.num_key_value_heads=4"),
        ({"hidden_size": "48a"}, "model.hidden_size=48a"),
    ],
)
def test_what_this_model_has_not_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_folder(tmp_path / "hf", num_hidden_layers=1)
    change_config(tmp_path / "hf", change)
    with pytest.raises(UserError) as caught:
        models.import_(tmp_path / "hf", tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
