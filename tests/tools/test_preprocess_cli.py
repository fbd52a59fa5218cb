"""The two data tools as a user runs them."""

import contextlib
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vishwamai_mp.data.indexed import check_indexed
from vishwamai_mp.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
LINES = [f"The {i}. of the counted mice sat on mat {i * i}.\n" for i in range(300)]


def run(tool, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus and the tokenizer the tool makes of it."""
    folder = tmp_path_factory.mktemp("cli")
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": line}) + "\n" for line in LINES)
    (folder / "more.txt").write_text("".join(LINES))
    arguments = ("--input", folder / "corpus.jsonl.gz", folder / "more.txt", "--vocab-size", 400)
    done = run("train_tokenizer.py", *arguments, "--output-prefix", folder / "small")
    assert done.returncode == 0, done.stderr
    assert "small.model: 400 tokens" in done.stdout
    return folder


@pytest.mark.parametrize("tool", ["train_tokenizer.py", "preprocess_data.py"])
def test_help_has_an_example(tool):
    done = run(tool, "--help")
    assert done.returncode == 0
    assert f"python tools/{tool} --input" in done.stdout


def test_files_of_several_formats(folder, tmp_path):
    inputs = (folder / "corpus.jsonl.gz", folder / "more.txt")
    tokenizer = ("--tokenizer", folder / "small.model", "--append-eod", "--workers", 2)
    done = run("preprocess_data.py", "--input", *inputs, *tokenizer, "--output-prefix", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    stats = check_indexed(tmp_path / "out_text_document", vocab_size=400)
    assert stats.num_documents == 301
    counts = f"out_text_document: 301 documents, {stats.num_tokens} tokens"
    assert counts in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out_text_document.bin", "out_text_document.idx"]
    again = run("preprocess_data.py", "--input", *inputs, *tokenizer, "--output-prefix", tmp_path / "out")
    assert again.returncode == 0
    assert counts in again.stdout
    assert "out_text_document.bin: made by an earlier run, replaced when this one is done" in again.stderr


def test_one_document_is_warned_of_and_can_be_split(folder, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(LINES[:40]))
    arguments = ("--input", tmp_path / "a.txt", "--tokenizer", folder / "small.model", "--append-bos", "--append-eod")
    done = run("preprocess_data.py", *arguments, "--output-prefix", tmp_path / "one")
    assert "1 document," in done.stdout
    assert "warning: the corpus is one document" in done.stderr
    assert "--split-documents-at blank-lines" in done.stderr
    split = ("--split-documents-at", "blank-lines", "--output-prefix", tmp_path / "many")
    done = run("preprocess_data.py", *arguments, *split)
    assert "40 documents," in done.stdout
    assert "warning" not in done.stderr
    tokenizer = Tokenizer(folder / "small.model")
    tokens = np.fromfile(tmp_path / "many_text_document.bin", np.uint16).tolist()
    expected = [[tokenizer.bos_id, *tokenizer.encode(line.removesuffix("\n")), tokenizer.eod_id] for line in LINES[:40]]
    assert tokens == list(itertools.chain.from_iterable(expected))


def test_skipped_documents_are_named_and_counted(folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + "bad\n" * 12)
    arguments = ("--input", tmp_path / "bad.jsonl", "--output-prefix", tmp_path / "out", "--on-error", "skip")
    done = run("preprocess_data.py", *arguments, "--tokenizer", folder / "small.model")
    assert done.returncode == 0
    assert done.stderr.count("skipped ") == 11  # ten with their place, and one line for the rest
    assert f"skipped {tmp_path}/bad.jsonl:2: not JSON" in done.stderr
    assert "0 documents without text, 12 malformed skipped" in done.stdout


def test_killed_and_run_again_the_same_is_written(folder, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES * 2))
    files = ("--input", tmp_path / "in.jsonl", "--tokenizer", folder / "small.model")
    arguments = (*files, "--dedup", "exact", "--shuffle-documents", "--seed", 3, "--output-prefix")
    done = run("preprocess_data.py", *arguments, tmp_path / "whole")
    assert "--dedup exact: 300 repeated documents dropped (50.0%)" in done.stdout
    assert "documents shuffled by --seed 3" in done.stdout
    command = [sys.executable, "tools/preprocess_data.py", *map(str, arguments), str(tmp_path / "again")]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        while process.poll() is None and not list(tmp_path.glob("again*.partial")):
            time.sleep(0.01)
        process.kill()
    assert run("preprocess_data.py", *arguments, tmp_path / "again").returncode == 0
    for suffix in ("bin", "idx"):
        written = (tmp_path / f"again_text_document.{suffix}").read_bytes()
        assert written == (tmp_path / f"whole_text_document.{suffix}").read_bytes()
    refused = run("preprocess_data.py", *files, "--seed", 3, "--output-prefix", tmp_path / "x")
    assert "--seed is for --shuffle-documents" in refused.stderr


@pytest.mark.parametrize(
    ("tool", "content", "changes", "message"),
    [
        ("preprocess_data.py", "bad\n", {}, r"in.jsonl:1: not JSON: Expecting value at column 1 (--on-error skip"),
        ("preprocess_data.py", "", {}, "in.jsonl:1: the file is empty"),
        ("preprocess_data.py", "{}", {"--tokenizer": "none.model"}, "no tokenizer file none.model"),
        ("preprocess_data.py", "{}", {"--input": "none.jsonl"}, "no input file none.jsonl"),
        ("preprocess_data.py", "{}", {"--output-prefix": "no/out"}, "there is no folder"),
        ("preprocess_data.py", "{}", {"--workers": 0}, "--workers 0: at least 1"),
        ("train_tokenizer.py", "bad\n", {}, r"in.jsonl:1: not JSON: Expecting value at column 1 (--on-error skip"),
        ("train_tokenizer.py", '{"text": "few"}', {}, "--vocab-size 400 is more than this text can fill: at most"),
        ("train_tokenizer.py", '{"text": "few"}', {"--character-coverage": 2}, "--character-coverage 2.0: a share"),
        ("train_tokenizer.py", '{"text": "few"}', {"--threads": 0}, "--threads 0: at least 1"),
        ("train_tokenizer.py", '{"text": ""}', {}, "no text to train a tokenizer on"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder, tmp_path, tool, content, changes, message):
    (tmp_path / "in.jsonl").write_text(content)
    own = {"--tokenizer": folder / "small.model"} if tool == "preprocess_data.py" else {"--vocab-size": 400}
    arguments = {"--input": "in.jsonl", "--output-prefix": "out"} | own | changes
    done = run(tool, *(part for pair in arguments.items() for part in pair), cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(folder, tmp_path, sent, workers):
    os.mkfifo(tmp_path / "in.jsonl")
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", "in.jsonl", "--output-prefix", "out"]
    command += ["--tokenizer", str(folder / "small.model"), "--workers", str(workers)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs' shells ignore it
    with (
        subprocess.Popen(command, start_new_session=True, **options) as process,
        open(tmp_path / "in.jsonl", "w") as pipe,
    ):
        pipe.write("".join(json.dumps({"text": line}) + "\n" for line in LINES * 100))  # over one block
        pipe.flush()
        assert list(tmp_path.glob("*.partial"))
        for _ in range(30):  # a signal between two reads waits for the next one
            if list(tmp_path.glob("*.partial")):  # not noticed yet; an interpreter that is ending dies of a second one
                os.killpg(process.pid, sent)  # as a terminal does, to the workers too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
                break
        else:
            process.kill()
        assert process.stderr
        errors = process.stderr.read()
    assert process.returncode == 128 + sent
    assert errors.strip().endswith("interrupted")
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    wait_for_no_process(process.pid)


def wait_for_no_process(group):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a worker outlives its parent")


def test_workers_follow_a_killed_parent(folder, tmp_path):
    os.mkfifo(tmp_path / "in.jsonl")
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", "in.jsonl", "--output-prefix", "out"]
    command += ["--tokenizer", str(folder / "small.model"), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, start_new_session=True, cwd=tmp_path, env=environment) as process:
        with open(tmp_path / "in.jsonl", "w") as pipe:
            pipe.write("".join(json.dumps({"text": line}) + "\n" for line in LINES * 100))
            pipe.flush()
            process.kill()
        process.wait()
        wait_for_no_process(process.pid)
