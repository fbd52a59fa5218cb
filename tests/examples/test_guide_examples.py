"""The guide's examples: a loop of one's own, Hugging Face on both sides, and the notebook."""

import json
import os
import re
from pathlib import Path

from tests.programs import run_forked
from tests.synthetic import tiny_corpus

_ROOT = Path(__file__).resolve().parents[2]
_FOLDER = _ROOT / "examples/guide"


def run(arguments: list[str], **environment: str) -> str:
    """What a program printed."""
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(_ROOT), "MPLBACKEND": "agg"}
    result = run_forked(arguments, env={**os.environ, **own, **environment}, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_loop_of_ones_own(tmp_path):
    corpus = tiny_corpus(tmp_path, 250, 6000, seed=1)
    settings = [
        "model.hidden_size=32",
        "model.vocab_size=250",
        "training.sequence_length=32",
        "schedule.warmup_steps=1",
    ]
    said = run([str(_FOLDER / "custom_loop.py"), "--data", corpus, "--steps", "4", "data.split=80,20,0", *settings])
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss ([\d.]+)", said, re.MULTILINE)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_hugging_face_on_both_sides(tmp_path):
    said = run([str(_FOLDER / "integration.py"), "--steps", "3", "--output", str(tmp_path)], HF_HUB_OFFLINE="1")
    found = re.search(r"here ([\d.]+)  in transformers ([\d.]+)", said)
    assert found
    here, there = map(float, found.groups())
    assert abs(here - there) < 1e-4
    assert 4 < here < 7


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = json.loads((_FOLDER / "vishwamai_pretrain.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    (tmp_path / "cells.py").write_text("\n".join(cells), encoding="utf-8")
    said = run([str(tmp_path / "cells.py")], STEPS="8", FOLDER=str(tmp_path / "run"))
    assert "8 steps, mean loss" in said
    assert "parameters of memory" in said
    assert (tmp_path / "run/curves.png").stat().st_size > 10_000
    assert (tmp_path / "run/model/config.yaml").is_file()
