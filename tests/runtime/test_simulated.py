"""Training steps on the simulated accelerator: the program runs by a GPU's rules, and what is counted is the truth."""

import gc
import itertools
import json
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.training.layouts import SMALL
from tests.workers import WorkerPool
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.planning.component_activations import component_activations
from vishwamai_mp.runtime.products import cpu_multiplies

_PROGRAM = Path(__file__).with_name("simulated_steps.py")
_FEW = ["training.global_batch_size=4"]

MEMORY = [
    "memory.enabled=true",
    "memory.memory_size=32",
    "memory.head_dim=4",
    "memory.chunk_size=8",
    "memory.layers=[1]",
]
CACHE = [
    "cache.enabled=true",
    "cache.num_heads=8",
    "cache.segment_length=8",
    "cache.latents_per_segment=2",
    "cache.max_cache_length=8",
    "cache.layers=[1]",
]
PACKED = ["data.reset_attention_mask=true", "data.reset_position_ids=true"]
VALUES = ["tree.enabled=true"]
LORA = ["lora.enabled=true"]
RECOMPUTE = ["training.recompute=full"]

_TENSOR = ["parallel.tensor_model_parallel_size=8", "parallel.sequence_parallel=true", "model.num_key_value_heads=8"]
_STAGES = ["parallel.pipeline_model_parallel_size=2"]
_CHUNKS = [*_STAGES, "parallel.virtual_pipeline_model_parallel_size=2"]
_CONTEXT = ["parallel.context_parallel_size=2"]
_REPLICAS = ["parallel.use_distributed_optimizer=true"]
_SHARDED = ["parallel.fully_sharded=true"]
_SHALLOW = ["model.num_layers=2"]
_LONG = ["training.sequence_length=2048", "model.max_position_embeddings=2048"]

# Name: ranks, rank, settings. Each kind of layer, layout and precision is in several.
_STEPS: dict[str, tuple[int, int, list[str]]] = {
    "one process, bf16": (1, 0, [*_SHALLOW, "precision=bf16"]),
    "tensor, fp16": (8, 3, [*_TENSOR, *_SHALLOW, "precision=fp16"]),
    "tensor, memory, cache and values, bf16": (
        8,
        5,
        [*_TENSOR, *_SHALLOW, *MEMORY, *CACHE, *VALUES, "precision=bf16"],
    ),
    "first stage, packed, fp32": (2, 0, [*_STAGES, *PACKED, *_SHALLOW, "precision=fp32"]),
    "last stage, packed, values, bf16": (2, 1, [*_STAGES, *PACKED, *_SHALLOW, *VALUES, "precision=bf16"]),
    "memory, 32 tokens": (1, 0, [*_SHALLOW, *MEMORY, *PACKED, "precision=bf16"]),
    "memory, 2048 tokens": (1, 0, [*_SHALLOW, *MEMORY, *PACKED, *_LONG, "precision=bf16"]),
    "cache, 32 tokens": (1, 0, [*_SHALLOW, *CACHE, "cache.retrieve_segments=2", "precision=bf16"]),
    "cache, 2048 tokens": (1, 0, [*_SHALLOW, *CACHE, *_LONG, "cache.retrieve_segments=2", "precision=bf16"]),
    "cache read whole, 32 tokens": (1, 0, [*_SHALLOW, *CACHE, "precision=bf16"]),
    "cache read whole, 2048 tokens": (
        1,
        0,
        [*_SHALLOW, *CACHE, *_LONG, "cache.retrieve_segments=1024", "precision=bf16"],
    ),
    "chunks, memory, fp32": (2, 0, [*_CHUNKS, *MEMORY, "precision=fp32"]),
    "chunks, adapters, fp16": (2, 1, [*_CHUNKS, *LORA, "precision=fp16"]),
    "context, cache, fp16": (2, 1, [*_CONTEXT, *_SHALLOW, *CACHE, "precision=fp16"]),
    "context, memory, values, bf16": (2, 0, [*_CONTEXT, *_SHALLOW, *MEMORY, *VALUES, "precision=bf16"]),
    "replicas, packed, cache, bf16": (2, 1, [*_REPLICAS, *_SHALLOW, *PACKED, *CACHE, "precision=bf16"]),
    "carried cache, bf16": (
        1,
        0,
        [*_SHALLOW, *PACKED, *CACHE, "cache.carry_state=true", "data.consecutive=true", "precision=bf16"],
    ),
    "replicas, adapters, recomputed, bf16": (2, 0, [*_REPLICAS, *_SHALLOW, *LORA, *RECOMPUTE, "precision=bf16"]),
    "replicas, fp32": (2, 0, [*_REPLICAS, *_SHALLOW, "precision=fp32"]),
    "sharded, bf16": (2, 1, [*_SHARDED, *_SHALLOW, "precision=bf16"]),
    "sharded, memory and cache, fp32": (2, 0, [*_SHARDED, *_SHALLOW, *MEMORY, *CACHE, "precision=fp32"]),
    "dropout, bf16": (
        2,
        1,
        [*_SHALLOW, "model.hidden_dropout=0.1", "model.attention_dropout=0.1", "precision=bf16"],
    ),
}

# On a CPU, simulated and real. fp32 that MKL multiplies: oneDNN's operator is not one that torch counts.
_TRUTHS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, ["precision=fp32", *_SHALLOW]),
    "tensor and sequence": (
        2,
        ["precision=fp32", *_SHALLOW, "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    ),
    "stages": (2, ["precision=fp32", *_SHALLOW, *_STAGES]),
    "replicas": (2, ["precision=fp32", *_SHALLOW, *_REPLICAS]),
}

# On a simulated CPU: what components keep, wide enough that what the formula leaves out is little.
_WIDE = [
    *("model.hidden_size=1024", "model.num_attention_heads=16", "model.num_key_value_heads=16", "model.head_dim=64"),
    *("model.intermediate_size=2816", "model.num_layers=2", "model.vocab_size=8000"),
    *("training.sequence_length=512", "model.max_position_embeddings=512"),
    *("training.micro_batch_size=1", "training.global_batch_size=1", "precision=bf16"),
]
_KEPT = {
    "memory": ["memory.enabled=true", "memory.layers=[0,1]"],
    "cache": ["cache.enabled=true", "cache.layers=[0,1]", "cache.num_heads=4"],
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What each step told; all in one process, for torch is imported and the device registered once."""
    cases = {name: [*place, "simulated", [*_FEW, *settings]] for name, (*place, settings) in _STEPS.items()}
    for name, (world_size, settings) in _TRUTHS.items():
        for rank in range(world_size):
            cases[f"cpu: {name}, {rank}"] = [world_size, rank, "cpu", [*_FEW, *settings]]
    for name, settings in {"no component": [], **_KEPT}.items():
        cases[f"kept: {name}"] = [1, 0, "cpu", [*_FEW, *_WIDE, *settings]]
    run = subprocess.run(
        [sys.executable, str(_PROGRAM)], input=json.dumps(list(cases.values())), text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(cases, json.loads(run.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", _STEPS)
def test_a_step_runs_by_the_rules_of_a_gpu_and_waits_once(found, name):
    step = found[name]
    assert "error" not in step, step["error"]
    assert step["updated"]
    assert list(step["host_waits"].values()) == [1], step["host_waits"]
    # The frequencies of positions, once in the life of a model, of which chunks are two.
    assert all("rotary" in place for place in step["host_copies"]), step["host_copies"]
    assert sum(step["host_copies"].values()) <= (2 if "chunks" in name else 1), step["host_copies"]
    assert step["parameters"] > 0
    assert step["at_peak"]["activations"] > 0
    assert sum(step["at_peak"].values()) == step["peak_bytes"]


@pytest.mark.parametrize("component", ["memory", "cache", "cache read whole"])
def test_a_component_launches_as_many_kernels_whatever_the_length(found, component):
    """In the pieces that suit a CPU's caches it would launch some for every 64 or 256 tokens."""
    assert found[f"{component}, 32 tokens"]["launches"] == found[f"{component}, 2048 tokens"]["launches"]


def test_what_components_launch():
    """Forward and backward; docs/kernels.md says what each launch is. One more of any operator is seen here."""
    program = Path(__file__).with_name("component_launches.py")
    run = subprocess.run([sys.executable, str(program)], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "memory of one level": [11, 16],
        "memory of three levels, documents": [15, 28],
        "cache": [12, 12],
        "cache, documents": [12, 12],
        "cache read whole": [10, 12],
    }


@pytest.mark.parametrize("component", _KEPT)
def test_what_a_component_keeps_on_a_cpu_is_planned(found, component):
    """Within 2 %: of the step's activations, those that the component added, by layer and token.

    Planned for a CPU that multiplies bf16 matrices. The cache of another keeps fp32 copies besides.
    """
    if component == "cache" and not cpu_multiplies(torch.bfloat16):
        pytest.skip("this CPU has no bf16 matrix product")
    steps = (found[f"kept: {name}"] for name in (component, "no component"))
    with_it, without = (sum(step["activations_at_peak"].values()) for step in steps)
    config = resolve(load_config(SMALL, [*_FEW, *_WIDE, *_KEPT[component]]), 1)
    planned = component_activations(config, component, on_gpu=False)
    assert (with_it - without) / 2 / 512 == pytest.approx(planned, rel=0.02)


_wait = dist.Work.wait


def _wait_and_let_go(work: dist.Work, *timeout: Any) -> bool:
    """gloo's threads let go of what arrived some time after the waiting thread goes on: give them that time."""
    done = _wait(work, *timeout)
    time.sleep(0.005)
    return done


def _real(settings: list[str]) -> dict[str, Any]:
    """The same step for real: torch's counter of operations, gloo's collectives, the allocator's peak."""
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    from vishwamai_mp.data.batches import DocumentRules, make_batch
    from vishwamai_mp.model import build_model
    from vishwamai_mp.runtime import initialize
    from vishwamai_mp.runtime.simulated import Recorder
    from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
    from vishwamai_mp.training.sharded_optimizer import fill_moments
    from vishwamai_mp.training.step import TrainStep

    config = resolve(load_config(SMALL, [*_FEW, *settings]), dist.get_world_size())
    runtime = initialize(config)
    chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
    optimizer = build_optimizer(config, runtime, chunks)
    for part in optimizer.chained_optimizers:
        fill_moments(part.optimizer)
    step = TrainStep(config, runtime, chunks, optimizer)
    count = 4 // (2 * runtime.data_parallel_size)
    batches = [make_batch(torch.zeros(2, 33, dtype=torch.int64), DocumentRules()) for _ in range(count)]
    recorder = Recorder(torch.device("cpu"), simulates=False)
    gc.collect()  # what earlier runs left is not to go while this one is watched
    with (
        patch.object(dist.Work, "wait", _wait_and_let_go),
        torch.backends.mkldnn.flags(enabled=False),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        recorder,
        FlopCounterMode(display=False) as counter,
    ):
        step.train(batches, 0, 1e-3, float("inf"))
    events = sorted(
        (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    # States of random streams are no part of a device's memory: a simulation draws no random numbers.
    changes = [event.nbytes() for event in events if abs(event.nbytes()) != torch.get_rng_state().nbytes]
    return {
        "flops": counter.get_total_flops(),
        "peak": max(itertools.accumulate(changes)),
        "collectives": [astuple(communication) for communication in recorder.communications],
    }


@pytest.mark.parametrize("name", _TRUTHS)
def test_the_simulation_tells_the_truth(found, workers: WorkerPool, name):
    world_size, settings = _TRUTHS[name]
    for rank, real in enumerate(workers.run(_real, world_size, settings)):
        simulated = found[f"cpu: {name}, {rank}"]
        assert "error" not in simulated, simulated["error"]
        assert simulated["flops"] == real["flops"]
        assert [tuple(communication.values()) for communication in simulated["collectives"]] == real["collectives"]
        assert simulated["peak_bytes"] - simulated["standing_bytes"] == pytest.approx(real["peak"], rel=0.02)


_RULES = """
import torch, vishwamai_mp.runtime
from tests.training.layouts import SMALL
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.runtime import device, is_accelerator
from vishwamai_mp.runtime.simulated import simulated_job

assert not is_accelerator(device())
with simulated_job(resolve(load_config(SMALL, []), 2), 2, 1) as job:
    here = torch.ones(1000, 3, device=device())
    assert is_accelerator(here) and is_accelerator(device()) and not is_accelerator(torch.ones(2))
    assert here.device == job.runtime.device and job.runtime.rank == 1
    assert job.recorder.memory.now == 24 * 512  # CUDA's allocator gives whole blocks
    here * torch.ones(())  # a number of the host may take part, as on a GPU
    try:
        here + torch.ones(1000, 3)
    except RuntimeError as error:
        assert "same device" in str(error)
    else:
        raise AssertionError("devices were mixed")
    for read in (here.tolist, here[0, 0].item, here.cpu, here.nonzero, lambda: bool((here > 0).all())):
        before = sum(job.recorder.waits.values())
        read()
        assert sum(job.recorder.waits.values()) == before + 1, read
    (here @ here.t()).sum()
    assert job.recorder.flops == {"mm": 2 * 1000 * 1000 * 3}
    assert job.recorder.memory.peak == (24 + 7813 + 1) * 512  # with the product and its sum
    del here
    assert job.recorder.memory.now == 0
assert not is_accelerator(device())
"""


def test_the_rules_of_the_device():
    run = subprocess.run(
        [sys.executable, "-c", _RULES], cwd=_PROGRAM.parents[2], text=True, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr
