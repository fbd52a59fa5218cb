"""The Countdown study: its puzzles, its verifier, and that its strategies run."""

import itertools
import json
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from vishwamai_mp.data.marks import BEGINS, LEARNT
from vishwamai_mp.tree_of_thoughts import Node, SearchResult, Thought

_FOLDER = str(Path(__file__).resolve().parents[2] / "examples/reasoning")


@pytest.fixture
def countdown(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(_FOLDER)
    import countdown

    return countdown


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(_FOLDER)
    import rows

    return rows


@pytest.fixture
def strategies(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(_FOLDER)
    import strategies

    return strategies


def test_made_solutions_are_right_and_damaged_ones_are_not(countdown: Any) -> None:
    rng = random.Random(1)
    for count in (3, 4):
        for _ in range(50):
            puzzle, solution = countdown.random_puzzle(rng, count)
            tokens = countdown.text(puzzle, solution)[len(puzzle.prompt) :]
            assert countdown.verify(puzzle, tokens)
            assert countdown.verify(puzzle, tokens[:-1])  # the end token may be missing
            for place in range(len(tokens) - 1):
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


def test_moves_that_begin_differently_are_different(countdown: Any) -> None:
    rng = random.Random(4)
    for count in (2, 3, 4):
        for _ in range(50):
            numbers = tuple(sorted(rng.randint(0, 13) for _ in range(count)))
            found = list(countdown.moves(numbers))
            assert len({move.token for move in found}) == len(found)
            assert len({(move.a, move.b, move.token // 6) for move in found}) == len(found)
            assert all(countdown.is_move(move.token) for move in found)


def test_no_puzzle_is_trained_on_and_asked(rows: Any) -> None:
    seen = {
        use: {p for p, _ in itertools.islice(rows.puzzles(use, 3, 0), 300)} for use in ("texts", "rollouts", "exam")
    }
    assert all(len(puzzles) > 100 for puzzles in seen.values())
    assert not any(a & b for a, b in itertools.combinations(seen.values(), 2))


def test_what_is_learnt_of_texts(countdown: Any, rows: Any) -> None:
    """Of random moves only results, of solutions all but the last result."""
    kinds = set()
    for tokens, marks in (rows.Texts(4, 0)[i].tolist() for i in range(20)):
        starts = [i for i, mark in enumerate(marks) if mark & BEGINS]
        for start, end in itertools.pairwise(starts):
            text, learnt = tokens[start:end], [bool(mark & LEARNT) for mark in marks[start:end]]
            numbers = [int(word) for word in countdown.decode([*text[:4], text[5]]).split()]
            solved = countdown.verify(countdown.Puzzle(tuple(numbers[:4]), numbers[4]), text[7:])
            moves = {i for i, token in enumerate(text) if countdown.is_move(token)}
            last = len(text) - 1
            unlearnt = {i for i, is_learnt in enumerate(learnt) if not is_learnt} - set(range(7))
            assert not any(learnt[:7])
            assert unlearnt in ({last - 4, last - 2}, moves | {last})
            assert solved or last in unlearnt
            assert text[last - 4] == text[last - 2] >= 30  # the result
            kinds.add((solved, last in unlearnt))
    assert kinds >= {(True, False), (False, True)}


def test_shuffled_values_are_those_of_their_depth(strategies: Any) -> None:
    values = strategies.ValuesByDepth()
    nodes = [Node(0, None, 0, [1]), Node(1, 0, 1, [2], score=0.25), Node(2, 1, 2, [3], score=0.5), Node(3, 1, 2, [4])]
    values.add(SearchResult(nodes))
    score = values.shuffled(random.Random(0))
    assert {score(Thought((1,), (7, 1), "", False)) for _ in range(20)} == {0.25}
    assert {score(Thought((1,), (7, 1, 7, 1), "", False)) for _ in range(20)} == {0.0, 0.5}


def test_a_short_run_of_the_study(tmp_path: Path) -> None:
    small = "--seeds 1 --jobs 1 --train-steps 3 --value-steps 3 --hidden 32 --layers 1 --rollouts 3 --puzzles 3"
    game = tmp_path / "game24.csv"
    game.write_text("Rank,Puzzles\n901,1 4 8 8\n902,2 3 5 12\n7,1 1 4 6\n")
    folders = ["--output", str(tmp_path), "--weights", str(tmp_path / "weights")]
    command = [sys.executable, f"{_FOLDER}/study.py", *folders, "--game24", str(game), *small.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [seed["seed"] for seed in found["seeds"]] == [0]
    for exam in ("countdown", "game_of_24"):
        rows = found["summary"][exam]
        assert set(rows) >= {"greedy", "beam", "best of N", "tree, values", "tree, shuffled values"}
        assert all(row["tokens"] > 0 and row["lowest"] <= row["chosen"] <= row["highest"] for row in rows.values())
        assert all(row["chosen"] <= row["any"] for row in rows.values())
    assert (tmp_path / "results.png").stat().st_size > 1000
    other = subprocess.run([*command, "--train-steps", "4"], capture_output=True, text=True, timeout=300)
    assert other.returncode == 1
    assert "was trained with" in other.stderr.splitlines()[-1]
    assert "give another --weights" in other.stderr.splitlines()[-1]
