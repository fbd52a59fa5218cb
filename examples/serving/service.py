"""Runs the model on one thread for many clients: text by continuous batching, trees one at a time.

Clients are asyncio tasks. They put commands to the thread and read what happens from queues of their own.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vishwamai_mp.config import TreeConfig, UserError
from vishwamai_mp.inference import Completion, Generator, SamplingOptions
from vishwamai_mp.tree_of_thoughts import SearchResult, TreeOfThoughts

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes of an unfinished character decode to


class Disconnected(Exception):  # noqa: N818 (no error: the client's wish)
    """The client of a search has gone."""


@dataclass
class Ticket:
    """One client's request: what the thread reports to it."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    completion: Completion | None = None
    sent: int = 0
    gone: bool = False

    def report(self, event: Any) -> None:
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Service:
    """The model's thread.

    Args:
        generator: with a tokenizer's `decode`.
        encode: text to token ids.
        tree: settings of searches.
        ending: what ends a thought (`tree_of_thoughts.ending_of_thoughts`).
    """

    def __init__(
        self, generator: Generator, encode: Callable[[str], list[int]], tree: TreeConfig, ending: dict[str, Any]
    ) -> None:
        self.generator, self.encode, self.tree, self.ending = generator, encode, tree, ending
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue()
        self._tickets: list[Ticket] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), daemon=True)
        self._thread.start()

    async def complete(self, prompt: str, options: SamplingOptions) -> AsyncIterator[str | Completion]:
        """Pieces of text as they come, then the whole completion. Leaving early frees the request's memory."""
        ticket = Ticket(asyncio.get_running_loop())
        self._commands.put(lambda: self._submit(ticket, prompt, options))
        try:
            while True:
                event = await ticket.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Completion):
                    return
        finally:
            self._commands.put(lambda: self._leave(ticket))

    async def search(self, prompt: str, changes: dict[str, Any], **budget: Any) -> AsyncIterator[SearchResult]:
        """The tree each time it has grown; the last is the whole."""
        ticket = Ticket(asyncio.get_running_loop())
        self._commands.put(lambda: self._search(ticket, prompt, changes, budget))
        try:
            while (event := await ticket.events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            ticket.gone = True

    def close(self) -> None:
        """End the thread after the pass in progress."""
        self._stopped = True
        self._commands.put(lambda: None)
        self._thread.join()

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a new thread has OpenMP's default
        while not self._stopped:
            try:
                command = self._commands.get(block=not self.generator.busy)
            except queue.Empty:
                self._step()
            else:
                command()

    def _submit(self, ticket: Ticket, prompt: str, options: SamplingOptions) -> None:
        try:
            ticket.completion = self.generator.submit(self.encode(prompt), options)
        except Exception as error:
            ticket.report(error)
        else:
            self._tickets.append(ticket)

    def _leave(self, ticket: Ticket) -> None:
        if ticket.completion is not None:
            self.generator.cancel(ticket.completion)
        self._tickets = [other for other in self._tickets if other is not ticket]

    def _step(self) -> None:
        try:
            self.generator.step()
        except Exception as error:
            for ticket in self._tickets:
                ticket.report(error)
            self._tickets = []
            return
        for ticket in self._tickets:
            self._report(ticket)
        self._tickets = [t for t in self._tickets if t.completion is not None and t.completion.finish is None]

    def _report(self, ticket: Ticket) -> None:
        """Send the text that is certain: no part of a character or of what may become a stop string."""
        completion = ticket.completion
        assert completion is not None
        text = self.generator.text(completion)
        certain = len(text)
        if completion.finish is None:
            certain = len(text.rstrip(_REPLACEMENT))
            for stop in completion.options.stop_strings:
                begun = (n for n in range(len(stop) - 1, 0, -1) if text[:certain].endswith(stop[:n]))
                certain -= next(begun, 0)
        if certain > ticket.sent:
            ticket.report(text[ticket.sent : certain])
            ticket.sent = certain
        if completion.finish is not None:
            ticket.report(completion)

    def _search(self, ticket: Ticket, prompt: str, changes: dict[str, Any], budget: dict[str, Any]) -> None:
        def watch(results: list[SearchResult]) -> None:
            if ticket.gone:
                raise Disconnected
            ticket.report(results[0])

        try:
            trees = TreeOfThoughts(
                self.generator.engine, replace(self.tree, **changes), decode=self.generator.decode, **self.ending
            )
            trees.search([self.encode(prompt)], watch=watch, **budget)
            ticket.report(None)
        except Disconnected:
            pass
        except Exception as error:
            ticket.report(error if isinstance(error, UserError) else RuntimeError(str(error)))
