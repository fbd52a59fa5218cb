"""Curves made drawable: smoothed, and thinned without losing a peak."""

import numpy as np

from vishwamai_mp.observability.run_folder import Curve

STRETCHES = 180  # of a curve; each keeps at most five points


def smooth(curve: Curve, half_life: float) -> Curve:
    """Mean of the values around each step, NaN left out; one `half_life` steps away, before or after, counts half."""
    known = np.isfinite(curve.values)
    values = np.where(known, curve.values, 0.0)
    decays = np.exp2(-np.diff(curve.steps, prepend=curve.steps[:1]) / half_life)
    total, weight = (_both_ways(numbers, decays) for numbers in (values, known.astype(float)))
    with np.errstate(invalid="ignore"):
        return Curve(curve.steps, np.where(known, total / weight, np.nan))


def _both_ways(numbers: np.ndarray, decays: np.ndarray) -> np.ndarray:
    """Each number and all others, decayed by their distance. `decays`: between a number and the one before."""
    backwards = np.append(decays[1:], 1.0)[::-1]
    return _decayed(numbers, decays) + _decayed(numbers[::-1], backwards)[::-1] - numbers


def _decayed(numbers: np.ndarray, decays: np.ndarray) -> np.ndarray:
    total, totals = 0.0, np.empty(len(numbers))
    for i, (number, decay) in enumerate(zip(numbers.tolist(), decays.tolist(), strict=True)):
        totals[i] = total = total * decay + number
    return totals


def thin(curve: Curve, stretches: int = STRETCHES) -> Curve:
    """At most five points of each of `stretches` equal parts: the first, lowest, highest, last, and a NaN.

    A line through them covers the same pixels as one through all (M4: Jugel et al., VLDB 2014, doi
    10.14778/2732951.2732953).
    """
    count = len(curve.steps)
    if count <= 5 * stretches:
        return curve
    edges = np.searchsorted(curve.steps, np.linspace(curve.steps[0], curve.steps[-1] + 1, stretches + 1))
    kept: set[int] = set()
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = curve.values[low:high]
        if not len(part):
            continue
        kept |= {low, high - 1}
        broken = np.isnan(part)
        if broken.any():
            kept.add(low + int(broken.argmax()))
        if not broken.all():
            kept |= {low + int(np.nanargmin(part)), low + int(np.nanargmax(part))}
    chosen = np.array(sorted(kept))
    return Curve(curve.steps[chosen], curve.values[chosen])


def last_of_each(curve: Curve, stretches: int = STRETCHES) -> Curve:
    """The last point of each of `stretches` equal parts, and the first of all: enough for a smooth curve."""
    if len(curve.steps) <= stretches:
        return curve
    ends = np.searchsorted(curve.steps, np.linspace(curve.steps[0], curve.steps[-1] + 1, stretches + 1)[1:]) - 1
    chosen = np.unique(np.append(ends.clip(0), 0))
    return Curve(curve.steps[chosen], curve.values[chosen])
