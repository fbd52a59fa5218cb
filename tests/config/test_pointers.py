"""What git-lfs leaves in place of a file is named by whatever reads the file, and so are named pipes."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vishwamai_mp.checkpoint.manifest import FileRecord, check_files, read_manifest
from vishwamai_mp.config import UserError, load_config
from vishwamai_mp.config.pointers import is_pointer, refuse_pointer
from vishwamai_mp.data.indexed import check_indexed
from vishwamai_mp.data.json_vocabulary import read_settings
from vishwamai_mp.data.lines import json_records, text_lines
from vishwamai_mp.data.preprocess import preprocess
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.observability.run_folder import read_run
from vishwamai_mp.opening.prompts import PromptTokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(["some words"] * 9, 370, tmp_path_factory.mktemp("tokenizer") / "small").path


def _prompts(path: Path, tokenizer: Path) -> Any:
    path.with_name("tokenizer.model").write_bytes(tokenizer.read_bytes())
    return PromptTokenizer(path.parent, 400)


READERS: dict[str, Callable[[Path, Path], Any]] = {
    **dict.fromkeys(
        ("a.jsonl", "a.txt", "a.parquet", "a.jsonl.gz", "a.jsonl.zst"),
        lambda path, tokenizer: preprocess([path], tokenizer, path.with_name("out")),
    ),
    **dict.fromkeys(("a.yaml", "a.json"), lambda path, _: load_config(path)),
    **dict.fromkeys(("tokenizer.model", "tokenizer.json"), lambda path, _: Tokenizer(path)),
    **dict.fromkeys(("tokenizer_config.json", "chat_template.jinja", "generation_config.json"), _prompts),
    "prompts.txt": lambda path, _: list(text_lines(path)),
    "records.jsonl": lambda path, _: list(json_records(path)),
    "metrics.jsonl": lambda path, _: read_run(path.parent),
    "special_tokens_map.json": lambda path, _: read_settings(path),
    "manifest.json": lambda path, _: read_manifest(path.parent),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_is_named(tmp_path: Path, tokenizer: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        READERS[name](tmp_path / name, tokenizer)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_pointer_for_token_files_is_named(tmp_path: Path, tokenizer: Path, suffix: str) -> None:
    (tmp_path / "a.txt").write_text("some words")
    preprocess([tmp_path / "a.txt"], tokenizer, tmp_path / "a")
    (tmp_path / f"a_text_document.{suffix}").write_text(POINTER)
    with pytest.raises(UserError, match=rf"a_text_document\.{suffix} is a git-lfs pointer"):
        check_indexed(tmp_path / "a_text_document")


def test_a_pointer_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_text(POINTER)
    (problem,) = check_files(tmp_path, {"__0_0.distcp": FileRecord(12345, 0)}, checksums=False)
    assert "git-lfs pointer" in problem


def test_what_only_begins_like_one_is_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(POINTER + "and so on, for longer than any pointer\n" * 40)
    refuse_pointer(tmp_path / "a.txt")


def test_a_pipe_is_not_read_to_find_out(tmp_path):
    """What is read of it is gone; and opening one that nobody writes to waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    assert not is_pointer(tmp_path / "pipe")


@pytest.mark.parametrize(
    "name",
    ["a.yaml", "a.json", "tokenizer.model", "tokenizer.json", "prompts.txt", "records.jsonl", "manifest.json"],
)
def test_a_named_pipe_is_refused(tmp_path: Path, tokenizer: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=(tmp_path / name).write_text, args=("{}",), daemon=True)
    writer.start()  # so that who reads it all the same fails instead of waiting
    with pytest.raises(UserError, match=f"{name} is a named pipe"):
        READERS[name](tmp_path / name, tokenizer)
    reader = os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK)  # lets the writer go
    writer.join()
    os.close(reader)


def test_corpora_come_through_pipes_and_lines_from_the_shell(tmp_path: Path, tokenizer: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    writer = threading.Thread(target=(tmp_path / "a.txt").write_text, args=("some words",), daemon=True)
    writer.start()
    assert preprocess([tmp_path / "a.txt"], tokenizer, tmp_path / "out")
    writer.join()
    reading, writing = os.pipe()
    os.write(writing, b"one\ntwo\n")
    os.close(writing)
    assert list(text_lines(Path(f"/dev/fd/{reading}"))) == ["one", "two"]
    os.close(reading)
