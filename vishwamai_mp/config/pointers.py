"""Tells files apart from what stands in their place: pointers that `git clone` leaves without git-lfs, named pipes."""

from pathlib import Path

from vishwamai_mp.config.errors import UserError

_BEGINNING = b"version https://git-lfs.github.com/spec/"
_MOST_BYTES = 1024  # of a pointer, git-lfs's own limit


def is_pointer(path: Path) -> bool:
    """Whether `path` is what git-lfs puts in place of a large file that it has not downloaded.

    A file that cannot be read is none: its reader says why. Nor is a pipe, which can be read once only.
    """
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError:
        return False
    return content.startswith(_BEGINNING) and len(content) <= _MOST_BYTES


def refuse_pointer(path: Path) -> None:
    """Raise `UserError` where `path` is such a pointer."""
    if is_pointer(path):
        raise UserError(f"{path} is a git-lfs pointer, its content was not downloaded: run git lfs pull in its folder")


def refuse_pointer_or_pipe(path: Path) -> None:
    """Raise `UserError` where `path` is such a pointer, or a named pipe: to read one waits until somebody writes to it.

    What the shell opens for the program (`/dev/stdin`, `<(command)`) is written to and may be read.
    """
    refuse_pointer(path)
    if path.is_fifo() and path.parts[:2] not in (("/", "dev"), ("/", "proc")):
        raise UserError(f"{path} is a named pipe, and a file is needed: write its content to one")
