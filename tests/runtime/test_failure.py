"""A failing job of real processes prints one error, and ends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parents[2]
# The file is loaded by its path: importing the room would import megatron-core in each process, for seconds.
_PROGRAM = f"""
import importlib.util, os, sys, time
from vishwamai_mp.config import UserError
spec = importlib.util.spec_from_file_location("failure", {str(_REPOSITORY / "vishwamai_mp/runtime/failure.py")!r})
failure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(failure)
case, rank = sys.argv[1], os.environ.get("RANK", "0")

def main():
    if case == "user" and rank == "1":
        raise UserError("data.train=x: no such file; give a prefix")
    if case == "defect" and rank == "1":
        raise RuntimeError("a defect of ours")
    if case == "full" and rank == "1":
        open("/dev/full", "wb", buffering=0).write(b"x")  # the error names no file
    if case == "all":
        raise RuntimeError(f"seen on rank {{rank}}")
    if case in ("silent", "gone"):
        import datetime, signal
        import torch
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # as in training
        import torch.distributed as dist
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=15))
        dist.barrier()
        if rank == "1":
            if case == "gone":
                os.kill(os.getpid(), 9)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(60)  # stopped, swapped out, or in an endless loop
        dist.all_reduce(torch.zeros(1))
    if case == "code":
        return 3
    if case in ("user", "full", "defect") and "RANK" in os.environ:
        time.sleep(60)  # as in a collective that a dead peer never answers
    if case == "alone":
        raise UserError("data.train=x: no such file; give a prefix")

failure.run_distributed_program(main)
"""


def _run(tmp_path, case, processes):
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *launcher, str(program), case],
        env={**environment, "PYTHONPATH": path, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.parametrize(
    ("case", "line", "kind"),
    [
        ("user", "error: data.train=x: no such file; give a prefix", "UserError"),
        ("full", "error: no space left on the disk that the output is written to", "OSError"),
    ],
)
def test_what_its_user_can_mend_is_one_line(tmp_path, case, line, kind):
    result = _run(tmp_path, case, 2)
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("error")] == [line]
    assert kind not in result.stderr  # no traceback of ours beside torchrun's own


def test_a_defect_shows_one_traceback_with_its_rank(tmp_path):
    result = _run(tmp_path, "defect", 2)
    assert result.returncode == 1
    assert result.stderr.count("error on rank 1:") == 1
    assert result.stderr.count("RuntimeError: a defect of ours") == 1
    assert "error on rank 0:" not in result.stderr


def test_only_the_first_of_many_reports(tmp_path):
    result = _run(tmp_path, "all", 2)
    assert result.returncode == 1
    assert result.stderr.count("RuntimeError: seen on rank") == 1


@pytest.mark.parametrize(("case", "cause"), [("silent", "Timed out"), ("gone", "closed by peer|reset by peer")])
def test_a_rank_that_waited_in_vain_names_the_silent_one(tmp_path, case, cause):
    result = _run(tmp_path, case, 3)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert re.match(rf"error: rank [02] waited for other ranks in vain: .*({cause})", line)
    assert "No word within 3 s from rank 1: dead, stopped, hung or still computing. The fault is there" in result.stderr
    assert "error on rank" not in result.stderr


@pytest.mark.parametrize(
    ("case", "code", "stderr"),
    [("alone", 1, "error: data.train=x: no such file; give a prefix\n"), ("nothing", 0, ""), ("code", 3, "")],
)
def test_one_process_alone(tmp_path, case, code, stderr):
    result = _run(tmp_path, case, 0)
    assert (result.returncode, result.stderr) == (code, stderr)
