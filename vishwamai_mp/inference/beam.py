"""Beam search with length penalty, many prompts at once, over shared key-value blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vishwamai_mp.config import UserError
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.inference.engine import Engine, check_fits
from vishwamai_mp.inference.options import BeamOptions
from vishwamai_mp.inference.vocabulary import Shard


@dataclass(frozen=True)
class BeamCompletion:
    """One text: added tokens without the stop token, and its log-probability / length ** length_penalty."""

    tokens: list[int]
    score: float


@dataclass
class _Beam:
    tokens: list[int]
    log_prob: float
    sequence: KvSequence


@dataclass
class _Search:
    """One prompt's search."""

    prompt: Sequence[int]
    limit: int
    beams: list[_Beam]
    finished: list[BeamCompletion] = field(default_factory=list)
    done: bool = False


def beam_search(engine: Engine, prompts: Sequence[Sequence[int]], options: BeamOptions) -> list[list[BeamCompletion]]:
    """Up to `num_beams` texts per prompt, the best first.

    Raises:
        UserError: an empty prompt, one that leaves no room in the context, or more beams than the vocabulary has
            tokens.
    """
    if options.num_beams > engine.config.model.vocab_size:
        raise UserError(f"num_beams={options.num_beams} exceeds the vocabulary; use fewer")
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt is empty; give at least one token")
        check_fits(len(prompt), engine.context)
    searches = [
        _Search(prompt, min(options.max_new_tokens, engine.context - len(prompt)), [_Beam([], 0.0, KvSequence())])
        for prompt in prompts
    ]
    try:
        while running := [search for search in searches if not search.done]:
            _advance(engine, running, options)
    finally:
        for search in searches:
            for beam in search.beams:
                engine.release(beam.sequence)
    return [search.finished for search in searches]


def _advance(engine: Engine, searches: Sequence[_Search], options: BeamOptions) -> None:
    """One more token for every beam."""
    # So many that enough remain to go on with when the best of them end.
    width = min((1 + max(1, len(options.stop_tokens))) * options.num_beams, engine.config.model.vocab_size)
    work = [(beam.sequence, beam.tokens[-1:] or search.prompt) for search in searches for beam in search.beams]
    output = engine.run(work)

    def candidates(shard: Shard, _: torch.Tensor) -> torch.Tensor:
        values, ids = shard.top(width)
        return torch.cat(((values - shard.log_normaliser()[:, None]).double(), ids.double()), -1)

    rows = iter(engine.decide(output, candidates, 2 * width).tolist())
    for search in searches:
        found = []
        for beam in search.beams:
            row = next(rows)
            found += [
                (beam.log_prob + step, beam, int(token)) for step, token in zip(row[:width], row[width:], strict=True)
            ]
        if not all(abs(log_prob) < float("inf") for log_prob, _, _ in found):
            raise UserError("the model's logits are not finite; its checkpoint is damaged or its training diverged")
        found.sort(key=lambda candidate: -candidate[0])  # stable: ties to the better beam, then the likelier token
        _select(engine, search, found[:width], options)


def _select(engine: Engine, search: _Search, found: list[tuple[float, _Beam, int]], options: BeamOptions) -> None:
    """Sort candidates into texts that end and prefixes that run on, and see whether the search is over."""
    count = options.num_beams
    length = len(found[0][1].tokens) + 1
    scale = length**options.length_penalty
    running = []
    for rank, (log_prob, beam, token) in enumerate(found):
        ends, full = token in options.stop_tokens, length == search.limit
        if (ends or full) and rank < count:  # those below only stand by
            search.finished.append(BeamCompletion(beam.tokens if ends else [*beam.tokens, token], log_prob / scale))
        elif not ends and not full:
            running.append((log_prob, beam, token))
    search.finished = sorted(search.finished, key=lambda text: -text.score)[:count]
    running = running[:count]
    search.done = not running or _is_settled(search, running[0][0], length, options)
    before = search.beams
    kept = [] if search.done else running
    search.beams = [
        _Beam([*beam.tokens, token], log_prob, engine.fork(beam.sequence)) for log_prob, beam, token in kept
    ]
    for beam in before:
        engine.release(beam.sequence)


def _is_settled(search: _Search, best_running: float, length: int, options: BeamOptions) -> bool:
    """Whether the ended texts are taken as they are."""
    if len(search.finished) < options.num_beams:
        return False
    if options.early_stopping is True:
        return True
    longest = search.limit if options.early_stopping == "never" and options.length_penalty > 0 else length
    return best_running / longest**options.length_penalty <= search.finished[-1].score
