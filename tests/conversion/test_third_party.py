"""Folders that transformers itself wrote, with random weights: imported, they compute what transformers computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion import models
from tests.workers import WorkerPool
from vishwamai_mp.checkpoint import read_manifest
from vishwamai_mp.config import UserError, load_config
from vishwamai_mp.conversion.dtypes import BF16, FP32

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
    "head_dim, eps": {"head_dim": 20, "rms_norm_eps": 1e-3, "num_key_value_heads": 1},
}


def write_folder(folder: Path, architecture: str = "Llama", shard: str = "50KB", **options: Any) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)


def assert_same_model(workers: WorkerPool, run: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = models.random_rows(2, 100, SIZES["vocab_size"])
    (ours,) = workers.run(models.our_logits, 1, run, rows)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor(rows)).logits
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


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


def test_names_of_transformers_4_are_read(workers: WorkerPool, tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", shard="1GB", rope_parameters=LLAMA3)
    path = tmp_path / "hf/config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    path.write_text(json.dumps({**config, "rope_scaling": scaling}))
    models.import_(tmp_path / "hf", tmp_path / "run")
    assert_same_model(workers, tmp_path / "run", tmp_path / "hf")


def test_a_tied_folder_may_repeat_its_embedding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_folder(tmp_path / "hf", shard="1GB", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    models.import_(tmp_path / "hf", tmp_path / "run")
    assert "output_layer.weight" not in read_manifest(models.step_zero(tmp_path / "run")).tensors


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
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM, which has biases of queries, keys and values"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel, cannot be converted; only Llama and Mistral"),
        ({"architectures": None}, "names no architecture"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported (the MLP here is SwiGLU)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rotary scaling 'linear' lacks factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized (gptq)"),
        ({"num_key_value_heads": 4}, "not a multiple of model.num_key_value_heads=4"),
        ({"hidden_size": "48a"}, "model.hidden_size=48a"),
    ],
)
def test_what_this_model_has_not_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_folder(tmp_path / "hf", num_hidden_layers=1)
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        models.import_(tmp_path / "hf", tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
