"""The `checkpoints/` folder: names, the atomic change from "being written" to "exists", retention, search.

A checkpoint is written in `step_00000100.<random>.partial`, then renamed. It is deleted by renaming it to
`….deleted` first. So at any moment a folder called `step_00000100` is whole unless the disk damaged it, and a process
killed at any moment leaves at worst a folder that nobody takes for a checkpoint. Needs no torch.
"""

import os
import re
import secrets
import shlex
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vishwamai_mp.checkpoint.manifest import NAME as MANIFEST
from vishwamai_mp.checkpoint.manifest import Manifest, check_files, read_manifest
from vishwamai_mp.config import UserError
from vishwamai_mp.config.files import sync_folder, write_whole

LATEST = "latest"
_CHECKPOINT = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"step_\d{8,}\.[0-9a-f]+\.(partial|deleted)|latest\.[0-9a-f]+\.partial")


def steps_in(root: Path) -> list[int]:
    """Steps of a `checkpoints/` folder's checkpoints, oldest first, whole or not."""
    return sorted(step_of(path) for path in _checkpoints(root))


def name_of(step: int) -> str:
    return f"step_{step:08d}"


@dataclass(frozen=True)
class Found:
    """What a search found: the newest whole checkpoint, if any, and why newer ones were skipped."""

    path: Path | None
    step: int = 0
    skipped: list[str] = field(default_factory=list)


def find_checkpoint(root: Path, checksums: bool = True) -> Found:
    """The newest whole checkpoint of a `checkpoints/` folder.

    Args:
        root: need not exist.
        checksums: read the files through; False compares their sizes only.
    """
    skipped: list[str] = []
    for path, manifest in candidates(root):
        problems = [manifest] if isinstance(manifest, str) else check_files(path, manifest.files, checksums)
        if not problems:
            return Found(path, step_of(path), skipped)
        skipped.append(reason(path, problems))
    return Found(None, 0, skipped)


def candidates(root: Path) -> Iterator[tuple[Path, Manifest | str]]:
    """Folders named like checkpoints, newest first, each with its manifest or what is wrong with that.

    Raises:
        UserError: the root is there and no folder, a link to a place that is gone for one.
    """
    if os.path.lexists(root) and not root.is_dir():
        raise UserError(f"{root} is no folder that is there; take it away, or name another run folder")
    for path in sorted(_checkpoints(root), key=step_of, reverse=True):
        try:
            yield path, read_manifest(path)
        except UserError as error:
            yield path, str(error)


def reason(path: Path, problems: list[str]) -> str:
    """One line that says why a checkpoint is skipped."""
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{path.name} skipped: {problems[0]}{more}"


def step_of(path: Path) -> int:
    match = _CHECKPOINT.fullmatch(path.name)
    assert match, path
    return int(match[1])


def locate(path: Path) -> Found:
    """The checkpoint that a user means by `path`: itself, or the newest of a `checkpoints/` folder or a run folder.

    Of several, the newest whose files have the right sizes; a checkpoint named itself is taken as it is.

    Raises:
        UserError: there is none.
    """
    if _CHECKPOINT.fullmatch(path.name) or (path / MANIFEST).exists():
        return Found(path, read_manifest(path).step)
    skipped: list[str] = []
    for root in (path, path / "checkpoints"):
        found = find_checkpoint(root, checksums=False)
        if found.path:
            return found
        skipped += found.skipped
    if not skipped and (path / "config.json").is_file():
        raise UserError(
            f"{path} is a Hugging Face folder; make a checkpoint of it: tools/convert_checkpoint.py from-hf"
            f" --load {shlex.quote(str(path))} --output {shlex.quote(f'runs/{path.name}')}"
        )
    why = "; ".join(skipped) if skipped else f"neither a checkpoint nor a folder that has one{_what_else(path)}"
    raise UserError(f"{path}: {why}")


def _what_else(path: Path) -> str:
    if not path.exists():
        return "; there is nothing of that name"
    if not path.is_dir():
        return ""
    runs = sorted(item.name for item in path.iterdir() if (item / "checkpoints").is_dir())
    return f"; it holds runs, name one of them: {', '.join(runs[:8])}{', …' if len(runs) > 8 else ''}" if runs else ""


def begin(root: Path, step: int) -> Path:
    """Make the folder in which a checkpoint is written. Clears away what killed processes left.

    The name is new each time: a process that outlived its job can never write into a later attempt.
    """
    root.mkdir(parents=True, exist_ok=True)
    for path in root.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            discard(path)
    partial = root / f"{name_of(step)}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    return partial


def publish(partial: Path, step: int) -> Path:
    """Turn the finished folder into a checkpoint and let `latest` name it."""
    root, final = partial.parent, partial.parent / name_of(step)
    sync_folder(partial)
    if final.exists():  # a broken one that a search skipped, or one of a run that was set back
        remove(final)
    partial.rename(final)
    sync_folder(root)
    write_whole(root / LATEST, f"{final.name}\n")
    return final


def retain(
    root: Path,
    keep_last: int | None,
    keep_every: int | None,
    best: int | None = None,
    held: Collection[int] = (),
) -> None:
    """Delete whole checkpoints except the newest `keep_last`, steps divisible by `keep_every`, the latest, the best and
    those `held`, which somebody reads.

    Broken ones are left for the user to look at and do not count.
    """
    if keep_last is None:
        return
    whole = [
        path
        for path, manifest in candidates(root)
        if isinstance(manifest, Manifest) and not check_files(path, manifest.files, checksums=False)
    ]
    latest = (root / LATEST).read_text().strip()
    for path in whole[keep_last:]:
        step = step_of(path)
        if path.name != latest and step != best and step not in held and not (keep_every and step % keep_every == 0):
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint such that no half of it is ever taken for a whole one."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.deleted")
    path.rename(aside)
    discard(aside)


def discard(path: Path) -> None:
    """Delete a leftover, as far as possible: a process that outlived its job may still write there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _checkpoints(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
