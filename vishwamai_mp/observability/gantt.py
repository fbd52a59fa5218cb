"""One step over all ranks, drawn: a row for each rank, a bar for each phase, and below it when it waited for others."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vishwamai_mp.diagnosis.shared import Phase
from vishwamai_mp.observability.chart import nice_ticks
from vishwamai_mp.observability.page import render
from vishwamai_mp.observability.timeline import WAITING, RankTimes, Timeline

_WIDTH, _LEFT, _TOP, _ROW = 1200, 170, 8, 24
_BAR, _WAIT = 13, 6  # heights
_ROWS = 64  # ranks that are drawn
_COLOURS = {
    Phase.BATCH: "--c1",
    Phase.FORWARD: "--c0",
    Phase.BACKWARD: "--c5",
    Phase.READING: "--c7",
    Phase.UPDATE: "--c3",
    Phase.EVALUATION: "--c4",
    Phase.SAVE: "--c6",
    Phase.BETWEEN: "--c2",
}


@dataclass(frozen=True)
class Bar:
    """A rectangle, what it is, and the colour's name."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    text: str


@dataclass(frozen=True)
class Row:
    """A rank's bars."""

    label: str
    y: float
    bars: list[Bar]


def gantt(timeline: Timeline) -> Markup:
    """The figure."""
    shown = drawn_ranks(timeline)
    starts = [begin for rank in shown for begin, *_ in rank.spans]
    first = min(starts, default=0)
    last = max((begin + length for rank in shown for begin, length, *_ in rank.spans), default=1)
    scale = (_WIDTH - _LEFT - 12) / max(1, last - first)
    rows = [_row(rank, _TOP + i * _ROW, first, scale) for i, rank in enumerate(shown)]
    milliseconds = max(1, last - first) / 1000
    ticks = [(_LEFT + 1000 * tick * scale, f"{tick:g}") for tick in nice_ticks(0.0, milliseconds, 8)]
    keys = [(phase.text, colour) for phase, colour in _COLOURS.items() if _has(shown, phase)]
    return render(
        "gantt.html",
        title=f"Step {timeline.step:,}, milliseconds",
        width=_WIDTH,
        height=_TOP + len(rows) * _ROW + 26,
        bottom=_TOP + len(rows) * _ROW,
        rows=rows,
        ticks=ticks,
        keys=[*keys, (WAITING, "--wrong")],
        note=_note(timeline, shown),
    )


def drawn_ranks(timeline: Timeline) -> list[RankTimes]:
    """All, or of many those that wait least: the others wait for them."""
    waits = sorted(timeline.ranks, key=lambda rank: rank.seconds.get(WAITING, 0.0))
    return sorted(waits[:_ROWS], key=lambda rank: rank.rank)


def _has(ranks: Sequence[RankTimes], phase: Phase) -> bool:
    return any(which == phase for rank in ranks for *_, which, _ in rank.spans)


def _row(rank: RankTimes, y: float, first: int, scale: float) -> Row:
    bars = []
    for begin, length, which, text in rank.spans:
        waits = which < 0
        name = WAITING if waits else Phase(which).text
        told = f"rank {rank.rank}: {name}{': ' if text else ''}{text}, {length / 1000:.2f} ms"
        bars.append(
            Bar(
                x=round(_LEFT + (begin - first) * scale, 2),
                y=y + (_BAR + 1 if waits else 0),
                width=round(max(0.5, length * scale), 2),
                height=_WAIT if waits else _BAR,
                colour="--wrong" if waits else _COLOURS.get(Phase(which), "--c7"),
                text=told,
            )
        )
    return Row(f"rank {rank.rank}  {rank.host[:14]}", y, bars)


def _note(timeline: Timeline, shown: Sequence[RankTimes]) -> str:
    parts = []
    if len(shown) < len(timeline.ranks):
        parts.append(f"Of {len(timeline.ranks):,} ranks the {len(shown)} that wait least, whom the others wait for.")
    if dropped := sum(rank.dropped for rank in shown):
        parts.append(f"{dropped:,} of the shortest bars are left out.")
    if len({rank.host for rank in shown}) > 1:
        parts.append("Rows of different machines are as far apart as their clocks.")
    return " ".join(parts)
