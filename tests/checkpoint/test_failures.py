"""Full disks and killed processes: the previous checkpoint stays usable, no rank hangs, nothing half-written counts."""

import multiprocessing
import time
from pathlib import Path

import pytest

from tests.checkpoint import jobs
from tests.workers import WorkerError, WorkerPool
from vishwamai_mp.checkpoint import find_checkpoint


@pytest.mark.parametrize(
    ("place", "async_save"),
    [
        ("folder", False),
        ("data of rank 1", False),
        ("data of rank 1", True),
        ("metadata", False),
        ("common", True),
        ("manifest", False),
    ],
)
def test_a_full_disk_fails_on_all_ranks_alike(
    workers: WorkerPool, tmp_path: Path, place: str, async_save: bool
) -> None:
    config = jobs.with_checkpoint(jobs.config(), async_save=async_save)
    errors = workers.run_within(60, jobs.save_on_full_disk, 2, tmp_path, config, place)
    assert errors[0] == errors[1]
    name, message = errors[0]
    assert name == "UserError"
    assert message.startswith(f"checkpoint of step 2 not saved to {tmp_path}: no space left on the disk (rank ")
    assert len(message.splitlines()) == 1
    # It could save again when there was space, and the failed attempt left nothing.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000003"]
    assert find_checkpoint(tmp_path).step == 3


def test_a_defect_of_ours_is_told_with_its_rank(workers: WorkerPool, tmp_path: Path) -> None:
    errors = workers.run_within(60, jobs.save_with_defect, 2, tmp_path, jobs.config())
    assert errors[0] == errors[1]
    assert errors[0][0] == "RuntimeError"
    assert "rank 1:" in errors[0][1]
    assert "ZeroDivisionError" in errors[0][1]


@pytest.mark.parametrize(
    ("moment", "async_save", "expected"),
    [
        ("data", False, 1),
        ("data", True, 1),
        ("metadata", False, 1),
        ("manifest", True, 1),
        ("rename", False, 1),
        ("latest", False, 2),  # complete but for `latest`: it counts
    ],
)
def test_killed_while_saving(workers: WorkerPool, tmp_path: Path, moment: str, async_save: bool, expected: int) -> None:
    config = jobs.with_checkpoint(jobs.config(use_distributed_optimizer=False), async_save=async_save)
    with pytest.raises(WorkerError, match="exit code -9"):
        workers.run(jobs.die_while_saving, 1, tmp_path, config, moment)
    found = find_checkpoint(tmp_path)
    assert found.step == expected
    assert found.path
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    workers.run(jobs.resume_and_save, 1, found.path, tmp_path, config, 2)
    assert not [path for path in tmp_path.iterdir() if "." in path.name]
    assert find_checkpoint(tmp_path).step == expected + 2


def test_a_background_writer_dies_with_its_parent(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    config = jobs.with_checkpoint(jobs.config(use_distributed_optimizer=False), async_save=True)
    job = context.Process(target=jobs.save_slowly_in_background, args=(tmp_path / "run", config, tmp_path / "pid"))
    job.start()
    _wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    writer = int((tmp_path / "pid").read_text())
    assert writer != job.pid
    assert _is_running(writer)
    job.kill()
    job.join()
    _wait_for(lambda: not _is_running(writer))
    assert find_checkpoint(tmp_path / "run").step == 1


def test_a_killed_background_writer_is_an_error_not_a_checkpoint(workers: WorkerPool, tmp_path: Path) -> None:
    config = jobs.with_checkpoint(jobs.config(), async_save=True)
    errors = workers.run_within(60, jobs.lose_background_writer, 2, tmp_path, config)
    assert errors[0] == errors[1]
    assert "the process that wrote for rank 1 was killed" in errors[0][1]
    assert find_checkpoint(tmp_path).step == 1


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
