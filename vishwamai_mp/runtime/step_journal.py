"""The rank's side of `diagnosis`: writes down what this rank is doing, phase by phase and collective by collective.

One journal is open at a time, in `journal_open`. Without one, `phase` and `step` do nothing, and torch.distributed is
as torch made it.

Collectives are seen where all of them pass, ours, megatron-core's and torch's own: at the methods of torch's
`ProcessGroup`, which every function of torch.distributed calls, and at `Work.wait`. Functional collectives
(torch.distributed._functional_collectives) go past both; neither this package nor megatron-core has any in a step.
"""

import faulthandler
import os
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic_ns
from types import TracebackType
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, Work

from vishwamai_mp.config.errors import HUNG_STATUS
from vishwamai_mp.diagnosis import shared
from vishwamai_mp.diagnosis.local_ranks import STACK_SIGNAL
from vishwamai_mp.diagnosis.shared import Ending, Group, Kind, Operation, Phase, Word, pack_event, pack_place

_BEAT_SECONDS = 0.5
_SHORT = 20_000  # nanoseconds: less is no waiting, but the call itself
# Methods of torch's ProcessGroup, of all versions of torch.
_METHODS = {
    "allreduce": Operation.all_reduce,
    "allreduce_coalesced": Operation.all_reduce,
    "broadcast": Operation.broadcast,
    "allgather": Operation.all_gather,
    "allgather_coalesced": Operation.all_gather,
    "_allgather_base": Operation.all_gather,
    "allgather_into_tensor_coalesced": Operation.all_gather,
    "all_gather_single": Operation.all_gather,
    "all_gather_single_coalesced": Operation.all_gather,
    "reduce_scatter": Operation.reduce_scatter,
    "_reduce_scatter_base": Operation.reduce_scatter,
    "reduce_scatter_tensor_coalesced": Operation.reduce_scatter,
    "reduce_scatter_single": Operation.reduce_scatter,
    "reduce_scatter_single_coalesced": Operation.reduce_scatter,
    "alltoall": Operation.all_to_all,
    "alltoall_base": Operation.all_to_all,
    "all_to_all_single": Operation.all_to_all,
    "reduce": Operation.reduce,
    "gather": Operation.gather,
    "scatter": Operation.scatter,
    "barrier": Operation.barrier,
    "send": Operation.send,
    "recv": Operation.receive,
}
_open: "Journal | None" = None


class Journal:
    """What this rank does, in the words of `diagnosis.shared`.

    Args:
        folder: on this machine, where a watchdog looks; None: nobody does, and the words are this process's alone.
        rank: of this process.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        if folder is None:
            self.words = memoryview(array("q", bytes(8 * shared.WORDS)))
        else:
            self.words = shared.map_words(shared.file_of(folder, rank), make=True)
        self.words[Word.PID] = os.getpid()
        self.words[Word.BEAT] = self.words[Word.SINCE] = monotonic_ns()
        self.groups: list[Group] = []
        self._numbers: dict[ProcessGroup, int] = {}
        self.begun: dict[int, int] = {}  # by work, as id(): its event
        self.last = 0  # event of the collective that was begun last
        self._ended = threading.Event()

    def switch(self, to: int) -> int:
        """A phase ends and another begins. Returns the one that ended."""
        words, now = self.words, monotonic_ns()
        ended = words[Word.PHASE]
        took = now - words[Word.SINCE]
        words[shared.SECONDS + ended] += took
        if words[Word.REPEATS] and Phase.FORWARD <= ended <= Phase.UPDATE:
            words[Word.REPEATED] += took
        self._note(now, Kind.PHASE, ended, 0, 0, took)
        words[Word.PHASE] = to
        words[Word.SINCE] = now
        return ended

    def number_of(self, group: ProcessGroup) -> int:
        """This rank's number of a process group; -1 where there is nobody to wait for, or too many groups."""
        number = self._numbers.get(group)
        if number is None:
            number = len(self.groups) if group.size() > 1 and len(self.groups) < shared.GROUPS else -1
            self._numbers[group] = number
            if number >= 0:
                description = group.group_desc.lower().replace("_group", "").replace("default_pg", "world")
                self.groups.append(Group(group.group_name, description, dist.get_process_group_ranks(group)))
                if self.folder is not None:
                    with shared.groups_of(self.folder, self.rank).open("a") as file:
                        file.write(self.groups[-1].line())
        return number

    def begin(self, group: int, operation: Operation, size: int, peer: int) -> int:
        """A collective is handed to the group. Returns the number of its event, from 1."""
        words, number = self.words, 0
        if peer < 0:
            number = words[shared.COUNTS + group] = words[shared.COUNTS + group] + 1
        self._note(monotonic_ns(), Kind.BEGINS, operation, group, pack_place(number, peer), size)
        self.last = words[Word.EVENT_COUNT]
        return self.last

    def waiting(self, event: int, wait: Callable[[], Any]) -> Any:
        """Call `wait`, in which the host waits for other ranks."""
        words, begun = self.words, monotonic_ns()
        words[Word.WAITS_SINCE], words[Word.WAITS_FOR] = begun, event
        result = wait()  # an error leaves what was waited for in place
        words[Word.WAITS_FOR] = 0
        now = monotonic_ns()
        if now - begun < _SHORT:
            return result
        words[shared.WAITED + words[Word.PHASE]] += now - begun
        at = shared.RING + 4 * ((event - 1) % shared.EVENTS)
        self._note(now, Kind.WAITED, words[at + 1] >> 4 & 0xF, words[at + 1] >> 8 & 0xFF, words[at + 2], now - begun)
        return result

    def _note(self, now: int, kind: int, code: int, group: int, place: int, size: int) -> None:
        words = self.words
        count = words[Word.EVENT_COUNT]
        at = shared.RING + 4 * (count % shared.EVENTS)
        words[at] = now
        words[at + 1] = pack_event(kind, code, group, words[Word.STEP], words[Word.PASSES])
        words[at + 2] = place
        words[at + 3] = size
        words[Word.EVENT_COUNT] = count + 1

    def beat(self) -> None:
        """Show that threads of this process run, until the journal is closed; end it when the watchdog says so."""
        while not self._ended.wait(_BEAT_SECONDS):
            self.words[Word.BEAT] = monotonic_ns()
            if self.words[Word.SENTENCE]:
                os._exit(HUNG_STATUS)

    def close(self, ending: Ending) -> None:
        """The last entry."""
        self.switch(self.words[Word.PHASE])
        self.words[Word.ENDING] = ending
        self._ended.set()


def current_journal() -> Journal | None:
    """The one that is open."""
    return _open


@contextmanager
def journal_open(journal: Journal) -> Iterator[Journal]:
    """Meanwhile `phase`, `step` and all collectives are written into this journal, which is fresh."""
    global _open
    assert _open is None, "one journal at a time"
    with ExitStack() as stack:
        if dist.is_initialized() and dist.get_world_size() > 1:
            stack.enter_context(_collectives_seen(journal))
        if journal.folder is not None:
            assert STACK_SIGNAL is not None
            # Stays: unregistered, a signal that is under way would end the process.
            faulthandler.register(STACK_SIGNAL, shared.stacks_of(journal.folder, journal.rank).open("wb"))
            threading.Thread(target=journal.beat, name="journal", daemon=True).start()
        _open = journal
        try:
            yield journal
        except BaseException:
            journal.close(Ending.DESERTED if journal.words[Word.WAITS_FOR] else Ending.FAILED)
            raise
        finally:
            _open = None
            if not journal.words[Word.ENDING]:
                journal.close(Ending.DONE)


class phase:  # noqa: N801  (read as a statement: `with phase(Phase.SAVE):`)
    """What happens inside is of a phase; afterwards the one before goes on.

    A forward pass is one only inside a step: an evaluation stays an evaluation.
    """

    __slots__ = ("_before", "_phase")

    def __init__(self, which: Phase) -> None:
        self._phase, self._before = which, -1

    def __enter__(self) -> None:
        journal = _open
        if journal is None:
            return
        if self._phase is Phase.FORWARD:
            journal.words[Word.PASSES] += 1
            if journal.words[Word.PHASE] != Phase.BACKWARD:
                return
        self._before = journal.switch(self._phase)

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: TracebackType | None) -> None:
        # After an error the journal keeps saying where it happened.
        if self._before >= 0 and kind is None and _open is not None:
            _open.switch(self._before)


@contextmanager
def step(number: int) -> Iterator[None]:
    """What happens inside is a step, the first of which is 1."""
    journal = _open
    if journal is None:
        yield
        return
    words = journal.words
    journal.switch(Phase.BACKWARD)
    words[Word.STEP], words[Word.STEP_SINCE], words[Word.PASSES] = number, words[Word.SINCE], 0
    yield
    journal.switch(Phase.BETWEEN)
    done = words[Word.STEPS]
    words[shared.LENGTHS + done % shared.DURATIONS] = words[Word.SINCE] - words[Word.STEP_SINCE]
    words[Word.STEPS] = done + 1


@contextmanager
def _collectives_seen(journal: Journal) -> Iterator[None]:
    """Meanwhile the methods of process groups and of what they return write into the journal."""
    with ExitStack() as stack:
        for name, operation in _METHODS.items():
            if hasattr(ProcessGroup, name):
                stack.enter_context(mock.patch.object(ProcessGroup, name, _seen(journal, name, operation)))
        wait, end = Work.wait, ProcessGroup._end_coalescing

        def seen_wait(work: Work, *args: Any, **options: Any) -> Any:
            event = journal.begun.pop(id(work), 0)
            if not event:
                return wait(work, *args, **options)
            return journal.waiting(event, lambda: wait(work, *args, **options))

        def seen_end(group: ProcessGroup, *args: Any) -> Any:
            work = end(group, *args)
            if work is not None:  # of several collectives: the last stands for all
                journal.begun[id(work)] = journal.last
            return work

        stack.enter_context(mock.patch.object(ProcessGroup, "_end_coalescing", seen_end))
        stack.enter_context(mock.patch.object(Work, "wait", seen_wait))
        yield


def _seen(journal: Journal, name: str, operation: Operation) -> Callable[..., Any]:
    """A method of `ProcessGroup` that writes into the journal."""
    original = getattr(ProcessGroup, name)
    is_message = operation.is_message

    def method(group: ProcessGroup, *args: Any, **options: Any) -> Any:
        number = journal.number_of(group)
        if number < 0:
            return original(group, *args, **options)
        peer = journal.groups[number].ranks[args[1]] if is_message else -1
        event = journal.begin(number, operation, _bytes(args), peer)
        # The first collective of a group may already wait in here, for its ranks to connect.
        work = journal.waiting(event, lambda: original(group, *args, **options))
        if work is not None:
            journal.begun[id(work)] = event
        return work

    return method


def _bytes(args: tuple[Any, ...]) -> int:
    """Bytes of the larger of the first two arguments: where one side is the whole and the other a part, the whole."""
    return max((_size(item) for item in args[:2]), default=0)


def _size(item: Any) -> int:
    if isinstance(item, Tensor):
        return item.nbytes
    return sum(map(_size, item)) if isinstance(item, list | tuple) else 0


def _forget() -> None:
    """A forked process, which writes a checkpoint or reads data, is not the rank."""
    global _open
    _open = None


os.register_at_fork(after_in_child=_forget)
