"""The README's commands run as they stand, in order, in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent
_README = (_REPOSITORY / "README.md").read_text(encoding="utf-8")
# Run elsewhere (the first by hand and before a release, the second is what is running now) or not ending by themselves.
_NOT_HERE = ("bash launch/quickstart.sh", "bash tests/run.sh", "python -m venv", "pip install", "tensorboard ")


def commands() -> list[str]:
    """Every command of the README's shell blocks, continued lines joined, comments dropped, and its Python blocks."""
    found = []
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", _README, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            found.append(shlex.join(["python", "-c", block]))
            continue
        lines = block.replace("\\\n", " ").splitlines()
        found += [line.split("  #")[0] for line in lines if line.strip() and not line.startswith("#")]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkout's look from inside: the tools, and the corpus that the README calls `corpus.jsonl`."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "tools").symlink_to(_REPOSITORY / "tools")
    words = [
        "".join(np.random.default_rng(n).choice(list("abcdefghijklmnopqrstuvwxyz"), 3 + n % 9)) for n in range(9000)
    ]
    rng = np.random.default_rng(0)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(400):
            file.write(json.dumps({"text": " ".join(rng.choice(words, 120))}) + "\n")
    return folder


def test_commands(folder):
    here = [command for command in commands() if not command.startswith(_NOT_HERE)]
    assert len(here) >= 6
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(_REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    for command in here:
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    metrics = [json.loads(line) for line in (folder / "runs/first/metrics.jsonl").open()]
    assert metrics[-1]["step"] == 40
    assert metrics[-1]["lm_loss"] < metrics[0]["lm_loss"]


def test_every_path_it_names_exists():
    paths = re.findall(r"\]\((?!https?:)([^)#]+)\)|`((?:vishwamai_mp|tools|examples|tests|launch)/[\w./-]*)`", _README)
    named = [a or b for a, b in paths]
    assert len(named) > 5
    assert [path for path in named if not (_REPOSITORY / path).exists()] == []


def test_presets_are_all_in_its_table():
    from vishwamai_mp.config import preset_names

    assert set(re.findall(r"^\| `([\w-]+)` \| [\d.]+ [MB] \|", _README, flags=re.MULTILINE)) == set(preset_names())
