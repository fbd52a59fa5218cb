"""The study of precisions: a short run, and what makes it fail."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vishwamai_mp.config import UserError

_PROGRAM = Path(__file__).parents[2] / "examples/precision/recipes.py"


def test_a_short_run(tmp_path):
    """Ten steps: the recipes begin as bf16 does, and go ways of their own."""
    options = ["--steps", "10", "--within", "0.05", "--settings", "bf16", "fp8_delayed", "fp8_mx"]
    command = [sys.executable, str(_PROGRAM), *options, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    curves = json.loads((tmp_path / "recipes.json").read_text())
    assert list(curves) == ["bf16", "fp8_delayed", "fp8_mx"]
    assert all(len(curve) == 10 and curve[-1] < curve[0] - 0.1 for curve in curves.values())
    assert curves["fp8_mx"] == pytest.approx(curves["bf16"], rel=0.05)
    assert len({tuple(curve) for curve in curves.values()}) == 3
    assert (tmp_path / "recipes.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes", _PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_fails_where_a_recipe_trains_worse(study):
    curves = {"bf16": [3.0, 2.0], "fp8_mx": [3.0, 2.01], "unscaled": [3.0, 2.5]}
    study.check(curves, 0.01)
    study.check({**curves, "unscaled": [3.0, float("nan")]}, 0.01)
    with pytest.raises(UserError, match=r"fp8_mx: final loss .* off bf16's 2.5"):
        study.check({**curves, "fp8_mx": [3.0, 2.2]}, 0.01)
    with pytest.raises(UserError, match="fp8_mx"):
        study.check({**curves, "fp8_mx": [3.0, float("nan")]}, 0.01)
    with pytest.raises(UserError, match=r"unscaled: .* not worse"):
        study.check({**curves, "unscaled": [3.0, 2.0]}, 0.01)
