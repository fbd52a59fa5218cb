"""The cache's studies run, at a size that shows that they work; what they found is committed beside them."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _load(folder: str, name: str) -> Any:
    sys.path.insert(0, str(_EXAMPLES / folder))
    spec = importlib.util.spec_from_file_location(f"example_{name}", _EXAMPLES / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_main(folder: str, name: str, arguments: list[str]) -> int:
    """Runs in a worker."""
    return _load(folder, name).main(arguments)


def streamed(latents: int, tokens: int, notes: int) -> Any:
    from vishwamai_mp.runtime import initialize

    study = _load("benchmarks", "cache_capacity")
    settings = study.configuration(latents)
    return vars(study.stream(settings, initialize(settings), tokens, notes))


def test_a_full_cache_keeps_what_is_important(workers):
    """8,192 tokens are 128 segments, of which 64 fit: half of them go, and none that is marked."""
    report = workers.run(streamed, 1, 512, 8192, 6)[0]
    assert report["marked"] == report["kept"] == 1
    assert report["unmarked"] <= 1 / 6
    assert report["segments"] <= 64
    assert report["age"] > 7000
    assert report["state_bytes"] <= report["formula_bytes"]


@pytest.mark.parametrize(
    ("name", "arguments", "arms"),
    [
        ("cache_recall", ["--scale", "0.001", "--seeds", "0", "--arms", "cache", "both"], {"cache", "both"}),
        ("deliberation", ["--steps", "2", "--seeds", "1"], {"base alone", "latents", "pause tokens"}),
    ],
)
def test_an_ablation_writes_a_table_and_a_plot(workers, tmp_path, name, arguments, arms):
    assert workers.run(run_main, 1, "ablations", name, [*arguments, "--output", str(tmp_path)])[0] == 0
    rows = json.loads((tmp_path / f"{name}.json").read_text())
    assert {row["arm"] for row in rows} == arms
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
