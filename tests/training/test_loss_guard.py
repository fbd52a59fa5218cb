"""Steps whose loss or gradient cannot be used change nothing, say where it began, and end the run if they last."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.synthetic import tiny_corpus
from tests.training.runs import VOCAB, hashes, train
from tests.workers import WorkerPool
from vishwamai_mp.checkpoint.sharded import gather_parameters
from vishwamai_mp.config import TrainingConfig, UserError
from vishwamai_mp.training.loop import Trainer
from vishwamai_mp.training.loss_guard import LossGuard
from vishwamai_mp.training.step import StepResult

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), VOCAB, 8000, seed=1)


def good(loss: float) -> StepResult:
    return StepResult(loss, 1, 1.0, True, {})


def bad(loss: float = NAN) -> StepResult:
    return StepResult(loss, 1, NAN, False, {})


def test_without_a_spike_factor_no_loss_is_too_high():
    guard = LossGuard(TrainingConfig())
    for _ in range(50):
        guard.observe(good(1.0))
    assert guard.limit == INF


def test_spikes_are_measured_against_the_running_mean_once_it_has_settled():
    guard = LossGuard(TrainingConfig(spike_factor=3.0))
    for _ in range(19):
        guard.observe(good(2.0))
        assert guard.limit == INF
    guard.observe(good(2.0))
    assert guard.limit == pytest.approx(6.0)
    guard.observe(good(4.0))
    assert guard.limit == pytest.approx(3 * (0.95 * 2.0 + 0.05 * 4.0))


def test_a_skipped_step_does_not_move_the_mean():
    guard = LossGuard(TrainingConfig(spike_factor=3.0))
    for _ in range(20):
        guard.observe(good(2.0))
    for loss in (NAN, INF, 1e9):
        guard.observe(bad(loss))
    assert guard.limit == pytest.approx(6.0)


def test_gives_up_after_too_many_in_a_row():
    guard = LossGuard(TrainingConfig(max_skipped_steps=2))
    for result in (bad(), bad(), good(1.0), bad(), bad()):
        guard.observe(result)
    with pytest.raises(UserError, match=r"3 steps in a row .*loss nan.*training\.max_skipped_steps"):
        guard.observe(bad())


@pytest.mark.parametrize("results", [[], [good(2.5)], [good(2.5), good(3.5), bad(), bad()]])
def test_its_state_survives_json(results):
    config = TrainingConfig(spike_factor=2.0, max_skipped_steps=2)
    guard, copy = LossGuard(config), LossGuard(config)
    for result in results:
        guard.observe(result)
    copy.load_state_dict(json.loads(json.dumps(guard.state_dict(), allow_nan=False)))
    assert copy.state_dict() == guard.state_dict()
    for _ in range(25):
        guard.observe(good(3.0))
        copy.observe(good(3.0))
    assert copy.limit == guard.limit != INF


def spoil_gradient(rank: int, step: int, value: float, times: int, trainer: Trainer, notes: list[Any]) -> None:
    """On one rank, make part of a gradient of one step non-finite, in the first `times` micro-batches that pass.

    Notes the hashes of all parameters before and after each step.
    """
    left = [times]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.runtime.rank != rank or trainer.state.step != step or not left[0]:
            return gradient
        left[0] -= 1
        return torch.full_like(gradient, value)

    parameter = next(iter(trainer.chunks[0].parameters()))
    parameter.register_hook(spoil)
    run = trainer.steps.train

    def watched(*args: Any) -> StepResult:
        gather_parameters(trainer.chunks)  # else that is left to the coming forward pass
        before = hashes(trainer)
        result = run(*args)
        gather_parameters(trainer.chunks)
        notes.append((result.updated, result.grad_norm, before == hashes(trainer)))
        return result

    trainer.steps.train = watched  # type: ignore[method-assign, assignment]


_ENDLESS = 10**9
_LAYOUTS = {
    "DP2": ["parallel.overlap_grad_reduce=false"],
    "DP2 sharded optimizer, overlap": ["parallel.use_distributed_optimizer=true"],
    "TP2 SP": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
}


@pytest.mark.parametrize("name", _LAYOUTS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_gradient_is_skipped_and_its_rank_named(workers: WorkerPool, corpus, tmp_path, name, value):
    settings = [*_LAYOUTS[name], "training.max_steps=5"]
    prepare = partial(spoil_gradient, 1, 2, value, _ENDLESS)
    outcomes = workers.run(train, 2, tmp_path, corpus, settings, prepare=prepare)
    for outcome in outcomes:
        assert [updated for updated, *_ in outcome.notes] == [True, True, False, True, True]
        assert [unchanged for *_, unchanged in outcome.notes] == [False, False, True, False, False]
        assert not math.isfinite(outcome.notes[2][1])
        assert outcome.state["skipped_steps"] == 1
        assert outcome.losses[-1] < outcome.losses[0]
    [line] = [line for line in outcomes[0].said.splitlines() if "skipped:" in line]
    assert line.startswith("step 3 skipped: loss ")
    assert "non-finite gradients on rank 1 (" in line
    assert "rank 0" not in line


def test_a_fault_that_does_not_repeat_is_told_from_one_that_does(workers: WorkerPool, corpus, tmp_path):
    prepare = partial(spoil_gradient, 1, 2, NAN, 1)
    outcomes = workers.run(train, 2, tmp_path, corpus, ["training.max_steps=4"], prepare=prepare)
    assert outcomes[0].state["skipped_steps"] == 1
    assert "step 3 skipped" in outcomes[0].said
    assert "computed again, the gradients are finite on all ranks" in outcomes[0].said


def test_the_steps_after_a_skipped_one_are_as_if_it_had_not_been(workers: WorkerPool, corpus, tmp_path):
    """Looking for the cause leaves nothing behind: the same run with and without that search, bit by bit."""
    settings = ["training.max_steps=5", "parallel.use_distributed_optimizer=true"]
    spoiled = [
        workers.run(train, 2, tmp_path / name, corpus, settings, prepare=partial(spoil_gradient, rank, 2, NAN, times))
        for name, rank, times in [("lasting", 0, _ENDLESS), ("once", 0, 1)]
    ]
    assert [outcome.tensors for outcome in spoiled[0]] == [outcome.tensors for outcome in spoiled[1]]


def spike(step: int, trainer: Trainer, notes: list[Any]) -> None:
    """Report a tenfold loss for one step; note which steps changed the parameters."""
    run = trainer.steps._run

    def spiking(batches: Any, forward_only: bool) -> torch.Tensor:
        loss, tokens = run(batches, forward_only)
        return torch.stack((loss * (10 if trainer.state.step == step else 1), tokens))

    trainer.steps._run = spiking  # type: ignore[method-assign]
    spoil_gradient(0, -1, 0.0, 0, trainer, notes)


def test_a_spike_is_skipped_and_said(workers: WorkerPool, corpus, tmp_path):
    settings = ["training.max_steps=24", "training.spike_factor=4"]
    [outcome] = workers.run(train, 1, tmp_path, corpus, settings, prepare=partial(spike, 22))
    assert [step for step, (updated, *_) in enumerate(outcome.notes) if not updated] == [22]
    assert [step for step, (*_, unchanged) in enumerate(outcome.notes) if unchanged] == [22]
    assert "step 23 skipped: loss" in outcome.said
    assert "above training.spike_factor's limit" in outcome.said


def lose_loss(trainer: Trainer, _: list[Any]) -> None:
    """Rank 1's embedding is lost after the second step."""

    class Lost(type(trainer.callbacks[0])):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def on_step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
            if trainer.state.step == 2 and trainer.runtime.rank == 1:
                for parameter in trainer.chunks[0].parameters():
                    parameter.data.fill_(NAN)

    trainer.callbacks.append(Lost())


def test_a_lost_model_ends_the_run_and_leaves_the_last_checkpoint(workers: WorkerPool, corpus, tmp_path: Path):
    settings = ["training.max_steps=9", "training.max_skipped_steps=3", "checkpoint.save_every=2"]
    with pytest.raises(UserError, match=r"4 steps in a row could not be used \(loss nan"):
        workers.run(train, 2, tmp_path, corpus, settings, prepare=lose_loss)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["lm_loss"] is None for row in rows] == [False, False, True, True, True]  # JSON has no NaN
    assert (tmp_path / "checkpoints/step_00000002").exists()
