"""Every number of a run with all components reaches TensorBoard and Weights & Biases, resumed runs included."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.synthetic import tiny_corpus
from tests.training.runs import VOCAB, train
from tests.workers import WorkerPool
from vishwamai_mp.training.loop import Trainer

_COMPONENTS = [
    *("memory.enabled=true", "memory.memory_size=32", "memory.head_dim=16", "memory.num_memory_layers=2"),
    *("memory.layers=[0]", "memory.loss_weight=0.01", "tree.enabled=true"),
    *("cache.enabled=true", "cache.layers=[1]", "cache.segment_length=8", "cache.latents_per_segment=2"),
    "cache.num_heads=2",
]
_EXPECTED = {
    *("memory_mix_loss", "value_loss", "memory_surprise_1", "memory_retention_2", "memory_write_1", "memory_read"),
    *("cache_entropy", "cache_null_share", "cache_fill", "cache_evictions", "cache_importance"),
    *("value_cross_entropy", "lm_loss", "loss", "validation_loss", "grad_norm", "skipped_steps", "memory_gib"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), VOCAB, 8000, seed=1)


def settings(*more: str) -> list[str]:
    return [*_COMPONENTS, "training.max_steps=3", "training.evaluate_every=1", "training.evaluate_batches=1", *more]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_all_of_it(workers: WorkerPool, corpus, tmp_path):
    workers.run(train, 1, tmp_path, corpus, settings("logging.report_to=[tensorboard]"))
    rows = logged(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == {key for row in rows for key in row} - {"step"}
    assert tags >= _EXPECTED
    for tag in tags:
        shown = {event.step: event.value for event in events.Scalars(tag)}
        assert shown == pytest.approx({row["step"]: row[tag] for row in rows if tag in row}, rel=1e-6)
    for row in rows:
        assert row["loss"] == pytest.approx(row["lm_loss"] + row["memory_mix_loss"] + row["value_loss"], rel=1e-9)


def offline(trainer: Trainer, notes: list[Any]) -> None:
    """Runs in a worker, before training."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def test_wandb_offline_has_all_of_it_and_one_id(workers: WorkerPool, corpus, tmp_path):
    """Opt-in, for the package is large: pip install -e '.[wandb]', and this test runs."""
    pytest.importorskip("wandb", reason="wandb is not installed (pip install -e '.[wandb]')")
    chosen = settings("logging.report_to=[wandb]")
    workers.run(train, 1, tmp_path, corpus, chosen, stop_after=2, prepare=offline)
    workers.run(train, 1, tmp_path, corpus, chosen, prepare=offline)
    run_id = (tmp_path / "wandb_id").read_text()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    found = [row for file in files for row in history(file)]
    expected = [{key: value for key, value in row.items() if key != "step"} for row in logged(tmp_path)]
    assert [row.pop("_step") for row in found] == [1, 2, 3]
    assert [{key: row[key] for key in row if not key.startswith("_")} for row in found] == expected
    assert set(expected[0]) >= _EXPECTED


def history(file: Path) -> Iterator[dict[str, Any]]:
    """What was logged, from a file that `wandb sync` sends."""
    from wandb.proto.wandb_internal_pb2 import Record

    for content in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.HasField("history"):
            items = record.history.item
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def records(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: blocks of 32 KiB, of parts with checksum (4), length (2) and kind (1)."""
    whole, at = b"", 7  # behind the file's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""
