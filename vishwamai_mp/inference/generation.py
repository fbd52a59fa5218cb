"""Text from prompts: requests of unequal lengths and options in one running batch.

Every rank of a replica makes the same calls in the same order.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.config.wording import counted
from vishwamai_mp.inference.added_text import AddedText, Decode, find_stop
from vishwamai_mp.inference.beginnings import Beginnings
from vishwamai_mp.inference.blocks import BLOCK_TOKENS, KvSequence
from vishwamai_mp.inference.choosing import Row, choose
from vishwamai_mp.inference.draft_model import DraftModel
from vishwamai_mp.inference.engine import Engine, check_fits
from vishwamai_mp.inference.options import SamplingOptions
from vishwamai_mp.inference.speculation import Asked, Pace, Proposer, Repetitions
from vishwamai_mp.inference.vocabulary import Shard
from vishwamai_mp.model import VishwamAIModel
from vishwamai_mp.runtime import Runtime

_PROMPT_TOKENS = 4096  # of prompts in one pass, where more than one is waiting
_DEFAULT_REUSE_BYTES = 1 << 30


@dataclass
class Completion:
    """A prompt and what has been added to it.

    Attributes:
        prompt, options: as given.
        tokens: added so far, without the stop token.
        log_probs: of each added token, in nats, where asked for.
        top_log_probs: ids and log-probabilities of the likeliest tokens in place of each, where asked for.
        finish: None while it grows; "stop", "length" (of `max_new_tokens` or the context), or "cancelled".
        stop: the stop string that ended it.
        passes: of the model that it took so far; with guesses there are fewer than tokens.
        guessed, accepted: tokens that were guessed, and those of them that are in the text.
        reused: tokens of the prompt that were not read, for an earlier text began with them.
    """

    prompt: list[int]
    options: SamplingOptions
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: str | None = None
    stop: str | None = None
    passes: int = 0
    guessed: int = 0
    accepted: int = 0
    reused: int = 0
    _sequence: KvSequence = field(default_factory=KvSequence)
    _limit: int = 0
    _reuses: bool = False  # what earlier texts have read, and later ones what it reads
    _added: AddedText | None = None
    _read: int = 0  # tokens whose text `_added` has
    _proposal: Any = None  # what the proposer of guesses keeps of it
    _pace: Pace = field(default_factory=lambda: Pace(0))

    def __getstate__(self) -> dict[str, Any]:
        """Without what decodes, which may be any function and begins anew in another process, and without guesses."""
        return {**self.__dict__, "_added": None, "_read": 0, "_proposal": None}

    @property
    def text(self) -> list[int]:
        """The prompt and what has been added."""
        return self.prompt + self.tokens


@dataclass
class _Turn:
    """What a request reads in a pass.

    Attributes:
        completion: the request.
        unread: certain tokens, at least one.
        most: guesses that it can take.
        guesses: at what follows.
    """

    completion: Completion
    unread: list[int]
    most: int = 0
    guesses: list[int] = field(default_factory=list)

    def rows(self) -> list[Row]:
        """What is to be chosen after the certain tokens and after each guess."""
        options, length = self.completion.options, len(self.completion.prompt) + len(self.completion.tokens)
        text = self.completion.text + self.guesses if options.repetition_penalty != 1 else []
        return [Row(options, length + i, text[: length + i]) for i in range(len(self.guesses) + 1)]


class Generator:
    """Continuous batching: requests join as memory allows and leave when they end.

    Args:
        config: resolved.
        runtime: process groups and device.
        model: this rank's stage.
        decode: text of token ids; needed for stop strings.
        kv_tokens: tokens whose keys and values fit at once; None: `Engine`'s default.
        max_batch: requests that run at once.
        speculate: tokens to guess at most in a pass for each request (inference/speculation.py). It changes how many
            passes a text takes, not the text.
        draft: runs the model that guesses, smaller and of the same vocabulary, on the same processes; None: texts are
            guessed to go on as they did where they were alike before.
        reuse_tokens: of ended texts' beginnings whose keys and values (and components' states) are kept at most, least
            recently used first to go, for later texts that begin alike; they also give way to running ones. Whoever
            changes the model's weights calls `forget_beginnings`. None: as many as 1 GiB holds, in all ranks of a
            replica together, without components' states.
    """

    def __init__(
        self,
        config: PretrainConfig,
        runtime: Runtime,
        model: VishwamAIModel,
        decode: Decode | None = None,
        kv_tokens: int | None = None,
        max_batch: int = 64,
        speculate: int = 0,
        reuse_tokens: int | None = 0,
        draft: Engine | None = None,
    ) -> None:
        if speculate < 0:
            raise UserError(f"speculate={speculate}: use 0 (no guesses) or more")
        if reuse_tokens is not None and reuse_tokens < 0:
            raise UserError(f"reuse_tokens={reuse_tokens}: use 0 (nothing is kept) or more")
        if draft is not None and not speculate:
            raise UserError("a draft model needs speculate=N, how many tokens it guesses at most at a time; try 4")
        self.speculate = speculate
        self.engine = Engine(config, runtime, model, kv_tokens)
        self._proposer: Proposer = Repetitions() if draft is None else DraftModel(draft, config)
        if reuse_tokens is None:
            reuse_tokens = _DEFAULT_REUSE_BYTES // self.engine.token_bytes
        has_states = config.memory.enabled or config.cache.enabled
        self._beginnings = Beginnings(self.engine.pool, config.model, reuse_tokens, has_states)
        self.decode, self.max_batch = decode, max_batch
        self._waiting: deque[Completion] = deque()
        self._running: list[Completion] = []

    def generate(self, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[Completion]:
        """Complete all prompts.

        Raises:
            UserError: an empty prompt, or one that leaves no room in the context.
        """
        if not prompts:
            raise UserError("the prompt is empty; give at least one token")
        for prompt in prompts:
            self._check(prompt, options)
        completions = [self.submit(prompt, options) for prompt in prompts]
        while any(completion.finish is None for completion in completions):
            self.step()
        return completions

    def submit(self, prompt: Sequence[int], options: SamplingOptions) -> Completion:
        """Queue a prompt; `step` makes it grow. Raises as `generate` does."""
        self._check(prompt, options)
        limit = min(options.max_new_tokens, self.engine.context - len(prompt))
        completion = Completion(list(prompt), options, _limit=limit, _pace=Pace(self.speculate))
        completion._proposal = self._proposer.begin()
        completion._reuses = self._beginnings.fit(len(prompt), len(prompt) + limit)
        self._waiting.append(completion)
        return completion

    def step(self) -> list[Completion]:
        """One pass: a token for each running request, those that are admitted now included. Returns these.

        With guesses it may be more than a token.
        """
        admitted = self._admit()
        batch = self._running + admitted
        if not batch:
            return []
        try:
            turns = [self._turn(c) for c in self._running] + [_Turn(c, c.prompt[c.reused :]) for c in admitted]
            self._guess([turn for turn in turns if turn.most])
            output = self.engine.run(
                [(turn.completion._sequence, turn.unread + turn.guesses) for turn in turns],
                guessed=[len(turn.guesses) for turn in turns],
            )
            rows = [row for turn in turns for row in turn.rows()]
            top = min(max(c.options.top_log_probs for c in batch), self.engine.config.model.vocab_size)
            chosen = self.engine.decide(
                output, lambda shard, _: _with_top(choose(shard, rows), shard, top), 2 + 2 * top
            ).tolist()
            _check_finite(chosen)
        except BaseException:
            for completion in batch:
                self._cancel(completion)
            self._running = []
            raise
        for completion in admitted:  # so that those that wait can begin with it
            self._keep(completion)
        rest = iter(chosen)
        for turn in turns:
            self._judge(turn, list(islice(rest, len(turn.guesses) + 1)))
        self._running = [completion for completion in batch if completion.finish is None]
        return batch

    def cancel(self, completion: Completion) -> None:
        """End a request now and free its memory."""
        if completion.finish is None:
            self._waiting = deque(other for other in self._waiting if other is not completion)
            self._running = [other for other in self._running if other is not completion]
            self._cancel(completion)

    def forget_beginnings(self) -> None:
        """Read all of later prompts: the model is no longer the one that read the beginnings which are kept."""
        self._beginnings.forget()

    @property
    def kept_tokens(self) -> int:
        """Of beginnings, which later texts may begin with."""
        return self._beginnings.tokens

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    def text(self, completion: Completion) -> str:
        """What was added to the prompt's text, cut before the stop string; of a request that grows, what is certain."""
        text = self._added_text(completion)
        return text if completion.stop is None else text[: text.index(completion.stop)]

    def _added_text(self, completion: Completion) -> str:
        assert self.decode is not None
        if completion._added is None:
            completion._added = AddedText(self.decode, completion.prompt)
        completion._added.add(completion.tokens[completion._read :])
        completion._read = len(completion.tokens)
        if completion.finish is not None:
            completion._added.end()
        return completion._added.text

    def score(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities in nats of each text's tokens from the second on.

        Raises:
            UserError: a text of fewer than 2 tokens or longer than the context.
        """
        for text in texts:
            if len(text) < 2:
                raise UserError(f"a text of {counted(len(text), 'token')} has nothing to score; give at least 2 tokens")
            check_fits(len(text) - 1, self.engine.context)
        return [[log_prob for log_prob, _ in self.score_tokens(text)] for text in texts]

    def score_tokens(self, text: Sequence[int], top: int = 0) -> list[tuple[float, list[tuple[int, float]]]]:
        """Of each token from the second on: its log-probability in nats, and the `top` likeliest ids with theirs."""
        top = min(top, self.engine.config.model.vocab_size)
        sequence = KvSequence()
        self._beginnings.make_room(-(-len(text) // BLOCK_TOKENS))
        try:
            output = self.engine.run([(sequence, text[:-1])], every_token=True)
            targets = torch.tensor(text[1:], device=self.engine.runtime.device)[:, None]
            scores = self.engine.decide(
                output, lambda shard, _: _with_top(shard.log_probs(targets).double(), shard, top), 1 + 2 * top
            )
        finally:
            self.engine.release(sequence)
        return [(log_prob, _pairs(rest, top)) for log_prob, *rest in scores.tolist()]

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises `UserError` where this model cannot go on from it."""
        check_prompt(prompt, self.engine.config.model.vocab_size, self.engine.context)

    def _check(self, prompt: Sequence[int], options: SamplingOptions) -> None:
        self.check_prompt(prompt)
        pool = self.engine.pool
        if options.stop_strings and self.decode is None:
            raise UserError("stop_strings need a tokenizer; use stop_tokens")
        if self._blocks(len(prompt), options) > pool.capacity:
            raise UserError(
                f"the prompt and max_new_tokens need more than the key-value pool of {pool.capacity * BLOCK_TOKENS}"
                " tokens; raise kv_tokens or lower max_new_tokens"
            )

    def _blocks(self, prompt_length: int, options: SamplingOptions) -> int:
        """The most a request can come to use."""
        return -(-min(prompt_length + options.max_new_tokens, self.engine.context) // BLOCK_TOKENS)

    def _admit(self) -> list[Completion]:
        """Waiting requests that fit, first come first served. One waits if then it has less to read."""
        admitted: list[Completion] = []
        tokens = 0
        while self._waiting and len(self._running) + len(admitted) < self.max_batch:
            first = self._waiting[0]
            sequence = self._beginnings.begin(first.prompt) if first._reuses else KvSequence()
            unread = len(first.prompt) - sequence.length
            waits = first._reuses and any(
                other._reuses and self._beginnings.is_worth_waiting(first.prompt, sequence.length, other.prompt)
                for other in admitted
            )
            promised = sum(self._blocks(len(c.prompt), c.options) - len(c._sequence.blocks) for c in self._running)
            promised += sum(self._blocks(len(c.prompt), c.options) - len(c._sequence.blocks) for c in admitted)
            needed = self._blocks(len(first.prompt), first.options) - len(sequence.blocks)
            too_many = bool(admitted) and tokens + unread > _PROMPT_TOKENS
            if waits or too_many or not self._beginnings.make_room(promised + needed):
                self.engine.release(sequence)
                break
            first._sequence, first.reused = sequence, sequence.length
            tokens += unread
            admitted.append(self._waiting.popleft())
        return admitted

    def _keep(self, completion: Completion) -> None:
        if completion._reuses:
            self._beginnings.keep(completion._sequence, completion.text)

    def _turn(self, completion: Completion) -> _Turn:
        """What a running request reads next: its last token, or all where that changes the angles of those before."""
        if self.engine.outgrows(completion._sequence, 1):
            self.engine.release(completion._sequence)
            return _Turn(completion, completion.text)
        count = min(completion._pace.count, completion._limit - len(completion.tokens) - 1)
        if count < 1 or self.engine.outgrows(completion._sequence, 1 + count):
            return _Turn(completion, completion.tokens[-1:])
        return _Turn(completion, completion.tokens[-1:], count)

    def _guess(self, turns: Sequence[_Turn]) -> None:
        """What may follow, of all that can take guesses together."""
        asked = [Asked(t.completion._proposal, t.completion.text, t.most, t.completion.options) for t in turns]
        for turn, guesses in zip(turns, self._proposer.guess(asked) if asked else [], strict=True):
            turn.guesses = guesses

    def _judge(self, turn: _Turn, chosen: list[list[float]]) -> None:
        """Add what was chosen, as far as the guesses before it are what was chosen there."""
        completion, guesses = turn.completion, turn.guesses
        before = len(completion.tokens)
        for i, (token, log_prob, *likeliest) in enumerate(chosen):
            self._append(completion, int(token), log_prob, _pairs(likeliest, completion.options.top_log_probs))
            if completion.finish is not None or i == len(guesses) or int(token) != guesses[i]:
                break
        added = completion.tokens[before:]
        right = sum(token == guess for token, guess in zip(added, guesses, strict=False))
        completion.passes += 1
        completion.guessed += len(guesses)
        completion.accepted += right
        completion._pace.judged(len(guesses), right)
        if right < len(guesses):
            self.engine.take_back(completion._sequence, len(guesses) - right)
        if completion.finish is not None:
            self._keep(completion)
            self._release(completion)

    def _append(self, completion: Completion, token: int, log_prob: float, top: list[tuple[int, float]]) -> None:
        options = completion.options
        if token in options.stop_tokens:
            completion.finish = "stop"
            return
        completion.tokens.append(token)
        if options.log_probs:
            completion.log_probs.append(log_prob)
            completion.top_log_probs.append(top)
        completion.stop = self._found_stop(completion)
        if completion.stop is not None:
            completion.finish = "stop"
        elif len(completion.tokens) == completion._limit:
            completion.finish = "length"

    def _found_stop(self, completion: Completion) -> str | None:
        """The stop string that the last token completed, if any: the first in the text."""
        strings = completion.options.stop_strings
        if not strings:
            return None
        before = len(completion._added.text) if completion._added else 0
        return find_stop(self._added_text(completion), strings, before)

    def _cancel(self, completion: Completion) -> None:
        completion.finish = "cancelled"
        self._release(completion)

    def _release(self, completion: Completion) -> None:
        self.engine.release(completion._sequence)
        self._proposer.end(completion._proposal)


def _with_top(chosen: Tensor, shard: Shard, count: int) -> Tensor:
    """Columns behind `chosen`: the `count` likeliest ids of each row, then their log-probabilities."""
    if not count:
        return chosen
    values, ids = shard.top(count)
    return torch.cat((chosen, ids.double(), (values - shard.log_normaliser()[:, None]).double()), -1)


def _pairs(columns: Sequence[float], count: int) -> list[tuple[int, float]]:
    """Of what `_with_top` appends, the first `count` ids with their log-probabilities."""
    half = len(columns) // 2
    return [(int(token), log_prob) for token, log_prob in zip(columns[:half], columns[half:], strict=True)][:count]


def check_prompt(prompt: Sequence[int], vocabulary: int, context: int) -> None:
    """Raises `UserError` where a model of this vocabulary and context cannot go on from the prompt."""
    if not prompt:
        raise UserError("the prompt is empty; give at least one token")
    if not all(0 <= token < vocabulary for token in prompt):
        raise UserError(f"the prompt has a token outside the vocabulary of {vocabulary}; encode it again")
    check_fits(len(prompt), context)


def _check_finite(chosen: Iterable[Sequence[float]]) -> None:
    if not all(abs(number) < float("inf") for _, number, *_ in chosen):
        raise UserError("the model's logits are not finite; its checkpoint is damaged or its training diverged")
