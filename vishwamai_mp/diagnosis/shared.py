"""What a rank tells of itself: a block of 64-bit words that it writes and another process reads.

A word is written in one go, so a reader never sees half of one; it may see an event whose neighbour is newer. That is
harmless for what it is read for: a rank that no longer moves.

    words of the head    see `Word`
    seconds by phase     nanoseconds in each phase, and nanoseconds of waiting for other ranks in each
    collectives by group how many were begun, by the group's number on this rank
    durations            nanoseconds of the last steps, a ring
    events               a ring of four words each, see `Event`
"""

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

GROUPS = 64  # process groups of a rank
DURATIONS = 64  # steps whose length is remembered
EVENTS = 8192  # that are remembered


class Phase(IntEnum):
    """What a rank is busy with. The parts of a step are BATCH to UPDATE."""

    STARTING = 0  # until the first step
    BATCH = 1  # waits for data
    FORWARD = 2  # a micro-batch through this rank's layers
    BACKWARD = 3  # the rest of a step: backward passes, messages between stages, gradients' reduction
    READING = 4  # the host waits for the device's numbers
    UPDATE = 5  # the optimizer
    EVALUATION = 6
    SAVE = 7
    BETWEEN = 8  # callbacks, logging, agreement about stopping

    @property
    def text(self) -> str:
        return _PHASE_TEXTS[self]

    @property
    def is_computing(self) -> bool:
        """Whether it is the step proper, whose length is known from the steps before."""
        return Phase.FORWARD <= self <= Phase.UPDATE


_PHASE_TEXTS = (
    *(
        "starting",
        "waiting for data",
        "forward pass",
        "backward passes",
        "reading the step's numbers",
        "optimizer step",
    ),
    *("evaluation", "saving", "between steps"),
)


class Operation(IntEnum):
    """Collectives and messages, by the names that torch.distributed gives them."""

    all_reduce = 0
    broadcast = 1
    all_gather = 2
    reduce_scatter = 3
    all_to_all = 4
    reduce = 5
    gather = 6
    scatter = 7
    barrier = 8
    send = 9
    receive = 10

    @property
    def is_message(self) -> bool:
        """Whether it concerns two ranks alone."""
        return self in (Operation.send, Operation.receive)

    @property
    def has_one_size(self) -> bool:
        """Whether all ranks of the group must bring tensors of equal size."""
        return self <= Operation.reduce_scatter or self is Operation.reduce


class Ending(IntEnum):
    """How a rank's training ended."""

    NONE = 0
    DONE = 1
    FAILED = 2  # by an error of its own
    DESERTED = 3  # by an error while it waited for others


class Word(IntEnum):
    """Places of the head."""

    PID = 0
    BEAT = 1  # nanoseconds, as all times here on the machine's monotonic clock: when a thread of the rank last ran
    PHASE = 2
    SINCE = 3  # when the phase began
    STEP = 4  # from 1; 0 before the first
    STEP_SINCE = 5
    PASSES = 6  # forward passes begun in this step
    EVENT_COUNT = 7
    WAITS_FOR = 8  # number of the event that is waited for, from 1; 0: none
    WAITS_SINCE = 9
    STEPS = 10  # finished by this process
    ENDING = 11
    SENTENCE = 12  # written by the watchdog: not 0 when the rank is to end
    REPEATS = 13  # 1: the step was done before, and lost
    REPEATED = 14  # nanoseconds of computing in such steps


class Kind(IntEnum):
    """Of events."""

    PHASE = 0  # code: the phase that ended; size: nanoseconds it took
    BEGINS = 1  # code: the operation that was handed to the process group
    WAITED = 2  # code: the operation; size: nanoseconds that the host waited for it


_HEAD = 16
_PHASES = 16
SECONDS = _HEAD
WAITED = SECONDS + _PHASES
COUNTS = WAITED + _PHASES
LENGTHS = COUNTS + GROUPS
RING = LENGTHS + DURATIONS
WORDS = RING + 4 * EVENTS


@dataclass(frozen=True)
class Event:
    """A moment of a rank.

    Attributes:
        end: nanoseconds.
        kind: what happened.
        code: a phase or an operation.
        group: number of the process group on this rank.
        step: from 1.
        passes: forward passes begun in the step by then.
        number: of the collective in its group, from 1; 0 for messages.
        peer: of a message: the other rank; -1 for collectives.
        size: bytes, or nanoseconds.
    """

    end: int
    kind: Kind
    code: int
    group: int
    step: int
    passes: int
    number: int
    peer: int
    size: int


def pack_event(kind: int, code: int, group: int, step: int, passes: int) -> int:
    """The second word of an event."""
    return kind | code << 4 | group << 8 | (passes & 0xFFFF) << 16 | (step & 0x7FFFFFFF) << 32


def pack_place(number: int, peer: int) -> int:
    """The third word of an event."""
    return number & 0xFFFFFFFF | (peer + 1) << 32


def read_event(words: Any, number: int) -> Event:
    """The event of a number, from 0; it must be one of the last `EVENTS`."""
    at = RING + 4 * (number % EVENTS)
    end, what, place, size = words[at : at + 4]
    return Event(
        end=end,
        kind=Kind(what & 0xF),
        code=what >> 4 & 0xF,
        group=what >> 8 & 0xFF,
        passes=what >> 16 & 0xFFFF,
        step=what >> 32,
        number=place & 0xFFFFFFFF,
        peer=(place >> 32) - 1,
        size=size,
    )


def events(words: Any) -> Iterator[Event]:
    """The remembered events, oldest first."""
    count = words[Word.EVENT_COUNT]
    return (read_event(words, number) for number in range(max(0, count - EVENTS), count))


def map_words(path: Path, *, make: bool = False) -> memoryview:
    """The words in a file, shared with whoever maps it too.

    Raises:
        OSError: no such file, or it cannot be made.
        ValueError: it is not of this program.
    """
    with path.open("x+b" if make else "r+b") as file:
        if make:
            file.truncate(8 * WORDS)
        return memoryview(mmap.mmap(file.fileno(), 8 * WORDS)).cast("q")


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank's words are."""
    return folder / f"rank_{rank}.words"


def stacks_of(folder: Path, rank: int) -> Path:
    """Where a rank's stacks are written at a signal."""
    return folder / f"rank_{rank}.stacks"


def groups_of(folder: Path, rank: int) -> Path:
    """Where a rank says which process groups it has: a JSON line each, in the order of their numbers."""
    return folder / f"rank_{rank}.groups"


@dataclass(frozen=True)
class Group:
    """A process group: the name that is the same on all its ranks, what it is for, and the ranks of the job in it."""

    name: str
    description: str
    ranks: list[int]

    def line(self) -> str:
        return json.dumps([self.name, self.description, self.ranks]) + "\n"


def read_groups(path: Path) -> list[Group]:
    """The groups in a file that `Group.line` filled."""
    return [Group(*json.loads(line)) for line in path.read_text().split("\n") if line] if path.exists() else []
