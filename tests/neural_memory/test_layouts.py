"""The memory in every layout: curves against one process, checkpoints from one layout to another, metrics."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import jobs
from tests.neural_memory.builds import SETTINGS, drawn_outputs
from tests.training.layouts import train
from tests.training.test_layouts import FEW
from tests.workers import WorkerPool
from vishwamai_mp.config import MemoryConfig, UserError
from vishwamai_mp.training import step as training_step

_TENSOR = "parallel.tensor_model_parallel_size="
_PIPELINE = "parallel.pipeline_model_parallel_size="
_CHUNKS = "parallel.virtual_pipeline_model_parallel_size="
_CONTEXT = "parallel.context_parallel_size="
_SEQUENCE = "parallel.sequence_parallel=true"
LAYOUTS = {
    "DP2": (2, ["parallel.use_distributed_optimizer=true"]),
    "TP2": (2, [_TENSOR + "2"]),
    "TP4": (4, [_TENSOR + "4"]),
    "TP2 SP": (2, [_TENSOR + "2", _SEQUENCE]),
    "PP2": (2, [_PIPELINE + "2"]),
    "PP2x2": (2, [_PIPELINE + "2", _CHUNKS + "2"]),
    "CP2": (2, [_CONTEXT + "2"]),
    "TP2 SP CP2": (4, [_TENSOR + "2", _SEQUENCE, _CONTEXT + "2"]),
    "recompute": (1, ["training.recompute=full"]),
    "recompute PP2": (2, [_PIPELINE + "2", "training.recompute=full"]),
}
_STEPS = 4
# Adam divides a gradient by its size. That of a gate which forgets half in 2,048 tokens is rounding noise over 32
# tokens, and noise differs from layout to layout.
_CALM = "optimizer.epsilon=1e-6"


def curve(overrides: list[str], steps: int = _STEPS) -> list[tuple[float, float]]:
    with drawn_outputs():
        return train([*SETTINGS, _CALM, FEW, *overrides], steps)


@pytest.fixture(scope="module")
def one_process(workers):
    known: dict[tuple[str, ...], Any] = {}

    def get(*overrides: str) -> Any:
        if overrides not in known:
            known[overrides] = workers.run(curve, 1, list(overrides))[0]
        return known[overrides]

    return get


def furthest(ours: Any, theirs: Any) -> tuple[float, float]:
    """In loss and in gradient norm."""
    pairs = list(zip(ours, theirs, strict=True))
    return max(abs(a[0] - b[0]) for a, b in pairs), max(abs(a[1] - b[1]) for a, b in pairs)


_PACKED = ["data.reset_attention_mask=true", "data.reset_position_ids=true", "data.eod_mask_loss=true"]


@pytest.mark.parametrize("settings", [[], _PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_fp32_layout_equals_one_process(workers, one_process, name, settings):
    processes, layout = LAYOUTS[name]
    loss, norm = furthest(workers.run(curve, processes, [*layout, *settings])[0], one_process(*settings))
    assert loss < 1e-6
    assert norm < 1e-5


def test_the_memory_is_felt_in_those_curves(workers, one_process):
    assert furthest(one_process(), workers.run(train, 1, [FEW], _STEPS)[0])[0] > 1e-4


@pytest.mark.parametrize("name", ["TP2 SP", "PP2", "CP2"])
def test_bf16_layout_equals_one_process(workers, one_process, name):
    processes, layout = LAYOUTS[name]
    bf16 = ["precision=bf16", "model.initializer_range=0.04"]
    bf16 += ["training.sequence_length=64", "training.global_batch_size=8"]
    expected = one_process(*bf16)
    loss, norm = furthest(workers.run(curve, processes, [*layout, *bf16])[0], expected)
    rounding = torch.finfo(torch.bfloat16).eps  # of one activation; a loss is the mean over hundreds of tokens
    assert loss < rounding / 64 * max(loss for loss, _ in expected)
    assert norm < rounding / 4 * max(norm for _, norm in expected)


def test_recomputation_sees_the_same_dropout(workers):
    dropout = ["memory.dropout=0.2", _TENSOR + "2", _SEQUENCE]
    plain, again = (workers.run(curve, 2, [*dropout, *more], 3)[0] for more in ([], ["training.recompute=full"]))
    assert max(furthest(plain, again)) == 0


_MEMORY = MemoryConfig(enabled=True, memory_size=32, head_dim=8, layers=[0, 3], num_memory_layers=2)


def config(memory: MemoryConfig | None = _MEMORY, **parallel: Any) -> Any:
    from dataclasses import replace

    from vishwamai_mp.config import resolve

    made = jobs.config(**parallel)
    return resolve(replace(made, memory=memory)) if memory else made


_ONE = {"use_distributed_optimizer": False}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, {}),
        ({}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ({"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}),
    ],
)
def test_a_checkpoint_loads_in_another_layout(workers: WorkerPool, tmp_path: Path, source, target):
    """Weights and optimizer: one more step after the move is the step that the first layout makes."""
    world = {name: math.prod(v for k, v in layout.items() if k != "sequence_parallel") for name, layout in
             (("source", source), ("target", target))}  # fmt: skip
    workers.run(jobs.train_and_save, world["source"], tmp_path / "whole", config(**source), 2, 1)
    moved = tmp_path / "whole/step_00000002"
    workers.run(jobs.resume_and_save, world["target"], moved, tmp_path / "moved", config(**target), 1)
    theirs, ours = (jobs.tensors_of(tmp_path / name / "step_00000003") for name in ("whole", "moved"))
    assert any(".memory.projection." in name for name in ours)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        (_MEMORY, None, r"has a neural memory in layers \[0, 3\].*set memory.enabled=true memory.layers=\[0,3\]"),
        (None, _MEMORY, r"has no neural memory.*set memory.enabled=false"),
        (
            _MEMORY,
            MemoryConfig(enabled=True, memory_size=32, head_dim=8, layers=[1], num_memory_layers=2),
            r"in layers \[0, 3\], not \[1\]; set memory.layers=\[0,3\]",
        ),
    ],
)
def test_a_checkpoint_with_other_memories_is_refused(workers, tmp_path, saved, wanted, message):
    workers.run(jobs.train_and_save, 1, tmp_path / "one", config(saved), 0)
    with pytest.raises(UserError, match=message):
        workers.run(jobs.resume_and_save, 1, tmp_path / "one/step_00000000", tmp_path / "two", config(wanted), 0)


def measured(overrides: list[str]) -> dict[str, float]:
    """Measures of the last step."""
    seen: list[Any] = []
    result = training_step.StepResult

    def keep(*fields: Any) -> Any:
        made = result(*fields)
        seen.append(made.measures)
        return made

    training_step.StepResult = keep  # type: ignore[misc,assignment]
    try:
        curve(overrides, 3)
    finally:
        training_step.StepResult = result  # type: ignore[misc]
    return seen[-1]


@pytest.mark.parametrize("name", ["TP2 SP CP2", "PP2x2", "recompute"])
def test_measures_are_those_of_one_process(workers, name):
    settings = ["memory.loss_weight=0.1", "memory.layers=[0,3]"]
    processes, layout = LAYOUTS[name]
    ours, theirs = workers.run(measured, processes, [*settings, *layout])[0], workers.run(measured, 1, settings)[0]
    # The loss of the mix, times 0.1, is what remains of p ln 2p, where 2p is one up to the last bit of fp32.
    assert ours == pytest.approx(theirs, rel=1e-4, abs=0.1 * 2**-23)
    assert theirs["memory_retention_1"] == pytest.approx(2 ** (-1 / 2**7), abs=3e-3)
    assert theirs["memory_retention_2"] == pytest.approx(2 ** (-1 / 2**11), abs=3e-4)
    assert 0 < theirs["memory_write_1"] < 0.75
    assert theirs["memory_read"] == pytest.approx(0.5, abs=0.1)
    assert theirs["memory_surprise_1"] > 0
    assert 0 < theirs["memory_mix_loss"] < 1e-3


def mix_gradient(overrides: list[str]) -> torch.Tensor:
    """Of the mix, by the auxiliary loss alone: the model's own loss is masked out by a zero output projection."""
    from tests.model.builds import build

    _, _, (model,) = build(*SETTINGS, *overrides)
    memory = model.decoder.layers[1].memory
    model.train()
    with torch.no_grad():
        memory.level_mix.view(-1, 2)[:] = torch.tensor([1.0, -1.0])
    tokens = torch.arange(1, 65).view(2, 32)
    model(tokens, labels=tokens).sum().backward()
    return memory.level_mix.grad / tokens.numel()


def test_auxiliary_loss_is_the_entropy_that_the_mix_lacks(workers):
    mix = torch.zeros(4, 2, requires_grad=True)
    shares = (mix + torch.tensor([1.0, -1.0])).softmax(-1)
    (0.3 * (shares * (2 * shares).log()).sum(-1).mean()).backward()
    for processes, layout in ((1, []), (2, [_TENSOR + "2", _SEQUENCE])):
        found = workers.run(mix_gradient, processes, ["memory.loss_weight=0.3", *layout])
        torch.testing.assert_close(torch.cat(found).view(4, 2), mix.grad, rtol=1e-5, atol=1e-7)
