"""The report's command line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.observability.run_folders import make_run

_TOOL = Path(__file__).resolve().parents[2] / "tools/report.py"


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, _TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_it_writes_one_whole_file(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 9)]
    page = tmp_path / "out.html"
    done = run_tool(*runs, runs[0], "--output", page)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{page}: a, b; [\d,]+ KiB\n", done.stdout)
    assert page.read_text(encoding="utf-8").endswith("</html>\n")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "b", "out.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no such folder"),
        (["."], "it holds runs, name some of them: a"),
        (["a", "--output", "no/such/folder.html"], "--output no/such/folder.html: cannot be written"),
        (["a", "empty"], "no step is logged"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").touch()
    done = run_tool(*arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
