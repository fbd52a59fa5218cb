"""The tables of a report: results, configurations and environments side by side, what each folder holds."""

import json
import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from vishwamai_mp.observability.chart import short
from vishwamai_mp.observability.gantt import gantt
from vishwamai_mp.observability.goodput_ledger import PARTS
from vishwamai_mp.observability.run_folder import Run
from vishwamai_mp.observability.timeline import WAITING, Timeline, stragglers


@dataclass(frozen=True)
class Table:
    """Texts. `marked`: numbers of the rows whose values are highlighted."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Collection[int] = ()


@dataclass(frozen=True)
class Details:
    """What a run's folder holds beside metrics. `files`: texts by name."""

    name: str
    folder: str
    command: str
    notes: Sequence[str]
    checkpoints: Table
    older_checkpoints: int
    slow: Table | None
    stragglers: Sequence[str]
    gantt: Markup
    window: str
    files: Mapping[str, str]


_SHOWN_CHECKPOINTS = 12
_SHOWN_PROFILE = 20_000  # characters


def summary(runs: Mapping[str, Run]) -> Table:
    """How each run went, a row each."""
    head = (
        *("run", "steps", "tokens", "training loss", "best validation loss", "tokens/s", "MFU", "memory, GiB"),
        *("skipped steps", "checkpoints", "goodput"),
    )
    rows = []
    for name, run in runs.items():
        steps = max(int(curve.steps[-1]) for curve in run.metrics.values())
        planned = run.config.get("training.max_steps")
        rows.append(
            (
                name,
                f"{steps:,}" + (f" of {planned:,}" if isinstance(planned, int) else ""),
                _last(run, "consumed_tokens", short),
                _last(run, "lm_loss", lambda value: f"{value:.4f}"),
                _best(run),
                _median(run, "tokens_per_second", lambda value: f"{value:,.0f}"),
                _median(run, "mfu", lambda value: f"{value:.1%}"),
                _greatest(run, "memory_gib"),
                _last(run, "skipped_steps", lambda value: f"{value:.0f}"),
                str(len(run.checkpoints)),
                f"{run.goodput.goodput:.1%}" if run.goodput.attempts else "–",
            )
        )
    return Table(head, rows)


def where_time_went(runs: Mapping[str, Run]) -> Table:
    """The parts of each run's time, a row each, for the runs that kept account."""
    rows = []
    for name, run in runs.items():
        if run.goodput.attempts:
            wall, seconds = run.goodput.wall, run.goodput.seconds
            parts = (f"{duration_text(seconds[part])} ({seconds[part] / wall:.1%})" for part in PARTS)
            rows.append((name, duration_text(wall), str(len(run.goodput.attempts)), *parts))
    return Table(("run", "all", "attempts", *PARTS), rows)


def slow_ranks(timeline: Timeline) -> Table:
    """The slowest ranks by phase, a row each."""
    rows = []
    for slow in timeline.slow:
        slowest = slow.slowest if slow.phase != WAITING else []  # who waits is not slow
        named = ", ".join(f"{rank} ({host}) {1e3 * seconds:,.1f}" for rank, host, seconds in slowest[:4])
        rows.append((slow.phase, f"{1e3 * slow.median:,.1f}", named))
    return Table(("phase", "median, ms a step", "slowest ranks, ms a step"), rows)


def duration_text(seconds: float) -> str:
    """Hours, minutes and seconds; of less than a minute, tenths of seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _last(run: Run, key: str, text: Any) -> str:
    curve = run.metrics.get(key)
    return "–" if curve is None else text(curve.values[-1]) if math.isfinite(curve.values[-1]) else "not finite"


def _median(run: Run, key: str, text: Any) -> str:
    curve = run.metrics.get(key)
    return "–" if curve is None or not len(curve.finite) else text(float(np.median(curve.finite)))


def _greatest(run: Run, key: str) -> str:
    curve = run.metrics.get(key)
    return "–" if curve is None or not len(curve.finite) else f"{curve.finite.max():.2f}"


def _best(run: Run) -> str:
    curve = run.metrics.get("validation_loss")
    if curve is None or not len(curve.finite):
        return "–"
    best = int(np.nanargmin(curve.values))
    return f"{curve.values[best]:.4f} at step {curve.steps[best]:,}"


def differences(runs: Mapping[str, Run]) -> Table:
    """Keys of the configuration that are not equal in all runs."""
    return Table(
        ("key", *runs), [row for row, differs in _side_by_side([run.config for run in runs.values()]) if differs]
    )


def environments(runs: Mapping[str, Run]) -> Table:
    """Versions and machines, with what differs highlighted."""
    shown = [{key: value for key, value in run.environment.items() if key != "command"} for run in runs.values()]
    found = _side_by_side(shown)
    marked = [number for number, (_, differs) in enumerate(found) if differs]
    return Table(("", *runs), [row for row, _ in found], marked)


def _side_by_side(mappings: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, ...], bool]]:
    """A row of texts for each key, and whether they differ."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    rows = [(key, *(_value(mapping[key]) if key in mapping else "–" for mapping in mappings)) for key in keys]
    return [(row, len(set(row[1:])) > 1) for row in rows]


def _value(value: Any) -> str:
    """As a recipe has it."""
    return json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value


def details(name: str, run: Run) -> Details:
    """What a folder holds beside metrics, and what of it could not be read."""
    command = run.environment.get("command")
    shown = run.checkpoints[:_SHOWN_CHECKPOINTS]
    rows = [(f"{c.step:,}", f"{c.size / 2**20:,.1f} MiB", c.problem or "whole") for c in shown]
    cut = {
        file: text if len(text) <= _SHOWN_PROFILE else text[:_SHOWN_PROFILE] + "\n…"
        for file, text in run.profiles.items()
    }
    return Details(
        name,
        str(run.folder),
        shlex.join(map(str, command)) if isinstance(command, list) else "",
        run.notes,
        Table(("checkpoint of step", "size", "files"), rows),
        len(run.checkpoints) - len(shown),
        slow_ranks(run.timeline) if run.timeline else None,
        stragglers(run.timeline) if run.timeline else [],
        gantt(run.timeline) if run.timeline else Markup(),
        f"Steps {run.timeline.step - run.timeline.steps + 1:,} to {run.timeline.step:,}" if run.timeline else "",
        cut | ({"config.yaml": run.config_text} if run.config_text else {}),
    )
