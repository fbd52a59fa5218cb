"""Countdown: reach a target from a few numbers with + − × ÷, each number used once. Puzzles, solutions, verifier.

A text is `numbers : target > move a b = c , numbers left [STEP] … [STEP] end`. Every number is one token, and so is
every move (an operation and the places of its two numbers), so that a small model can learn to calculate, and thoughts
that begin differently are different moves.
"""

import csv
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LARGEST = 199  # numbers above do not occur
END, STEP, COLON, BEGIN, EQUALS, COMMA = range(6)
_OPERATORS = "+-*/"
_PLACES = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]  # of the two numbers among those left, ascending
_FIRST_MOVE = 6
_FIRST_NUMBER = _FIRST_MOVE + len(_OPERATORS) * len(_PLACES)
VOCABULARY = _FIRST_NUMBER + LARGEST + 1
_SYMBOLS = {END: "<end>", STEP: "[STEP]", COLON: ":", BEGIN: ">", EQUALS: "=", COMMA: ","}


@dataclass(frozen=True)
class Puzzle:
    """Numbers, ascending, and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> list[int]:
        return [*map(_token, self.numbers), COLON, _token(self.target), BEGIN]


@dataclass(frozen=True)
class Move:
    """An operation on two numbers, the larger first, and its result; `token` names it among those of its numbers."""

    token: int
    a: int
    b: int
    result: int


def moves(numbers: Sequence[int]) -> Iterator[Move]:
    """Every operation on two of the numbers (ascending) whose result is a number from 0 to `LARGEST`, each once."""
    seen = set()
    for (i, j), (place, operator) in itertools.product(
        itertools.combinations(range(len(numbers)), 2), enumerate(_OPERATORS)
    ):
        a, b = numbers[j], numbers[i]
        result = _apply(a, operator, b)
        if result is not None and (a, b, operator) not in seen:
            seen.add((a, b, operator))
            yield Move(_FIRST_MOVE + place * len(_PLACES) + _PLACES.index((i, j)), a, b, result)


def _apply(a: int, operator: str, b: int) -> int | None:
    match operator:
        case "+":
            result = a + b
        case "-":
            result = a - b
        case "*":
            result = a * b
        case _:
            if b == 0 or a % b:
                return None
            result = a // b
    return result if 0 <= result <= LARGEST else None


def after(numbers: Sequence[int], move: Move) -> tuple[int, ...]:
    """The numbers that are left, ascending."""
    rest = list(numbers)
    rest.remove(move.a)
    rest.remove(move.b)
    return tuple(sorted([*rest, move.result]))


def solve(numbers: tuple[int, ...], target: int, rng: random.Random) -> list[Move] | None:
    """One of the solutions, found in random order; None if there is none."""
    if len(numbers) == 1:
        return [] if numbers[0] == target else None
    options = list(moves(numbers))
    rng.shuffle(options)
    for move in options:
        rest = solve(after(numbers, move), target, rng)
        if rest is not None:
            return [move, *rest]
    return None


def random_puzzle(rng: random.Random, count: int, highest: int = 13) -> tuple[Puzzle, list[Move]]:
    """A solvable puzzle and a solution: random numbers, random operations, and what comes out is the target."""
    while True:
        numbers = tuple(sorted(rng.randint(1, highest) for _ in range(count)))
        solution = random_moves(rng, numbers)
        if 10 <= solution[-1].result <= 99:
            return Puzzle(numbers, solution[-1].result), solution


def random_moves(rng: random.Random, numbers: tuple[int, ...]) -> list[Move]:
    """Moves until one number is left, whatever it is."""
    made = []
    while len(numbers) > 1:
        made.append(rng.choice(list(moves(numbers))))
        numbers = after(numbers, made[-1])
    return made


def text(puzzle: Puzzle, made: Sequence[Move]) -> list[int]:
    """Prompt and moves as tokens."""
    tokens, left = puzzle.prompt, puzzle.numbers
    for move in made:
        left = after(left, move)
        numbers = [_token(move.a), _token(move.b), EQUALS, _token(move.result), COMMA, *map(_token, left)]
        tokens += [move.token, *numbers, STEP]
    return [*tokens, END]


def is_move(token: int) -> bool:
    return _FIRST_MOVE <= token < _FIRST_NUMBER


def verify(puzzle: Puzzle, tokens: Sequence[int]) -> bool:
    """Whether a continuation of the prompt uses every number once, computes rightly and reaches the target."""
    left = puzzle.numbers
    body = list(tokens)
    if body and body[-1] == END:
        body.pop()
    while body:
        if STEP not in body:
            return False
        thought, body = body[: body.index(STEP)], body[body.index(STEP) + 1 :]
        made = next((move for move in moves(left) if move.token == thought[0]), None) if thought else None
        if made is None:
            return False
        following = after(left, made)
        if thought != text(Puzzle(left, 0), [made])[len(left) + 3 : -2]:
            return False
        left = following
    return left == (puzzle.target,)


def decode(tokens: Sequence[int]) -> str:
    """Tokens as a person reads them; of a move, the operator."""
    words = []
    for token in tokens:
        operator = _OPERATORS[(token - _FIRST_MOVE) // len(_PLACES)] if is_move(token) else ""
        words.append(operator or _SYMBOLS.get(token, str(token - _FIRST_NUMBER)))
    return " ".join(words)


def game_of_24(path: Path, first: int = 901, last: int = 1000) -> list[Puzzle]:
    """Puzzles of that rank from a CSV file with the columns `Rank` and `Puzzles`; 901–1000 is the usual exam."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if first <= int(row["Rank"]) <= last]
    return [Puzzle(tuple(sorted(map(int, row["Puzzles"].split()))), 24) for row in rows]


def _token(number: int) -> int:
    return _FIRST_NUMBER + number
