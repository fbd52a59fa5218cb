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
# How a command begins that is not run here, and why.
_NOT_HERE = {
    "bash launch/quickstart.sh": "ten minutes; run by hand before a release",
    "bash tests/run.sh": "is what is running now",
    "python -m venv": "makes the environment that this runs in; tests/run.sh does",
    "pip install": "as above",
    "tensorboard ": "does not end by itself",
}
# What each extra of setup.py brings, by the names that are imported.
_EXTRAS = {
    "datasets": ["datasets"],
    "dedup": ["rensa"],
    "gguf": ["gguf"],
    "hf": ["tokenizers", "transformers"],
    "parquet": ["pyarrow"],
    "plots": ["matplotlib"],
    "serve": ["starlette", "uvicorn"],
    "wandb": ["wandb"],
}


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


def hide_what_its_installation_lacks(folder: Path) -> None:
    """Python in this folder cannot import packages of extras that the README's reader has not installed."""
    (command,) = [command for command in commands() if command.startswith("pip install")]
    installed = re.findall(r"\w+", command.partition("[")[2].partition("]")[0])
    hidden = [name for extra, names in _EXTRAS.items() if extra not in installed for name in names]
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n")


def test_commands(folder):
    hide_what_its_installation_lacks(folder)
    here = [command for command in commands() if not command.startswith(tuple(_NOT_HERE))]
    assert len(here) >= 6
    assert all(any(command.startswith(beginning) for command in commands()) for beginning in _NOT_HERE)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(folder), str(_REPOSITORY)]),
        "OMP_NUM_THREADS": "1",
    }
    for command in here:
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    metrics = [json.loads(line) for line in (folder / "runs/first/metrics.jsonl").open()]
    assert metrics[-1]["step"] == 8
    assert metrics[-1]["lm_loss"] < metrics[0]["lm_loss"]


def test_every_path_it_names_exists():
    paths = re.findall(r"\]\((?!https?:)([^)#]+)\)|`((?:vishwamai_mp|tools|examples|tests|launch)/[\w./-]*)`", _README)
    named = [a or b for a, b in paths]
    assert len(named) > 5
    assert [path for path in named if not (_REPOSITORY / path).exists()] == []


def test_presets_are_all_in_its_table_with_their_sizes():
    from vishwamai_mp.config import load_config, preset_names, resolve
    from vishwamai_mp.planning import parameter_count

    table = dict(re.findall(r"^\| `([\w-]+)` \| ([\d.]+ [MB]) \|", _README, flags=re.MULTILINE))
    assert set(table) == set(preset_names())
    for name, told in table.items():
        number, unit = told.split()
        count = parameter_count(resolve(load_config(name)).model) / {"M": 1e6, "B": 1e9}[unit]
        assert round(count, len(number.partition(".")[2])) == float(number), name
