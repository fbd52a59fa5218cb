"""One arm of the benchmark, in a process of its own."""

import importlib.util
import sys
from pathlib import Path

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples/benchmarks/neural_memory.py"


def test_an_arm_is_timed_and_its_memory_measured():
    spec = importlib.util.spec_from_file_location("neural_memory_benchmark", _EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(_EXAMPLE.parent))  # where a program finds its neighbours
    try:
        spec.loader.exec_module(benchmark)
    finally:
        sys.path.remove(str(_EXAMPLE.parent))
    child = benchmark.Child("our rule, 2 heads", None)
    child.run()
    child.run()
    child.close()
    assert child.process.returncode == 0
    assert len(child.seconds) == 2
    assert 0.01 < min(child.seconds) < 10
    inputs = 2 * 1024 * 256 * 4 * 3 / 2**20  # MiB of queries, keys and values: their gradients alone take as much
    # 12.4 of them; a state kept for every token, in place of one for every chunk, would be hundreds.
    assert 8 * inputs < child.peak < 18 * inputs
