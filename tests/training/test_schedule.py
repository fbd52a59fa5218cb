"""The learning rate at each step, by hand."""

import math
from itertools import pairwise

import pytest

from vishwamai_mp.config import OptimizerConfig, PretrainConfig, ScheduleConfig, TrainingConfig, resolve
from vishwamai_mp.training.schedule import learning_rate

DECAYS = ("cosine", "linear", "constant", "wsd")


def rates(max_steps: int = 100, low: float | None = 0.1, count: int | None = None, **schedule) -> list[float]:
    """Learning rates with a peak of 1.0, of each step of the run or of `count`."""
    config = resolve(
        PretrainConfig(
            optimizer=OptimizerConfig(learning_rate=1.0, min_learning_rate=low),
            schedule=ScheduleConfig(**schedule),
            training=TrainingConfig(max_steps=max_steps),
        )
    )
    return [learning_rate(config, step) for step in range(count or max_steps)]


@pytest.mark.parametrize("decay", DECAYS)
def test_warm_up_is_linear_and_ends_at_the_peak(decay):
    assert rates(warmup_steps=4, decay=decay)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("decay", DECAYS)
def test_without_warm_up_the_first_step_has_the_peak(decay):
    assert rates(decay=decay)[0] == 1.0


def test_cosine():
    curve = rates(max_steps=20, warmup_steps=4, decay="cosine", count=30)
    assert curve[4] == 1.0
    assert curve[8] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way
    assert curve[12] == pytest.approx(0.55)  # half of it
    assert curve[16] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2)
    assert curve[20:] == pytest.approx([0.1] * 10)


def test_linear():
    curve = rates(max_steps=20, warmup_steps=4, decay="linear", count=30)
    assert curve[4:20:4] == pytest.approx([1.0, 0.775, 0.55, 0.325])
    assert curve[20:] == pytest.approx([0.1] * 10)


def test_constant_never_decays():
    assert rates(max_steps=20, warmup_steps=4, decay="constant", count=50)[3:] == [1.0] * 47


def test_warm_up_stable_decay():
    curve = rates(max_steps=20, warmup_steps=4, decay="wsd", wsd_decay_steps=5, count=25)
    assert curve[3:16] == [1.0] * 13
    assert curve[16:20] == pytest.approx([0.82, 0.64, 0.46, 0.28])
    assert curve[20:] == pytest.approx([0.1] * 5)


def test_the_final_decay_of_wsd_is_a_tenth_unless_said():
    curve = rates(max_steps=200, decay="wsd")
    assert curve.count(1.0) == 181  # step 180 is where the decay begins, still at the peak
    assert curve[199] == pytest.approx(0.1 + 0.9 / 20)


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd"])
def test_decay_may_end_before_the_run_does(decay):
    curve = rates(max_steps=50, decay=decay, decay_steps=30)
    assert curve[29] > 0.1
    assert curve[30:] == pytest.approx([0.1] * 20)


def test_the_minimum_is_a_tenth_of_the_peak_unless_said():
    assert rates(max_steps=10, low=None, decay="linear", count=20)[-1] == pytest.approx(0.1)
    assert rates(max_steps=10, low=0.0, decay="linear", count=20)[-1] == 0.0


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_no_jumps_and_never_up_after_the_warm_up(decay, warmup):
    curve = rates(max_steps=100, warmup_steps=warmup, decay=decay, wsd_decay_steps=40, count=130)
    assert max(abs(a - b) for a, b in pairwise(curve)) <= (0.1 if warmup else 0.9 / 40) + 1e-9
    after = curve[max(0, warmup - 1) :]
    assert all(a >= b for a, b in pairwise(after))
    assert min(curve[warmup:]) == pytest.approx(0.1)


def test_a_warm_up_of_one_step_starts_at_the_peak():
    assert rates(warmup_steps=1, decay="constant") == [1.0] * 100
