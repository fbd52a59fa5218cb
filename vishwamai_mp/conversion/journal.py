"""What a conversion has finished, so that a killed one continues and never mixes with another; and how far it is.

The journal lies in the output folder from the first moment to the last; a folder that has one is not complete.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vishwamai_mp.config import UserError
from vishwamai_mp.config.checked_values import refuse_home
from vishwamai_mp.config.errors import NO_SPACE
from vishwamai_mp.config.files import aside_of, leftovers, replace_durably, sync_folder, write_whole
from vishwamai_mp.config.json_text import parse_json

_NAME = ".conversion.json"


class Journal:
    """The finished files of a conversion into `folder`.

    Args:
        folder: the output; made if missing.
        job: what is converted, from what, how; JSON-able. Equal jobs write equal bytes.

    Raises:
        UserError: the folder holds something else, or the unfinished output of another job.
    """

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        self._path = folder / _NAME
        self.resumes = self._path.is_file()
        if self.resumes:
            self._state = self._read(job)
            return
        refuse_used(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._state = {"job": job, "finished": {}}
        self._write()

    def facts(self, file: str) -> Any:
        """What was noted of a finished file; None if it is not."""
        return self._state["finished"].get(file)

    def finish(self, file: str, facts: Any) -> None:
        """Note that a file is complete and durable."""
        self._state["finished"][file] = facts
        self._write()

    def close(self) -> None:
        """The whole output is complete."""
        _discard_leftovers(self._path)
        sync_folder(self._path.parent)
        self._path.unlink()

    def _read(self, job: dict[str, Any]) -> dict[str, Any]:
        try:
            state = parse_json(self._path.read_bytes())
            same = state["job"] == json.loads(json.dumps(job))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self._path} cannot be read; empty {self._path.parent} and start again") from None
        if not same:
            raise UserError(
                f"--output {self._path.parent} holds another conversion that was interrupted (from another source or"
                " with other options); finish that one, name a new folder or empty it"
            )
        return state

    def _write(self) -> None:
        write_whole(self._path, json.dumps(self._state))


def refuse_used(folder: Path) -> None:
    """Raise `UserError` unless `folder` is a new one or has nothing but what a conversion left that was killed at its
    very beginning."""
    refuse_home("--output ", str(folder))
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a new folder")
    if set(folder.iterdir()) != set(leftovers(folder, _NAME)):
        raise UserError(f"--output {folder} is not empty; name a new folder or empty it")


class Files:
    """Writes files so that each gets its name when it is complete and durable, and is then noted in the journal.

    While one is brought to the disk the next is being written.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()
        if self._pending:
            self._pending.result()

    def begin(self, path: Path) -> BinaryIO:
        """A file to write, which is to be given to `finish`."""
        _discard_leftovers(path)
        return aside_of(path).open("wb")

    def finish(self, file: BinaryIO, path: Path, facts: Any) -> None:
        """All is written; `facts` is what the journal is to know. Raises what came of the file before."""
        file.flush()
        if self._pending:
            self._pending.result()
        self._pending = self._pool.submit(self._publish, file, path, facts)

    def _publish(self, file: BinaryIO, path: Path, facts: Any) -> None:
        file.close()
        replace_durably(Path(file.name), path)
        self._journal.finish(path.name, facts)


def _discard_leftovers(path: Path) -> None:
    """Delete what killed attempts wrote of a file: a conversion's folder has one writer."""
    for leftover in leftovers(path.parent, path.name):
        leftover.unlink()


def check_space(folder: Path, needed: int, output: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        UserError: says how much is missing.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{output}: needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; name a folder elsewhere"
        )


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turn a full or failing disk into one line."""
    try:
        yield
    except OSError as error:
        what = "no space left on the disk" if error.errno in NO_SPACE else str(error.strerror or error)
        mend = "; make room and run the same command again, it continues" if error.errno in NO_SPACE else ""
        raise UserError(f"{output}: {what}{mend}") from None
