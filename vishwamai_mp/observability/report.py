"""Runs as one self-contained HTML page: curves, what the components do, configurations side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from vishwamai_mp.config.wording import counted
from vishwamai_mp.observability.chart import FEW, Line, legend, line_chart
from vishwamai_mp.observability.curves import STRETCHES
from vishwamai_mp.observability.goodput_ledger import NOTE
from vishwamai_mp.observability.page import page, render
from vishwamai_mp.observability.panels import Panel, panels_of
from vishwamai_mp.observability.report_style import SCRIPT, STYLE
from vishwamai_mp.observability.report_tables import details, differences, environments, summary, where_time_went
from vishwamai_mp.observability.run_folder import Curve, Run


def render_report(runs: Sequence[Run]) -> str:
    """The page. Equal run folders give equal bytes."""
    names = unique_names(runs)
    tokens = [_finite(run.metrics.get("consumed_tokens")) for run in runs]
    curves = [curve for run in runs for curve in run.metrics.values()]
    span = max(int(curve.steps[-1] - curve.steps[0]) for curve in curves)
    smoothed = any(len(curve.steps) > FEW for curve in curves)
    half_life = max(1, round(span / 100)) if smoothed else None
    runs_named = dict(zip(names, runs, strict=True))
    title = f"Run report: {', '.join(names)}"
    across = {"across": ("steps", "tokens")} if all(tokens) else {}
    none = np.zeros(0)
    keys = legend([Line(name, i, Curve(none, none), None) for i, name in enumerate(names)])
    tokens_of = dict(zip(names, tokens, strict=True))
    sections = [
        {"title": section, "note": note, "charts": [Markup(_chart(panel, tokens_of, half_life)) for panel in panels]}
        for section, panels, note in panels_of(runs_named)
    ]
    body = render(
        "report.html",
        title=title,
        facts=_facts(runs, half_life),
        summary=summary(runs_named),
        time=where_time_went(runs_named),
        time_note=NOTE,
        choices=across | {"up": ("linear", "log")},
        smoothed=smoothed,
        legend=Markup(keys),
        sections=sections,
        differences=differences(runs_named),
        environments=environments(runs_named),
        details=[details(name, run) for name, run in runs_named.items()],
    )
    return page(title, body, STYLE, SCRIPT)


def unique_names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as many folders above them as it takes to tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths))):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i + 1})" for i, name in enumerate(names)]


def _chart(panel: Panel, tokens: Mapping[str, Curve | None], half_life: float | None) -> str:
    lines = [Line(item.label, item.colour, item.curve, tokens[item.run]) for item in panel.curves]
    keyed = len(tokens) == 1  # of several runs, the page's head has the legend
    return line_chart(panel.title, lines, half_life if panel.noisy else None, keyed=keyed)


def _finite(curve: Curve | None) -> Curve | None:
    if curve is None or not len(curve.finite):
        return None
    known = np.isfinite(curve.values)
    return Curve(curve.steps[known], curve.values[known])


def _facts(runs: Sequence[Run], half_life: int | None) -> str:
    longest = max(len(curve.steps) for run in runs for curve in run.metrics.values())
    facts = f"Up to {counted(longest, 'logged step', ',')}."
    if longest > 5 * STRETCHES:
        facts += (
            f" Curves are thinned: of each of {STRETCHES} stretches the first, lowest, highest and last value are"
            " drawn, so no peak is lost."
        )
    if half_life is not None:
        facts += (
            f" Smoothed: a mean in which a value {counted(half_life, 'step', ',')} away, before or after, counts half."
        )
    return facts
