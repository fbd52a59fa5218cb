"""The tables of a report: results, configurations and environments side by side, what each folder holds."""

import html
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vishwamai_mp.observability.chart import short
from vishwamai_mp.observability.run_folder import Run

_SHOWN_CHECKPOINTS = 12
_SHOWN_PROFILE = 20_000  # characters


def summary(runs: Mapping[str, Run]) -> str:
    """How each run went, a row each."""
    head = (
        *("run", "steps", "tokens", "training loss", "best validation loss", "tokens/s", "MFU", "memory, GiB"),
        *("skipped steps", "checkpoints"),
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
            )
        )
    note = "Loss: nats per token, of the last logged step. Speed: median. Memory: the fullest process's peak."
    return _table(head, rows) + paragraph(note)


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


def differences(runs: Mapping[str, Run]) -> str:
    """Keys of the configuration that are not equal in all runs."""
    rows = [row for row, differs in _side_by_side([run.config for run in runs.values()]) if differs]
    heading = "<h2>Differences of the configurations</h2>"
    if not rows:
        return f"<section>{heading}{paragraph('None.')}</section>\n"
    return f"<section>{heading}{_table(('key', *runs), rows)}</section>\n"


def environments(runs: Mapping[str, Run]) -> str:
    """Versions and machines, with what differs highlighted."""
    shown = [{key: value for key, value in run.environment.items() if key != "command"} for run in runs.values()]
    found = list(_side_by_side(shown))
    if not found:
        return ""
    marks = [differs for _, differs in found]
    table = _table(("", *runs), [row for row, _ in found], marks)
    return f"<section><h2>Environment</h2>{table}</section>\n"


def _side_by_side(mappings: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, ...], bool]]:
    """A row of texts for each key, and whether they differ."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    rows = [(key, *(_value(mapping[key]) if key in mapping else "–" for mapping in mappings)) for key in keys]
    return [(row, len(set(row[1:])) > 1) for row in rows]


def _value(value: Any) -> str:
    """As a recipe has it."""
    return json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value


def details(name: str, run: Run) -> str:
    """What a folder holds beside metrics, and what of it could not be read."""
    parts = [f"<h2>{html.escape(name)}</h2>", paragraph(str(run.folder))]
    command = run.environment.get("command")
    if isinstance(command, list):
        parts.append(_fold("command", shlex.join(map(str, command))))
    parts += [f'<p class="wrong">{html.escape(note)}</p>' for note in run.notes]
    if run.checkpoints:
        rows = [
            (f"{c.step:,}", f"{c.size / 2**20:,.1f} MiB", c.problem or "whole")
            for c in run.checkpoints[:_SHOWN_CHECKPOINTS]
        ]
        parts.append(_table(("checkpoint of step", "size", "files"), rows))
        left = len(run.checkpoints) - len(rows)
        parts.append(paragraph(f"and {left:,} older" if left else ""))
    for file, text in run.profiles.items():
        cut = text if len(text) <= _SHOWN_PROFILE else text[:_SHOWN_PROFILE] + "\n…"
        parts.append(_fold(file, cut))
    if run.config_text:
        parts.append(_fold("config.yaml", run.config_text))
    return f"<section>{''.join(parts)}</section>\n"


def _fold(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def paragraph(text: str) -> str:
    """Of small print; nothing without a text."""
    return f'<p class="facts">{html.escape(text)}</p>' if text else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[bool] | None = None) -> str:
    """`marks`: rows whose values are highlighted."""
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=differs' if j and marks and marks[i] else ''}>{html.escape(cell)}</td>"
            for j, cell in enumerate(row)
        )
        + "</tr>"
        for i, row in enumerate(rows)
    )
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table><tr>{titles}</tr>{body}</table></div>'
