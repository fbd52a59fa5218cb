"""`checkpoint.export_hf_every`: what is exported when, what is kept for it, and what is left of one that is ended."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.synthetic import tiny_corpus
from tests.training.runs import VOCAB, configure, train
from tests.training.test_best_model import kept
from tests.training.test_callbacks import Then
from tests.workers import WorkerPool
from vishwamai_mp.config import ConfigError
from vishwamai_mp.conversion.source import open_source
from vishwamai_mp.conversion.to_hf import ExportOptions, export_folder
from vishwamai_mp.training.callbacks import HuggingFaceExport, hugging_face_export
from vishwamai_mp.training.loop import Trainer

_EVERY = ["checkpoint.save_every=2", "checkpoint.export_hf_every=2", "checkpoint.keep_last=1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), VOCAB, 8000, seed=1)


def pause(after: int, trainer: Trainer, notes: list[Any]) -> None:
    def stop(trainer: Trainer) -> None:
        if trainer.state.step == after:
            trainer.stop_reason, trainer.goes_on_later = "signal", True

    trainer.callbacks.insert(0, Then(stop))


def test_a_run_exports_goes_on_after_a_signal_and_waits_at_its_end(workers: WorkerPool, corpus, tmp_path) -> None:
    settings = [*_EVERY, "training.max_steps=4", "checkpoint.async_save=true"]
    [first] = workers.run(train, 1, tmp_path, corpus, settings, prepare=partial(pause, 3))
    assert first.state["step"] == 3
    assert "the export of step 2 to a Hugging Face folder was ended" in first.said
    assert list((tmp_path / "hf").iterdir()) == []
    assert kept(tmp_path) == [2, 3]  # 2 waits for its export
    outcomes = workers.run(train, 2, tmp_path, corpus, settings)
    assert f"Hugging Face folder: {tmp_path}/hf/step_00000004" in outcomes[0].said
    assert "is not exported" not in outcomes[0].said
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["step_00000002", "step_00000004"]
    assert kept(tmp_path) == [4]
    export_folder(open_source(tmp_path), tmp_path / "by-hand", ExportOptions())
    for path in (tmp_path / "by-hand").iterdir():
        assert (tmp_path / "hf/step_00000004" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "hf/step_00000002/config.json").is_file()


def test_what_waits_what_is_left_out_and_what_fails(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processes that do nothing but end as they are told."""
    said: list[str] = []
    started: list[tuple[str, Any]] = []

    def start(checkpoint: Path, folder: Path, messages: Any) -> Any:
        code = "import sys; sys.exit(sys.stdin.readline().strip() or 'error: told to end')"
        process = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stderr=messages)
        started.append((folder.name, process))
        return process

    def end(reason: str) -> None:
        process = started[-1][1]
        process.stdin.write(f"{reason}\n".encode())
        process.stdin.close()
        process.wait()

    monkeypatch.setattr(hugging_face_export, "start_export", start)
    config = configure(tmp_path, corpus, [*_EVERY, "training.max_steps=20"])
    checkpoints = SimpleNamespace(
        root=tmp_path / "checkpoints", saved_step=None, held=set(), delete_old=lambda best: None
    )
    state = SimpleNamespace(step=0, best_step=None)
    trainer: Any = SimpleNamespace(
        config=config, runtime=SimpleNamespace(rank=0), folder=tmp_path, checkpoints=checkpoints, state=state,
        stop_reason=None, goes_on_later=False, say=said.append,
    )  # fmt: skip
    export = HuggingFaceExport(config)
    export.on_train_begin(trainer)

    def step(number: int, saved: int | None = None) -> None:
        state.step, checkpoints.saved_step = number, saved
        export.on_step_end(trainer, {})

    step(2)
    assert (started, checkpoints.held) == ([], {2})  # it is still being saved
    step(3, saved=2)
    assert [name for name, _ in started] == ["step_00000002"]
    step(4, saved=4)
    assert (len(started), checkpoints.held) == (1, {2, 4})
    step(6, saved=6)
    assert (len(started), checkpoints.held) == (1, {2, 6})
    assert said == [
        "step 4 is not exported to a Hugging Face folder: an export takes longer than checkpoint.export_hf_every=2"
        " steps; raise it"
    ]
    end("error: no space left on the disk")
    step(7, saved=6)
    assert said[1:] == ["step 2 is not exported to a Hugging Face folder: no space left on the disk"]
    assert ([name for name, _ in started], checkpoints.held) == (["step_00000002", "step_00000006"], {6})
    trainer.goes_on_later = True
    export.on_train_end(trainer)
    assert started[-1][1].returncode is not None
    assert said[2:] == ["the export of step 6 to a Hugging Face folder was ended before it was whole"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["checkpoint.save_every=3", "checkpoint.export_hf_every=4"], r"=4 is no multiple .*set .*export_hf_every=6$"),
        (["checkpoint.export_hf_every=4"], r"; set checkpoint\.save_every=4$"),
        (
            [*_EVERY, "model.norm_position=post"],
            r"^checkpoint\.export_hf_every=2: .*model\.norm_position.*; leave it out$",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_at_the_start(corpus, tmp_path, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        HuggingFaceExport(configure(tmp_path, corpus, settings))
