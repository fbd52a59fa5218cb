"""What all ranks did in one step, and which were slow over the steps before it: `timeline.json`. Needs no torch.

On a rank that waits for others, time passes that others use. A rank's own time in a phase is therefore what the phase
took less what the host waited in collectives within it; the rank that waits least is the one the others wait for. On
GPUs the host runs ahead of the device, so own time is the host's: data, Python, saving, launching kernels.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vishwamai_mp.config.files import write_whole
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.wording import counted
from vishwamai_mp.diagnosis import shared
from vishwamai_mp.diagnosis.shared import Group, Kind, Operation, Phase

NAME = "timeline.json"
WAITING = "waiting for other ranks"
_SPANS = 200_000  # of all ranks; of each, the longest are kept
_SPANS_OF_RANK = 400
_SLOWEST = 8  # ranks that are named for each phase


@dataclass(frozen=True)
class RankTimes:
    """A rank.

    Attributes:
        seconds: a step, over the window: its own time by phase, and `WAITING`.
        spans: of the window's last step: [begin and length in microseconds on the host's clock, phase or wait, words].
        dropped: shorter spans that were left out.
    """

    rank: int
    host: str
    seconds: Mapping[str, float]
    spans: list[tuple[int, int, int, str]]
    dropped: int


@dataclass(frozen=True)
class Slow:
    """The ranks that take longest in a phase. `slowest`: [rank, host, seconds a step], the longest first."""

    phase: str
    median: float
    slowest: list[tuple[int, str, float]]


@dataclass(frozen=True)
class Timeline:
    """Of a step and the window of steps that it ends."""

    step: int
    steps: int
    slow: list[Slow]
    ranks: list[RankTimes]

    def write(self, folder: Path) -> None:
        write_whole(folder / NAME, json.dumps(asdict(self)) + "\n")


def counters(words: Any) -> list[int]:
    """Nanoseconds in each phase, and waited in each, so far."""
    return list(words[shared.SECONDS : shared.COUNTS])


def rank_times(
    rank: int,
    host: str,
    words: Any,
    groups: Sequence[Group],
    before: Sequence[int],
    steps: int,
    step: int,
    world: int,
    offset: int,
) -> RankTimes:
    """What a rank tells of itself.

    Args:
        words: its journal.
        groups: of the journal.
        before: `counters` at the window's beginning.
        steps: of the window.
        step: its last.
        world: ranks of the job.
        offset: nanoseconds to add to the journal's clock, for that of the host.
    """
    taken = [now - then for now, then in zip(counters(words), before, strict=True)]
    waited = taken[len(taken) // 2 :]
    seconds = {
        phase.text: (taken[phase] - waited[phase]) / 1e9 / steps for phase in Phase if phase is not Phase.STARTING
    }
    seconds[WAITING] = sum(waited) / 1e9 / steps
    spans = _spans(words, groups, step, offset)
    kept = max(40, min(_SPANS_OF_RANK, _SPANS // world))
    longest = sorted(sorted(spans, key=lambda span: -span[1])[:kept])
    return RankTimes(rank, host, seconds, longest, len(spans) - len(longest))


def _spans(words: Any, groups: Sequence[Group], step: int, offset: int) -> list[tuple[int, int, int, str]]:
    """Of the events that are remembered of a step."""
    spans = []
    for event in shared.events(words):
        if event.step != step or event.kind is Kind.BEGINS:
            continue
        if event.kind is Kind.PHASE:
            which = event.code
            text = f"micro-batch {event.passes}" if which == Phase.FORWARD else ""
        else:
            which = -1
            peer = f" rank {event.peer}" if event.peer >= 0 else ""
            text = f"{Operation(event.code).name}{peer}, {groups[event.group].description}"
        spans.append(((event.end - event.size + offset) // 1000, event.size // 1000, which, text))
    return spans


def timeline_of(step: int, steps: int, ranks: Sequence[RankTimes]) -> Timeline:
    """Who is slow at what."""
    slow = []
    for phase in ranks[0].seconds:
        times = sorted(((rank.rank, rank.host, rank.seconds[phase]) for rank in ranks), key=lambda item: -item[2])
        slow.append(Slow(phase, statistics.median(item[2] for item in times), times[:_SLOWEST]))
    return Timeline(step, steps, slow, list(ranks))


def stragglers(timeline: Timeline) -> list[str]:
    """A sentence for each phase in which a rank is a fifth slower than the median, and by a twentieth of a step."""
    whole = sum(slow.median for slow in timeline.slow)
    found = []
    for slow in timeline.slow:
        rank, host, seconds = slow.slowest[0]
        if slow.phase != WAITING and seconds > 1.2 * slow.median and seconds - slow.median > 0.05 * whole:
            found.append(
                f"rank {rank} on {host} is slow: {slow.phase} takes it {seconds:.3g} s a step, the median rank"
                f" {slow.median:.3g} s (over {counted(timeline.steps, 'step')})"
            )
    return found


def read_timeline(folder: Path) -> Timeline | None:
    """The timeline in a run folder; None where there is none.

    Raises:
        ValueError: it cannot be understood.
    """
    try:
        found = parse_json((folder / NAME).read_bytes())
        slow = [
            Slow(str(x["phase"]), float(x["median"]), [(int(a), str(b), float(c)) for a, b, c in x["slowest"]])
            for x in found["slow"]
        ]
        ranks = [_rank(x) for x in found["ranks"]]
        numbers = [x.median for x in slow] + [time for x in slow for *_, time in x.slowest]
        if not ranks or not all(map(math.isfinite, numbers)):
            raise ValueError
        return Timeline(int(found["step"]), int(found["steps"]), slow, ranks)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        raise ValueError(f"{NAME}: cannot be understood") from None


def _rank(found: Mapping[str, Any]) -> RankTimes:
    spans = [(int(a), int(b), int(c), str(d)) for a, b, c, d in found["spans"]]
    if any(not -1 <= which < len(Phase) or length < 0 for _, length, which, _ in spans):
        raise ValueError
    seconds = {str(phase): float(value) for phase, value in found["seconds"].items()}
    return RankTimes(int(found["rank"]), str(found["host"]), seconds, spans, int(found["dropped"]))
