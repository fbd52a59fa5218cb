"""Adapters on their way out: merged into the weights, and as a folder that the real peft loads onto the base model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion import models
from tests.programs import run_forked
from tests.workers import WorkerPool
from vishwamai_mp.config import UserError
from vishwamai_mp.conversion.adapters import export_adapters
from vishwamai_mp.conversion.dtypes import BF16
from vishwamai_mp.conversion.source import open_source

LORA = ["lora={enabled: true, rank: 4, alpha: 10}"]
TP2_PP2 = models.TP2_PP2_VPP2[:2]
_TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"


@pytest.fixture(scope="module")
def adapted(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run` with adapters, saved by 4 processes, and `hf` exported from it; `base`, the same without, and `base-hf`."""
    folder = tmp_path_factory.mktemp("adapted")
    workers.run(models.save_run, 4, folder / "run", [*LORA, *TP2_PP2])
    workers.run(models.save_run, 1, folder / "base", [])
    models.export(folder / "run", folder / "hf")
    models.export(folder / "base", folder / "base-hf")
    return folder


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(rows)).logits


def test_merged_weights_compute_what_adapters_do(workers: WorkerPool, adapted: Path) -> None:
    (result,) = workers.run(models.compare_both, 1, adapted / "run", adapted / "hf", [], 32)
    assert result.is_equal, result.describe()
    assert result.difference < 1e-5


def test_adapters_of_another_family_are_merged(workers: WorkerPool, tmp_path: Path) -> None:
    """Of a Gemma 3, whose keys beyond a Llama's all meet the adapters."""
    gemma = [
        *("model.norm_position=sandwich", "model.norm_zero_centered=true", "model.activation=geglu"),
        *("model.qk_norm=head", "model.logit_softcap=3", "model.sliding_window=9", "model.layer_pattern=SF"),
        *("model.window_rope_theta=100", "model.attention_multiplier=0.25"),
    ]
    width = "model.embedding_multiplier=%r" % models.configure(gemma, 1).model.hidden_size ** 0.5
    workers.run(models.save_run, 4, tmp_path / "run", [*LORA, *TP2_PP2, *gemma, width])
    models.export(tmp_path / "run", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    (result,) = workers.run(models.compare_both, 1, tmp_path / "run", tmp_path / "hf", [], 32)
    assert result.is_equal, result.describe()


def test_adapters_matter(workers: WorkerPool, adapted: Path) -> None:
    rows = models.random_rows(2, 40, 250)
    (ours,) = workers.run(models.our_logits, 1, adapted / "run", rows)
    (base,) = workers.run(models.our_logits, 1, adapted / "base", rows)
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(logits_of(load(adapted / "base-hf"), rows), base, atol=1e-5, rtol=1e-5)


def test_merged_weights_come_back_as_a_plain_checkpoint(workers: WorkerPool, adapted: Path, tmp_path: Path) -> None:
    models.import_(adapted / "hf", tmp_path / "back")
    rows = models.random_rows(2, 40, 250)
    (ours,) = workers.run(models.our_logits, 1, adapted / "run", rows)
    (back,) = workers.run(models.our_logits, 1, tmp_path / "back", rows)
    torch.testing.assert_close(back, ours, atol=1e-5, rtol=0)


def test_peft_loads_the_adapters(workers: WorkerPool, adapted: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    command = [_TOOL, "to-peft", "--load", adapted / "run", "--output", tmp_path / "a"]
    done = run_forked([*command, "--base", "theirs"])
    assert done.returncode == 0, done.stderr
    assert "--base theirs is no folder here: its weights were not compared" in done.stderr
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["base_model_name_or_path"] == "theirs"
    with pytest.raises(UserError, match="is not empty"):
        export_adapters(open_source(adapted / "run"), tmp_path / "a", "")
    with pytest.raises(UserError, match=r"--output .*adapter_config\.json is a file; name a new folder"):
        export_adapters(open_source(adapted / "run"), tmp_path / "a/adapter_config.json", "")
    model = PeftModel.from_pretrained(load(adapted / "base-hf"), tmp_path / "a").eval()
    rows = models.random_rows(2, 40, 250)
    (ours,) = workers.run(models.our_logits, 1, adapted / "run", rows)
    torch.testing.assert_close(logits_of(model, rows), ours, atol=1e-5, rtol=0)


def test_some_targets_and_bf16(workers: WorkerPool, tmp_path: Path) -> None:
    """A folder of a 16-bit run: only what was adapted, in its own type."""
    from peft import PeftConfig

    some = ["lora={enabled: true, rank: 2, alpha: 3, targets: [linear_qkv, linear_fc2]}", "precision=bf16"]
    workers.run(models.save_run, 1, tmp_path / "run", some)
    export_adapters(open_source(tmp_path / "run"), tmp_path / "a", "")
    config = PeftConfig.from_pretrained(str(tmp_path / "a"))
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "down_proj"}
    assert (config.r, config.lora_alpha) == (2, 3)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert len(tensors) == 4 * 4 * 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_what_cannot_be_exported_as_adapters(workers: WorkerPool, adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapters"):
        export_adapters(open_source(adapted / "base"), tmp_path / "a", "")
    workers.run(models.save_run, 1, tmp_path / "run", [*LORA, models.MEMORY])
    with pytest.raises(UserError, match="to-hf writes it whole, adapters merged"):
        export_adapters(open_source(tmp_path / "run"), tmp_path / "a", "")
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        open_source(tmp_path / "run")


def test_the_base_is_the_model_that_was_adapted(adapted: Path, tmp_path: Path) -> None:
    source = open_source(adapted / "run")
    assert export_adapters(source, tmp_path / "fp32", str(adapted / "base-hf")) == []
    models.export(adapted / "base", tmp_path / "bf16-hf", dtype=BF16)
    assert export_adapters(source, tmp_path / "bf16", str(tmp_path / "bf16-hf")) == []
    tensors = load_file(adapted / "base-hf/model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][-1, -1] += 1e-3
    other = Path(shutil.copytree(adapted / "base-hf", tmp_path / "other"))
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"trained on: model\.layers\.2\.mlp\.gate_proj\.weight or .*up_proj\.weight differs"
    ):
        export_adapters(source, tmp_path / "a", str(other))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    with pytest.raises(UserError, match=r"trained on: model\.rope_theta is 5\.0 there and 10000\.0 here"):
        export_adapters(source, tmp_path / "a", str(other))
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_with_adapters_wants_a_model_with_the_same(workers: WorkerPool, adapted: Path) -> None:
    path = models.step_zero(adapted / "run")
    for overrides, message in [
        ([], r"set lora\.enabled=true lora\.rank=4 lora\.targets=\[linear_fc1,linear_fc2,linear_proj,linear_qkv\]"),
        ([*LORA, "lora.rank=8"], r"has adapters that are not this model's; set lora\.enabled=true lora\.rank=4"),
        ([*LORA, "lora.targets=[linear_qkv]"], r"lora\.targets=\[linear_fc1"),
    ]:
        with pytest.raises(UserError, match=message):
            workers.run(models.load_and_save, 1, path, adapted / "never", overrides)
    with pytest.raises(UserError, match=r"has no adapters and this model has"):
        workers.run(models.load_and_save, 1, models.step_zero(adapted / "base"), adapted / "never", LORA)
