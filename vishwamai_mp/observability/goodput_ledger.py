"""Where a run's time went, over all its attempts: `goodput.json` in the run folder. Needs no torch.

An attempt is a process that trained. What lies between one that ended and the next is down time, unless the run had
finished. The parts of all attempts and the down time add up to the time since the first attempt began.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vishwamai_mp.config.files import write_whole
from vishwamai_mp.config.json_text import parse_json

NAME = "goodput.json"
PARTS = ("useful", "repeated", "data", "saving", "evaluating", "between", "starting", "down")
NOTE = (
    "Useful: steps that no attempt had done before. Repeated: steps that were lost with an attempt and done again."
    " Data: waiting for micro-batches. Between: logging and callbacks. Starting: from the start of the process to the"
    " first step. Down: between attempts."
)


@dataclass(frozen=True)
class Attempt:
    """A process that trained.

    Attributes:
        began, ended: seconds since the epoch; `ended` is when this was last written.
        seconds: by part, without "down".
        step: the last finished one.
        finished: the run had done all its steps; what comes later is no down time.
    """

    began: float
    ended: float
    seconds: Mapping[str, float]
    step: int
    finished: bool = False


@dataclass(frozen=True)
class Ledger:
    """The attempts at a run, in order."""

    attempts: list[Attempt]

    @property
    def reached(self) -> int:
        """The furthest step that any attempt finished."""
        return max((attempt.step for attempt in self.attempts), default=0)

    @property
    def seconds(self) -> dict[str, float]:
        """By part."""
        total = dict.fromkeys(PARTS, 0.0)
        for attempt in self.attempts:
            for part, seconds in attempt.seconds.items():
                total[part] += seconds
        for before, after in zip(self.attempts, self.attempts[1:], strict=False):
            if not before.finished:
                total["down"] += max(0.0, after.began - before.ended)
        return total

    @property
    def wall(self) -> float:
        """Seconds that the run took, down time included."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of it that went into useful steps."""
        return self.seconds["useful"] / self.wall if self.wall else 0.0

    def with_attempt(self, attempt: Attempt) -> "Ledger":
        """These attempts and another."""
        return Ledger([*self.attempts, attempt])

    def write(self, folder: Path) -> None:
        """Write it whole."""
        write_whole(folder / NAME, json.dumps({"attempts": list(map(asdict, self.attempts))}, indent=1) + "\n")


def read_ledger(folder: Path) -> Ledger:
    """The ledger of a run folder; without attempts where there is none.

    Raises:
        ValueError: it cannot be understood.
    """
    try:
        found = parse_json((folder / NAME).read_bytes())
        return Ledger(list(map(_attempt, found["attempts"])))
    except FileNotFoundError:
        return Ledger([])
    except (KeyError, TypeError, ValueError, OSError):
        raise ValueError(f"{NAME}: cannot be understood") from None


def _attempt(found: Mapping[str, Any]) -> Attempt:
    seconds = {str(part): float(value) for part, value in found["seconds"].items() if part in PARTS}
    attempt = Attempt(
        float(found["began"]), float(found["ended"]), seconds, int(found["step"]), bool(found["finished"])
    )
    if not all(map(math.isfinite, _numbers(attempt))):
        raise ValueError("not finite")
    return attempt


def _numbers(attempt: Attempt) -> Iterable[float]:
    return (attempt.began, attempt.ended, *attempt.seconds.values())
