"""Runs the model on one thread for many clients: texts by continuous batching, and beside them one search at a time.

Clients are asyncio tasks. They put commands to the thread and read what happens from queues of their own. Between two
passes of a search, texts have one of theirs, so neither holds up the other.
"""

import asyncio
import contextlib
import copy
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from vishwamai_mp.config import TreeConfig, UserError
from vishwamai_mp.inference import Completion, Generator, SamplingOptions
from vishwamai_mp.inference.added_text import without_begun_stop
from vishwamai_mp.inference.blocks import BLOCK_TOKENS
from vishwamai_mp.serving.limits import Limits, Refusal
from vishwamai_mp.tree_of_thoughts import SearchResult, TreeOfThoughts

TokenScore = tuple[float, list[tuple[int, float]]]  # log-probability of a token; the likeliest in its place with theirs


class Prompts(Protocol):
    """What the service needs of `opening.prompts.PromptTokenizer`."""

    @property
    def template(self) -> object | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def ends(self, stops: Sequence[str]) -> tuple[int, ...]: ...

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]: ...

    def spell(self, token: int) -> str: ...

    def content_of(self, token: int) -> bytes: ...


@dataclass(frozen=True)
class Job:
    """One text to write.

    Attributes:
        prompt: token ids.
        options: None: nothing is to be added.
        scores: of the prompt's tokens too, with so many likeliest ones; None: none.
    """

    prompt: list[int]
    options: SamplingOptions | None
    scores: int | None = None


@dataclass(frozen=True)
class Piece:
    """What has been added to a job's text since the last piece.

    Attributes:
        index: of the job.
        text: no part of a character or of what may become a stop text.
        tokens, scores: added too; scores where the options ask for them.
        finish: with the last: "stop" or "length".
        prompt_scores: with the first, of the prompt's tokens from the second on, where they are asked for.
        reused: tokens of the prompt that were not read, for an earlier text began with them.
    """

    index: int
    text: str
    tokens: list[int]
    scores: list[TokenScore]
    finish: str | None
    prompt_scores: list[TokenScore] | None = None
    reused: int = 0


class Disconnected(Exception):  # noqa: N818 (no error: the client's wish)
    """The client of a search has gone."""


@dataclass
class _Client:
    """Where the thread reports to."""

    deadline: float
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    gone: bool = False

    def report(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclass
class _Ticket:
    """A job under way: what of it has been reported."""

    client: _Client
    index: int
    job: Job
    completion: Completion | None = None
    sent: int = 0
    told: int = 0
    scored: bool = False
    prompt_scores: list[TokenScore] | None = None

    @property
    def waits_for_scores(self) -> bool:
        return self.job.scores is not None and not self.scored


@dataclass(frozen=True)
class _Search:
    client: _Client
    prompt: list[int]
    tree: TreeConfig


class Service:
    """The model's thread.

    Args:
        generator: with a decoder.
        prompts: how the model is addressed.
        tree: settings of searches.
        ending: what ends a thought (`tree_of_thoughts.ending_of_thoughts`).
        limits: of clients.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Prompts,
        tree: TreeConfig,
        ending: dict[str, Any],
        limits: Limits | None = None,
    ) -> None:
        self.generator, self.prompts, self.tree, self.ending = generator, prompts, tree, ending
        self.limits = limits or Limits()
        # The same model with key-value pool of its own: a search that fills it up ends alone.
        self._searcher = copy.copy(generator.engine)
        self._searcher.pool = generator.engine.stage.pool(generator.engine.pool.capacity * BLOCK_TOKENS)
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue()
        self._tickets: list[_Ticket] = []
        self._to_score: deque[_Ticket] = deque()
        self._searches: deque[_Search] = deque()
        self._counts = {"texts": 0, "searches": 0}  # that wait or run, as asyncio's thread knows them
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), daemon=True)
        self._thread.start()

    async def complete(self, jobs: Sequence[Job]) -> AsyncIterator[Piece]:
        """Pieces of the jobs' texts as they come. Leaving early frees the jobs' memory.

        Raises:
            UserError: a job that cannot be done; then none is. Too many wait, or the time is up.
        """
        with self._counted("texts", len(jobs), self.limits.waiting):
            client = self._client()
            self._commands.put(lambda: self._submit(client, jobs))
            unfinished = len(jobs)
            try:
                while unfinished:
                    event = await client.events.get()
                    if isinstance(event, Exception):
                        raise event
                    unfinished -= event.finish is not None
                    yield event
            finally:
                self._commands.put(lambda: self._leave(client))

    async def search(self, prompt: list[int], changes: dict[str, Any]) -> AsyncIterator[SearchResult]:
        """The tree each time it has grown; the last is the whole. Raises as `complete` does."""
        tree = replace(self.tree, **changes)
        if tree.beam_width * tree.max_depth > self.limits.search_nodes:
            raise Refusal(
                f"beam_width={tree.beam_width} times max_depth={tree.max_depth}: this server takes at most"
                f" {self.limits.search_nodes}",
                "beam_width",
            )
        with self._counted("searches", 1, self.limits.searches):
            client = self._client()
            self._commands.put(lambda: self._searches.append(_Search(client, prompt, tree)))
            try:
                while (event := await client.events.get()) is not None:
                    if isinstance(event, Exception):
                        raise event
                    yield event
            finally:
                client.gone = True

    def close(self) -> None:
        """End the thread after the pass in progress."""
        self._stopped = True
        self._commands.put(lambda: None)
        self._thread.join()

    def _client(self) -> _Client:
        return _Client(time.monotonic() + self.limits.seconds, asyncio.get_running_loop())

    @contextlib.contextmanager
    def _counted(self, what: str, count: int, most: int) -> Iterator[None]:
        if self._counts[what] + count > most:
            raise Refusal(f"{most} {what} wait or run already; try again later", status=429, code="queue_full")
        self._counts[what] += count
        try:
            yield
        finally:
            self._counts[what] -= count

    # What follows runs on the model's thread.

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a new thread has OpenMP's default
        while not self._stopped:
            self._turn(wait=not (self.generator.busy or self._to_score or self._searches))
            if self._searches and not self._stopped:
                self._search(self._searches.popleft())

    def _turn(self, wait: bool = False) -> None:
        """Do what clients have commanded, then one pass."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get(block=wait)()
                wait = False
        now = time.monotonic()
        for client in {id(t.client): t.client for t in self._tickets if t.client.deadline < now}.values():
            client.report(self._too_late())
            self._leave(client)
        if self._to_score:
            self._score(self._to_score.popleft())
        if self.generator.busy:
            self._step()

    def _too_late(self) -> Refusal:
        seconds = self.limits.seconds
        return Refusal(f"the request took longer than {seconds:g} s; ask for less", status=504, code="timeout")

    def _submit(self, client: _Client, jobs: Sequence[Job]) -> None:
        tickets = [_Ticket(client, index, job) for index, job in enumerate(jobs)]
        self._tickets += tickets
        try:
            for ticket in tickets:
                if ticket.job.options is None:
                    self.generator.check_prompt(ticket.job.prompt)
                else:
                    ticket.completion = self.generator.submit(ticket.job.prompt, ticket.job.options)
        except Exception as error:
            self._leave(client)
            client.report(error)
            return
        self._to_score += [ticket for ticket in tickets if ticket.job.scores is not None]
        for ticket in tickets:
            if ticket.job.options is None and ticket.job.scores is None:
                self._report(ticket)

    def _leave(self, client: _Client) -> None:
        for ticket in self._tickets:
            if ticket.client is client and ticket.completion is not None:
                self.generator.cancel(ticket.completion)
        self._tickets = [ticket for ticket in self._tickets if ticket.client is not client]
        self._to_score = deque(ticket for ticket in self._to_score if ticket.client is not client)

    def _score(self, ticket: _Ticket) -> None:
        prompt, top = ticket.job.prompt, ticket.job.scores
        assert top is not None
        try:
            ticket.prompt_scores = self.generator.score_tokens(prompt, top) if len(prompt) > 1 else []
        except Exception as error:
            self._leave(ticket.client)
            ticket.client.report(error)
        else:
            ticket.scored = True
            if ticket.completion is None or ticket.completion.finish is not None:
                self._report(ticket)

    def _step(self) -> None:
        try:
            self.generator.step()
        except Exception as error:
            cancelled = [t for t in self._tickets if t.completion is not None and t.completion.finish == "cancelled"]
            for client in {id(ticket.client): ticket.client for ticket in cancelled}.values():
                client.report(error)
                self._leave(client)
        for ticket in list(self._tickets):
            if ticket.completion is not None and not ticket.waits_for_scores:
                self._report(ticket)

    def _report(self, ticket: _Ticket) -> None:
        """Send the text that is certain; with the last of it, the ticket is done. What goes wrong is the client's to
        hear, and the thread goes on with others."""
        try:
            self._send(ticket)
        except Exception as error:
            self._leave(ticket.client)
            ticket.client.report(error)

    def _send(self, ticket: _Ticket) -> None:
        completion, text = ticket.completion, ""
        finish: str | None = "length"
        tokens: list[int] = []
        scores: list[TokenScore] = []
        if completion is not None:
            text, finish = self.generator.text(completion), completion.finish
            if finish is None:
                text = without_begun_stop(text, completion.options.stop_strings)
            tokens = completion.tokens[ticket.told :]
            scores = list(zip(completion.log_probs, completion.top_log_probs, strict=True))[ticket.told :]
        if len(text) > ticket.sent or finish is not None:
            reused = 0 if completion is None else completion.reused
            piece = Piece(ticket.index, text[ticket.sent :], tokens, scores, finish, ticket.prompt_scores, reused)
            ticket.client.report(piece)
            ticket.sent, ticket.told = len(text), ticket.told + len(tokens)
            ticket.prompt_scores = None
        if finish is not None:
            self._tickets = [other for other in self._tickets if other is not ticket]

    def _search(self, search: _Search) -> None:
        client = search.client

        def watch(results: list[SearchResult]) -> None:
            client.report(results[0])

        def let_others() -> None:
            if client.gone or self._stopped:
                raise Disconnected
            self._turn()

        left = client.deadline - time.monotonic()
        try:
            if client.gone:
                raise Disconnected
            if left <= 0:
                raise self._too_late()
            trees = TreeOfThoughts(self._searcher, search.tree, decode=self.generator.decode, **self.ending)
            trees.search(
                [search.prompt],
                max_tokens=self.limits.search_tokens,
                max_seconds=left,
                watch=watch,
                before_pass=let_others,
            )
            client.report(None)
        except Disconnected:
            pass
        except Exception as error:
            client.report(error if isinstance(error, UserError) else RuntimeError(str(error)))
