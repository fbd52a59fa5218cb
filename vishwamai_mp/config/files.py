"""The one way this package writes a file that others may read meanwhile: aside, through to the disk, then renamed.

A reader, and whoever comes after a crash at any moment, sees the old content or the new, never a part. That takes
three steps in this order, and `replace_durably` does them:

1. fsync of the file: a rename may reach the disk before the content, and then a power cut leaves an empty file;
2. rename, which POSIX makes atomic within a file system (NFS too, as the server sees it);
3. fsync of the folder: until then a power cut may bring the old name back. File systems that cannot are left alone.

The name aside is drawn anew each time, so two writers of one file never write into each other's: the later rename wins.
A killed writer leaves `NAME.<8 hex digits>.partial`, which `leftovers` finds.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

_LEFTOVER = re.compile(r"(.+)\.[0-9a-f]{8}\.partial(\..+)?")


def aside_of(path: Path, ending: str = "") -> Path:
    """A fresh name beside `path` to write its content under.

    Args:
        ending: what the name must end with, dot included, for writers that choose a format by it.
    """
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial{ending}")


def leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """What killed writers left in a folder, and what living ones are writing now; of one file if `name` is given."""
    found = [(path, _LEFTOVER.fullmatch(path.name)) for path in folder.iterdir()]
    return [path for path, match in found if match and name in (None, match[1])]


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk, whoever wrote it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; file systems, and permissions, that do not allow it are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_through(path: Path, content: bytes) -> None:
    """Write a file through to the disk under its own name: for a folder that is itself still aside."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(aside: Path, path: Path) -> None:
    """Give a complete file its name, in place of any older one, such that a power cut leaves one of the two."""
    sync_file(aside)
    aside.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def written_whole(path: Path, ending: str = "") -> Iterator[Path]:
    """The name to write `path`'s content under; it becomes `path` when the block ends, and is gone where that raises.

    A block that deletes the file has changed its mind: `path` stays as it was.

    Args:
        ending: see `aside_of`.
    """
    aside = aside_of(path, ending)
    try:
        yield aside
        if aside.exists():
            replace_durably(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that appears whole or not at all; text as UTF-8."""
    with written_whole(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
