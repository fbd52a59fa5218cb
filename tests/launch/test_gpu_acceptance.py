"""launch/gpu_acceptance.sh: its plan by a GPU's rules, and what makes it refuse a machine."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from vishwamai_mp.launch.gpu_acceptance import (
    Acceptance,
    Verdict,
    compare_losses,
    compare_speed,
    component_trials,
    layouts,
    speed_trials,
    write_results,
)

_PROGRAM = Path(__file__).resolve().parents[2] / "launch" / "gpu_acceptance.sh"


def _run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "HOME": "/", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", str(_PROGRAM), *arguments], capture_output=True, text=True, env=environment)


def test_the_plan_runs_in_simulation(tmp_path):
    run = _run("--work-dir", str(tmp_path), "--simulate", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "acceptance.json").read_text())
    assert not found["trust"]  # a simulation says nothing about a machine
    states = {verdict["check"]: verdict["state"] for verdict in found["verdicts"]}
    assert [name for name, state in states.items() if state == "passed"] == [
        *(f"layout: {trial.name}" for trial in [*layouts(2), *component_trials(2)]),
        *(f"speed: {trial.name}" for trial in speed_trials(2)),
    ]
    assert "simulated" in (tmp_path / "acceptance.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--simulate", "0"], "--simulate 0: use a number"), ([], "torch sees no GPU here")]
)
def test_a_mistake_is_a_line(tmp_path, arguments, message):
    run = _run("--work-dir", str(tmp_path), *arguments)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_every_trial_is_possible(tmp_path, gpus):
    acceptance = Acceptance(tmp_path, gpus)
    for trial in [*layouts(gpus), *component_trials(gpus), *speed_trials(gpus)]:
        assert trial.gpus <= gpus
        acceptance.config(trial)


@pytest.mark.parametrize(
    ("losses", "state"),
    [([9.0, 8.0], "passed"), ([9.01, 8.0], "passed"), ([9.1, 8.0], "failed"), ([9.0], "failed"), ([], "failed"),
     ([9.0, math.nan], "failed")],
)  # fmt: skip
def test_losses_that_differ_fail(losses, state):
    assert compare_losses("layout", losses, [9.0, 8.0], 5e-3).state == state


def test_a_slow_or_hungry_machine_fails(tmp_path):
    trial = speed_trials(8)[0]
    config = Acceptance(tmp_path, 8).config(trial)
    usual = compare_speed("", {"memory_gib": 5.0, "tokens_per_second": 1e7}, config, 8, "NVIDIA H100 80GB HBM3")
    assert usual.state == "passed"
    planned = usual.figures["planned_tokens_per_second"], usual.figures["planned_memory_gib"]
    slow = {"memory_gib": 5.0, "tokens_per_second": 0.4 * planned[0]}
    hungry = {"memory_gib": 1.2 * planned[1] + 1, "tokens_per_second": planned[0]}
    for record in (slow, hungry):
        assert compare_speed("", record, config, 8, "NVIDIA H100 80GB HBM3").state == "failed"
    unknown = compare_speed("", slow, config, 8, "Some Other GPU")
    assert (unknown.state, "is not known to planning" in unknown.says) == ("passed", True)


@pytest.mark.parametrize(("state", "trust"), [("passed", True), ("failed", False)])
def test_one_failure_is_enough(tmp_path, state, trust):
    verdicts = [Verdict("layout: one GPU", "passed", "as it should be"), Verdict("FP8 operands", state, "3 <codes>")]
    assert write_results(tmp_path, verdicts, 2, simulated=False) is trust
    assert json.loads((tmp_path / "acceptance.json").read_text())["trust"] is trust
    assert "3 &lt;codes&gt;" in (tmp_path / "acceptance.html").read_text()
