"""Reads what a run folder tells, be the run over, killed, still going or edited by hand. Needs no torch."""

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vishwamai_mp.checkpoint import Manifest, check_files
from vishwamai_mp.checkpoint.store import candidates, step_of
from vishwamai_mp.config import UserError
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.data.lines import text_lines
from vishwamai_mp.observability.goodput_ledger import Ledger, read_ledger
from vishwamai_mp.observability.timeline import Timeline, read_timeline


@dataclass(frozen=True)
class Curve:
    """One metric over the steps at which it was logged.

    Attributes:
        steps: (N,) ascending.
        values: (N,) NaN where the number was not finite.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """The values that are numbers."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class SavedCheckpoint:
    """`problem` is empty for a checkpoint whose files have the right sizes."""

    step: int
    size: int
    problem: str


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        name: the folder's.
        metrics: by key of `metrics.jsonl`.
        fp8: by `layer/operand/what`, of `fp8.jsonl`; empty without one.
        config: dotted keys of the resolved configuration, and `config_text` as it stands.
        environment: dotted keys of `environment.json`.
        checkpoints: newest first.
        profiles: tables of operators (`logging.profile_steps`), by file name.
        goodput: where the time of all attempts went.
        timeline: of a late step over all ranks; None without one.
        notes: what could not be read.
    """

    name: str
    folder: Path
    metrics: Mapping[str, Curve]
    fp8: Mapping[str, Curve]
    config: Mapping[str, Any]
    config_text: str
    environment: Mapping[str, Any]
    checkpoints: list[SavedCheckpoint]
    profiles: Mapping[str, str]
    goodput: Ledger
    timeline: Timeline | None
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    """Everything there is.

    Raises:
        UserError: no run folder, or no step was logged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: has no metrics.jsonl; {_what_else(folder)}")
    notes: list[str] = []
    metrics = read_curves(path, notes)
    if not metrics:
        raise UserError(f"{path}: no step is logged in it; train for at least logging.log_every steps")
    fp8_file = folder / "fp8.jsonl"
    config_text = _text(folder / "config.yaml", notes)
    return Run(
        name=folder.resolve().name,
        folder=folder,
        metrics=metrics,
        fp8=read_curves(fp8_file, notes) if fp8_file.is_file() else {},
        config=_mapping(config_text, yaml.safe_load, "config.yaml", notes),
        config_text=config_text,
        environment=_mapping(_text(folder / "environment.json", notes), parse_json, "environment.json", notes),
        checkpoints=list(_checkpoints(folder / "checkpoints")),
        profiles={file.name: _text(file, notes) for file in sorted((folder / "profile").glob("*.txt"))},
        goodput=_ledger(folder, notes),
        timeline=_timeline(folder, notes),
        notes=notes,
    )


def read_curves(path: Path, notes: list[str]) -> dict[str, Curve]:
    """The numbers of a file of JSON objects with a `step` each. Of a repeated step the later line counts.

    Lines that are no such object (the torn last one of a killed run) are left out and counted in `notes`.
    """
    steps: dict[str, array] = {}
    values: dict[str, array] = {}
    unreadable = 0
    for line in text_lines(path, errors="replace"):
        record = _record(line)
        if record is None:
            unreadable += 1
            continue
        step = record.pop("step")
        for key, value in record.items():
            steps.setdefault(key, array("q")).append(step)
            values.setdefault(key, array("d")).append(value)
    if unreadable:
        notes.append(f"{path.name}: left out {unreadable:,} of its lines, which are no JSON objects with a step")
    return {key: _curve(steps[key], values[key]) for key in steps}


def _record(line: str) -> dict[str, Any] | None:
    """A line's numbers, `null` and what is not finite as NaN, other values left out; None: no such line."""
    try:
        found = parse_json(line)
        if not isinstance(found, dict) or type(found.get("step")) is not int or not 0 <= found["step"] < 2**62:
            return None
        numbers = {key: math.nan if value is None else value for key, value in found.items()}
        kept = {key: float(value) for key, value in numbers.items() if type(value) in (int, float)}
    except (ValueError, OverflowError):
        return None
    return kept | {"step": found["step"]}


def _curve(steps: array, values: array) -> Curve:
    step, value = np.array(steps), np.array(values)
    value[~np.isfinite(value)] = np.nan
    if np.any(np.diff(step) <= 0):
        step, last = np.unique(step[::-1], return_index=True)
        value = value[::-1][last]
    return Curve(step, value)


def _what_else(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder" if not folder.exists() else "give the run's folder"
    runs = sorted(item.name for item in folder.iterdir() if (item / "metrics.jsonl").is_file())
    if runs:
        return f"it holds runs, name some of them: {', '.join(runs[:8])}{', …' if len(runs) > 8 else ''}"
    return "give the folder that training wrote, its training.output_dir"


def _ledger(folder: Path, notes: list[str]) -> Ledger:
    try:
        return read_ledger(folder)
    except ValueError as error:
        notes.append(str(error))
        return Ledger([])


def _timeline(folder: Path, notes: list[str]) -> Timeline | None:
    try:
        return read_timeline(folder)
    except ValueError as error:
        notes.append(str(error))
        return None


def _text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path.name}: cannot be read ({error.strerror})")
        return ""


def _mapping(text: str, parse: Any, name: str, notes: list[str]) -> dict[str, Any]:
    """A file's nested mapping with dotted keys; lists stay values."""
    if not text:
        return {}
    try:
        tree = parse(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        notes.append(f"{name}: cannot be understood")
        return {}
    return dict(_flat(tree, ""))


def _flat(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _checkpoints(root: Path) -> Iterator[SavedCheckpoint]:
    for path, manifest in candidates(root):
        if not isinstance(manifest, Manifest):
            yield SavedCheckpoint(step_of(path), 0, manifest)
            continue
        problems = check_files(path, manifest.files, checksums=False)
        size = sum(record.size for record in manifest.files.values())
        yield SavedCheckpoint(step_of(path), size, "; ".join(problems[:2]))
