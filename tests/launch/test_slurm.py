"""The Slurm job script: with programs that stand for Slurm's, and on a real Slurm where one is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parents[2]
_DRILL = _REPOSITORY / "examples/fault_tolerance/slurm_drill.py"
_JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_SUBMIT_DIR": str(_REPOSITORY),
}
# Machines n1 to n3; those in UNFIT fail their checks. What is started, and what the controller is told, is noted.
_SCONTROL = """\
case "$*" in
"show hostnames "*) printf 'n1\\nn2\\nn3\\n' ;;
"show node "*) echo "NodeName=$4 NodeAddr=10.0.0.${4#n} Port=6818" ;;
"show job "*) echo "JobId=77 ExcNodeList=${EXCLUDED:-(null)} PreemptTime=${PREEMPTED:-None}" ;;
*) echo "scontrol $*" >>"$NOTES" ;;
esac
"""
_SRUN = """\
case "$*" in
*preflight*)
    for node in $UNFIT; do
        [[ "$*" != *"--nodelist=$node "* ]] || exit 1
    done ;;
*) echo "srun $* NNODES=$NNODES MASTER=$MASTER_ADDR:$MASTER_PORT" >>"$NOTES"; exit "${ENDS:-0}" ;;
esac
"""


@pytest.fixture
def job(tmp_path):
    """Runs the script as a job; returns its exit status, what it said, and what was noted."""
    for name, text in {"scontrol": _SCONTROL, "srun": _SRUN, "scancel": "", "sleep": ""}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    notes = tmp_path / "notes"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def run(*arguments: str, **environment: str) -> tuple[int, list[str], list[str]]:
        notes.write_text("")
        result = subprocess.run(
            ["bash", str(_REPOSITORY / "launch/slurm.sbatch"), *arguments],
            env={"PATH": path, "NOTES": str(notes), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.stdout == ""
        return result.returncode, result.stderr.splitlines(), notes.read_text().splitlines()

    return run


def test_shellcheck_is_content():
    checker = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert checker, "pip install -c constraints.txt -e '.[dev]'"
    command = [checker, "-x", "launch/slurm.sbatch"]
    result = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == ("", 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SLURM_JOB_ID": ""}, "this is no Slurm job; start it with sbatch, or use torchrun_multi_node.sh"),
        ({"SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is not set though SLURM_JOB_ID is; start it with sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ is not the repository's root; run sbatch there"),
        ({"SLURM_JOB_NUM_NODES": "4"}, "scontrol cannot expand SLURM_JOB_NODELIST=n[1-3]"),
        ({"SPARE_NODES": "3"}, "SPARE_NODES=3: use a number from 0 to 2"),
        ({"SWEEP": "/none"}, "SWEEP=/none needs --array=0-N"),
        ({"SWEEP": "/none", "SLURM_ARRAY_TASK_ID": "0"}, "SWEEP=/none cannot be read"),
        ({"SWEEP": "/dev/null", "SLURM_ARRAY_TASK_ID": "0"}, "SWEEP=/dev/null has 0 lines, none for array member 0"),
        ({"SWEEP": "{sweep}", "SLURM_ARRAY_TASK_ID": "0"}, "line 0 has no training.output_dir"),
    ],
)
def test_a_job_that_cannot_run_says_why_in_a_line(job, tmp_path, change, said):
    (tmp_path / "sweep").write_text("optimizer.learning_rate=1e-3\n")
    change = {name: value.format(sweep=tmp_path / "sweep") for name, value in change.items()}
    status, lines, notes = job(**_JOB | change)
    assert (status, notes) == (1, [])
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]


def test_all_machines_train_at_the_first_ones_address(job):
    status, lines, (started,) = job("--config", "tiny", **_JOB)
    assert (status, lines) == (0, ["slurm: attempt 1 on n1 n2 n3"])
    assert "--nodelist=n1,n2,n3 bash launch/torchrun_multi_node.sh --config tiny " in started
    assert started.endswith("NNODES=3 MASTER=10.0.0.1:20077")


def test_the_launchers_status_is_the_jobs(job):
    assert job("--config", "tiny", **_JOB, ENDS="79")[0] == 79


def test_a_preempted_job_is_queued_again(job):
    assert job(**_JOB, PREEMPTED="2026-11-26T13:42:40")[2][1:] == ["scontrol requeue 77"]


def test_an_unfit_machine_is_named_and_left_out(job):
    status, lines, (started,) = job(**_JOB, UNFIT="n1", SPARE_NODES="1", SLURM_RESTART_COUNT="2")
    assert (status, lines) == (0, ["slurm: unfit: n1", "slurm: attempt 3 on n2 n3"])
    assert "--nodelist=n2,n3 " in started
    assert started.endswith("NNODES=2 MASTER=10.0.0.2:20077")


def test_too_many_unfit_machines_are_excluded(job):
    status, lines, notes = job(**_JOB, UNFIT="n1 n3", SPARE_NODES="1", EXCLUDED="n7")
    assert (status, lines) == (0, ["slurm: unfit: n1 n3", "slurm: queued again, to run without n1 n3"])
    assert notes == [
        "scontrol requeuehold 77",
        "scontrol update JobId=77 ExcNodeList=n7,n1,n3",
        "scontrol release 77",
    ]


def test_a_member_of_a_sweep_has_its_lines_arguments(job, tmp_path):
    sweep = tmp_path / "sweep"
    sweep.write_text("training.output_dir=a\n'training.output_dir=b c' optimizer.learning_rate=1e-3\n")
    _, _, (started,) = job("--config", "tiny", **_JOB, SWEEP=str(sweep), SLURM_ARRAY_TASK_ID="1")
    assert "--config tiny training.output_dir=b c optimizer.learning_rate=1e-3 NNODES" in started


@pytest.mark.skipif(
    os.environ.get("SLURM_DRILL") != "1" or os.geteuid() != 0 or shutil.which("slurmctld") is None,
    reason="needs SLURM_DRILL=1, root, and Debian's slurm-wlm and munge; starts daemons and makes network namespaces",
)
def test_a_real_slurm_queues_a_run_again():
    command = [sys.executable, str(_DRILL), "--only", "warned"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "warned     held" in result.stdout
