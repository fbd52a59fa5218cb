"""tools/dry_run.py as its users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.layouts import SMALL
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.planning.footprint_advice import stage_memory
from vishwamai_mp.runtime.fused_layers import python_folder

_TOOL = Path(__file__).resolve().parents[2] / "tools" / "dry_run.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.json"
    path.write_text(json.dumps(SMALL | {"precision": "bf16"}))  # JSON is YAML
    return path.rename(path.with_suffix(".yaml"))


def _run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(_TOOL), *arguments], capture_output=True, text=True)


def test_a_rank_of_a_job_in_numbers(recipe):
    layout = ["parallel.tensor_model_parallel_size=2", "training.global_batch_size=4"]
    run = _run("--config", str(recipe), "--gpus", "4", "--rank", "3", "--json", *layout)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    config = resolve(load_config(SMALL, ["precision=bf16", *layout]), 4)
    assert found["predicted_bytes"] == round(stage_memory(config, 4, 0, on_gpu=True).total)
    assert found["layers"] == ("torch" if python_folder() is None else "Transformer Engine")
    needed = found["peak_bytes"] - found["at_peak"].get("workspaces", 0)  # cuBLAS's are many times this model
    assert needed == pytest.approx(found["predicted_bytes"], rel=0.3)
    norms = 9 * 32  # whole on each rank
    assert found["parameters"] == norms + (2 * 256 * 32 + 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96)) / 2
    assert found["flops"] > 6 * (found["parameters"] - 256 * 32 / 2) * 2 * 32  # the input table is looked up
    assert sum(found["host_waits"].values()) == 1
    assert found["launches"] > 100
    kinds = {(c["operation"], c["group"], c["size"]) for c in found["collectives"]}
    assert {("all_reduce", "tensor_model_parallel", 2), ("all_reduce", "data_parallel_group_with_cp", 2)} <= kinds


def test_as_text_and_what_fp8_becomes_without_transformer_engine(recipe):
    settings = ["precision=fp8_current", "training.global_batch_size=2"]
    run = _run("--config", str(recipe), "--gpus", "1", "--torch-layers", *settings)
    assert run.returncode == 0, run.stderr
    assert "data 0) of 1, torch's layers" in run.stdout
    assert "precision=fp8_current is simulated as bf16" in run.stdout
    assert "the host waits for the device 1 times" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "4", "--rank", "4"], "--rank 4: a job of --gpus 4 has ranks 0 to 3"),
        (["--gpus", "3", "parallel.tensor_model_parallel_size=2"], "3 processes cannot hold"),
    ],
)
def test_a_mistake_is_a_line(recipe, arguments, message):
    run = _run("--config", str(recipe), *arguments)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr
