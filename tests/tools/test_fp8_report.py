"""The table of an FP8 report, from files that are torn, empty or something else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/fp8_report.py"
FIGURES = {"amax": 1.5, "smallest_scale": 1.0, "largest_scale": 2.0, "underflow": 0.25, "overflow": None}


def line(step, layer="layers.0.mlp"):
    return json.dumps({"step": step} | {f"{layer}/weight/{what}": value for what, value in FIGURES.items()}) + "\n"


def run(folder, content):
    if content is not None:
        (folder / "fp8.jsonl").write_text(content)
    return subprocess.run([sys.executable, TOOL, folder], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("torn", ["", '{"step": 3, "layers.0.ml', line(3)[:-2], "\n"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    done = run(tmp_path, line(1) + line(2, "layers.1\u2028mlp") + torn)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 2\n")
    assert "layers.1\u2028mlp  weight" in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there; train with fp8.report_every=N"),
        ("", "is empty: no step was reported yet"),
        (line(1) + "{\n" + line(2), "fp8.jsonl:2: no JSON object"),
        ('{"lm_loss": 1}\n', "is no FP8 report"),
        ('{"step": 1, "lm_loss": 1}\n', "is no FP8 report"),
        ('{"step": 1, "a/b/amax": "x"}\n', "is no FP8 report"),
        ('{"step": 1, "a/b/amax": 1}\n', "a/b lacks largest_scale, overflow, smallest_scale, underflow"),
    ],
)
def test_what_is_no_report_is_one_line(tmp_path, content, message):
    done = run(tmp_path, content)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
