"""Countdown: reach a target from a few numbers with + − × ÷, each number used once. Puzzles, solutions, verifier.

A text is `numbers : target > a op b = c , numbers left [STEP] … [STEP] end`. Every number is one token, so a small
model can learn arithmetic; a thought is one operation.
"""

import csv
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LARGEST = 199  # numbers above do not occur
END, STEP, COLON, BEGIN, EQUALS, COMMA = range(6)
_OPERATORS = {6: "+", 7: "-", 8: "*", 9: "/"}
_FIRST_NUMBER = 10
VOCABULARY = _FIRST_NUMBER + LARGEST + 1
_SYMBOLS = {END: "<end>", STEP: "[STEP]", COLON: ":", BEGIN: ">", EQUALS: "=", COMMA: ",", **_OPERATORS}


@dataclass(frozen=True)
class Puzzle:
    """Numbers, ascending, and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> list[int]:
        return [*map(_token, self.numbers), COLON, _token(self.target), BEGIN]


Move = tuple[int, int, int, int]  # a, operator's token, b, result


def moves(numbers: Sequence[int]) -> Iterator[Move]:
    """Every operation on two of the numbers whose result is a number from 0 to `LARGEST`; larger operand first."""
    for i, j in itertools.combinations(range(len(numbers)), 2):
        a, b = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        for operator in _OPERATORS:
            result = _apply(a, operator, b)
            if result is not None:
                yield a, operator, b, result


def _apply(a: int, operator: int, b: int) -> int | None:
    match _OPERATORS[operator]:
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
    rest.remove(move[0])
    rest.remove(move[2])
    return tuple(sorted([*rest, move[3]]))


def solve(numbers: tuple[int, ...], target: int, rng: random.Random) -> list[Move] | None:
    """One of the solutions, found in random order; None if there is none."""
    if len(numbers) == 1:
        return [] if numbers[0] == target else None
    options = list(set(moves(numbers)))
    options.sort()
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
        left, solution = numbers, []
        while len(left) > 1:
            move = rng.choice(list(moves(left)))
            solution.append(move)
            left = after(left, move)
        if 10 <= left[0] <= 99:
            return Puzzle(numbers, left[0]), solution


def text(puzzle: Puzzle, solution: Sequence[Move]) -> list[int]:
    """Prompt and solution as tokens."""
    tokens, left = puzzle.prompt, puzzle.numbers
    for move in solution:
        left = after(left, move)
        a, operator, b, result = move
        tokens += [_token(a), operator, _token(b), EQUALS, _token(result), COMMA, *map(_token, left), STEP]
    return [*tokens, END]


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
        if len(thought) < 6 or thought[1] not in _OPERATORS or thought[3] != EQUALS or thought[5] != COMMA:
            return False
        a, b, result = thought[0] - _FIRST_NUMBER, thought[2] - _FIRST_NUMBER, thought[4] - _FIRST_NUMBER
        if (a, thought[1], b, result) not in moves(left):
            return False
        left = after(left, (a, thought[1], b, result))
        if [_token(number) for number in left] != thought[6:]:
            return False
    return left == (puzzle.target,)


def decode(tokens: Sequence[int]) -> str:
    """Tokens as a person reads them."""
    return " ".join(_SYMBOLS.get(token, str(token - _FIRST_NUMBER)) for token in tokens)


def game_of_24(path: Path, first: int = 901, last: int = 1000) -> list[Puzzle]:
    """Puzzles of that rank from a CSV file with the columns `Rank` and `Puzzles`; 901–1000 is the usual exam."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if first <= int(row["Rank"]) <= last]
    return [Puzzle(tuple(sorted(map(int, row["Puzzles"].split()))), 24) for row in rows]


def _token(number: int) -> int:
    return _FIRST_NUMBER + number
