"""`examples/conversion/families.py`: every family has variants, one is checked, and the page says what was seen."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workers import WorkerPool
from vishwamai_mp.config import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "examples/conversion/families.py"


@pytest.fixture(scope="module")
def families() -> Any:
    spec = importlib.util.spec_from_file_location("families_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


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


def test_a_family_is_checked(families: Any, workers: WorkerPool) -> None:
    (report,) = families.check(families.variants("Granite")[:1], workers.run, ["TP1", "TP2"], 4)
    assert report["holds"], report
    row = families.table([report]).splitlines()[2]
    assert row.startswith("| Granite: untied, grouped queries, multipliers | ")
    assert row.count("not made") == 3  # the other layouts
    assert " 12/12 " in row


def test_cells_say_what_fails_and_what_is_left_out(families: Any) -> None:
    reasons: list[str] = []
    finding = {"status": "fails", "seen": "x", "figures": {"relative": 0.25}}
    assert families.cell(finding, reasons) == "**fails**: 2e-01"
    assert families.cell({**finding, "status": "left out"}, reasons) == "(1)"
    assert families.cell({**finding, "status": "left out"}, reasons) == "(1)"
    assert reasons == ["x"]
