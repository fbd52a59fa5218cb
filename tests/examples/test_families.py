"""`examples/conversion/families.py`: every family has variants, one is checked, and the page says what was seen.

`llama_cpp_check.py` beside it needs llama.cpp, which CI does not compile: its figures on the page are its own.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workers import WorkerPool
from vishwamai_mp.config import UserError

FOLDER = Path(__file__).resolve().parents[2] / "examples/conversion"


def loaded(name: str) -> Any:
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def families() -> Any:
    return loaded("families")


def test_every_family_has_two_variants_and_a_row_each(families: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script, with `--only`, where a family is new: the page has a row for each variant, and all hold."""
    titles = [families.title(*variant) for variant in families.variants()]
    reports = json.loads(families.RESULTS.read_text())
    assert [report["variant"] for report in reports] == titles
    assert all(report["holds"] for report in reports)
    assert f"{families.BEGIN}\n{families.table(reports)}\n{families.END}" in families.PAGE.read_text()
    monkeypatch.setattr(families, "VARIANTS", {**families.VARIANTS, "Qwen3ForCausalLM": ()})
    with pytest.raises(UserError, match="Qwen3ForCausalLM has 0 variants"):
        families.variants()


def test_the_page_has_what_llama_cpp_computed(families: Any) -> None:
    script = loaded("llama_cpp_check")
    results = json.loads(script.RESULTS.read_text())
    assert f"{script.BEGIN}\n{script.table(results)}\n{script.END}" in script.PAGE.read_text()
    assert {families.title(*variant) for variant in families.variants()} <= {
        row["variant"] for row in results["models"]
    }


def test_a_family_is_checked(families: Any, workers: WorkerPool) -> None:
    (report,) = families.check(families.variants("Granite")[:1], workers.run, ["TP1", "TP2"], 4)
    assert report["holds"], report
    row = families.table([report]).splitlines()[2]
    assert row.startswith("| Granite: untied, grouped queries, multipliers | ")
    assert row.count("not made") == 4  # the other layouts, and the simulated step
    assert " 12/12 " in row


def test_cells_say_what_fails_and_what_is_left_out(families: Any) -> None:
    reasons: list[str] = []
    finding = {"status": "fails", "seen": "x", "figures": {"relative": 0.25}}
    assert families.cell(finding, reasons) == "**fails**: 2e-01"
    assert families.cell({**finding, "status": "left out"}, reasons) == "(1)"
    assert families.cell({**finding, "status": "left out"}, reasons) == "(1)"
    assert reasons == ["x"]
