"""The Countdown study: its puzzles, its verifier, and that its strategies run."""

import itertools
import random
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

_FOLDER = str(Path(__file__).resolve().parents[2] / "examples/reasoning")


@pytest.fixture
def countdown(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(_FOLDER)
    import countdown

    return countdown


def test_made_solutions_are_right_and_damaged_ones_are_not(countdown: Any) -> None:
    rng = random.Random(1)
    for count in (3, 4):
        for _ in range(50):
            puzzle, solution = countdown.random_puzzle(rng, count)
            tokens = countdown.text(puzzle, solution)[len(puzzle.prompt) :]
            assert countdown.verify(puzzle, tokens)
            assert countdown.verify(puzzle, tokens[:-1])  # the end token may be missing
            # Another operation may give the same: 8 / 1 = 8 * 1.
            for place in (i for i, token in enumerate(tokens[:-1]) if countdown.decode([token]) not in "+-*/"):
                damaged = list(tokens)
                damaged[place] = damaged[place] + 1
                assert not countdown.verify(puzzle, damaged), countdown.decode(damaged)
            assert not countdown.verify(puzzle, tokens[: tokens.index(countdown.STEP) + 1])
            assert not countdown.verify(countdown.Puzzle(puzzle.numbers, puzzle.target + 1), tokens)


def reachable(numbers: list[Fraction]) -> set[Fraction]:
    """Every result of using all numbers, fractions and negative ones included: an oracle that knows no rules."""
    if len(numbers) == 1:
        return {numbers[0]}
    found: set[Fraction] = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for result in (a + b, a - b, a * b, *([a / b] if b else [])):
            found |= reachable([*rest, result])
    return found


def test_the_solver_finds_what_is_there(countdown: Any) -> None:
    rng = random.Random(2)
    for _ in range(40):
        numbers = tuple(sorted(rng.randint(1, 13) for _ in range(3)))
        every = reachable([Fraction(number) for number in numbers])
        for target in range(10, 30):
            solution = countdown.solve(numbers, target, rng)
            if solution is None:
                continue
            assert target in every
            puzzle = countdown.Puzzle(numbers, target)
            assert countdown.verify(puzzle, countdown.text(puzzle, solution)[len(puzzle.prompt) :])


def strategies() -> dict[str, dict[str, float]]:
    """Runs in a worker: every strategy on a few puzzles, by a model that knows nothing."""
    import argparse

    sys.path.insert(0, _FOLDER)
    import study
    from countdown import random_puzzle

    from vishwamai_mp.inference import Generator
    from vishwamai_mp.model import build_model
    from vishwamai_mp.runtime import initialize

    options = argparse.Namespace(hidden=32, layers=1, threads=1, numbers=3, train_steps=10)
    config = study.study_config(options, 0)
    runtime = initialize(config)
    generator = Generator(config, runtime, build_model(config, runtime)[0])
    rng = random.Random(3)
    puzzles = [random_puzzle(rng, 3)[0] for _ in range(3)]
    return study.examine(generator, config.tree, puzzles, options, 0)


def test_all_strategies_run(workers: Any) -> None:
    found = workers.run(strategies, 1)[0]
    assert set(found) >= {"greedy", "beam", "best of N", "tree, values", "tree, random scores"}
    assert all(row["tokens"] > 0 and row["chosen"] <= row["any"] for row in found.values())
