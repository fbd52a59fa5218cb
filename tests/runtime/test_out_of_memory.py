"""Out of memory: a job of real processes says what to change, and ends."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.synthetic import tiny_corpus
from vishwamai_mp.config import UserError, load_config, resolve
from vishwamai_mp.runtime import out_of_memory
from vishwamai_mp.runtime.out_of_memory import advice_when_out_of_memory, check_memory, is_out_of_memory
from vishwamai_mp.training import loop

_REPOSITORY = Path(__file__).resolve().parents[2]
# When it begins to train, rank 1 may grow by a little; rank 0 then waits for it in a collective.
_PROGRAM = """
import os, resource, sys
from pathlib import Path
from vishwamai_mp import pretrain
from vishwamai_mp.runtime.failure import run_distributed_program
from vishwamai_mp.training.loop import Trainer

train = Trainer.train

def train_with_little(trainer):
    if os.environ["RANK"] == "1":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + (400 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return train(trainer)

Trainer.train = train_with_little
run_distributed_program(lambda: pretrain.main(sys.argv[1:]))
"""


def test_a_rank_without_memory_ends_the_job_with_advice(tmp_path):
    """Real allocations: the micro-batch's logits alone are 512 MiB."""
    (tmp_path / "program.py").write_text(_PROGRAM)
    corpus = tiny_corpus(tmp_path / "corpus", 250, 8000, seed=1)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(tmp_path / "program.py"), "--config", "tiny", f"data.train={corpus}", "data.split=100,0,0"),
            *("model.vocab_size=65536", "training.micro_batch_size=8", "training.global_batch_size=16"),
            *("logging.hardware_peak_tflops=1", "training.evaluate_every=null"),
            f"training.output_dir={tmp_path / 'run'}",
        ],
        env={**os.environ, "PYTHONPATH": str(_REPOSITORY), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    (first,) = [index for index, line in enumerate(lines) if line.startswith("error")]
    assert lines[first].startswith(
        "error: out of memory on rank 1 (DefaultCPUAllocator: can't allocate memory: you tried to"
    )
    assert "this run needs about " in lines[first]
    steps = [line.split()[0] for line in lines[first + 1 :] if "saves about" in line]
    assert steps[:2] == ["training.recompute=selective", "training.micro_batch_size=4"]
    assert "RuntimeError" not in "".join(lines[first:])  # no traceback of ours beside torchrun's own


def too_much_for_torch() -> None:
    torch.empty(2**55)


def too_much_for_python() -> None:
    bytearray(2**60)


def too_much_for_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")


@pytest.mark.parametrize("allocate", [too_much_for_torch, too_much_for_python, too_much_for_a_gpu])
def test_every_allocators_error_becomes_advice(allocate: Callable[[], None], monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    message = r"out of memory \(.+\); this run needs about .+ per process"
    with (
        pytest.raises(UserError, match=message) as error,
        advice_when_out_of_memory(resolve(load_config("tiny"))),
    ):
        allocate()
    assert "training.recompute=" in str(error.value)
    assert error.value.__cause__ is not None


def test_what_no_memory_of_this_machine_holds_is_refused_before_it_is_made(monkeypatch, tmp_path):
    """On a CPU nothing raises: the machine stalls, then the kernel kills the process."""
    monkeypatch.setattr(loop, "build_model", lambda *_: pytest.fail("made"))
    config = resolve(load_config("1b", [f"training.output_dir={tmp_path / 'run'}"]), 1)
    monkeypatch.setattr(out_of_memory, "machine_memory", lambda: 24 * 2.0**30)
    with pytest.raises(UserError, match=r"too large for this machine, which has 24.0 GiB of memory and swap") as error:
        loop.Trainer(config, cast(Any, SimpleNamespace(world_size=1, reports=True)), cast(Any, None), [])
    assert "training.micro_batch_size=2 " in str(error.value)
    assert "or a smaller model" in str(error.value)
    monkeypatch.setattr(out_of_memory, "machine_memory", lambda: 40 * 2.0**30)
    assert check_memory(config, 1).startswith("too large for this machine, which has 40.0 GiB")  # activations: a guess
    monkeypatch.setattr(out_of_memory, "machine_memory", lambda: 64 * 2.0**30)
    assert check_memory(config, 1) == ""


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), UserError("out of memory of my own"), OSError("x")])
def test_other_errors_pass(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as found, advice_when_out_of_memory(resolve(load_config("tiny"))):
        raise error
    assert found.value is error
