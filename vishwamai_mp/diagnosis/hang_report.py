"""The report of a job that hangs: `hang_report.json` for programs, `hang_report.txt` and the console for people."""

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from vishwamai_mp.diagnosis.state import RankState
from vishwamai_mp.diagnosis.verdict import Verdict, describe_wait, ranks_text

NAME = "hang_report"
_FRAMES = 12  # of a stack that are printed
_RECENT = 8  # collectives of a group
_SHOWN = 16  # ranks that are printed; the JSON has all


def to_dict(verdict: Verdict, states: Mapping[int, RankState]) -> dict[str, Any]:
    """All that is known, of collectives the last few."""
    ranks = [states[rank].to_dict() for rank in sorted(states)]
    for group in (group for rank in ranks for group in rank["groups"].values()):
        group["recent"] = [f"{number} {operation} {size}" for number, operation, size in group["recent"][-_RECENT:]]
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "ranks_at_fault": verdict.ranks,
        "why": verdict.why,
        "operation": verdict.operation,
        "waiting": verdict.waiting,
        "ranks": ranks,
    }


def to_text(verdict: Verdict, states: Mapping[int, RankState], folder: Path) -> str:
    """For a person: the fault first, then its stack, then what each rank does."""
    lines = [_headline(verdict, states)]
    if verdict.waiting:
        count = len(verdict.waiting)
        lines.append(f"  rank{'s wait' if count > 1 else ' waits'}: {ranks_text(verdict.waiting)}")
    if verdict.operation:
        lines.append(f"  operation: {verdict.operation}")
    for rank in verdict.ranks[:4]:
        if rank in states:
            lines += ["  " + line for line in _stack_lines(states[rank])]
    others = [rank for rank in sorted(states) if rank not in verdict.ranks]
    shown = [*(rank for rank in verdict.ranks if rank in states), *others][:_SHOWN]
    lines += ["what each rank does:", *(f"  {describe(states[rank])}" for rank in shown)]
    if len(states) > len(shown):
        lines.append(f"  and {len(states) - len(shown):,} more")
    lines.append(f"all of it, with every stack: {folder / NAME}.json")
    return "\n".join(lines)


def _headline(verdict: Verdict, states: Mapping[int, RankState]) -> str:
    event = "the job cannot go on" if verdict.is_ending else "the job hangs"
    if not verdict.ranks:
        return f"{event}: {verdict.why}"
    named = []
    for rank in verdict.ranks[:8]:
        where = f" ({states[rank].host}, process {states[rank].pid})" if rank in states else ""
        named.append(f"rank {rank}{where}")
    more = f" and {len(verdict.ranks) - 8} more" if len(verdict.ranks) > 8 else ""
    return f"{event}: {', '.join(named)}{more}: {verdict.why}"


def _stack_lines(state: RankState) -> Sequence[str]:
    if not state.stacks:
        return [f"no stack of rank {state.rank} can be had"]
    frames = state.stacks[0]
    more = [f"  … {len(frames) - _FRAMES} more"] if len(frames) > _FRAMES else []
    return [f"stack of rank {state.rank}, innermost call first:", *(f"  {frame}" for frame in frames[:_FRAMES]), *more]


def describe(state: RankState) -> str:
    """A rank in a line."""
    pass_ = (
        f", micro-batch {state.micro_batch}" if state.phase.endswith(("pass", "passes")) and state.micro_batch else ""
    )
    text = f"rank {state.rank} on {state.host}: step {state.step}, {state.phase}{pass_} for {state.seconds:.0f} s"
    text += f" (at most {state.limit:.0f})"
    if state.waiting is not None:
        text += f", waits {state.waiting.seconds:.0f} s in {describe_wait(state.waiting, state)}"
    process = state.process
    if process not in ("stopped", "traced", "dead"):
        if not math.isnan(state.cpu):
            process += f", {100 * state.cpu:.0f} % of a core"
        if state.beat_seconds > 5:
            process += f", ran no Python for {state.beat_seconds:.0f} s"
    ending = "" if state.ending == "none" else f", {state.ending}"
    return f"{text}; process {state.pid} {process}{ending}"


def write_new(path: Path, text: str) -> bool:
    """Write a file whole, unless it is there. Returns whether this process did."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)
    return True


def replace(path: Path, text: str) -> None:
    """Write a file whole, in place of an older one. Not synced: it says what is now."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_report(folder: Path, verdict: Verdict, states: Mapping[int, RankState], text: str) -> None:
    """Both files, in the run folder."""
    replace(folder / f"{NAME}.json", json.dumps(to_dict(verdict, states), indent=1) + "\n")
    replace(folder / f"{NAME}.txt", text + "\n")
