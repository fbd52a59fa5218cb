"""A line chart as SVG, drawn for every choice a reader may make: steps or tokens across, linear or logarithmic up.

All variants stand in the page and style sheets show one (`page.py`), so the chart needs no script to be seen.
"""

import html
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vishwamai_mp.observability.curves import last_of_each, smooth, thin
from vishwamai_mp.observability.run_folder import Curve

WIDTH, HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 28
COLOURS = 8  # of the page's palette; then they come again, dashed
FEW = 30  # points that are drawn as dots too, and not smoothed


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        colour: number of the page's palette.
        tokens: consumed tokens over steps; None: not known.
    """

    label: str
    colour: int
    curve: Curve
    tokens: Curve | None


@dataclass(frozen=True)
class _Scale:
    """From numbers to pixels. `low` < `high`; both above 0 if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if self.log:
            share = np.log10(values / self.low) / math.log10(self.high / self.low)
        else:
            share = (values - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for multiples in ((1,), (1, 3), (1, 2, 5)):
            found = [m * 10.0**k for k in decades for m in multiples if self.low <= m * 10.0**k <= self.high]
            if len(found) >= 4:
                return found[:: math.ceil(len(found) / 8)]
        return nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers within [low, high]: multiples of 1, 2 or 5 × 10^k."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(number: float, digits: int = 4) -> str:
    """A number for an axis or a table: 12k, 3.5M, 0.25, 3e-4."""
    size = abs(number)
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor and size >= 1e4:
            return f"{number / factor:.{digits}g}{suffix}"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{number:.{max(digits, 4)}g}"


def labels(ticks: Sequence[float]) -> list[str]:
    """As short as they can be while different."""
    for digits in range(3, 12):
        texts = [short(tick, digits) for tick in ticks]
        if len(set(texts)) == len(texts):
            break
    return texts if ticks else []


def line_chart(title: str, lines: Sequence[Line], half_life: float | None = None, *, keyed: bool = True) -> str:
    """A `<figure>` with title, legend, picture and the numbers that the page shows on hover.

    Args:
        lines: each with a finite value.
        half_life: of the smoothed curves, steps; None: none are drawn.
        keyed: with a legend, where there are several lines.
    """
    values = np.concatenate([line.curve.finite for line in lines])
    across = {"steps": _across([line.curve.steps for line in lines])}
    if all(line.tokens is not None for line in lines):
        across["tokens"] = _across([_tokens(line, line.curve.steps) for line in lines])
    bottom, top = HEIGHT - _BOTTOM, _TOP
    up = {"linear": _Scale(*_room(values.min(), values.max()), bottom, top)}
    if values.min() > 0 and values.max() > values.min():
        up["log"] = _Scale(values.min() / 1.05, values.max() * 1.05, bottom, top, log=True)
    drawn = [_frame()]
    drawn += [_grid_across(kind, scale) for kind, scale in across.items()]
    drawn += [_grid_up(kind if len(up) > 1 else "", scale) for kind, scale in up.items()]
    data = []
    for number, line in enumerate(lines):
        points = thin(line.curve)
        style = f"stroke:var(--c{line.colour % COLOURS})" + (";stroke-dasharray:6 4" if line.colour >= COLOURS else "")
        smoothed = half_life if len(line.curve.steps) > FEW else None
        kind = "line" if smoothed is None else "line raw"
        drawn += _paths(points, line, kind, style, across, up, f' data-line="{number}"')
        if smoothed is not None:
            drawn += _paths(last_of_each(smooth(line.curve, smoothed)), line, "line smooth", style, across, up, "")
        data.append(_numbers(points, line, "tokens" in across))
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'{"".join(drawn)}<line class="cross" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/></svg>'
    )
    numbers = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(title)}</b>{legend(lines) if keyed else ""}</figcaption>'
        f'{picture}<script type="application/json">{numbers}</script></figure>\n'
    )


def legend(lines: Sequence[Line]) -> str:
    """What each colour stands for; nothing where there is one."""
    if len(lines) < 2:
        return ""
    return "".join(
        f'<span class="key{" dashed" if line.colour >= COLOURS else ""}" style="--key:var(--c{line.colour % COLOURS})">'
        f"{html.escape(line.label)}</span>"
        for line in lines
    )


def _across(values: Sequence[np.ndarray]) -> _Scale:
    low, high = float(min(v.min() for v in values)), float(max(v.max() for v in values))
    room = 0 if high > low else 1  # on both sides of a place alone, which would lie on the axis
    return _Scale(low - room, high + room, _LEFT, WIDTH - _RIGHT)


def _room(low: float, high: float) -> tuple[float, float]:
    """A range with some air; around a constant, a range at all. Air does not take a positive curve below zero."""
    air = (high - low) * 0.04 or abs(high) * 0.5 or 0.5
    return (max(0.0, low - air) if low >= 0 else low - air), high + air


def _tokens(line: Line, steps: np.ndarray) -> np.ndarray:
    assert line.tokens is not None
    return np.interp(steps, line.tokens.steps, line.tokens.values)


def _frame() -> str:
    return f'<path class="axis" d="M{_LEFT} {_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>'


def _grid_across(kind: str, scale: _Scale) -> str:
    def draw(x: float, text: str) -> str:
        bottom = HEIGHT - _BOTTOM
        return f'<path d="M{x} {bottom}v4"/><text x="{x}" y="{bottom + 19}" text-anchor="middle">{text}</text>'

    return _ticks(f"x-{kind}", scale, draw)


def _grid_up(kind: str, scale: _Scale) -> str:
    def draw(y: float, text: str) -> str:
        line = f'<path d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>'
        return f'{line}<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'

    return _ticks(f"y-{kind}" if kind else "", scale, draw)


def _ticks(kind: str, scale: _Scale, draw: Callable[[float, str], str]) -> str:
    ticks = scale.ticks()
    places = np.round(scale(np.array(ticks)), 1).tolist()
    return f'<g class="tick {kind}">' + "".join(map(draw, places, labels(ticks))) + "</g>"


def _paths(
    points: Curve, line: Line, kind: str, style: str, across: dict[str, _Scale], up: dict[str, _Scale], mark: str
) -> list[str]:
    """The curve for each choice of axes; choices that look the same share a path."""
    classes: dict[tuple[str, str], list[str]] = {}
    for x_name, x_scale in across.items():
        x = x_scale(points.steps if x_name == "steps" else _tokens(line, points.steps))
        for y_name, y_scale in up.items():
            key = (_path(x, y_scale(points.values)), f"y-{y_name}" if len(up) > 1 else "")
            classes.setdefault(key, []).append(f"x-{x_name}")
    drawn = [
        f'<path class="{kind} {" ".join(names)} {y_class}" style="{style}"{mark} d="{d}"/>'
        for (d, y_class), names in classes.items()
    ]
    if kind != "line smooth" and len(points.steps) <= FEW:
        drawn += [
            f'<path class="dots {" ".join(names)} {y_class}" style="{style}" d="{_dots(d)}"/>'
            for (d, y_class), names in classes.items()
        ]
    return drawn


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A path through the points, broken at NaN; a point alone is a dot."""
    parts, pen_up = [], True
    for place, height in zip(np.round(x, 1).tolist(), np.round(y, 1).tolist(), strict=True):
        if height != height:  # NaN
            pen_up = True
            continue
        parts.append(f"{'M' if pen_up else 'L'}{place:g} {height:g}")
        if pen_up:
            parts.append("h0")
        pen_up = False
    return "".join(parts)


def _dots(path: str) -> str:
    """The points of a path, each a line of no length, which round ends make a dot."""
    return "".join(f"M{place}h0" for place in re.findall(r"[ML]([^MLh]+)", path))


def _numbers(points: Curve, line: Line, with_tokens: bool) -> dict[str, object]:
    """What hovering shows, point by point of the path."""
    finite = np.isfinite(points.values)
    steps = points.steps[finite]
    return {
        "label": line.label,
        "colour": line.colour % COLOURS,
        "steps": steps.tolist(),
        "tokens": _tokens(line, steps).astype(int).tolist() if with_tokens else [],
        "values": [float(f"{value:.5g}") for value in points.values[finite].tolist()],
    }
