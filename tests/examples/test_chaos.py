"""A short run of the chaos suite; its own docstring has the command of the long one."""

import json
import subprocess
import sys
from pathlib import Path

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples/fault_tolerance/chaos.py"


def test_a_kill_a_flipped_bit_and_a_read_only_folder(tmp_path):
    kinds = ["launcher", "flip", "read-only"]
    command = [sys.executable, str(_EXAMPLE), "--kills", "3", "--only", *kinds, "--output", str(tmp_path / "found")]
    command += ["--async-save", "--forked"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["events"] == {
        kind: {"tried": 1, "survived": 1, "lost": 0} for kind in ("launcher", "read-only", "flip")
    }
    assert found["final_bitwise_equal"]
    assert found["losses_equal"]
    assert "all             3         3     0" in (tmp_path / "found.txt").read_text()
