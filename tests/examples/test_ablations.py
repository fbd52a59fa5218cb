"""The tasks of the ablations, and short runs of the studies."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_ROOT / "examples/ablations"))

import tasks  # noqa: E402


def made(task: tasks.Task, rows: int = 5) -> tasks.Examples:
    return task(rows, torch.Generator().manual_seed(0))


def bound(tokens: list[int], key: int, until: int) -> list[int]:
    """The values that follow `key` before place `until`."""
    return [after for token, after in itertools.pairwise(tokens[:until]) if token == key]


@pytest.mark.parametrize(
    ("task", "count", "reach"),
    [
        (tasks.associative_recall(), 1, 32),
        (tasks.overwrite_recall(), 2, 32),
        (tasks.passkey(128), 1, 50),
        (tasks.leak(), 1, 32),
    ],
    ids=["recall", "overwrite", "passkey", "leak"],
)
def test_answers_are_the_latest_bindings_out_of_reach_of_the_window(task, count, reach):
    examples = made(task)
    for row in range(5):
        tokens, asked = examples.tokens[row].tolist(), examples.asked[row].nonzero()[:, 0].tolist()
        assert len(asked) in (4, 8)
        for place in asked:
            values = bound(tokens, tokens[place], asked[0])
            assert len(values) == count
            assert len(set(values)) == count
            assert int(examples.labels[row, place]) == values[-1]
            last = max(i for i in range(asked[0]) if tokens[i] == tokens[place])
            assert place - last >= reach


def test_leaked_bindings_are_in_another_document():
    examples = made(tasks.leak())
    assert examples.documents is not None
    assert examples.documents[:, :16].unique().tolist() == [0]
    assert examples.documents[:, 16:].unique().tolist() == [1]


def test_a_short_run_of_the_study_of_recall(tmp_path):
    command = [sys.executable, str(_ROOT / "examples/ablations/recall.py"), "--seeds", "1", "--scale", "0.002"]
    result = subprocess.run(
        [*command, "--tasks", "recall", "--output", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads((tmp_path / "recall.json").read_text())
    assert [outcome["arm"] for outcome in outcomes] == ["memory", "window", "full attention"]
    step = [outcome["gflops"] / outcome["steps"] for outcome in outcomes]
    budget = 0.002 * 1200 * step[0]  # of the memory arm's 1,200 steps; each arm spends it, to the nearest step
    assert [outcome["steps"] for outcome in outcomes] == [round(budget / each) for each in step]
    assert len(set(step)) > 1
    assert (tmp_path / "recall.png").stat().st_size > 10_000
