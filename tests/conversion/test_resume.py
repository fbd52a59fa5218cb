"""A conversion killed at any of its writes continues, and ends with the bytes of one that was not."""

import os
import signal
from pathlib import Path
from unittest import mock

import pytest

from tests.conversion import models
from tests.conversion.test_bad_input import contents
from tests.workers import WorkerError, WorkerPool
from vishwamai_mp.checkpoint import find_checkpoint
from vishwamai_mp.config import UserError
from vishwamai_mp.conversion import from_hf
from vishwamai_mp.conversion.dtypes import BF16

SHARD = {"max_shard_size": 50_000}


@pytest.fixture(scope="module")
def folders(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`; `hf`, exported from it; `back`, imported from that. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    workers.run(models.save_run, 1, folder / "run", [])
    models.export(folder / "run", folder / "hf", **SHARD)
    workers.run(import_in_small_files, 1, folder / "hf", folder / "back")
    assert len(list(models.step_zero(folder / "back").glob("*.distcp"))) > 3
    return folder


def import_in_small_files(source: Path, output: Path) -> None:
    with mock.patch.object(from_hf, "_FILE_BYTES", 50_000):
        models.import_(source, output)


def die_at_rename(number: int, direction: str, source: Path, output: Path) -> None:
    """In a worker: convert, and be killed just before the `number`th file gets its name."""
    real, count = Path.replace, 0

    def replace(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, target)

    with mock.patch.object(Path, "replace", replace):
        convert(direction, source, output)


def convert(direction: str, source: Path, output: Path) -> None:
    if direction == "to-hf":
        models.export(source, output, **SHARD)
    else:
        import_in_small_files(source, output)


@pytest.mark.parametrize("number", [1, 2, 5, 8])
@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_killed_and_continued_is_bitwise_the_same(
    workers: WorkerPool, folders: Path, tmp_path: Path, direction: str, number: int
) -> None:
    source, whole = (folders / "run", folders / "hf") if direction == "to-hf" else (folders / "hf", folders / "back")
    output = tmp_path / "out"
    with pytest.raises(WorkerError):
        workers.run(die_at_rename, 1, number, direction, source, output)
    assert find_checkpoint(output / "checkpoints").path is None
    assert not (output / "model.safetensors.index.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in output.rglob("*") if path.suffix != ".partial"}
    workers.run(convert, 1, direction, source, output)
    assert contents(output) == contents(whole)
    kept = [p.name for p in output.rglob("*.safetensors") if finished.get(p.name) == p.stat().st_mtime_ns]
    kept += [p.name for p in output.rglob("*.distcp") if finished.get(p.name) == p.stat().st_mtime_ns]
    assert len(kept) == max(0, (number - 2) // 2)  # the journal is first, and written after each file


def test_an_unfinished_output_of_another_job_is_refused(workers: WorkerPool, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError):
        workers.run(die_at_rename, 1, 5, "to-hf", folders / "run", tmp_path / "out")
    with pytest.raises(UserError, match="another conversion that was interrupted"):
        models.export(folders / "run", tmp_path / "out", dtype=BF16, **SHARD)
    with pytest.raises(UserError, match="another conversion that was interrupted"):
        models.import_(folders / "hf", tmp_path / "out")


def test_a_finished_file_that_was_damaged_in_between_is_written_again(
    workers: WorkerPool, folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(WorkerError):
        workers.run(die_at_rename, 1, 8, "to-hf", folders / "run", tmp_path / "out")
    file = next((tmp_path / "out").glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    models.export(folders / "run", tmp_path / "out", **SHARD)
    assert contents(tmp_path / "out") == contents(folders / "hf")


def test_an_imported_checkpoint_is_whole_by_its_checksums(folders: Path) -> None:
    found = find_checkpoint(folders / "back/checkpoints")
    assert found.path == models.step_zero(folders / "back")
    assert (folders / "back/checkpoints/latest").read_text() == "step_00000000\n"
