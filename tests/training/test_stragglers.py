"""A rank that is slow is named, and a report draws what it did."""

import re
import time
from typing import Any

import pytest

from tests.synthetic import tiny_corpus
from tests.training.runs import VOCAB, train
from tests.workers import WorkerPool
from vishwamai_mp.observability.report import render_report
from vishwamai_mp.observability.run_folder import read_run
from vishwamai_mp.observability.timeline import WAITING, read_timeline
from vishwamai_mp.training.loop import Trainer


class _Slow:
    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.05)
        return self.samples[index]


def slow_data_on_rank_1(trainer: Trainer, notes: list[Any]) -> None:
    if trainer.runtime.rank == 1:
        trainer.datasets.train.samples = _Slow(trainer.datasets.train.samples)  # type: ignore[attr-defined]


def test_the_slow_rank_is_named_with_its_phase_and_drawn(workers: WorkerPool, tmp_path):
    corpus, run = tiny_corpus(tmp_path, VOCAB, 8000, seed=1), tmp_path / "run"
    settings = ["training.max_steps=7", "logging.stragglers_every=3", "parallel.tensor_model_parallel_size=1"]
    outcome = workers.run(train, 2, run, corpus, settings, prepare=slow_data_on_rank_1)[0]
    timeline = read_timeline(run)
    assert timeline is not None
    assert (timeline.step, timeline.steps, [rank.rank for rank in timeline.ranks]) == (6, 3, [0, 1])
    slow = {item.phase: item for item in timeline.slow}
    rank, host, seconds = slow["waiting for data"].slowest[0]
    assert (rank, host) == (1, timeline.ranks[1].host)
    assert seconds >= 4 * 0.05  # rows of a step on a rank
    assert timeline.ranks[0].seconds[WAITING] > 0.1 > timeline.ranks[1].seconds[WAITING]
    assert re.search(rf"rank 1 on {re.escape(host)} is slow: waiting for data takes it 0\.\d+ s a step", outcome.said)
    data = [span for span in timeline.ranks[1].spans if span[2] == 1]
    assert sum(length for _, length, *_ in data) == pytest.approx(1e6 * seconds, rel=0.5)
    begins = [begin for begin, *_ in timeline.ranks[1].spans]
    assert begins == sorted(begins)
    assert abs(begins[0] / 1e6 - time.time()) < 600

    page = render_report([read_run(run)])
    assert "<title>rank 1: waiting for data, " in page
    assert "<title>rank 0: waiting for other ranks: " in page
    assert "<title>rank 0: forward pass: micro-batch 2, " in page
    assert f"<td>1 ({host}) " in page.replace("&#39;", "'")
    (run / "timeline.json").write_text('{"step": 1}')
    assert "timeline.json: cannot be understood" in render_report([read_run(run)])
