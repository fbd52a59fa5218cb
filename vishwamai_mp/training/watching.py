"""Opens the journal of a training run, and starts the process that watches the ranks of this machine."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from vishwamai_mp.checkpoint.collective import Failure, on_first_rank
from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.runtime import Runtime, local_rank
from vishwamai_mp.runtime.failure import is_launched
from vishwamai_mp.runtime.step_journal import Journal, journal_open


@contextmanager
def watched(config: PretrainConfig, runtime: Runtime, folder: Path) -> Iterator[Journal]:
    """Meanwhile this rank keeps a journal; in a launched job a watchdog reads it, one on each machine.

    Args:
        folder: of the run.
    """
    if not (config.watchdog.enabled and is_launched() and sys.platform == "linux"):
        with journal_open(Journal()) as journal:
            yield journal
        return
    token = on_first_rank(lambda: secrets.token_hex(8))
    assert not isinstance(token, Failure)
    here = _shared_memory() / f"vishwamai-{token}"
    here.mkdir(mode=0o700, exist_ok=True)
    journal = Journal(here, runtime.rank)
    if local_rank() == 0:
        _start(config, runtime, here, folder / "watch" / token)
    with journal_open(journal):
        yield journal


def _shared_memory() -> Path:
    path = Path("/dev/shm")
    return path if os.access(path, os.W_OK) else Path(tempfile.gettempdir())


def _start(config: PretrainConfig, runtime: Runtime, here: Path, meeting: Path) -> None:
    """Start this machine's watchdog, which ends by itself when its ranks have."""
    count = min(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), runtime.world_size - runtime.rank)
    ranks = range(runtime.rank, runtime.rank + count)
    shutil.rmtree(meeting, ignore_errors=True)
    orders = {
        "folder": str(here),
        "meeting": str(meeting),
        "ranks": list(ranks),
        "world_size": runtime.world_size,
        "limits": asdict(config.watchdog),
    }
    # A session of its own: the launcher ends the workers' groups, and the watchdog tells why they ended.
    subprocess.Popen(
        [sys.executable, "-m", "vishwamai_mp.diagnosis", json.dumps(orders)], start_new_session=True, close_fds=True
    )
