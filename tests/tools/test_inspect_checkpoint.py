"""`tools/inspect_checkpoint.py` as a user runs it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint import jobs
from tests.workers import WorkerPool

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/inspect_checkpoint.py"


@pytest.fixture(scope="module")
def original(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints, not to be changed."""
    run = tmp_path_factory.mktemp("inspected") / "run"
    workers.run(jobs.train_and_save, 2, run / "checkpoints", jobs.config(tensor_model_parallel_size=2), 1, 1)
    return run


@pytest.fixture
def run_folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("path", [".", "checkpoints", "checkpoints/step_00000002"])
def test_it_tells_what_is_in_a_checkpoint(original: Path, path: str) -> None:
    done = inspect(original / path)
    assert done.returncode == 0, done.stderr
    assert "step        2\n" in done.stdout
    assert "tensor 2, pipeline 1, virtual pipeline 1, context 1, data 1; precision fp32" in done.stdout
    assert "hidden_size=24" in done.stdout
    assert re.search(r"^optimizer   yes, .* KiB in \d+ tensors", done.stdout, re.M)
    assert "exp_avg" not in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("output_layer.weight"))
    assert row.split() == ["output_layer.weight", "512", "×", "24", "float32", "48.0", "KiB"]


def test_json_counts_parameters(original: Path) -> None:
    facts = json.loads(inspect(original, "--verify", "--json").stdout)
    per_layer = 24 * (24 + 2 * 12) + 24 * 24 + 3 * 24 * 40 + 2 * 24
    assert facts["parameters"] == 4 * per_layer + 2 * 512 * 24 + 24
    assert (facts["step"], facts["whole"], facts["verified"], facts["optimizer"]) == (2, True, True, True)
    assert facts["layout"]["tensor_model_parallel_size"] == 2
    assert {"torch", "megatron-core", "vishwamai_mp"} <= facts["versions"].keys()


def test_damage_is_named(run_folder: Path) -> None:
    damaged = next((run_folder / "checkpoints/step_00000002").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[100] ^= 255
    damaged.write_bytes(content)
    assert inspect(run_folder).returncode == 0
    done = inspect(run_folder, "--verify")
    assert done.returncode == 1
    assert done.stderr.endswith(f"step_00000002 is broken: {damaged.name} is damaged (its checksum differs)\n")


def test_the_newest_whole_one_is_shown_and_others_are_mentioned(run_folder: Path) -> None:
    newest = run_folder / "checkpoints/step_00000002"
    (newest / "trainer.json").unlink()
    done = inspect(run_folder)
    assert done.returncode == 0
    assert "step        1\n" in done.stdout
    assert "step_00000002 skipped: trainer.json is missing" in done.stdout
    assert inspect(newest).returncode == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither a checkpoint nor a folder that has one"),
        ("{", "manifest.json cannot be read"),
        ('{"format_version": 99}', "format version 99; this program reads version 1"),
        ('{"format_version": 1}', "manifest.json is not a manifest"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content:
        (tmp_path / "manifest.json").write_text(content)
    done = inspect(tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_hugging_face_folder_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = inspect(tmp_path)
    assert done.returncode == 1
    assert (
        "is a Hugging Face folder; make a checkpoint of it: tools/convert_checkpoint.py from-hf --load" in done.stderr
    )


def test_it_starts_without_torch(original: Path) -> None:
    script = "\n".join(
        [
            f"import sys, runpy; sys.argv = ['', {str(original)!r}]",
            f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')",
            "finally: sys.exit('torch' in sys.modules)",
        ]
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0
