"""`examples/quickstart/corpus.py`: its command line; launch/quickstart.sh runs the rest."""

import os
from pathlib import Path

import pytest

from tests.programs import run_forked

_PROGRAM = Path(__file__).resolve().parents[2] / "examples/quickstart/corpus.py"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "the following arguments are required: FOLDER"),
        (["--help"], 0, "usage: "),
        (["a-file"], 1, "error: a-file cannot be written to (File exists); name another folder"),
    ],
)
def test_what_names_no_folder_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    done = run_forked([_PROGRAM, *arguments])
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir() == ["a-file"]
