"""What an unfinished run has written so far, such that another run of the same settings goes on from there.

The folder `PREFIX.partial` holds files that only grow, and `mark.json`: how large each was when the run was last
marked, and what the run then knew. Files reach the disk before their mark does. The next run cuts each file to its
marked size, so what was written after the mark, whole or torn, is made anew.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.files import leftovers, sync_folder, write_whole
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.wording import counted

MARK_SECONDS = 30.0  # between marks
_MARK = "mark.json"
_FORMAT = 2  # of the folder; raised where an earlier one's files would be misread, or had other tokens of the same text


class UnfinishedRun:
    """The folder, from `__enter__` on this process's alone. Unless a mark was made, it is gone when the block ends.

    Args:
        folder: made where it does not exist.
        settings: by flag, all that decides what is written, as JSON has it. `--input` is the files, each with its size
            and the time of its last change.
        restart: begin anew, whatever an earlier run has left.
        say: for the person who watches.

    Attributes:
        state: what `mark` was last given, by an earlier run too; None: nothing was marked.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], restart: bool, say: Callable[[str], None] | None = None
    ) -> None:
        self.folder = folder
        self.state: Any = None
        self._settings = {"format": _FORMAT, **settings}
        self._restart = restart
        self._say = say or (lambda text: None)
        self._files: dict[str, IO[bytes]] = {}
        self._sizes: dict[str, int] = {}
        self._marked_at = time.monotonic()

    def __enter__(self) -> "UnfinishedRun":
        if not self.folder.absolute().parent.is_dir():
            raise UserError(f"cannot write {self.folder}: there is no folder {self.folder.absolute().parent}")
        try:
            self.folder.mkdir(exist_ok=True)
            self._descriptor = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from error
        try:
            self._lock()
            if not (self.folder / _MARK).exists():
                # A first mark may have been begun when its run was killed.
                if set(self.folder.iterdir()) != set(leftovers(self.folder, _MARK)):
                    raise UserError(f"{self.folder} has files of something else: move it, or write to another place")
            elif not self._restart:
                self._read_mark()
            for path in self.folder.iterdir():
                if path.name != _MARK and path.name not in self._sizes:
                    path.unlink()
            if self.state is None:
                self._write_mark({}, None)  # from now on its files are known to be ours
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def open(self, name: str) -> IO[bytes]:
        """A file to append to and to read, at its marked end; closed by whoever opens it, or with the run."""
        try:
            file = self._files[name] = (self.folder / name).open("a+b")
            file.truncate(self._sizes.get(name, 0))
            file.seek(0, os.SEEK_END)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}/{name}: {error.strerror}") from error
        return file

    @property
    def due(self) -> bool:
        """Whether it is time for a mark."""
        return time.monotonic() - self._marked_at >= MARK_SECONDS

    def mark(self, state: Any) -> None:
        """Make what is written so far what the next run goes on from.

        Raises:
            UserError: the disk is full or fails.
        """
        try:
            sizes = {}
            for name, file in self._files.items():
                file.flush()
                os.fsync(file.fileno())
                sizes[name] = file.seek(0, os.SEEK_END)
            sync_folder(self.folder)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from error
        self._write_mark(sizes, state)
        self.state, self._sizes, self._marked_at = state, sizes, time.monotonic()

    def done(self) -> None:
        """There is nothing to go on from any more: what was written gets its names next."""
        self.state = None
        self._write_mark({}, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what is buffered no longer fits, and is not marked
                file.close()
        if self.state is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._say(f"{self.folder} keeps what is done; run the same command again to go on")
        os.close(self._descriptor)

    def _lock(self) -> None:
        """Held by the open descriptor, so a killed process holds it no longer."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder} is another run's, which is at work: wait for it, or stop it") from None
        except OSError:
            return  # a file system without locks

    def _write_mark(self, sizes: Mapping[str, int], state: Any) -> None:
        mark = {"settings": self._settings, "sizes": sizes, "state": state}
        try:
            write_whole(self.folder / _MARK, json.dumps(mark, indent=1))
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from error

    def _read_mark(self) -> None:
        try:
            mark = parse_json((self.folder / _MARK).read_bytes())
            settings, self._sizes, self.state = mark["settings"], mark["sizes"], mark["state"]
            kept = {name: (self.folder / name).stat().st_size for name in self._sizes}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder} is damaged ({error}); --restart begins anew") from None
        if short := [name for name, size in self._sizes.items() if kept[name] < size]:
            raise UserError(f"{self.folder}/{short[0]} is shorter than it was; --restart begins anew")
        if self.state is not None and (changed := _difference(settings, self._settings)):
            raise UserError(
                f"{self.folder} holds what a run with other settings has done: {changed}."
                " Go on with those, or begin anew with --restart"
            )


def identities(paths: list[Path]) -> list[list[Any]]:
    """What tells that files are still the same, as `UnfinishedRun` takes them."""
    found = [(path, path.stat()) for path in paths]
    return [[str(path.absolute()), status.st_size, status.st_mtime_ns] for path, status in found]


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting that differs, in words."""
    for name in {**before, **now}:
        was, is_now = before.get(name), now.get(name)
        if was == is_now:
            continue
        if name == "--input" and was and is_now:
            for old, new in zip(was, is_now, strict=False):
                if old != new:
                    return f"{old[0]} has changed since" if old[0] == new[0] else f"{old[0]} was where {new[0]} is"
            return f"{counted(len(was), 'input file')}, now {len(is_now)}"
        if name in ("--tokenizer", "format"):
            return f"another {name}"
        return f"{name} was {_words(was)}, now {_words(is_now)}"
    return None


def _words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return {None: "not given", True: "given", False: "not given"}.get(value, str(value))
