"""A short run of the example; its own docstring has the command of the long one."""

import re
import subprocess
import sys
from pathlib import Path

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples/fault_tolerance/kill_and_resume.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_EXAMPLE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def test_two_kills(tmp_path):
    result = run("--kills", "2", "--async-save", "--forked", "--work-dir", str(tmp_path / "work"))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if re.match(r" +\d+  \d+\.\d\d s", line)]
    assert len(rows) >= 2
    assert any("  saving  " in row and ".partial" in row for row in rows)
    assert "DIFFER" not in result.stdout
    assert (
        "final checkpoint: 27 tensors of weights, 54 of the optimizer, the trainer's state: bitwise equal"
        in result.stdout
    )
    assert "metrics.jsonl: each step once, losses equal" in result.stdout


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    result = run("--work-dir", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == f"error: --work-dir {tmp_path} is not empty; name another\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
