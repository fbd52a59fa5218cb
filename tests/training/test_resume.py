"""A resumed run goes on as if nothing had happened; at another layout too, up to rounding."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.synthetic import tiny_corpus
from tests.training.runs import VOCAB, Outcome, train
from tests.training.test_layouts import FEW
from tests.workers import WorkerPool
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.model import core_attention  # noqa: F401  (makes its choices known)
from vishwamai_mp.runtime.choices import _choices

_TENSOR = "parallel.tensor_model_parallel_size=2"
_SEQUENCE = "parallel.sequence_parallel=true"
_PIPELINE = "parallel.pipeline_model_parallel_size=2"
_SHARDED_OPTIMIZER = "parallel.use_distributed_optimizer=true"
_NARROW = "optimizer.moments_in=bf16"
_DROPOUT = ["model.attention_dropout=0.1", "model.hidden_dropout=0.1"]
_EVERY_3 = ["checkpoint.save_every=3", "training.max_steps=8", FEW]

_COMPILED = {"compiled bf16": (1, ["precision=bf16", "training.compile=true"])} if shutil.which("g++") else {}

# name: (processes, settings)
LAYOUTS = {
    "TP1 DP1": (1, []),
    "DP2 sharded optimizer, overlap": (2, [_SHARDED_OPTIMIZER]),
    "TP2 SP": (2, [_TENSOR, _SEQUENCE]),
    "PP2": (2, [_PIPELINE]),
    "bf16 DP2 sharded optimizer, overlap": (2, ["precision=bf16", _SHARDED_OPTIMIZER]),
    "bf16 TP2 SP": (2, ["precision=bf16", _TENSOR, _SEQUENCE]),
    "FSDP2": (2, ["parallel.fully_sharded=true"]),
    "bf16 FSDP2": (2, ["precision=bf16", "parallel.fully_sharded=true"]),
    "bf16 moments, DP2 sharded optimizer": (2, [_NARROW, _SHARDED_OPTIMIZER]),
    "bf16 moments, bf16 TP2 SP": (2, [_NARROW, "precision=bf16", _TENSOR, _SEQUENCE]),
    "bf16 moments, FSDP2": (2, [_NARROW, "parallel.fully_sharded=true"]),
    **_COMPILED,
    "fp16 DP2": (2, ["precision=fp16", "optimizer.initial_loss_scale=1024", "optimizer.loss_scale_window=2"]),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), VOCAB, 8000, seed=1)


@pytest.fixture(scope="module")
def uninterrupted(workers, corpus, tmp_path_factory):
    """Outcomes of runs without an interruption, each made once: (processes, settings) to folder and outcomes."""
    known: dict[tuple, tuple[Path, list[Outcome]]] = {}

    def get(processes: int, *settings: str) -> tuple[Path, list[Outcome]]:
        key = (processes, *settings)
        if key not in known:
            folder = tmp_path_factory.mktemp("run")
            known[key] = folder, workers.run(train, processes, folder, corpus, list(settings))
        return known[key]

    return get


def trainer_file(folder: Path, step: int) -> dict:
    return json.loads((folder / f"checkpoints/step_{step:08d}/trainer.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_layout_is_bitwise_equal(workers: WorkerPool, uninterrupted, corpus, tmp_path, name):
    """Ended after 5 of 8 steps without a warning, resumed from step 3. Dropout is on: seeds are resumed as well."""
    processes, layout = LAYOUTS[name]
    settings = [*layout, *_EVERY_3, *_DROPOUT]
    folder, whole = uninterrupted(processes, *settings)
    first = workers.run(train, processes, tmp_path, corpus, settings, crash_after=5)
    second = workers.run(train, processes, tmp_path, corpus, settings)
    assert "resumed from step_00000003, 12 samples in" in second[0].said
    for expected, before, after in zip(whole, first, second, strict=True):
        assert before.losses == expected.losses[:5]
        assert after.losses == expected.losses[3:]
        assert after.state == expected.state
        assert after.samples == expected.samples[len(expected.samples) * 3 // 8 :]
        assert after.tensors == expected.tensors
        assert after.tensors != before.tensors
    assert trainer_file(tmp_path, 8) == trainer_file(folder, 8)


def test_a_run_goes_on_by_the_ways_it_began_with(workers: WorkerPool, uninterrupted, corpus, tmp_path):
    """All but the first of each choice, which the table in its folder says; bitwise among themselves."""
    table = {name: list(choice.ways)[-1] for name, choice in _choices.items()}
    settings = [*LAYOUTS["TP2 SP"][1], *_EVERY_3, "memory.enabled=true"]
    _, first_ways = uninterrupted(2, *settings)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ways.json").write_text(json.dumps(table))
    whole = workers.run(train, 2, tmp_path / "whole", corpus, settings)
    workers.run(train, 2, tmp_path / "broken", corpus, settings, crash_after=5)
    resumed = workers.run(train, 2, tmp_path / "broken", corpus, settings)
    for expected, after, other in zip(whole, resumed, first_ways, strict=True):
        assert after.tensors == expected.tensors
        assert expected.tensors != other.tensors, "the table decides"
        assert expected.losses == pytest.approx(other.losses, abs=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("TP1 DP1", "DP2 sharded optimizer, overlap"),
        ("DP2 sharded optimizer, overlap", "TP1 DP1"),
        ("DP2 sharded optimizer, overlap", "TP2 SP"),
        ("TP2 SP", "PP2"),
    ],
)
def test_other_layout_continues_the_curve(workers: WorkerPool, uninterrupted, corpus, tmp_path, before, after):
    _, whole = uninterrupted(1, *_EVERY_3)
    processes, layout = LAYOUTS[before]
    workers.run(train, processes, tmp_path, corpus, [*layout, *_EVERY_3], stop_after=4)
    processes, layout = LAYOUTS[after]
    resumed = workers.run(train, processes, tmp_path, corpus, [*layout, *_EVERY_3])
    for outcome in resumed:
        assert outcome.losses == pytest.approx(whole[0].losses[4:], abs=1e-6)
        assert outcome.state == whole[0].state


@pytest.mark.parametrize(("before", "after"), [([], [_NARROW]), ([_NARROW], [])])
@pytest.mark.parametrize("name", ["DP2 sharded optimizer, overlap", "FSDP2"])
def test_moments_may_change_their_type(workers: WorkerPool, uninterrupted, corpus, tmp_path, name, before, after):
    processes, layout = LAYOUTS[name]
    settings = [*layout, *_EVERY_3]
    _, whole = uninterrupted(processes, *settings)
    workers.run(train, processes, tmp_path, corpus, [*settings, *before], crash_after=5)
    second = workers.run(train, processes, tmp_path, corpus, [*settings, *after])
    assert second[0].losses == pytest.approx(whole[0].losses[3:], abs=1e-3)
    assert second[0].tensors != whole[0].tensors


def test_sums_of_gradients_and_recomputation_may_change(workers: WorkerPool, uninterrupted, corpus, tmp_path):
    """Neither is of the checkpoint: the curve goes on, up to bf16's rounding of gradients."""
    name = "bf16 DP2 sharded optimizer, overlap"
    processes, layout = LAYOUTS[name]
    settings = [*layout, *_EVERY_3, *_DROPOUT]
    _, whole = uninterrupted(processes, *settings)
    workers.run(train, processes, tmp_path, corpus, settings, crash_after=5)
    changed = ["parallel.reduce_grads_in=bf16", "training.recompute=full", "training.recompute_layers=1"]
    second = workers.run(train, processes, tmp_path, corpus, [*settings, *changed])
    assert second[0].losses == pytest.approx(whole[0].losses[3:], abs=2e-3)
    assert second[0].tensors != whole[0].tensors


def test_other_batch_layout_sees_each_sample_once(workers: WorkerPool, corpus, tmp_path):
    """Data parallel size 1, 2, 1 and micro-batches of 2, 1, 4."""
    read: list[int] = []
    for processes, micro_batch, stop in [(1, 2, 2), (2, 1, 5), (1, 4, None)]:
        settings = [f"training.micro_batch_size={micro_batch}", "training.max_steps=7"]
        outcomes = workers.run(train, processes, tmp_path, corpus, settings, stop_after=stop)
        read += [number for outcome in outcomes for number in outcome.samples]
    assert Counter(read) == Counter(range(7 * 8))


def test_a_changed_blend_is_said(workers: WorkerPool, corpus, tmp_path):
    other = tiny_corpus(tmp_path / "other", VOCAB, 4000, seed=2)
    run = tmp_path / "run"
    workers.run(train, 1, run, f"[0.7, {corpus}, 0.3, {other}]", _EVERY_3, stop_after=2)
    [same] = workers.run(train, 1, run, f"[0.7, {corpus}, 0.3, {other}]", _EVERY_3, stop_after=3)
    [changed] = workers.run(train, 1, run, f"[0.5, {corpus}, 0.5, {other}]", _EVERY_3, stop_after=4)
    assert "data.train" not in same.said
    assert "data.train: weight of" in changed.said
    assert "0.3 -> 0.5" in changed.said
    assert changed.state["step"] == 4  # said, and gone on


def test_fine_tuning_starts_from_weights_or_from_everything(workers: WorkerPool, corpus, tmp_path):
    settings = ["precision=bf16", "training.max_steps=6"]
    [source] = workers.run(train, 1, tmp_path / "source", corpus, settings, stop_after=4)
    checkpoint = tmp_path / "source/checkpoints/step_00000004"
    load = [*settings, f"checkpoint.load={checkpoint}"]

    [everything] = workers.run(train, 1, tmp_path / "everything", corpus, load)
    [continued] = workers.run(train, 1, tmp_path / "source", corpus, settings)
    assert everything.tensors == continued.tensors
    assert f"starts from {checkpoint}, at step 4" in everything.said

    weights_only = [*load, "checkpoint.load_optimizer=false"]
    [fresh] = workers.run(train, 1, tmp_path / "weights", corpus, weights_only, stop_after=1)
    assert f"starts from the weights of {checkpoint}, at step 0" in fresh.said
    assert fresh.state["step"] == 1
    # Sample 0 again, but seen by the trained model: the loss is lower than the untrained one's.
    assert fresh.samples == source.samples[: len(fresh.samples)]
    assert fresh.losses[0] < source.losses[0] - 0.1
    with pytest.raises(Exception, match=r"training\.max_steps=4 counts from the beginning and .* is at step 4: raise"):
        workers.run(train, 1, tmp_path / "beyond", corpus, [*load, "training.max_steps=4"])
    assert list((tmp_path / "beyond").iterdir()) == []
    newest = [*settings, f"checkpoint.load={tmp_path / 'everything'}", "training.max_steps=7"]
    [beyond] = workers.run(train, 1, tmp_path / "newest", corpus, newest)
    assert f"starts from {tmp_path}/everything/checkpoints/step_00000006, at step 6" in beyond.said
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text("{}")
    with pytest.raises(
        Exception, match=r"checkpoint\.load: .*/llama is a Hugging Face folder; make a checkpoint of it"
    ):
        workers.run(train, 1, tmp_path / "never", corpus, [*settings, f"checkpoint.load={tmp_path / 'llama'}"])
    # A run folder's own checkpoint comes before checkpoint.load.
    [again] = workers.run(train, 1, tmp_path / "weights", corpus, weights_only, stop_after=2)
    assert "resumed from step_00000001" in again.said
    assert "starts from" not in again.said


def test_a_run_keeps_the_tokenizer_that_its_weights_know(workers: WorkerPool, corpus, tmp_path):
    first, other = (
        train_tokenizer([text] * 9, 365, tmp_path / text[:3]).path for text in ("one two three", "two six seven")
    )
    run, begun, steps = tmp_path / "run", f"data.tokenizer={first}", "training.max_steps=2"
    workers.run(train, 1, run, corpus, [begun, steps], stop_after=1)
    with pytest.raises(
        Exception, match=r"data\.tokenizer=.* is not the one that this run began with: token \d+ is '.*"
    ):
        workers.run(train, 1, run, corpus, [f"data.tokenizer={other}", steps])
    assert (run / "tokenizer.model").read_bytes() == first.read_bytes()
    load = [f"checkpoint.load={run}/checkpoints/step_00000001", steps]
    [elsewhere] = workers.run(train, 1, tmp_path / "elsewhere", corpus, [f"data.tokenizer={other}", *load])
    assert "data.tokenizer is not the one that" in elsewhere.said
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/tokenizer.model").write_bytes(first.read_bytes())
    [same] = workers.run(train, 1, run, corpus, [f"data.tokenizer={tmp_path / 'copy'}", steps])
    assert same.state["step"] == 2
    description = (run / "config.yaml").read_text()
    [finished] = workers.run(train, 1, run, corpus, [begun, "training.max_steps=1"])
    assert "has finished step 2, beyond training.max_steps=1; raise" in finished.said
    assert (run / "config.yaml").read_text() == description


@pytest.mark.parametrize("name", ["DP2 sharded optimizer, overlap", "TP2 SP"])
def test_saving_in_the_background_changes_nothing(workers: WorkerPool, uninterrupted, corpus, tmp_path, name):
    processes, layout = LAYOUTS[name]
    settings = [*layout, *_EVERY_3, *_DROPOUT]
    folder, whole = uninterrupted(processes, *settings)
    background = [*settings, "checkpoint.async_save=true"]
    workers.run(train, processes, tmp_path, corpus, background, crash_after=5)
    resumed = workers.run(train, processes, tmp_path, corpus, background)
    assert "resumed from step_00000003" in resumed[0].said
    assert [outcome.tensors for outcome in resumed] == [outcome.tensors for outcome in whole]
    for step in (3, 6, 8):
        assert trainer_file(tmp_path, step) == trainer_file(folder, step)


def _damage(checkpoint: Path) -> str:
    """Change one byte of a checkpoint's largest file; returns the file's name."""
    path = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def test_a_damaged_checkpoint_is_skipped_with_its_reason(workers: WorkerPool, uninterrupted, corpus, tmp_path):
    processes, layout = LAYOUTS["DP2 sharded optimizer, overlap"]
    settings = [*layout, *_EVERY_3, *_DROPOUT]
    _, whole = uninterrupted(processes, *settings)
    workers.run(train, processes, tmp_path, corpus, settings, crash_after=7)
    name = _damage(tmp_path / "checkpoints/step_00000006")
    (tmp_path / "checkpoints/step_00000007").mkdir()  # and one that is hardly there
    resumed = workers.run(train, processes, tmp_path, corpus, settings)
    lines = [line for line in resumed[0].said.splitlines() if line.startswith(("step_", "resumed"))]
    assert lines[0].startswith("step_00000007 skipped: ")
    assert lines[1].startswith("step_00000006 skipped: ")
    assert name in lines[1]
    assert lines[2] == "resumed from step_00000003, 12 samples in"
    assert [outcome.tensors for outcome in resumed] == [outcome.tensors for outcome in whole]
