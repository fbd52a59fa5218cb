"""What a run leaves beside its weights: metrics, evaluation, progress, and how it ends when asked to."""

import json
import os
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.synthetic import tiny_corpus
from tests.training.runs import VOCAB, Counter, Interruption, configure, train
from tests.workers import WorkerPool
from vishwamai_mp.config import load_config
from vishwamai_mp.planning import flops_per_token
from vishwamai_mp.training.callbacks import Callback
from vishwamai_mp.training.loop import Trainer
from vishwamai_mp.training.schedule import learning_rate

_TENSORBOARD = "logging.report_to=[tensorboard]"
_KEYS = {
    *("step", "consumed_tokens", "lm_loss", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"),
    "memory_gib",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), VOCAB, 8000, seed=1)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Then(Callback):
    """Does something at the end of a step."""

    def __init__(self, action: Callable[[Trainer], None]) -> None:
        self.action = action

    def on_step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self.action(trainer)


def count_steps(trainer: Trainer, notes: list[Any]) -> None:
    trainer.callbacks.insert(0, Counter())


def test_a_callback_goes_on_where_it_was(workers: WorkerPool, corpus, tmp_path):
    run = partial(workers.run, train, 1, tmp_path, corpus, ["training.max_steps=6"], prepare=count_steps)
    assert [record["counted"] for record in run(stop_after=4)[0].records] == [1, 2, 3, 4]
    assert [record["counted"] for record in run()[0].records] == [5, 6]


def name_callbacks(trainer: Trainer, notes: list[Any]) -> None:
    notes.extend(type(callback).__name__ for callback in trainer.callbacks)


def test_the_trainer_puts_callbacks_in_the_order_that_they_declare(workers: WorkerPool, corpus, tmp_path):
    """They are handed to it from the last to the first, with one of the user's."""
    own = "training.callbacks=[examples.extensions.stop_at_loss:StopAtLoss]"
    (outcome,) = workers.run(train, 1, tmp_path, corpus, ["training.max_steps=1", own], prepare=name_callbacks)
    order = ["_Watch", "Stopping", "Evaluation", "StopAtLoss", "Metrics", "Checkpointing", "Progress"]
    assert [name for name in outcome.notes if name in order] == order


def test_metrics_have_the_keys_of_the_contract_and_mean_what_they_say(workers: WorkerPool, corpus, tmp_path):
    outcomes = workers.run(train, 2, tmp_path, corpus, ["training.max_steps=4"])
    rows, config = metrics(tmp_path), configure(tmp_path, corpus, ["training.max_steps=4"], 2)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row.keys() >= _KEYS for row in rows)
    assert [row["lm_loss"] for row in rows] == outcomes[0].losses == outcomes[1].losses
    flops = flops_per_token(config.model, config.training.sequence_length)
    for row in rows:
        assert row["consumed_tokens"] == row["step"] * 8 * 32
        assert row["learning_rate"] == learning_rate(config, row["step"] - 1)
        assert row["mfu"] == pytest.approx(
            row["tokens_per_second"] * flops / (2 * 1e12)
        )  # two processes, 1 TFLOP/s each
        assert row["grad_norm"] > 0
        assert 0.05 < row["memory_gib"] < 100
    # The folder says what the run was.
    assert load_config(tmp_path / "config.yaml") == config
    assert json.loads((tmp_path / "environment.json").read_text())["world_size"] == 2


def test_only_every_nth_step_is_logged(workers: WorkerPool, corpus, tmp_path):
    settings = ["training.max_steps=7", "logging.log_every=3"]
    [outcome] = workers.run(train, 1, tmp_path, corpus, settings)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 3, 6, 7]
    lines = [line for line in outcome.said.splitlines() if line.startswith("step ")]
    shape = r"step {}/7  loss \d\.\d{{4}}  lr \d\.\d\de-\d\d  grad norm [\d.]+  tok/s [\d,]+  \d+:\d\d:\d\d left"
    assert len(lines) == 4
    assert all(re.fullmatch(shape.format(step), line) for step, line in zip((1, 3, 6, 7), lines, strict=True))
    assert lines[-1].endswith("0:00:00 left")


def test_progress_can_be_switched_off(workers: WorkerPool, corpus, tmp_path):
    settings = ["training.max_steps=2", "logging.progress_bar=false"]
    [outcome] = workers.run(train, 1, tmp_path, corpus, settings)
    assert "step 1/2" not in outcome.said
    assert len(metrics(tmp_path)) == 2


def labels(said: str) -> dict[str, str]:
    """The tables that a run begins and ends with: the first word of a line, and the rest."""
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in said.splitlines() if re.match(r"\w+  +\S", line)}


def test_a_run_says_what_it_is_and_what_came_of_it(workers: WorkerPool, corpus, tmp_path):
    settings = ["training.max_steps=3", "memory.enabled=true", "cache.enabled=true", "cache.segment_length=8"]
    quiet, told = workers.run(train, 2, tmp_path, corpus, settings)[::-1]
    assert quiet.said == ""
    table = labels(told.said)
    assert re.match(r"[\d.]+ k parameters: 2 layers × \d+, ", table["model"])
    assert re.match(
        r"[\d.]+ k parameters, [\d.]+% of FLOPs: layers \[\d\], memory_size 64, head_dim 16", table["memory"]
    )
    assert re.match(r"[\d.]+ k parameters, [\d.]+% of FLOPs: layers \[\d\], num_heads 2, ", table["cache"])
    assert table["layout"] == "2 processes: tensor 1 × pipeline 1 × context 1 × data 2"
    assert table["compute"] == "fp32 on CPU, 1 thread per process (training.threads)"
    assert table["batch"].startswith("8 sequences × 32 = 256 tokens a step, in 2 passes of 2 per replica; 768 tokens")
    assert re.match(r"about [\d.]+ MiB per process: [\d.]+ MiB for weights", table["footprint"])
    assert table["output"] == f"{tmp_path}, a new run of 3 steps"
    assert table["footprint"].endswith("of this machine's memory and swap for each process")
    assert table["done"].startswith("step 3 of 3 in 0:00:0")
    assert re.match(r"[\d.]+ MiB per process, measured [\d.]+ [MG]iB with the program's libraries", table["planned"])
    assert f"loss {told.losses[-1]:.4f}" in table["done"]
    assert table["checkpoint"] == f"{tmp_path}/checkpoints/step_00000003"
    assert f"python tools/convert_checkpoint.py to-hf --load {tmp_path} --output {tmp_path}-hf" in told.said


def test_a_finished_run_says_so_and_goes_on_when_asked_to(workers: WorkerPool, corpus, tmp_path):
    settings = ["training.max_steps=2"]
    workers.run(train, 1, tmp_path, corpus, settings)
    [again] = workers.run(train, 1, tmp_path, corpus, settings)
    said = f"nothing to do: the run in {tmp_path} has finished step 2 of training.max_steps=2; raise"
    assert again.said.splitlines()[-1].startswith(said)
    assert labels(again.said) == {}
    [more] = workers.run(train, 1, tmp_path, corpus, ["training.max_steps=3"])
    assert labels(more.said)["output"] == f"{tmp_path}, continues after step 2 of 3"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "goodput.json", "checkpoints"])
def test_a_file_of_the_run_folder_that_cannot_be_written_is_a_line(workers: WorkerPool, corpus, tmp_path, name):
    if name == "checkpoints":
        (tmp_path / name).symlink_to("/nowhere/purged")
    else:
        (tmp_path / name / "full").mkdir(parents=True)
    with pytest.raises(Exception, match=rf"{tmp_path}/{name} (cannot be used|is no folder that is there)"):
        workers.run(train, 1, tmp_path, corpus, ["training.max_steps=1"])


def crash_after_save(step: int, trainer: Trainer, _: list[Any]) -> None:
    """End without a word when the checkpoint of a step is there, before anything else is done."""
    save = trainer.save

    def save_and_crash(**options: Any) -> None:
        save(**options)
        if trainer.state.step == step:
            raise Interruption

    trainer.save = save_and_crash  # type: ignore[method-assign]


@pytest.mark.parametrize("crash", ["between checkpoints", "after a checkpoint"])
def test_a_resumed_run_logs_each_step_once(workers: WorkerPool, corpus, tmp_path, crash):
    settings = ["training.max_steps=8", "checkpoint.save_every=3", _TENSORBOARD]
    if crash == "between checkpoints":
        workers.run(train, 1, tmp_path, corpus, settings, crash_after=5)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "lm_l')  # what a kill may leave
    else:
        workers.run(train, 1, tmp_path, corpus, settings, prepare=partial(crash_after_save, 3))
    [outcome] = workers.run(train, 1, tmp_path, corpus, settings)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["lm_loss"] for row in rows[3:]] == outcome.losses
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= _KEYS - {"step"}
    scalars = events.Scalars("lm_loss")
    assert [event.step for event in scalars] == list(range(1, 9))
    assert [event.value for event in scalars] == pytest.approx([row["lm_loss"] for row in rows], rel=1e-6)


def test_evaluation_is_the_same_at_every_layout_and_leaves_training_alone(workers: WorkerPool, corpus, tmp_path):
    settings = ["training.max_steps=5", "training.evaluate_batches=2", "model.hidden_dropout=0.1"]
    every = [*settings, "training.evaluate_every=2"]
    two = ["training.micro_batch_size=4", "parallel.tensor_model_parallel_size=2"]
    losses = []
    for name, processes, layout in [("one", 1, []), ("DP2", 2, []), ("TP2", 2, two)]:
        workers.run(train, processes, tmp_path / name, corpus, [*every, *layout, "model.hidden_dropout=0"])
        rows = metrics(tmp_path / name)
        assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4, 5]
        losses.append([row["validation_loss"] for row in rows if "validation_loss" in row])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)
    assert losses[0][2] < losses[0][0]
    with_dropout = [
        workers.run(train, 1, tmp_path / name, corpus, chosen)[0]
        for name, chosen in [("evaluated", every), ("not", settings)]
    ]
    assert with_dropout[0].tensors == with_dropout[1].tensors


def signal_on_rank_1(number: int, trainer: Trainer, notes: list[Any]) -> None:
    def send(trainer: Trainer) -> None:
        if trainer.state.step == 3 and trainer.runtime.rank == 1:
            os.kill(os.getpid(), number)

    trainer.callbacks.insert(0, Then(send))
    notes.append(signal.getsignal(number))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("background", [False, True])
def test_a_signal_to_one_rank_stops_all_after_a_save(workers: WorkerPool, corpus, tmp_path, number, background):
    settings = ["training.max_steps=6", f"checkpoint.async_save={background}".lower()]
    prepare = partial(signal_on_rank_1, number)
    outcomes = workers.run(train, 2, tmp_path, corpus, settings, prepare=prepare)
    assert [outcome.state["step"] for outcome in outcomes] == [3, 3]
    name = signal.Signals(number).name
    assert f"stopped after step 3: signal {name}; the same command continues" in outcomes[0].said
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000003\n"
    resumed = workers.run(train, 2, tmp_path, corpus, settings)
    assert resumed[0].state["step"] == 6


def handlers_after(folder: Path, data: str) -> bool:
    """Whether training leaves the process's signal handlers as they were."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    train(folder, data, ["training.max_steps=1"])
    return before == [signal.getsignal(number) for number in numbers]


def test_signal_handlers_are_put_back(workers: WorkerPool, corpus, tmp_path):
    assert workers.run(handlers_after, 1, tmp_path, corpus) == [True]


def test_exit_after_minutes_saves_and_the_same_command_continues(workers: WorkerPool, corpus, tmp_path):
    settings = ["training.max_steps=3", "training.exit_after_minutes=0.0000001"]
    for step in (1, 2, 3):
        outcomes = workers.run(train, 2, tmp_path, corpus, settings)
        assert [outcome.state["step"] for outcome in outcomes] == [step, step]
        assert f"stopped after step {step}: training.exit_after_minutes" in outcomes[0].said
    [*_, last] = workers.run(train, 2, tmp_path, corpus, settings)
    assert last.records == []
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
