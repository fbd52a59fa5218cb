"""The step journal costs next to nothing, as its benchmark measures it."""

import importlib.util
import sys
from pathlib import Path

from tests.workers import WorkerPool

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples/benchmarks/journal.py"


def _cost() -> tuple[str, float]:
    spec = importlib.util.spec_from_file_location("journal_benchmark", _EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(_EXAMPLE.parent))  # where a program finds its neighbours
    try:
        spec.loader.exec_module(benchmark)
    finally:
        sys.path.remove(str(_EXAMPLE.parent))
    return benchmark.measure("tiny", 2, ["training.sequence_length=256"])


def test_the_journal_takes_less_than_half_a_percent_of_a_step(workers: WorkerPool):
    for text, share in workers.run(_cost, 2):
        assert "collectives" in text
        assert 1e-6 < share < 0.005, text
