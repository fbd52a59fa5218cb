"""All benchmarks in one command: what it collects, keeps and shows. Their own figures are for a quiet machine."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).resolve().parents[2] / "examples/benchmarks"
_GOOD = (
    'import sys\nfrom turns import say_ratio\nprint("busy")\nsay_ratio("speed, ours / <theirs>", float(sys.argv[1]))\n'
)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`all.py` with two benchmarks of its own: one that works and one that fails."""
    spec = importlib.util.spec_from_file_location("all_benchmarks", _FOLDER / "all.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "all_benchmarks", module)  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    (tmp_path / "good.py").write_text(_GOOD)
    (tmp_path / "bad.py").write_text(_GOOD + "sys.exit(3)\n")
    (tmp_path / "turns.py").write_text((_FOLDER / "turns.py").read_text())
    few = {
        "good": module.Benchmark(("2.5",)),
        "bad": module.Benchmark(("1",)),
        "peer": module.Benchmark(peer="megatron_lm", needs_peer=True),
    }
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "BENCHMARKS", few)
    return module


def _run(module, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["all.py", "--output", str(folder), *arguments])
    return module.main()


def test_every_benchmark_of_the_folder_is_known():
    spec = importlib.util.spec_from_file_location("all_benchmarks", _FOLDER / "all.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["all_benchmarks"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["all_benchmarks"]
    programs = {path.stem for path in _FOLDER.glob("*.py") if "__main__" in path.read_text()}
    # cache_capacity.py holds a promise about memory and needs many minutes; it has no peer.
    assert programs - {"all", "cache_capacity"} == set(module.BENCHMARKS)
    for name in module.BENCHMARKS:
        assert "say_ratio(" in (_FOLDER / f"{name}.py").read_text(), name


def test_ratios_are_kept_run_by_run_and_shown_side_by_side(program, monkeypatch, tmp_path):
    results = tmp_path / "results"
    assert _run(program, monkeypatch, results, "--only", "good", "peer") == 0
    program.BENCHMARKS["good"] = program.Benchmark(("3",))
    assert _run(program, monkeypatch, results, "--only", "good", "--instructions", "avx2") == 0
    runs = json.loads((results / "all.json").read_text())
    assert [run["ratios"]["good"] for run in runs] == [{"speed, ours / <theirs>": 2.5}, {"speed, ours / <theirs>": 3}]
    assert runs[0]["left_out"] == {"peer": "needs --megatron-lm FOLDER"}
    assert [run["machine"]["instructions"] for run in runs] == ["native", "avx2"]
    shown = (results / "all.html").read_text()
    assert "speed, ours / &lt;theirs&gt;" in shown
    assert shown.index(">3.0<") < shown.index(">2.5<")


def test_one_that_fails_is_named_and_the_others_go_on(program, monkeypatch, tmp_path, capsys):
    assert _run(program, monkeypatch, tmp_path / "results", "--only", "bad", "good") == 1
    (run,) = json.loads((tmp_path / "results" / "all.json").read_text())
    assert run["left_out"] == {"bad": "failed with status 3"}
    assert run["ratios"]["good"]
    assert "bad: failed with status 3" in capsys.readouterr().out


def test_a_foreign_file_is_not_overwritten(program, monkeypatch, tmp_path):
    (tmp_path / "all.json").write_text('[{"mine": 1}]')
    with pytest.raises(program.UserError, match="not a file that this program wrote"):
        _run(program, monkeypatch, tmp_path, "--only", "good")
    assert (tmp_path / "all.json").read_text() == '[{"mine": 1}]'
