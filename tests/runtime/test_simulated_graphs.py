"""CUDA graphs on the simulated accelerator: the kernels, FLOPs and exchanges of a step are those without graphs."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.test_simulated import MEMORY
from vishwamai_mp.runtime.fused_layers import python_folder

_PROGRAM = Path(__file__).with_name("graph_rules.py")
_FEW = ["model.num_layers=2", "training.global_batch_size=4", "precision=bf16"]
_TENSOR = ["parallel.tensor_model_parallel_size=2", "parallel.use_distributed_optimizer=true"]
_CHUNKS = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]

# Name: ranks, rank, settings; how often the micro-batches of a step pass through a run of captured layers.
_STEPS: dict[str, tuple[int, int, list[str], int]] = {
    "memory in the middle": (1, 0, [*_FEW, *MEMORY, "model.num_layers=3"], 4),
    "tensor, replicas": (4, 1, [*_FEW, *_TENSOR], 1),
    "chunks": (2, 0, [*_FEW, *_CHUNKS, "model.num_layers=4"], 4),
}
_WIDE = ["model.hidden_size=256", "model.intermediate_size=256", "model.num_key_value_heads=8"]
_ENGINE: dict[str, tuple[int, int, list[str], int]] = {
    "sequence, context, sums in products": (
        4,
        1,
        [
            *(*_FEW, *_WIDE, *_TENSOR, "parallel.sequence_parallel=true", "parallel.context_parallel_size=2"),
            "parallel.fuse_grad_accumulation=true",
        ],
        2,
    ),
}


def _found(steps: dict[str, tuple[int, int, list[str], int]], *options: str) -> dict[str, Any]:
    cases = json.dumps({name: place for name, (*place, _) in steps.items()})
    run = subprocess.run([sys.executable, str(_PROGRAM), *options], input=cases, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return _found(_STEPS)


@pytest.mark.parametrize("name", _STEPS)
def test_a_step_does_what_it_does_without(found, name):
    _check(found[name], _STEPS[name][3])


def test_so_do_layers_of_transformer_engine():
    if python_folder() is None:
        pytest.skip("Transformer Engine's Python is not where runtime/fused_layers.py says")
    found = _found(_ENGINE, "--transformer-engine")
    for name, (*_, passes) in _ENGINE.items():
        _check(found[name], passes)


def _check(step: dict[str, Any], passes: int) -> None:
    plain, graphed = step["false"], step["true"]
    for same in ("flops", "exchanges", "waits", "state"):
        assert graphed[same] == plain[same], same
    assert plain["updated"]
    assert graphed["updated"]
    assert sum(graphed["waits"].values()) == 1
    kernels, before = Counter(graphed["kernels"]), Counter(plain["kernels"])
    assert plain["graphs"] == 0
    assert graphed["graphs"] == kernels.pop("graph") > 0
    assert not before - kernels
    # Where graphs begin: hidden states and their gradient are copied to where they are read, and a gradient leaves.
    assert kernels - before == {"copy_": 2 * passes, "clone": passes}
    assert graphed["launches"] < 0.75 * plain["launches"]
    assert graphed["graphs in evaluation"] == 0
    assert graphed["peak"] > plain["peak"]


def test_what_a_capture_refuses(found):
    refused = dict(found["refusals"])
    assert refused.pop("a sum") == ""
    for name, error in refused.items():
        assert "operation not permitted while a CUDA graph is captured: " in error, name
    assert refused["a number read"].endswith("the host waits for the device")
    assert refused["documents, by a line of ours"].startswith("vishwamai_mp/model/masks.py:")


def test_a_pool_stays_and_serves_one_graph_after_another(found):
    mebibyte = 2**20
    assert found["pool"] == {
        "one graph": mebibyte,
        "two graphs": mebibyte,
        "launches of a replay": 1,
        "kernels in it": 1,
        "and a tensor": 2 * mebibyte,
        "without it": mebibyte,
    }
