"""The study of a big checkpoint, on a small one."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_study_runs_and_its_promises_hold(tmp_path: Path) -> None:
    script = ROOT / "examples/conversion/big_checkpoint.py"
    work = tmp_path / "work"
    command = [sys.executable, str(script), "--work-dir", str(work), "--size", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((work / "results.json").read_text())
    assert results["continued_is_bitwise_equal"]
    assert results["round_trip_is_bitwise_equal"]
    assert results["steps"]["to_hf"]["peak_memory"] < 2**30
    assert [path.name for path in work.iterdir()] == ["results.json"]
