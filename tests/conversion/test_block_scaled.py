"""FP8 weights in blocks, by transformers' own reading of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.conversion import models
from tests.workers import WorkerPool
from vishwamai_mp.conversion.block_scaled import quantized
from vishwamai_mp.conversion.dtypes import FP8

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
