"""The program that torchrun starts: what it does with bad input, and with a signal."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.synthetic import tiny_corpus, write_corpus
from tests.workers import WorkerPool
from vishwamai_mp import pretrain
from vishwamai_mp.config import UserError
from vishwamai_mp.data.tokenizer_training import train_tokenizer

_REPOSITORY = Path(__file__).resolve().parents[1]
_RECIPE = """\
model: {hidden_size: 32, num_layers: 2, num_attention_heads: 4, vocab_size: 250, max_position_embeddings: 64}
precision: fp32
training: {sequence_length: 32, micro_batch_size: 2, global_batch_size: 8, max_steps: 3, threads: 1}
logging: {report_to: [], hardware_peak_tflops: 1}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), 250, 6000, seed=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("tokenizer") / "spm"
    return train_tokenizer(["the quick brown fox jumps over the lazy dog " * 40], 380, prefix).path


@pytest.fixture
def recipe(tmp_path, corpus) -> list[str]:
    """Arguments of a small run into `tmp_path/run`."""
    path = tmp_path / "recipe.yaml"
    path.write_text(_RECIPE)
    return ["--config", str(path), f"training.output_dir={tmp_path / 'run'}", f"data.train={corpus}"]


def attempt(arguments: list[str]) -> str:
    """What the program says about its input; empty where it has nothing to say."""
    try:
        pretrain.main(arguments)
    except UserError as error:
        return str(error)
    return ""


def empty(folder: Path) -> str:
    for suffix in (".bin", ".idx"):
        (folder / f"empty{suffix}").touch()
    return f"data.train={folder / 'empty'}"


def of_a_larger_vocabulary(folder: Path) -> str:
    return f"data.train={write_corpus(folder / 'large', [[1, 2, 251, 0]] * 200)}"


def too_little(folder: Path) -> str:
    return f"data.train={write_corpus(folder / 'little', [[1, 2, 0]] * 5)}"


# name: (processes, overrides or a function of a folder, parts of the message)
BAD: dict[str, tuple[int, list[str | Callable[[Path], str]], list[str]]] = {
    "missing data": (2, ["data.train=nowhere/corpus"], ["nowhere/corpus"]),
    "no data": (1, ["data.train=null"], ["data.train is not set"]),
    "empty data": (2, [empty], ["empty"]),
    "data of another vocabulary": (2, [of_a_larger_vocabulary], ["token 251", "model.vocab_size=250"]),
    "too little data": (2, [too_little], ["little has 15 tokens", "training.sequence_length"]),
    "missing tokenizer": (2, ["data.tokenizer=nowhere.model"], ["nowhere.model", "tools/train_tokenizer.py"]),
    "world size": (1, ["parallel.tensor_model_parallel_size=2"], ["1 process ", "tensor 2", "multiple of 2"]),
    "batch": (2, ["training.micro_batch_size=3"], ["training.global_batch_size=8", "not a multiple"]),
    "unknown key": (1, ["training.max_step=3"], ["training.max_step", "training.max_steps"]),
    "wrong type": (1, ["training.max_steps=many"], ["training.max_steps", "many"]),
    "unwritable folder": (2, ["training.output_dir=/proc/run"], ["training.output_dir=/proc/run"]),
    "missing checkpoint": (2, ["checkpoint.load=nowhere"], ["nowhere"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_on_every_rank(workers: WorkerPool, recipe, tmp_path, name):
    processes, changes, parts = BAD[name]
    overrides = [change if isinstance(change, str) else change(tmp_path) for change in changes]
    messages = workers.run(attempt, processes, [*recipe, *overrides])
    assert len(set(messages)) == 1
    for part in parts:
        assert part in messages[0]
    assert "\n" not in messages[0]
    assert not any((tmp_path / "run").rglob("*"))  # nothing half-written


def test_a_vocabulary_that_does_not_match_the_tokenizer(workers: WorkerPool, recipe, tokenizer, tmp_path):
    messages = workers.run(attempt, 2, [*recipe, f"data.tokenizer={tokenizer}"])
    assert set(messages) == {
        f"model.vocab_size=250 but the tokenizer {tokenizer} has 380 tokens; set model.vocab_size=380"
    }
    assert not (tmp_path / "run").exists()


def test_the_same_recipe_without_mistakes_trains(workers: WorkerPool, recipe, tmp_path):
    """Or the tests above would show nothing."""
    assert workers.run(attempt, 2, recipe) == ["", ""]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000003\n"


def start(arguments: list[str], launcher: list[str], log: Path) -> subprocess.Popen:
    """The real program. `log` gets both of its streams."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(log.parent)}
    command = [sys.executable, *launcher, "-m", "vishwamai_mp.pretrain", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error")]


def test_the_program_exits_with_one_line_and_no_traceback(recipe, tmp_path):
    """Alone: a mistake in the command line is found before torch is imported."""
    log = tmp_path / "log"
    assert start([*recipe, "training.max_step=3"], [], log).wait(120) == 1
    assert "training.max_steps" in log.read_text()
    assert error_lines(log.read_text()) == log.read_text().splitlines()
    assert len(log.read_text().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_job_under_torchrun_exits_with_one_line(recipe, tmp_path):
    log = tmp_path / "log"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert start([*recipe, "data.train=nowhere/corpus"], launcher, log).wait(180) == 1
    [line] = error_lines(log.read_text())
    assert "nowhere/corpus" in line
    assert "UserError" not in log.read_text()  # no traceback of ours beside torchrun's
    assert not (tmp_path / "run").exists()


def test_sigterm_saves_and_exits_with_0(recipe, tmp_path):
    log = tmp_path / "log"
    process = start([*recipe, "training.max_steps=100000"], [], log)
    try:
        while "step 2/" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
    [last] = [line for line in log.read_text().splitlines() if line.startswith("stopped after step")]
    step = int(last.split("step ")[1].split(":")[0])
    assert f"stopped after step {step}: signal SIGTERM; the same command continues" == last
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step_{step:08d}\n"
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == step
