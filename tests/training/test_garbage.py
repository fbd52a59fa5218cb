"""Python's garbage collector by hand: it runs when it is due and at no other time, and is back afterwards."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.synthetic import tiny_corpus
from tests.training.runs import VOCAB, train
from tests.workers import WorkerPool
from vishwamai_mp.training.garbage import garbage_collected_every


class _Cycle:
    def __init__(self) -> None:
        self.me = self


def _dropped_cycle() -> weakref.ref:
    return weakref.ref(_Cycle())


def test_cycles_live_until_the_step_that_collects():
    with garbage_collected_every(3) as collect:
        assert not gc.isenabled()
        gone = _dropped_cycle()
        for finished in (1, 2):
            collect(finished)
            assert gone() is not None
        collect(3)
        assert gone() is None
    assert gc.isenabled()


def test_python_decides_where_nothing_is_set():
    with garbage_collected_every(None) as collect:
        assert gc.isenabled()
        collect(1)


def test_it_is_back_after_an_error():
    with pytest.raises(ZeroDivisionError), garbage_collected_every(1):
        raise ZeroDivisionError
    assert gc.isenabled()


def test_a_caller_who_switched_it_off_finds_it_off():
    gc.disable()
    try:
        with garbage_collected_every(2) as collect:
            gone = _dropped_cycle()
            collect(2)
            assert gone() is None
        assert not gc.isenabled()
    finally:
        gc.enable()


def note_collections(trainer: Any, notes: list[Any]) -> None:
    """After which steps the collector ran, if Python did not decide."""
    began, callbacks = gc.get_stats(), trainer.callbacks[0]
    end = callbacks.on_step_end

    def counted(*arguments: Any) -> None:
        notes.append((gc.isenabled(), gc.get_stats()[2]["collections"] - began[2]["collections"]))
        end(*arguments)

    callbacks.on_step_end = counted


def test_a_run_collects_on_every_rank_after_the_same_steps(workers: WorkerPool, tmp_path: Path):
    corpus = tiny_corpus(tmp_path, VOCAB, 8000, seed=1)
    settings = ["training.max_steps=5"]
    plain = workers.run(train, 2, tmp_path / "plain", corpus, settings)
    by_hand = workers.run(
        train, 2, tmp_path / "hand", corpus, [*settings, "training.collect_garbage_every=2"], prepare=note_collections
    )
    for outcome in by_hand:
        assert [enabled for enabled, _ in outcome.notes] == [False] * 5
        counts = [count for _, count in outcome.notes]  # noted before the step's own collection
        assert [count - counts[0] for count in counts] == [0, 0, 1, 1, 2]
    assert [outcome.tensors for outcome in by_hand] == [outcome.tensors for outcome in plain]
