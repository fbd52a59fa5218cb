"""tools/dry_run.py as its users run it."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.layouts import SMALL
from vishwamai_mp.config import UserError, load_config, resolve
from vishwamai_mp.planning.footprint_advice import stage_memory
from vishwamai_mp.planning.hardware import find_gpu
from vishwamai_mp.planning.parameters import total_parameters
from vishwamai_mp.planning.states import WORKSPACE
from vishwamai_mp.runtime.fused_layers import python_folder
from vishwamai_mp.training.dry_run import DryRun, memory_verdict
from vishwamai_mp.training.shard_tiling import Box, shard_faults

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
    # cuBLAS's workspaces are many times this model; torch's layers have none.
    needed, predicted = (
        found["peak_bytes"] - found["at_peak"].get("workspaces", 0),
        found["predicted_bytes"] - WORKSPACE,
    )
    assert needed == pytest.approx(predicted, rel=0.3)
    norms = 9 * 32  # whole on each rank
    assert found["parameters"] == norms + (2 * 256 * 32 + 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96)) / 2
    assert found["flops"] > 6 * (found["parameters"] - 256 * 32 / 2) * 2 * 32  # the input table is looked up
    assert sum(found["host_waits"].values()) == 1
    # Heads of 8 are too narrow for fused attention, whose backward pass multiplies once more.
    assert found["flops"] == pytest.approx(found["predicted_flops"], rel=0.025)
    assert found["launches"] > 100
    assert set(found["launches_by_part"]) >= {"KvSelfAttention", "MLP", "none"}
    assert sum(found["launches_by_part"].values()) == found["launches"]
    kinds = {(c["operation"], c["group"], c["size"]) for c in found["collectives"]}
    assert {("all_reduce", "tensor_model_parallel", 2), ("all_reduce", "data_parallel_group_with_cp", 2)} <= kinds


def test_as_text_and_what_fp8_becomes_without_transformer_engine(recipe):
    settings = ["precision=fp8_current", "training.global_batch_size=2"]
    run = _run("--config", str(recipe), "--gpus", "1", "--torch-layers", "--all-stages", *settings)
    assert run.returncode == 0, run.stderr
    assert "data 0) of 1, torch's layers" in run.stdout
    assert "precision=fp8_current is simulated as bf16" in run.stdout
    assert "the host waits for the device 1 time:" in run.stdout
    *_, head, row = run.stdout.splitlines()
    assert head.split()[:2] == ["rank", "seconds"]
    assert row.split()[0] == "0"
    assert row.split()[-1] == "1"  # waits


def test_every_stage_on_one_page(recipe, tmp_path):
    page = tmp_path / "stages.html"
    settings = ["parallel.pipeline_model_parallel_size=2", "training.global_batch_size=4"]
    arguments = ["--gpus", "4", "--all-stages", "--html", str(page), "--json", "--torch-layers"]
    run = _run("--config", str(recipe), *arguments, *settings)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [stage["rank"] for stage in found] == [0, 2]
    assert all(max(stage["course"]) == stage["peak_bytes"] > stage["course"][0] for stage in found)
    text = page.read_text()
    assert text.count("<polygon") == 2
    assert all(stage["place"] in text for stage in found)


def test_all_ranks_shards_make_up_the_model(recipe):
    """With memory and cache, in a layout that divides them."""
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    components = ["memory.enabled=true", "cache.enabled=true", "cache.segment_length=16", "model.vocab_size=256"]
    arguments = ["--gpus", "8", "--all-ranks", "--torch-layers", "--json", "training.global_batch_size=4"]
    run = _run("--config", str(recipe), *arguments, *layout, *components)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["ranks"] == 4
    assert found["faults"] == []
    assert found["numbers"] == total_parameters(resolve(load_config(SMALL, [*layout, *components]), 8))


def test_what_is_missing_and_what_is_held_twice_is_a_fault():
    halves: list[tuple[Box, int]] = [(((0, 2), (0, 3)), 0), (((2, 4), (0, 3)), 1)]
    assert list(shard_faults("w", (4, 3), halves)) == []
    assert list(shard_faults("w", (4, 3), halves[:1])) == ["w: 6 of 12 numbers are on no rank"]
    assert "ranks 0 and 1 both hold" in next(shard_faults("w", (4, 3), [halves[0], (((1, 4), (0, 3)), 1)]))
    assert "beyond [4, 3]" in next(shard_faults("w", (4, 3), [(((2, 5), (0, 3)), 1)]))


def test_what_does_not_fit_says_by_how_much_and_what_to_change():
    """Of runs that were made already."""
    sizes = ["training.micro_batch_size=8", "training.global_batch_size=8", "parallel.use_distributed_optimizer=false"]
    config = resolve(load_config("1b", sizes), 1)
    nothing: dict[str, Any] = dict.fromkeys((item.name for item in fields(DryRun)), 0)
    run = DryRun(**nothing)
    gib = 2**30
    fitting, large = (replace(run, world_size=1, at_peak={}, peak_bytes=size * gib) for size in (60, 130))
    with pytest.raises(UserError) as error:
        memory_verdict(config, [fitting, replace(large, rank=1)], find_gpu("h100"))
    first, need, *changes = str(error.value).splitlines()
    found = re.fullmatch(
        r"does not fit H100 SXM 80 GB: rank 1 needs ([\d.]+) GiB with libraries and fragmentation, of 79.6 GiB,"
        r" ([\d.]+) GiB more than there is",
        first,
    )
    assert found
    assert float(found[1]) - 79.6 == pytest.approx(float(found[2]), abs=0.11)
    assert float(found[1]) > 130.8
    assert "Change in this order" in need
    assert any("training.micro_batch_size=4" in line for line in changes)
    assert memory_verdict(config, [large], find_gpu("h200")).startswith("fits H200 SXM 141 GB: rank 0 needs 13")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "4", "--rank", "4"], "--rank 4: a job of --gpus 4 has ranks 0 to 3"),
        (["--gpus", "4", "--gpu", "h1000"], "--gpu h1000: not a known GPU; did you mean h100?"),
        (["--gpus", "3", "parallel.tensor_model_parallel_size=2"], "3 processes cannot hold"),
    ],
)
def test_a_mistake_is_a_line(recipe, arguments, message):
    run = _run("--config", str(recipe), *arguments)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr
