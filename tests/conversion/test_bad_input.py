"""Whatever is wrong with a folder or a checkpoint is said in one line, and nothing is left that looks like a result."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion import models
from tests.conversion.test_third_party import write_folder
from tests.workers import WorkerPool
from vishwamai_mp.config import UserError
from vishwamai_mp.conversion import journal
from vishwamai_mp.conversion.dtypes import FP16
from vishwamai_mp.conversion.folder import open_folder
from vishwamai_mp.conversion.from_hf import import_folder
from vishwamai_mp.data.byte_level_training import train_byte_level

Q = "model.layers.1.self_attn.q_proj.weight"
LAST = "model-00006-of-00006.safetensors"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_folder(tmp_path / "hf", shard="1GB")
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_folder(tmp_path / "hf", shard="70KB")
    assert (tmp_path / "hf" / LAST).exists()
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def saved(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, not to be changed."""
    run = tmp_path_factory.mktemp("saved") / "run"
    workers.run(models.save_run, 1, run, [])
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_missing_tensor_is_named_with_the_nearest(hf: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_prj.weight"] = tensors.pop(Q)

    change(hf / "model.safetensors", rename)
    said = refusal(lambda: models.import_(hf, tmp_path / "out"))
    assert said.endswith(f"lacks {Q} (nearest: model.layers.1.self_attn.q_prj.weight)")


def test_extra_tensors_are_named(hf: Path, tmp_path: Path) -> None:
    change(hf / "model.safetensors", lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(48)}))
    said = refusal(lambda: models.import_(hf, tmp_path / "out"))
    assert "has model.layers.1.self_attn.q_proj.bias, which its model has not" in said


def test_a_misshapen_tensor_is_named(hf: Path, tmp_path: Path) -> None:
    change(hf / "model.safetensors", lambda t: t.update({Q: torch.ones(48, 47)}))
    said = refusal(lambda: models.import_(hf, tmp_path / "out"))
    assert f"{Q} has the shape [48, 47], config.json says [48, 48]" in said


def test_an_integer_weight_is_refused(hf: Path, tmp_path: Path) -> None:
    change(hf / "model.safetensors", lambda t: t.update({Q: torch.ones(48, 48, dtype=torch.int32)}))
    assert f"{Q} is stored as I32" in refusal(lambda: models.import_(hf, tmp_path / "out"))


@pytest.mark.parametrize("kept", [-100, 1000, 4])
def test_a_truncated_file_is_refused(hf: Path, tmp_path: Path, kept: int) -> None:
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    said = refusal(lambda: models.import_(hf, tmp_path / "out"))
    assert str(file) in said
    assert "is truncated" in said or "no whole safetensors file" in said or "no safetensors file" in said


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda places: places.update({Q: LAST}), "q_proj.weight"),
        (lambda places: places.update({"x": LAST}), f"says that x is in {LAST}, which does not have it"),
        (lambda places: places.pop("model.norm.weight"), "has model.norm.weight, which model.safetensors.index.json"),
        (lambda places: places.update({Q: "../hf/model.safetensors"}), "which is not a file of the folder"),
        (lambda places: places.update({Q: "model-9.safetensors"}), "names model-9.safetensors, which is missing"),
        (lambda places: places.update({Q: "a" * 300}), f"names {'a' * 300}, which is missing"),
    ],
)
def test_an_index_that_lies_is_refused(
    sharded: Path, tmp_path: Path, lie: Callable[[dict[str, str]], object], message: str
) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    lie(index["weight_map"])
    path.write_text(json.dumps(index))
    assert message in refusal(lambda: models.import_(sharded, tmp_path / "out"))


def test_a_file_beside_an_index_of_others_is_refused(sharded: Path) -> None:
    """transformers would read it instead of them."""
    first = next(path for path in sharded.glob("*.safetensors"))
    (sharded / "model.safetensors").write_bytes(first.read_bytes())
    said = refusal(lambda: open_folder(sharded))
    assert "has model.safetensors, and model.safetensors.index.json, which names other files" in said


def test_ends_of_texts_that_give_way_to_others_are_told(hf: Path, tmp_path: Path) -> None:
    described = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**described, "eos_token_id": [5, 7]}))
    (hf / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    notes = "\n".join(models.import_(hf, tmp_path / "run"))
    assert "eos_token_id=[5, 7] of config.json gives way to [7, 9] of generation_config.json" in notes


def test_pickles_are_refused_with_the_reason(hf: Path, tmp_path: Path) -> None:
    (hf / "model.safetensors").unlink()
    (hf / "pytorch_model.bin").write_bytes(b"")
    said = refusal(lambda: models.import_(hf, tmp_path / "out"))
    assert "pickles (pytorch_model.bin), and unpickling a file can run any program in it" in said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model", "tokenizer.json"])
def test_a_file_that_git_lfs_has_not_downloaded_is_named(hf: Path, tmp_path: Path, name: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 2471645608\n"
    (hf / name).write_text(pointer)
    said = refusal(lambda: models.import_(hf, tmp_path / "out"))
    assert said.startswith(f"{hf / name} is a git-lfs pointer")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_kind_does_not_stop_the_weights(hf: Path, tmp_path: Path) -> None:
    (hf / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    notes = models.import_(hf, tmp_path / "tiktoken")
    assert "its tokenizer.model is a tiktoken file" in notes[0]
    assert models.step_zero(tmp_path / "tiktoken").is_dir()
    assert not (tmp_path / "tiktoken/tokenizer.model").exists()
    (hf / "tokenizer.model").write_bytes(b"\x0a\x0e")
    assert "is not a whole SentencePiece model" in refusal(lambda: models.import_(hf, tmp_path / "damaged"))
    assert not (tmp_path / "damaged").exists()


def test_code_that_a_tokenizer_names_is_left_out_and_said(hf: Path, tmp_path: Path) -> None:
    train_byte_level([Path(__file__).read_text()] * 3, 300, hf / "tokenizer")
    settings = {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own", "eos_token": "</s>"}
    (hf / "tokenizer_config.json").write_text(json.dumps(settings))
    (hf / "code.py").write_text("raise SystemExit(3)")
    notes = models.import_(hf, tmp_path / "run")
    assert any("names Python code (auto_map), which is not run and left out" in note for note in notes)
    assert any("left behind: code.py" in note for note in notes)
    written = json.loads((tmp_path / "run/tokenizer_config.json").read_text())
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}


def test_adapters_are_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds adapters of PEFT, not a model" in refusal(lambda: models.import_(tmp_path, tmp_path / "out"))


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert "config.json is missing" in refusal(lambda: models.import_(tmp_path, tmp_path / "out"))
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(lambda: models.import_(tmp_path, tmp_path / "out"))
    (tmp_path / "config.json").write_text("[]")
    assert "holds no JSON object" in refusal(lambda: models.import_(tmp_path, tmp_path / "out"))
    assert "is a Hugging Face folder; make a checkpoint" in refusal(lambda: models.export(tmp_path, tmp_path / "out"))


def test_a_used_output_folder_is_refused(run: Path, hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    for action in (models.export, models.import_):
        said = refusal(partial(action, run if action is models.export else hf, tmp_path / "out"))
        assert said.endswith("out is not empty; name a new folder or empty it")
    assert (tmp_path / "out/mine.txt").read_text() == "precious"


def test_a_disk_that_is_too_small_is_refused_before_it_is_full(run: Path, tmp_path: Path) -> None:
    free = mock.Mock(free=1000)
    with mock.patch.object(journal.shutil, "disk_usage", return_value=free):
        assert "needs 0.0 GB, the disk has 0.0 GB free" in refusal(lambda: models.export(run, tmp_path / "out"))


def test_a_disk_that_fills_up_is_one_line_and_the_next_run_continues(run: Path, hf: Path, tmp_path: Path) -> None:
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with mock.patch.object(os, "fsync", full):
        said = refusal(lambda: models.export(run, tmp_path / "out", max_shard_size=50_000))
    assert "no space left on the disk; make room and run the same command again" in said
    models.export(run, tmp_path / "out", max_shard_size=50_000)
    models.export(run, tmp_path / "whole", max_shard_size=50_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    step = models.step_zero(run)
    file = max(step.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[2000] ^= 255  # in the numbers of its first tensor
    file.write_bytes(content)
    said = refusal(lambda: models.export(run, tmp_path / "out"))
    assert f"{file.name} is damaged: the checksum of " in said
    file.write_bytes(content[:-100])
    assert "bytes of" in refusal(lambda: models.export(step, tmp_path / "out"))


def test_a_checkpoint_with_other_tensors_is_refused(run: Path, tmp_path: Path) -> None:
    path = models.step_zero(run) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"]["decoder.layers.1.mlp.linear_fc9.weight"] = manifest["tensors"].pop(
        "decoder.layers.1.mlp.linear_fc2.weight"
    )
    path.write_text(json.dumps(manifest))
    said = refusal(lambda: models.export(run, tmp_path / "out"))
    assert said.endswith(
        "lacks decoder.layers.1.mlp.linear_fc2.weight (nearest: decoder.layers.1.mlp.linear_fc9.weight)"
    )


def test_metadata_that_could_run_code_is_refused(run: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch " + str(tmp_path / "ran"),)

    path = models.step_zero(run) / ".metadata"
    size = path.stat().st_size
    path.write_bytes(pickle.dumps(Attack()).ljust(size, b"."))
    assert "not plain checkpoint metadata" in refusal(lambda: models.export(run, tmp_path / "out"))
    assert not (tmp_path / "ran").exists()


def test_numbers_beyond_fp16_are_refused(hf: Path, tmp_path: Path) -> None:
    change(hf / "model.safetensors", lambda t: t[Q][5].fill_(1e5))
    said = refusal(lambda: models.import_(hf, tmp_path / "out", FP16))
    assert f"{Q} has values beyond the range of fp16" in said


def test_weights_that_are_not_finite_are_imported_and_named(hf: Path, tmp_path: Path) -> None:
    file = hf / "model.safetensors"
    tensors = load_file(file)
    tensors[Q][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    tensors["model.norm.weight"][:1] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    *_, warning = import_folder(open_folder(hf), tmp_path / "run", None)
    others = "model.layers.1.self_attn.k_proj.weight + model.layers.1.self_attn.v_proj.weight"
    assert "warning: 4 weights are NaN or infinite" in warning
    assert f"3 of {Q} + {others}, 1 of model.norm.weight;" in warning
    tensors[Q][0, :3] = 1
    tensors["model.norm.weight"][:1] = 1
    save_file(tensors, file, {"format": "pt"})
    assert not any("NaN" in note for note in import_folder(open_folder(hf), tmp_path / "finite", None))
