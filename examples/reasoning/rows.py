"""Training data of the study: rows of solved puzzles, and rows of judged searches."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from countdown import END, Move, Puzzle, is_move, random_moves, random_puzzle, text, verify
from strategies import searched, tree_search

from vishwamai_mp.config import TreeConfig
from vishwamai_mp.data.marks import BEGINS, LEARNT
from vishwamai_mp.inference import Engine
from vishwamai_mp.tree_of_thoughts import Rollout, rollout_rows, rollouts_of

LENGTH = 128  # tokens of a row
_AT_RANDOM = 0.3  # of the texts: moves that lead anywhere


def puzzles(use: Literal["texts", "rollouts", "exam"], numbers: int, seed: int) -> Iterator[tuple[Puzzle, list[Move]]]:
    """Endless puzzles with a solution each. No puzzle has two uses."""
    rng = random.Random(f"{use} {seed}")
    while True:
        puzzle, solution = random_puzzle(rng, numbers)
        share = random.Random(repr(puzzle)).random()
        if use == ("exam" if share < 0.05 else "rollouts" if share < 0.2 else "texts"):
            yield puzzle, solution


class Texts:
    """Endless rows of puzzles end to end.

    Most are solved; of these all is learnt but the last result. In the others moves are made at random, and only what
    moves result in is learnt. So the model calculates the last result like every other, where it would else learn to
    write down the target.
    """

    def __init__(self, numbers: int, seed: int) -> None:
        self.numbers, self.seed = numbers, seed

    def __getitem__(self, index: int) -> torch.Tensor:
        seed = self.seed * 1_000_003 + index
        rng = random.Random(seed)
        tokens: list[int] = []
        marks: list[int] = []
        for puzzle, solution in puzzles("texts", self.numbers, seed):
            solved = rng.random() >= _AT_RANDOM
            whole = text(puzzle, solution if solved else random_moves(rng, puzzle.numbers))
            asked = len(puzzle.prompt)
            learnt = [LEARNT if solved or not (is_move(token) or token == END) else 0 for token in whole[asked:]]
            if solved:
                learnt[-5] = learnt[-3] = 0  # move a b = RESULT , RESULT [STEP] end
            tokens += whole
            marks += [BEGINS] + [0] * (asked - 1) + learnt
            if len(tokens) > LENGTH:
                break
        return torch.tensor([tokens, marks])[:, : LENGTH + 1]


class WithRollouts:
    """Rows of texts, and behind each a row of rollouts."""

    def __init__(self, texts: Texts, rollouts: Sequence[Rollout], seed: int) -> None:
        self.texts, self.seed = texts, seed
        self.rows = torch.from_numpy(rollout_rows(rollouts, LENGTH, END))

    def __getitem__(self, index: int) -> torch.Tensor:
        if index % 2 == 0:
            return self.texts[10**9 + index]  # others than those of pretraining
        epoch, place = divmod(index // 2, len(self.rows))
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + epoch))
        return self.rows[order[place]]


def explore(engine: Engine, tree: TreeConfig, numbers: int, count: int) -> list[Rollout]:
    """Searches puzzles, follows up every thought, and judges each by what was found below it.

    A search tries thoughts that the model itself would hardly write, since siblings begin differently; on texts that it
    samples, values would never be learnt of those. Most last thoughts are wrong and easily seen to be: of paths that
    tell nothing else, one in four is kept.
    """
    rng = random.Random(tree.seed)
    everything = replace(tree, pruning_threshold=0.0, temperature=1.0, branching=4, beam_width=4**tree.max_depth)
    search = tree_search(engine, everything)
    asked = [puzzle for puzzle, _ in itertools.islice(puzzles("rollouts", numbers, tree.seed), count)]
    return [
        rollout
        for puzzle, result in searched(search, asked)
        for rollout in rollouts_of(result, partial(verify, puzzle))
        if len(rollout.verdicts) > 1 or any(rollout.verdicts.values()) or rng.random() < 0.25
    ]
