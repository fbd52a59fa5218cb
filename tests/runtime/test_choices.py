"""Ways to the same result: that they are, and how one of them is chosen and kept."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vishwamai_mp.config import UserError
from vishwamai_mp.model import core_attention  # noqa: F401  (makes its choices known)
from vishwamai_mp.runtime import choices, products  # noqa: F401
from vishwamai_mp.runtime.choices import Choice

_NAMES = sorted(choices._choices)


def use_clock(monkeypatch: pytest.MonkeyPatch, clock: Callable[[], float]) -> None:
    for name in ("perf_counter", "thread_time"):
        monkeypatch.setattr(choices.time, name, clock)


@pytest.fixture
def slow_and_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Choice:
    """The only choice, of two ways of which the second is faster, on a machine that knows nothing yet."""
    seconds = iter(range(1_000_000))
    clock = {"now": 0.0}

    def way(takes: float) -> Any:
        def run() -> int:
            clock["now"] += takes
            return next(seconds)

        return run

    monkeypatch.setattr(choices, "_choices", {})
    monkeypatch.setattr(choices, "_in_force", {})
    use_clock(monkeypatch, lambda: clock["now"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VISHWAMAI_WAYS")
    return Choice("walk", {"slow": way(2.0), "fast": way(1.0)}, lambda: [()])


@pytest.mark.parametrize("name", _NAMES)
def test_all_ways_lead_to_the_same(name):
    """Results and, where it is trained, gradients; within the rounding of the type they are computed in."""
    choice = choices._choices[name]
    found = []
    for way in choice.ways.values():
        arguments = [x.clone() if isinstance(x, torch.Tensor) and not choice.trained else x for x in choice.trial()[0]]
        leaves = [x for x in arguments if isinstance(x, torch.Tensor)]
        for x in leaves:
            if choice.trained:
                x.retain_grad()
        out = way(*arguments)
        if choice.trained:
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
            (out * weights).sum().backward()
        found.append([out.detach(), *(x.grad for x in leaves if choice.trained)])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            bound = 16 * torch.finfo(ours.dtype).eps * float(theirs.abs().max())
            assert float((ours - theirs).abs().max()) <= bound


def test_the_fastest_is_measured_once_and_kept(slow_and_fast, tmp_path, monkeypatch):
    assert choices.decide() == {"walk": "fast"}
    (kept,) = (tmp_path / "vishwamai_mp").glob("ways-*.json")
    assert json.loads(kept.read_text())["seconds"] == {"walk": {"slow": 2.0, "fast": 1.0}}
    monkeypatch.setattr(choices, "_time", lambda *_: pytest.fail("measured again"))
    assert choices.decide() == {"walk": "fast"}


@pytest.mark.parametrize("content", ["", "[]", '{"seconds": 3}', '{"seconds": {"walk": {"slow": "x", "fast": 1.0}}}'])
def test_a_broken_record_is_measured_anew(slow_and_fast, tmp_path, content):
    choices.decide()
    (kept,) = (tmp_path / "vishwamai_mp").glob("ways-*.json")
    kept.write_text(content)
    assert choices.decide() == {"walk": "fast"}
    assert json.loads(kept.read_text())["seconds"] == {"walk": {"slow": 2.0, "fast": 1.0}}


def test_a_choice_within_anothers_trial_is_timed_once(slow_and_fast, monkeypatch):
    Choice("walk_twice", {"so": lambda: (slow_and_fast(), slow_and_fast()), "otherwise": lambda: None}, lambda: [()])
    timed, time_choice = [], choices._time

    def time_and_count(choice: Choice, most_seconds: float) -> Any:
        timed.append(choice.name)
        return time_choice(choice, most_seconds)

    monkeypatch.setattr(choices, "_time", time_and_count)
    choices.measured()
    assert timed == ["walk", "walk_twice"]


def test_a_little_faster_is_not_enough(slow_and_fast, monkeypatch):
    monkeypatch.setattr(choices, "_time", lambda *_: {"slow": 1.0, "fast": 0.97})
    assert choices.decide() == {"walk": "slow"}


def test_a_machine_too_busy_to_measure_takes_the_first_and_keeps_nothing(slow_and_fast, tmp_path, monkeypatch):
    now = iter(2.0**n for n in range(1000))  # no two times are alike
    use_clock(monkeypatch, lambda: next(now))
    assert choices.decide() == {"walk": "slow"}
    assert not (tmp_path / "vishwamai_mp").exists()


def test_a_busy_machine_is_not_measured_for_long(slow_and_fast, tmp_path, monkeypatch):
    clock, looked = iter(range(0, 1000, 2)), itertools.count(1)
    use_clock(monkeypatch, lambda: 2.0 ** next(looked))
    monkeypatch.setattr(choices.time, "monotonic", lambda: next(clock))
    assert choices.decide() == {"walk": "slow"}
    assert next(looked) - 1 == 2 * 2 * 2  # rounds within the limit, ways, beginning and end of each


def test_all_choices_together_have_that_time(slow_and_fast, monkeypatch):
    """What one leaves is for those after it."""
    for name in ("swim", "fly"):
        Choice(name, {"slow": lambda: None, "fast": lambda: None}, lambda: [()])
    clock, allowed = iter((10.0, 10.0, 11.0, 11.0)), []
    monkeypatch.setattr(choices.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(choices, "_time", lambda _, most: allowed.append(most))
    choices.measured()
    assert allowed == [5 / 3, 4 / 2, 4 / 1]


def test_one_threads_time_is_the_processors(slow_and_fast, monkeypatch):
    processors, wall = itertools.count(0.0, 3.0), itertools.count(0.0, 4.0)
    monkeypatch.setattr(choices.time, "thread_time", lambda: next(processors))
    monkeypatch.setattr(choices.time, "perf_counter", lambda: next(wall))
    for threads, seconds in ((1, 3.0), (2, 4.0)):
        monkeypatch.setattr(choices.torch, "get_num_threads", lambda threads=threads: threads)
        assert choices._time(choices._choices["walk"], 5.0) == {"slow": seconds, "fast": seconds}


def test_the_environment_decides(slow_and_fast, tmp_path, monkeypatch):
    monkeypatch.setenv("VISHWAMAI_WAYS", "first")
    assert choices.decide() == {"walk": "slow"}
    (tmp_path / "mine.json").write_text('{"walk": "fast"}')
    monkeypatch.setenv("VISHWAMAI_WAYS", str(tmp_path / "mine.json"))
    monkeypatch.setattr(choices, "_time", lambda *_: pytest.fail("measured"))
    assert choices.decide() == {"walk": "fast"}
    assert slow_and_fast() is not None
    assert choices.ways_in_force() == {"walk": "fast"}


def test_a_run_keeps_its_table(slow_and_fast, tmp_path, monkeypatch):
    path = tmp_path / "ways.json"
    assert choices.table_of_run(path) == {"walk": "fast"}
    monkeypatch.setenv("VISHWAMAI_WAYS", "first")  # a restart elsewhere would choose otherwise
    assert choices.table_of_run(path) == {"walk": "fast"}
    Choice("swim", {"crawl": lambda: 1, "dive": lambda: 2}, lambda: [()])  # a later version knows more
    assert choices.table_of_run(path) == {"walk": "fast", "swim": "crawl"} == json.loads(path.read_text())


@pytest.mark.parametrize("content", ["{", '["walk"]', '{"walk": 1}'])
def test_a_table_that_is_none_is_refused(slow_and_fast, tmp_path, content):
    path = tmp_path / "ways.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"ways\.json: .* delete it to measure anew"):
        choices.table_of_run(path)


def test_an_unknown_way_is_refused_by_name(slow_and_fast, tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text('{"walk": "run"}')
    monkeypatch.setenv("VISHWAMAI_WAYS", str(tmp_path / "mine.json"))
    with pytest.raises(UserError, match="walk=run is not known"):
        slow_and_fast()
    with pytest.raises(UserError, match="walk=run is not known; it is one of slow, fast"):
        choices.use({"walk": "run"})


def test_nothing_is_timed_where_nothing_is_computed(slow_and_fast):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        slow_and_fast()
    assert choices.ways_in_force() == {}
