"""Early stopping, the best model and what is kept of checkpoints, on validation losses that the test says."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.synthetic import tiny_corpus
from tests.training.runs import VOCAB, configure, hashes, train
from tests.training.test_callbacks import Then, metrics
from tests.workers import WorkerPool
from vishwamai_mp.config import ConfigError
from vishwamai_mp.training.loop import Trainer

_EVERY = ["training.evaluate_every=2", "training.evaluate_batches=1", "training.max_steps=12"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), VOCAB, 8000, seed=1)


def say(losses: list[float], trainer: Trainer, notes: list[Any]) -> None:
    """Let evaluation number i find losses[i]; note the parameters of each evaluated step, and those at the end."""

    def evaluate() -> float:
        return losses[trainer.state.step // 2 - 1]

    trainer.evaluate = evaluate  # type: ignore[method-assign]
    trainer.callbacks.append(Then(lambda trainer: notes.append((trainer.state.step, parameters(trainer)))))


def parameters(trainer: Trainer) -> dict[str, str]:
    return {name: value for name, value in hashes(trainer).items() if name.startswith("chunk")}


def kept(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def test_training_stops_when_the_loss_has_not_fallen_for_so_long(workers: WorkerPool, corpus, tmp_path):
    settings = [*_EVERY, "training.early_stopping_patience=2"]
    losses = [5.0, 4.0, 4.0, 4.5, 1.0, 1.0]
    outcomes = workers.run(train, 2, tmp_path, corpus, settings, prepare=partial(say, losses))
    assert [outcome.state["step"] for outcome in outcomes] == [8, 8]
    assert "stopped after step 8: 2 evaluations without a new lowest validation loss" in outcomes[0].said
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000008\n"
    # The same command has nothing more to do.
    [again] = workers.run(train, 1, tmp_path, corpus, settings, prepare=partial(say, losses))
    assert again.records == []
    assert again.state["step"] == 8
    # With more patience it goes on, and counts on.
    patient = [*_EVERY, "training.early_stopping_patience=4"]
    [more] = workers.run(train, 1, tmp_path, corpus, patient, prepare=partial(say, losses))
    assert more.state["step"] == 12
    assert (more.state["best_step"], more.state["best_loss"], more.state["evaluations_since_best"]) == (10, 1.0, 1)


def test_a_falling_loss_never_stops_and_one_that_is_not_finite_counts_as_no_fall(workers: WorkerPool, corpus, tmp_path):
    settings = [*_EVERY, "training.early_stopping_patience=3"]
    falling = [5.0, float("nan"), float("inf"), 4.0, 3.0, 2.0]
    [outcome] = workers.run(train, 1, tmp_path / "falling", corpus, settings, prepare=partial(say, falling))
    assert outcome.state["step"] == 12
    never = [float("nan")] * 6
    [outcome] = workers.run(train, 1, tmp_path / "never", corpus, settings, prepare=partial(say, never))
    assert outcome.state["step"] == 6


@pytest.mark.parametrize("layout", [[], ["parallel.use_distributed_optimizer=true", "checkpoint.async_save=true"]])
def test_the_best_model_is_kept_and_loaded_at_the_end(workers: WorkerPool, corpus, tmp_path, layout):
    settings = [*_EVERY, *layout, "checkpoint.load_best=true", "checkpoint.save_every=5", "checkpoint.keep_last=1"]
    losses = [5.0, 3.0, 4.0, 4.0, 4.0, 4.0]
    outcomes = workers.run(train, 2, tmp_path, corpus, settings, prepare=partial(say, losses))
    for outcome in outcomes:
        at = dict(outcome.notes)
        ended_with = {name: value for name, value in outcome.tensors.items() if name.startswith("chunk")}
        assert ended_with == at[4] != at[12]
    assert "loaded the best model: step_00000004, validation loss 3.0000" in outcomes[0].said
    assert kept(tmp_path) == [4, 12], "the best and the last, of 2, 4, 5, 10 and 12"
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000012\n"


def test_the_best_may_be_the_last_and_a_resumed_run_remembers_it(workers: WorkerPool, corpus, tmp_path):
    settings = [*_EVERY, "checkpoint.load_best=true", "checkpoint.keep_last=1", "checkpoint.save_every=2"]
    first, then = [5.0, 3.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0, 3.5, 3.0]
    workers.run(train, 1, tmp_path, corpus, [*settings, "training.max_steps=8"], prepare=partial(say, first))
    assert kept(tmp_path) == [4, 8]
    [outcome] = workers.run(train, 1, tmp_path, corpus, settings, prepare=partial(say, then))
    assert kept(tmp_path) == [4, 12]  # 3.0 again is not lower
    assert "loaded the best model: step_00000004" in outcome.said
    [outcome] = workers.run(train, 1, tmp_path / "last", corpus, settings, prepare=partial(say, [6, 5, 4, 3, 2, 1]))
    assert kept(tmp_path / "last") == [12]
    assert "loaded the best" not in outcome.said
    assert [row["validation_loss"] for row in metrics(tmp_path / "last") if "validation_loss" in row][-1] == 1


@pytest.mark.parametrize("setting", ["training.early_stopping_patience=3", "checkpoint.load_best=true"])
def test_both_need_evaluations(corpus, tmp_path, setting):
    with pytest.raises(ConfigError, match=r"set training\.evaluate_every"):
        configure(tmp_path, corpus, [setting])
    configure(tmp_path, corpus, [setting, "training.evaluate_every=3"])
