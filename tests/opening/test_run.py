"""From a path to a run and its configuration, without a model."""

import subprocess
import sys
from pathlib import Path

import pytest

from vishwamai_mp.config import UserError, load_config, resolve, to_yaml
from vishwamai_mp.opening import RunFolder, find_run


def run_of(folder: Path, *overrides: str) -> RunFolder:
    trained = resolve(load_config("tiny", overrides))
    (folder / "config.yaml").write_text(to_yaml(trained))
    return RunFolder(folder, folder / "checkpoints/step_00000900")


def test_settings_of_training_alone_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """Steps, evaluations and profiles of the run, whatever they were; a cache whose segments are long."""
    overrides = ["training.max_steps=900", "training.evaluate_every=5", "checkpoint.load_best=true"]
    overrides += ["logging.profile_steps=[800,801]", "cache.enabled=true", "cache.segment_length=64"]
    found = run_of(tmp_path, *overrides).answering()
    trained = resolve(load_config("tiny", overrides))
    assert (found.model, found.cache) == (trained.model, trained.cache)


def test_a_layout_of_training_does_not_either(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("sequence_parallel: false", "sequence_parallel: true"))
    assert not run.answering().parallel.sequence_parallel
    with pytest.raises(UserError, match=r"parallel\.sequence_parallel has no use in generation"):
        run.answering(["parallel.sequence_parallel=true"])


def test_settings_of_training_alone_are_refused_for_answering(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    for setting in ("training.max_steps=3", "optimizer.learning_rate=1", "checkpoint.load=x", "logging.report_to=[]"):
        with pytest.raises(UserError, match=rf"^{setting.partition('=')[0]} has no use in generation; leave it out$"):
            run.answering([setting])
    assert run.answering(["training.threads=1"]).training.threads == 1


def test_the_run_folders_tokenizer_unless_another_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path, "data.tokenizer=gone.model")
    assert run.answering().data.tokenizer == "gone.model"
    (tmp_path / "tokenizer.model").write_bytes(b"")
    for config in (run.answering, run.trained):
        assert config().data.tokenizer == str(tmp_path / "tokenizer.model")
        assert config(["data.tokenizer=other.model"]).data.tokenizer == "other.model"


def test_code_that_a_run_names_is_imported_only_when_the_user_names_it_too(tmp_path: Path) -> None:
    own, marker = "model.attention=strange:Attention", tmp_path / "imported"
    (tmp_path / "strange.py").write_text(f"open({str(marker)!r}, 'w')")
    run = run_of(tmp_path, own, "training.loss=strange:loss")
    with pytest.raises(UserError, match=r"config\.yaml names code of its own.*if you trust model\.attention=strange:A"):
        run.answering()
    assert run.answering([own]).model.attention == "strange:Attention"  # what is training's has no part in answering
    with pytest.raises(UserError, match=r"if you trust training\.loss=strange:loss, say so"):
        run.trained([own])
    assert run.trained([own, "training.loss=strange:loss"]).training.loss == "strange:loss"
    assert not marker.exists()


def test_a_hugging_face_folder_is_told_how_it_becomes_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        find_run(tmp_path)
    assert f"convert_checkpoint.py from-hf --load {tmp_path} --output" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a checkpoint nor a folder that has one"):
        find_run(tmp_path / "nothing")


def test_it_needs_no_megatron_core() -> None:
    """Mistakes on the command line are told before seconds of imports."""
    code = (
        "import sys, vishwamai_mp.opening; assert not [m for m in sys.modules if m.startswith(('megatron', 'torch'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
