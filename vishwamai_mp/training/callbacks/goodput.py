"""Keeps account of where the run's time goes, over restarts."""

import time
from typing import TYPE_CHECKING

from vishwamai_mp.diagnosis import shared
from vishwamai_mp.diagnosis.shared import Phase, Word
from vishwamai_mp.observability.goodput_ledger import Attempt, Ledger, read_ledger
from vishwamai_mp.runtime.step_journal import Journal, current_journal
from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer

_EVERY_SECONDS = 5.0  # so much of a killed process's time may count as down time, and its steps as never done
_PARTS = {
    Phase.STARTING: "starting",
    Phase.BATCH: "data",
    Phase.EVALUATION: "evaluating",
    Phase.SAVE: "saving",
    Phase.BETWEEN: "between",
}


class Goodput(Callback):
    """`goodput.json`, from rank 0, whose journal stands for the job: its ranks do the same at the same time.

    Comes after `Checkpointing`, so that a step's save is accounted for when the step is.

    Args:
        began: when the process began whose only purpose is this run, seconds since the epoch; None: now.
    """

    order = Order.REPORT

    def __init__(self, began: float | None = None) -> None:
        self.began = began
        self.journal: Journal | None = None
        self.written = 0.0

    def on_train_begin(self, trainer: "Trainer") -> None:
        if not trainer.runtime.reports or trainer.state.step >= trainer.config.training.max_steps:
            return
        try:
            self.before = read_ledger(trainer.folder)
        except ValueError as error:
            trainer.say(f"{error}; the account begins anew")
            self.before = Ledger([])
        self.journal = current_journal()
        assert self.journal is not None, "training keeps a journal"
        opened = time.time() - sum(_seconds(self.journal).values())
        self.opened, self.began = opened, min(self.began or opened, opened)
        self.written = time.monotonic()

    def on_step_begin(self, trainer: "Trainer") -> None:
        if self.journal is not None:
            self.journal.words[Word.REPEATS] = int(trainer.state.step < self.before.reached)

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        if time.monotonic() - self.written > _EVERY_SECONDS:
            self._write(trainer)

    def on_train_end(self, trainer: "Trainer") -> None:
        self._write(trainer)

    def _write(self, trainer: "Trainer") -> None:
        if self.journal is None or self.began is None:
            return
        phases, repeated = _seconds(self.journal), self.journal.words[Word.REPEATED] / 1e9
        seconds = {part: phases[phase] for phase, part in _PARTS.items()}
        computing = sum(taken for phase, taken in phases.items() if phase.is_computing)
        seconds |= {"useful": computing - repeated, "repeated": repeated}
        seconds["starting"] += self.opened - self.began
        finished = trainer.state.step >= trainer.config.training.max_steps
        ended = self.opened + sum(phases.values())
        attempt = Attempt(self.began, ended, seconds, trainer.state.step, finished)
        self.before.with_attempt(attempt).write(trainer.folder)
        self.written = time.monotonic()


def _seconds(journal: Journal) -> dict[Phase, float]:
    """In each phase so far; all of them are the time since the journal was opened."""
    words, now = journal.words, time.monotonic_ns()
    taken = {phase: words[shared.SECONDS + phase] / 1e9 for phase in Phase}
    taken[Phase(words[Word.PHASE])] += (now - words[Word.SINCE]) / 1e9
    return taken
