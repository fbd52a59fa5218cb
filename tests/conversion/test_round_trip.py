"""Checkpoint to Hugging Face and back: bit by bit the same, and the same model to transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion import models
from tests.workers import WorkerPool

PP2 = ["parallel.pipeline_model_parallel_size=2"]
LLAMA3 = "model.rope_scaling={rope_type: llama3, factor: 8, original_max_position_embeddings: 64}"
LINEAR = "model.rope_scaling={rope_type: linear, factor: 4}"
VARIANTS: dict[str, tuple[int, list[str]]] = {
    "grouped queries, TP2 PP2 VPP2": (4, models.TP2_PP2_VPP2),
    "tied, PP2": (2, [*PP2, "model.tie_word_embeddings=true", "model.num_key_value_heads=8"]),
    "one key-value head, wide heads": (1, ["model.num_key_value_heads=1", "model.head_dim=16"]),
    "llama3 rope": (1, [LLAMA3, "model.rope_theta=500000"]),
    "linear rope, bf16": (1, [LINEAR, "precision=bf16"]),
    "trained in fp8, which leaves scales": (1, ["precision=fp8_delayed"]),
    "sliding window, TP2": (2, ["parallel.tensor_model_parallel_size=2", "model.sliding_window=16"]),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, and `hf` exported from it in several files."""
    world_size, overrides = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("variant")
    workers.run(models.save_run, world_size, folder / "run", overrides)
    models.export(folder / "run", folder / "hf", max_shard_size=50_000)
    assert len(list((folder / "hf").glob("model-*.safetensors"))) > 2
    return folder


def test_there_and_back_is_bitwise_equal(variant: Path, tmp_path: Path) -> None:
    notes = models.import_(variant / "hf", tmp_path / "back")
    assert "it has no tokenizer" in notes[0]
    models.assert_equal(models.tensors_of(variant / "run"), models.tensors_of(tmp_path / "back"))


def test_transformers_computes_the_same_logits_and_tokens(workers: WorkerPool, variant: Path) -> None:
    (result,) = workers.run(models.compare_both, 1, variant / "run", variant / "hf", [], 256)
    assert result.is_equal, result.describe()
    assert result.difference < 1e-5
    assert result.tokens == 3 * 256
    assert result.largest_logit > 0.5  # there is something to compare


def test_it_is_a_plain_llama(variant: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(variant / "hf", output_loading_info=True)
    model, info = loaded
    assert type(model).__name__ in ("LlamaForCausalLM", "MistralForCausalLM")
    assert not any(info.values())
    assert model.get_input_embeddings().weight.shape[0] == 250
    assert model.dtype == (torch.bfloat16 if model.config.dtype == torch.bfloat16 else torch.float32)


def test_an_imported_checkpoint_loads_at_another_layout(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(models.save_run, 1, tmp_path / "run", [])
    models.export(tmp_path / "run", tmp_path / "hf")
    models.import_(tmp_path / "hf", tmp_path / "back")
    workers.run(models.load_and_save, 4, models.step_zero(tmp_path / "back"), tmp_path / "again", models.TP2_PP2_VPP2)
    models.assert_equal(models.tensors_of(tmp_path / "run"), models.tensors_of(tmp_path / "again"))


def test_greedy_decoding_chooses_the_tokens_of_generate(workers: WorkerPool, tmp_path: Path) -> None:
    """Token by token on both sides, not by the comparison's shortcut."""
    from transformers import AutoModelForCausalLM

    workers.run(models.save_run, 2, tmp_path / "run", ["parallel.tensor_model_parallel_size=2"])
    models.export(tmp_path / "run", tmp_path / "hf")
    (prompt,) = models.random_rows(1, 8, 250)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([prompt])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False)[0].tolist()
    (ours,) = workers.run(models.our_greedy, 1, tmp_path / "run", prompt, 256)
    assert ours == theirs


def test_a_changed_weight_is_found_and_its_layer_named(workers: WorkerPool, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    workers.run(models.save_run, 1, tmp_path / "run", [])
    models.export(tmp_path / "run", tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    tensors = load_file(file)
    q = tensors["model.layers.2.self_attn.q_proj.weight"]
    tensors["model.layers.2.self_attn.q_proj.weight"] = q.roll(1, 0)
    save_file(tensors, file, {"format": "pt"})
    (result,) = workers.run(models.compare_both, 1, tmp_path / "run", tmp_path / "hf", [], 4)
    assert not result.is_equal
    assert result.worst.startswith("layer 2 ")
