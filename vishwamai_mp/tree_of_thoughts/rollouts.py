"""Rollouts: texts that a verifier has judged, as the value head learns from them.

Shapes: R rows, T tokens of a sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vishwamai_mp.config import UserError
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.bins import best_fit
from vishwamai_mp.data.indexed import IndexedWriter, token_dtype
from vishwamai_mp.data.marks import BEGINS, JUDGED, SOLVED, SUFFIX
from vishwamai_mp.tree_of_thoughts.result import SearchResult


@dataclass(frozen=True)
class Rollout:
    """One text and what is known of it.

    Attributes:
        tokens: prompt and continuation.
        verdicts: by index of a token, such as a `[STEP]`: whether the text up to it led to a solution.
    """

    tokens: Sequence[int]
    verdicts: Mapping[int, bool]


def rollouts_of(result: SearchResult, solves: Callable[[list[int]], bool]) -> list[Rollout]:
    """The texts of a tree that have ended, each thought judged by whether one that goes through it is a solution.

    Nothing is said of thoughts that no such text goes through, nor that nothing comes of a thought where the search's
    budget ended first. A thought that several texts share is judged in one of them, so that all thoughts count alike.

    Args:
        result: of a search; one that pruned little tells more.
        solves: whether an answer (tokens behind the prompt) is a solution; asked once of every text that has ended.
    """
    nodes = result.nodes
    deepest = max(node.depth for node in nodes)
    # At the greatest depth that a search may reach, nodes are complete for that reason alone, before some are cut.
    at_bottom = [node for node in nodes if node.depth == deepest and node.status != "unfinished"]
    reached = any(node.status == "complete" and node.ending in ("stop", "cap") for node in at_bottom)
    bottom = {node.id for node in at_bottom} if reached else set()
    ended = [node.id for node in nodes[1:] if node.ending in ("end", "context") or node.id in bottom]
    solved = {above for leaf in ended if solves(result.answer_to(leaf)) for above in result.path_to(leaf)}
    unknown = {above for node in nodes if node.status == "unfinished" for above in result.path_to(node.id)} - solved
    rollouts, judged = [], unknown | {0}
    for leaf in ended:
        tokens, verdicts = list(nodes[0].tokens), {}
        for above in result.path_to(leaf)[1:]:
            tokens += nodes[above].tokens
            if above not in judged:
                judged.add(above)
                verdicts[len(tokens) - 1] = above in solved
        rollouts.append(Rollout(tokens, verdicts))
    return rollouts


def rollout_rows(rollouts: Sequence[Rollout], sequence_length: int, padding: int = 0) -> np.ndarray:
    """Rollouts side by side in rows, tokens and `marks` of each: int64 (R, 2, T + 1). No token's prediction counts.

    Args:
        rollouts: each of at most `sequence_length` tokens.
        sequence_length: T.
        padding: the token that fills rows up.

    Raises:
        UserError: there is none, or one is longer.
    """
    longest = max((len(rollout.tokens) for rollout in rollouts), default=0)
    if not 0 < longest <= sequence_length:
        raise UserError(
            f"{counted(len(rollouts), 'rollout')} of up to {counted(longest, 'token')} for rows of {sequence_length}"
        )
    layout = best_fit([len(rollout.tokens) for rollout in rollouts], sequence_length)
    rows = np.zeros((len(layout), 2, sequence_length + 1), dtype=np.int64)
    rows[:, 0] = padding
    for (tokens, marks), numbers in zip(rows, layout, strict=True):
        at = 0
        for rollout in (rollouts[number] for number in numbers):
            end = at + len(rollout.tokens)
            tokens[at:end] = rollout.tokens
            for place, solved in rollout.verdicts.items():
                marks[at + place] = JUDGED | (SOLVED if solved else 0)
            marks[at] |= BEGINS
            at = end
        marks[at] = BEGINS
    return rows


def write_rollouts(
    prefix: str | Path, rollouts: Sequence[Rollout], *, sequence_length: int, vocab_size: int, padding: int = 0
) -> int:
    """Write rows to train on with `data.prepared_rows=true tree.value_signal=verdicts`; both pairs of files or nothing.

    Args:
        prefix: files are `<prefix>.bin/.idx` and `<prefix>_marks.bin/.idx`.
        rollouts, sequence_length, padding: as `rollout_rows` takes them.
        vocab_size: of the tokens.

    Returns:
        the number of rows.

    Raises:
        UserError: as `rollout_rows` and the writing of files do.
    """
    rows = rollout_rows(rollouts, sequence_length, padding)
    sizes = np.full(len(rows), sequence_length + 1)
    with (
        IndexedWriter(prefix, token_dtype(vocab_size)) as tokens,
        IndexedWriter(f"{prefix}{SUFFIX}", np.dtype(np.uint8)) as marks,
    ):
        for writer, part in ((tokens, rows[:, 0]), (marks, rows[:, 1])):
            writer.add(part.astype(writer.dtype).tobytes(), sizes)
            writer.finish()
        marks.publish()
        tokens.publish()
    return len(rows)
