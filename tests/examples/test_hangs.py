"""Two kinds of the hang drill; its own docstring has the command of all."""

import re
import subprocess
import sys
from pathlib import Path

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples/fault_tolerance/hangs.py"


def test_a_stopped_rank_and_a_collective_left_out():
    kinds = ["stops", "leaves_out_a_collective"]
    command = [sys.executable, str(_EXAMPLE), "--kinds", *kinds, "--limit", "4", "--steps", "0", "--forked"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for kind in kinds:
        assert re.search(rf"^{kind} +right .* rank \[2\]: ", result.stdout, re.MULTILINE), result.stdout
    assert "2 of 2 right" in result.stdout
