"""Profiles: the right steps on the right ranks, whole files, and training that does not notice."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.synthetic import tiny_corpus
from tests.training.runs import VOCAB, train
from tests.workers import WorkerPool
from vishwamai_mp.config import ConfigError, load_config, resolve
from vishwamai_mp.runtime import profiling
from vishwamai_mp.training.callbacks.memory_snapshot import MemorySnapshot
from vishwamai_mp.training.callbacks.profiler import operator_table


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), VOCAB, 8000, seed=1)


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def test_a_trace_holds_its_steps_alone(workers: WorkerPool, corpus, tmp_path):
    settings = ["training.max_steps=4", "logging.profile_steps=[2,3]", "logging.profile_ranks=[1]"]
    outcomes = workers.run(train, 2, tmp_path, corpus, [*settings, "training.evaluate_every=3"])
    name = "steps_00000002-00000003_rank1"
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [f"{name}.json.gz", f"{name}.txt"]
    found = events(tmp_path / "profile" / f"{name}.json.gz")
    steps = [event for event in found if event.get("name", "").startswith("step ") and event["ph"] == "X"]
    assert [event["name"] for event in sorted(steps, key=lambda event: event["ts"])] == ["step 2", "step 3"]
    # Every operator of the model's passes lies within a step, the evaluation after step 3 does not.
    products = [event for event in found if event.get("name") == "_BlockedAttention"]
    assert len(products) == 2 * 2 * 2  # of two steps' micro-batches, in two layers
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in steps]
    assert all(any(low <= event["ts"] <= high for low, high in spans) for event in products)
    plain = workers.run(train, 2, tmp_path / "plain", corpus, settings[:1])
    assert outcomes[0].losses == plain[0].losses
    assert outcomes[0].tensors == plain[0].tensors


def test_operators_and_their_memory_on_a_cpu(workers: WorkerPool, corpus, tmp_path):
    settings = ["training.max_steps=6", "logging.profile_steps=[2,5]", "logging.memory_snapshot=true"]
    [outcome] = workers.run(train, 1, tmp_path, corpus, settings, stop_after=3)
    assert "without a GPU there is no history of memory" in outcome.said
    (table,) = (tmp_path / "profile").glob("*.txt")
    assert table.name == "steps_00000002-00000003_rank0.txt"  # as far as it went
    text = table.read_text()
    assert text.startswith("steps 2 to 3, rank 0: ")
    by_time, _, by_memory = text.partition("allocated, less freed:\n")
    assert len(by_time.splitlines()) == 16
    assert "(between operators)" in by_time
    assert all(line.endswith(" MiB") for line in by_memory.splitlines())
    assert len(by_memory.splitlines()) > 3
    assert text in outcome.said
    [resumed] = workers.run(train, 1, tmp_path, corpus, ["training.max_steps=8", *settings[1:]])
    assert len(list((tmp_path / "profile").glob("*.txt"))) == 2  # steps 4 and 5
    [past] = workers.run(train, 1, tmp_path, corpus, ["training.max_steps=9", *settings[1:]])
    assert "the run is past step 5; nothing is profiled" in past.said
    assert resumed.state["step"] == 8


def test_the_table_is_right():
    def average(key: str, count: int, own: float, on_device: float = 0.0, memory: int = 0) -> SimpleNamespace:
        return SimpleNamespace(
            key=key,
            count=count,
            self_cpu_time_total=own,
            self_device_time_total=on_device,
            self_cpu_memory_usage=memory,
        )

    found = [average("a", 3, 1000.0), average("b", 1200, 2500.0, memory=5 * 2**20), average("step 7", 1, 500.0)]
    assert [line.split() for line in operator_table(found, memory=True).splitlines()] == [
        ["4.0", "ms", "in", "operators"],
        ["b", "1,200", "×", "2.50", "ms", "62.5%"],
        ["a", "3", "×", "1.00", "ms", "25.0%"],
        ["(between", "operators)", "1", "×", "0.50", "ms", "12.5%"],
        ["allocated,", "less", "freed:"],
        ["b", "1,200", "×", "5.0", "MiB"],
    ]
    on_gpu = operator_table([average("a", 1, 9e9, 500.0), average("launch", 1, 9e9)], memory=False)
    assert [line.split()[0] for line in on_gpu.splitlines()] == ["0.5", "a"]


def test_a_snapshot_is_whole_or_not_there(tmp_path, monkeypatch):
    """The callback alone; what records is a GPU's allocator."""
    calls: list[str] = []

    def write(path: Path) -> None:
        calls.append(path.name)
        path.write_bytes(b"history")

    module = "vishwamai_mp.training.callbacks.memory_snapshot"
    monkeypatch.setattr(f"{module}.has_memory_history", lambda: True)
    monkeypatch.setattr(f"{module}.record_memory_history", lambda: calls.append("record"))
    monkeypatch.setattr(f"{module}.write_memory_history", write)
    state = SimpleNamespace(step=0)
    trainer: Any = SimpleNamespace(state=state, runtime=SimpleNamespace(rank=3), folder=tmp_path)
    callback = MemorySnapshot(2, 3, [3])
    for _ in range(4):
        callback.on_step_begin(trainer)
        state.step += 1
        callback.on_step_end(trainer, {})
    callback.on_train_end(trainer)
    name = "steps_00000002-00000003_rank3_memory.pickle"
    assert calls[0] == "record"
    assert [path.partition(".pickle")[0] for path in calls[1:]] == [name.removesuffix(".pickle")]  # once, and aside
    assert calls[1].endswith(".partial")
    assert [path.name for path in (tmp_path / "profile").iterdir()] == [name]


def test_a_cpu_has_no_such_history():
    assert not profiling.has_memory_history()
    assert [str(activity).rpartition(".")[2] for activity in profiling.profiler_activities()] == ["CPU"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["logging.profile_steps=[3]"], r"profile_steps=\[3\]: give the first step and the last"),
        (["logging.profile_steps=[5,3]"], r"profile_steps=\[5,3\]: give the first step and the last"),
        (["logging.profile_steps=[0,3]"], r"profile_steps.*greater than 0"),
        (["logging.profile_steps=[90,101]"], r"\[90,101\] ends beyond training.max_steps=100"),
        (["logging.profile_steps=[1,21]"], r"\[1,21\] are 21 steps.*at most 20"),
        (["logging.profile_ranks=[1]"], r"profile_ranks=\[1\] without logging.profile_steps"),
        (["logging.memory_snapshot=true"], r"memory_snapshot=true without logging.profile_steps"),
        (["logging.profile_steps=[1,2]", "logging.profile_ranks=[0,2]"], "rank 2 is beyond the job's 2 processes"),
        (["logging.profile_steps=[1,2]", "logging.profile_ranks=[]"], r"profile_ranks=\[\]: name each rank once"),
        (["logging.profile_steps=[1,2]", "logging.profile_ranks=[1,1]"], r"profile_ranks=\[1,1\]: name each rank once"),
    ],
)
def test_mistakes_are_told(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(load_config("tiny", ["training.max_steps=100", *overrides]), 2)
