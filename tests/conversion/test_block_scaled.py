"""FP8 weights in blocks, out and in, by transformers' own reading of them; other quantized weights are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion import models
from tests.conversion.test_third_party import assert_same_model, change_config, write_folder
from tests.workers import WorkerPool
from vishwamai_mp.config import UserError
from vishwamai_mp.conversion import rows
from vishwamai_mp.conversion.block_scaled import quantized
from vishwamai_mp.conversion.dtypes import FP8, FP32

WIDE = ["model.hidden_size=256", "model.intermediate_size=384", "model.num_layers=1", "precision=bf16"]


def dequantized(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """By transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    config = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128)))
    return Fp8Dequantize(config)._dequantize_one(numbers, scales)


def test_numbers_are_the_nearest_and_fill_the_range() -> None:
    matrix = torch.randn(384, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix[0, 0] = 3.0
    numbers, scales = quantized(matrix)
    assert (numbers.dtype, numbers.shape, scales.shape) == (torch.float8_e4m3fn, (384, 256), (3, 2))
    assert torch.equal(scales.log2().round().exp2(), scales)  # powers of two
    blocks = numbers.float().unflatten(0, (3, 128)).unflatten(2, (2, 128)).abs().amax((1, 3))
    assert (blocks > 223).all()
    assert (blocks <= 448).all()
    error = (dequantized(numbers, scales) - matrix).abs()
    # Half a step of 3 mantissa bits, or of the smallest exponent.
    scale = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert (error <= torch.maximum(matrix.abs() / 16, scale * 2.0**-10)).all()


def test_an_export_has_weights_and_scales_that_transformers_reads(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(models.save_run, 2, tmp_path / "run", [*WIDE, "parallel.tensor_model_parallel_size=2"])
    models.export(tmp_path / "run", tmp_path / "bf16")
    models.export(tmp_path / "run", tmp_path / "fp8", dtype=FP8)
    exact, coarse = load_file(tmp_path / "bf16/model.safetensors"), load_file(tmp_path / "fp8/model.safetensors")
    scaled = [name for name in exact if name.endswith("_proj.weight")]
    assert len(scaled) == 7
    assert coarse.keys() == exact.keys() | {f"{name}_scale_inv" for name in scaled}
    for name, tensor in exact.items():
        if name in scaled:
            close = dequantized(coarse[name], coarse[f"{name}_scale_inv"]).float()
            assert (close - tensor.float()).abs().max() <= tensor.float().abs().max() / 16
        else:
            assert torch.equal(coarse[name], tensor)
    config = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8"
    assert config["weight_block_size"] == [128, 128]
    assert config["modules_to_not_convert"] == ["lm_head"]


def test_matrices_that_blocks_do_not_make_up_stay_as_they_are(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(models.save_run, 1, tmp_path / "run", [*WIDE, "model.num_key_value_heads=2"])  # 64 rows of keys
    models.export(tmp_path / "run", tmp_path / "fp8", dtype=FP8)
    tensors = load_file(tmp_path / "fp8/model.safetensors")
    assert tensors["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    kept = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert kept == ["lm_head", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]


def test_transformers_computes_with_them(workers: WorkerPool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers loads quantized weights with it")
    workers.run(models.save_run, 1, tmp_path / "run", WIDE)
    models.export(tmp_path / "run", tmp_path / "fp8", dtype=FP8)
    (result,) = workers.run(models.compare_both, 1, tmp_path / "run", tmp_path / "fp8", [], 16)
    assert result.is_equal, result.describe()


def write_scaled(folder: Path, block: tuple[int, int], kind: torch.dtype) -> dict[str, torch.Tensor]:
    """A folder whose layers' matrices are FP8 in blocks, with any scales; returns what they mean, in bf16."""
    write_folder(folder, shard="1GB", hidden_size=192, intermediate_size=320, num_key_value_heads=2)
    meant = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    stored = dict(meant)
    for name, tensor in meant.items():
        if name.endswith("_proj.weight"):
            high, wide = (-(-length // size) for length, size in zip(tensor.shape, block, strict=True))
            scales = torch.rand(high, wide, generator=torch.Generator().manual_seed(high)).add(0.5).mul(1e-3).to(kind)
            each = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            each = each[: tensor.shape[0], : tensor.shape[1]]
            stored[name] = (tensor.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
            meant[name] = (stored[name].float() * each).bfloat16()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    change_config(folder, {"quantization_config": quantization, "dtype": "bfloat16"})
    return meant


@pytest.mark.parametrize(
    ("block", "kind"),
    [((64, 32), torch.float32), ((64, 64), torch.bfloat16), ((128, 128), torch.float32)],  # the last reach beyond edges
)
def test_a_folder_is_imported_as_the_numbers_that_it_means(
    tmp_path: Path, block: tuple[int, int], kind: torch.dtype
) -> None:
    meant = write_scaled(tmp_path / "hf", block, kind)
    assert "21 matrices are FP8 in blocks" in models.import_(tmp_path / "hf", tmp_path / "run")[-1]
    models.export(tmp_path / "run", tmp_path / "again")
    models.assert_equal(load_file(tmp_path / "again/model.safetensors"), meant)


def test_a_row_is_scaled_by_its_own_block_wherever_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows at a time, which begin and end within blocks."""
    meant = write_scaled(tmp_path / "hf", (64, 64), torch.float32)
    monkeypatch.setattr(rows, "_PIECE_BYTES", 7 * 192 * 2)
    models.import_(tmp_path / "hf", tmp_path / "run")
    models.export(tmp_path / "run", tmp_path / "again")
    models.assert_equal(load_file(tmp_path / "again/model.safetensors"), meant)


def test_transformers_reads_the_same_numbers(workers: WorkerPool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers loads quantized weights with it")
    write_scaled(tmp_path / "hf", (64, 64), torch.float32)
    models.import_(tmp_path / "hf", tmp_path / "run", FP32)
    assert_same_model(workers, tmp_path / "run", tmp_path / "hf")


def _change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


_Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{_Q}_scale_inv"), f"{_Q} is FP8 and lacks its scales, {_Q}_scale_inv"),
        (lambda t: t.update({f"{_Q}_scale_inv": torch.ones(2, 3)}), "has the shape [2, 3] and the type F32;"),
        (lambda t: t.update({f"{_Q}_scale_inv": torch.ones(3, 3).to(torch.uint8)}), "the type U8;"),
        (lambda t: t.update({_Q: t[_Q].float()}), f"has {_Q}_scale_inv, but no FP8 numbers {_Q}"),
    ],
)
def test_scales_that_are_not_those_of_the_numbers_are_refused(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    write_scaled(tmp_path / "hf", (64, 64), torch.float32)
    _change_tensors(tmp_path / "hf", edit)
    with pytest.raises(UserError) as caught:
        models.import_(tmp_path / "hf", tmp_path / "run")
    assert message in str(caught.value)


_FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [64, 64]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized (awq)"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "(bitsandbytes, 4bit)"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantized (bitsandbytes, 8bit)"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "x"}}, "(compressed-tensors)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "quantized (compressed-tensors)"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8' is not an object"),
        ({"quantization_config": {**_FP8, "weight_block_size": None}}, "with weight_block_size=None"),
        ({"quantization_config": {**_FP8, "weight_block_size": [64]}}, "with weight_block_size=[64]"),
        ({"quantization_config": {**_FP8, "activation_scheme": "static"}}, "with activation_scheme='static'"),
        ({"quantization_config": {**_FP8, "fmt": "e5m2"}}, "with fmt='e5m2'"),
        ({"quantization_config": {**_FP8, "hadamard": True}}, "quantization_config with hadamard=True is unknown"),
    ],
)
def test_other_quantized_weights_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_folder(tmp_path / "hf", num_hidden_layers=1)
    change_config(tmp_path / "hf", change)
    with pytest.raises(UserError) as caught:
        models.import_(tmp_path / "hf", tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.SCB", "bitsandbytes, 8 bits"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes, 4 bits"),
        ("model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "FP8 in blocks, of which config.json has no quantization"),
    ],
)
def test_quantized_weights_that_the_configuration_is_silent_of_are_named(tmp_path: Path, name: str, kind: str) -> None:
    write_folder(tmp_path / "hf", shard="1GB", num_hidden_layers=1)
    _change_tensors(tmp_path / "hf", lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(UserError) as caught:
        models.import_(tmp_path / "hf", tmp_path / "run")
    assert f"has {name}: its weights are quantized ({kind}" in str(caught.value)
