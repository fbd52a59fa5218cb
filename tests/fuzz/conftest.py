"""The table of a long run: for each reader its inputs, processor time, faults and memory.

FUZZ_EXAMPLES=2000 python -m pytest tests/fuzz
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest


@dataclass
class Reader:
    """What a reader was seen to do."""

    inputs: int = 0
    seconds: float = 0.0  # of processors, those of processes begun for it included
    mib: float = 0.0  # resident at the most, beyond what was resident before
    faults: int = 0


@dataclass
class Table:
    """Of the readers that were run."""

    readers: dict[str, Reader] = field(default_factory=dict)

    def lines(self) -> list[str]:
        width = max(map(len, self.readers))
        lines = [f"{'reader':<{width}}  inputs  CPU seconds  memory MiB  faults"]
        for name, reader in self.readers.items():
            lines.append(
                f"{name:<{width}}  {reader.inputs:>6}  {reader.seconds:>11.1f}  {reader.mib:>10.0f}  {reader.faults:>6}"
            )
        return lines


_table = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_table] = Table()


def _seconds() -> float:
    """Of this process, of those that it has begun and of those that have ended."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            spent = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system
    return total


def _resident_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Measures a test of hypothesis."""
    hypothesis: Any = getattr(getattr(item, "obj", None), "hypothesis", None)
    if hypothesis is None:
        return (yield)
    reader = item.config.stash[_table].readers.setdefault(item.nodeid.partition("::test_")[2], Reader())
    inner = hypothesis.inner_test

    def counted(*arguments: Any, **named: Any) -> Any:
        reader.inputs += 1
        return inner(*arguments, **named)

    hypothesis.inner_test = counted
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew: proc(5)
    resident, before = _resident_mib("VmRSS"), _seconds()
    try:
        return (yield)
    except BaseException:
        reader.faults += 1
        raise
    finally:
        hypothesis.inner_test = inner
        reader.seconds += _seconds() - before
        reader.mib = max(reader.mib, _resident_mib("VmHWM") - resident)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    table = config.stash[_table]
    if "FUZZ_EXAMPLES" in os.environ and table.readers:
        terminalreporter.section("readers")
        terminalreporter.write_line("\n".join(table.lines()))
