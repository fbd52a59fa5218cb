"""The account of a run that is killed and goes on."""

import time
from functools import partial
from typing import Any

import pytest

from tests.synthetic import tiny_corpus
from tests.training.runs import VOCAB, train
from tests.workers import WorkerPool
from vishwamai_mp.observability.goodput_ledger import read_ledger
from vishwamai_mp.training.callbacks import goodput
from vishwamai_mp.training.loop import Trainer


def write_at_every_step(trainer: Trainer, notes: list[Any]) -> None:
    goodput._EVERY_SECONDS = 0.0  # the run is over in less than the usual interval
    notes.append(time.time())


def test_steps_that_were_lost_and_done_again_are_told_from_useful_ones(workers: WorkerPool, tmp_path):
    corpus = tiny_corpus(tmp_path, VOCAB, 8000, seed=1)
    settings = ["training.max_steps=8", "checkpoint.save_every=2", "training.evaluate_every=4"]
    run = partial(workers.run, train, 1, tmp_path / "run", corpus, settings, prepare=write_at_every_step)
    begun = run(crash_after=5)[0].notes[0]  # step 5 is lost, and so is what came after the account of step 4
    said = run()[0].said
    ended = time.time()
    ledger = read_ledger(tmp_path / "run")
    first, second = ledger.attempts
    assert (first.step, second.step, second.finished) == (4, 8, True)
    seconds = ledger.seconds
    assert all(seconds[part] > 0 for part in ("useful", "saving", "evaluating", "starting", "between", "data", "down"))
    assert seconds["repeated"] == 0  # step 4 had been saved
    assert ledger.wall == pytest.approx(second.ended - first.began, rel=0.01)
    assert begun <= first.began
    assert second.ended <= ended
    assert ledger.goodput == pytest.approx(seconds["useful"] / ledger.wall)
    assert f"goodput     {ledger.goodput:.1%} of " in said


def test_repeated_steps(workers: WorkerPool, tmp_path):
    corpus = tiny_corpus(tmp_path, VOCAB, 8000, seed=1)
    settings = ["training.max_steps=6", "checkpoint.save_every=6"]
    run = partial(workers.run, train, 1, tmp_path / "run", corpus, settings, prepare=write_at_every_step)
    run(crash_after=4)
    run()
    ledger = read_ledger(tmp_path / "run")
    assert ledger.attempts[0].step == 3
    repeated, useful = ledger.attempts[1].seconds["repeated"], ledger.attempts[1].seconds["useful"]
    assert 0 < repeated < 5 * useful
    assert useful < 5 * repeated  # three steps each
