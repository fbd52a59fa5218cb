"""What is known of a rank at a moment, in a form that travels between machines."""

from dataclasses import asdict, dataclass, field
from typing import Any

STOPPED, TRACED, DEAD = "stopped", "traced", "dead"  # of `RankState.process`; else as psutil says


@dataclass(frozen=True)
class Wait:
    """What a rank's host waits for.

    Attributes:
        operation: by its name in torch.distributed.
        group: name of the process group.
        number: of the collective in the group, from 1; 0: a message.
        peer: of a message, else -1.
        size: bytes.
        seconds: for how long.
    """

    operation: str
    group: str
    number: int
    peer: int
    size: int
    seconds: float


@dataclass(frozen=True)
class Membership:
    """A process group as one of its ranks sees it. `recent`: the last collectives as [number, operation, bytes]."""

    description: str
    ranks: list[int]
    count: int
    recent: list[tuple[int, str, int]]


@dataclass(frozen=True)
class RankState:
    """A rank.

    Attributes:
        host: the machine's name.
        process: "running", "sleeping", "disk-sleep", "stopped", "traced", "dead", ….
        beat_seconds: since a thread of it last ran Python.
        cpu: share of a core that it used lately; NaN is not known.
        ending: "none" while it trains, "done", "failed" by its own error, "deserted" by others.
        phase: in words.
        seconds: in this phase.
        limit: seconds that the phase may take.
        step: from 1; 0 before the first.
        micro_batch: forward passes begun in the step.
        groups: by name.
        stacks: of its threads, the main one first: innermost call first.
    """

    rank: int
    host: str
    pid: int
    process: str
    beat_seconds: float
    cpu: float
    ending: str
    phase: str
    seconds: float
    limit: float
    step: int
    micro_batch: int
    waiting: Wait | None = None
    groups: dict[str, Membership] = field(default_factory=dict)
    stacks: list[list[str]] = field(default_factory=list)

    @property
    def is_late(self) -> bool:
        """Whether its phase takes longer than it may."""
        return self.ending == "none" and self.seconds > self.limit

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "RankState":
        groups = {
            name: Membership(**{**group, "recent": [tuple(entry) for entry in group["recent"]]})
            for name, group in found["groups"].items()
        }
        waiting = found["waiting"] and Wait(**found["waiting"])
        return cls(**{**found, "groups": groups, "waiting": waiting})
