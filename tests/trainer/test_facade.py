"""The façade does what the core does with the same settings, and opens the data once."""

from unittest import mock

import pytest

from tests.synthetic import tiny_corpus
from tests.trainer.runs import VOCAB, core_losses, pretrainer, rows
from tests.workers import WorkerPool
from vishwamai_mp.data.datasets import build_datasets

_SETTINGS = {
    "max_steps": 6,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "seed": 7,
}
_SAME = [
    "training.max_steps=6",
    "training.micro_batch_size=2",
    "training.seed=7",
    "optimizer.learning_rate=0.002",
    "optimizer.min_learning_rate=0",
    "optimizer.weight_decay=0.05",
    "optimizer.beta2=0.999",
    "schedule.warmup_steps=2",
    "schedule.warmup_from_zero=true",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), VOCAB, 6000, seed=1)


def both(folder, corpus, batch: int, overrides: tuple[str, ...] = ()) -> tuple[list[float], list[float], list[float]]:
    """Losses of the façade as returned and as logged, and of the core."""
    with mock.patch("vishwamai_mp.data.given.build_datasets", side_effect=build_datasets) as opened:
        ours = pretrainer(folder / "facade", corpus, overrides=overrides, **_SETTINGS)
    assert opened.call_count == 1
    ours.train()
    core = core_losses(
        folder / "core", [*_SAME, *overrides, f"data.train={corpus}", f"training.global_batch_size={batch}"]
    )
    return [record["lm_loss"] for record in ours.history], [row["lm_loss"] for row in rows(folder / "facade")], core


@pytest.mark.parametrize(
    ("processes", "batch", "overrides"),
    [
        (1, 4, ()),
        (2, 8, ()),
        (2, 4, ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")),
    ],
)
def test_losses_are_the_cores_bit_for_bit(workers: WorkerPool, corpus, tmp_path, processes, batch, overrides):
    for returned, logged, core in workers.run(both, processes, tmp_path, corpus, batch, overrides):
        assert len(core) == 6
        assert returned == logged == core
