"""Smoothing and thinning against their definitions."""

import itertools

import numpy as np
import pytest

from vishwamai_mp.observability.curves import STRETCHES, last_of_each, smooth, thin
from vishwamai_mp.observability.run_folder import Curve


def noisy(count: int, seed: int = 0) -> Curve:
    rng = np.random.default_rng(seed)
    return Curve(np.cumsum(rng.integers(1, 4, count)), rng.normal(size=count))


def test_a_smooth_curve_is_the_weighted_mean():
    curve, half_life = noisy(50), 7.0
    curve.values[[3, 20, 49]] = np.nan
    known = np.isfinite(curve.values)
    weights = 0.5 ** (np.abs(curve.steps[:, None] - curve.steps) / half_life) * known
    expected = (weights * np.nan_to_num(curve.values)).sum(1) / weights.sum(1)
    found = smooth(curve, half_life).values
    assert found[known] == pytest.approx(expected[known], rel=1e-12)
    assert np.isnan(found[~known]).all()


def test_a_thin_curve_keeps_every_peak():
    curve = noisy(100_000)
    curve.values[54321] = 99.0
    curve.values[12345] = -99.0
    curve.values[777] = np.nan
    found = thin(curve)
    assert len(found.steps) <= 5 * STRETCHES
    assert (np.diff(found.steps) > 0).all()
    by_step = dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
    kept = dict(zip(found.steps.tolist(), found.values.tolist(), strict=True))
    assert {step: value for step, value in kept.items() if value == value} == {
        step: by_step[step] for step, value in kept.items() if value == value
    }
    assert {99.0, -99.0} <= set(kept.values())
    assert np.isnan(found.values).any()
    assert curve.steps[0] in kept
    assert curve.steps[-1] in kept
    # The band between lowest and highest is that of the whole curve, stretch by stretch.
    edges = np.linspace(curve.steps[0], curve.steps[-1] + 1, STRETCHES + 1)
    for low, high in itertools.pairwise(edges):
        whole = curve.values[(curve.steps >= low) & (curve.steps < high)]
        part = found.values[(found.steps >= low) & (found.steps < high)]
        assert (np.nanmin(part), np.nanmax(part)) == (np.nanmin(whole), np.nanmax(whole))


def test_a_short_curve_is_left_alone():
    curve = noisy(5 * STRETCHES)
    assert thin(curve) is curve
    assert last_of_each(noisy(STRETCHES)).steps.tolist() == noisy(STRETCHES).steps.tolist()


def test_stretches_without_a_point_and_without_a_number():
    steps = np.append(np.arange(1000), 10**7)
    curve = Curve(steps, np.append(np.full(1000, np.nan), 5.0))
    found = thin(curve)
    assert found.steps[-1] == 10**7
    assert np.isnan(found.values[:-1]).all()
    assert last_of_each(curve).steps.tolist() == [0, 999, 10**7]
