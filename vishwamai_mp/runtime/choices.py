"""Ways to the same result, within rounding, of which the fastest on this machine is taken.

Whether MKL or oneDNN multiplies faster, or torch's fused attention or one by blocks, differs from CPU to CPU. Each
`Choice` lists its ways; a table says by name which of them is in force. The table comes from, first that applies:

1. `use`: a training run keeps its table in `ways.json` of its folder, so that a resumed run computes bit for bit what
   it would have computed, and all its ranks take the same ways;
2. the file that the environment variable VISHWAMAI_WAYS names, or `first` for the first way of each choice;
3. what was measured on this kind of machine before, kept in the user's cache folder;
4. a measurement, milliseconds for each choice, made when it is first needed.

`tools/ways.py` shows this machine's table and what was measured.
"""

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.config.json_text import parse_json

_CLEARLY = 0.95  # another way than the first must need less than this share of its time
_MOST_SECONDS = 5.0  # of the clock for all choices: a run waits meanwhile, on a busy machine for minutes otherwise
_FEWEST, _ATTEMPTS = 3, 20  # rounds of a measurement; the first, which warms up, is one of them
_NEARLY = 1.1
_CAPS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")

_choices: dict[str, "Choice"] = {}
_in_force: dict[str, str] = {}  # of this process: name of a choice → name of its way


class Choice:
    """A function that calls the way in force.

    Args:
        name: in tables.
        ways: by name. The first is taken unless another is clearly faster.
        trial: makes the arguments of calls that stand for those that matter, which are timed one after the other.
        trained: whether the backward pass counts as well: the way's result is a tensor, its arguments have gradients.
    """

    def __init__(
        self,
        name: str,
        ways: Mapping[str, Callable[..., Any]],
        trial: Callable[[], Sequence[tuple[Any, ...]]],
        trained: bool = False,
    ) -> None:
        assert name not in _choices
        self.name, self.ways, self.trial, self.trained = name, dict(ways), trial, trained
        _choices[name] = self

    def __call__(self, *args: Any) -> Any:
        return self.ways[_in_force.get(self.name) or self._settle()](*args)

    @property
    def first(self) -> str:
        return next(iter(self.ways))

    def _settle(self) -> str:
        if is_in_torch_dispatch_mode():  # nothing is computed there, so nothing can be timed
            return self.first
        use(decide([self]))
        return _in_force[self.name]


def use(table: Mapping[str, str]) -> None:
    """Put ways into force. Those of unknown choices are ignored: a later version may have had them.

    Raises:
        UserError: a choice has no way of that name.
    """
    for name, way in table.items():
        if name in _choices and way not in _choices[name].ways:
            known = ", ".join(_choices[name].ways)
            raise UserError(f"ways: {name}={way} is not known; it is one of {known}")
        _in_force[name] = way


def forget() -> None:
    """Settle all ways anew when they are next needed: `use` for one job must not reach into the next one's."""
    _in_force.clear()


def ways_in_force() -> dict[str, str]:
    """Of this process, so far as they were settled."""
    return dict(_in_force)


def decide(choices: list[Choice] | None = None) -> dict[str, str]:
    """The way of each choice (default: of all) by the environment, what was measured before, or a measurement."""
    wanted = list(_choices.values()) if choices is None else choices
    said = os.environ.get("VISHWAMAI_WAYS")
    if said == "first":
        return {choice.name: choice.first for choice in wanted}
    given = read_table(Path(said)) if said else {}
    undecided = [choice for choice in wanted if choice.name not in given]
    table = {choice.name: given.get(choice.name, choice.first) for choice in wanted}
    for name, seconds in measured(undecided).items():
        table[name] = _fastest_of(seconds, _choices[name].first)
    return table


def read_table(path: Path) -> dict[str, str]:
    """A table from a file, checked.

    Raises:
        UserError: it cannot be read, or is no table.
    """
    try:
        table = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no table of ways can be read from it ({error}); delete it to measure anew") from None
    if not isinstance(table, dict) or not all(isinstance(way, str) for way in table.values()):
        raise UserError(f"{path}: a table of ways is an object of texts; delete it to measure anew")
    return table


def table_of_run(path: Path) -> dict[str, str]:
    """The table that a run keeps at `path`, which is completed, or made where there is none."""
    kept = read_table(path) if path.exists() else {}
    table = decide([choice for choice in _choices.values() if choice.name not in kept]) | kept
    if table != kept:
        write_whole(path, json.dumps(table, indent=1).encode() + b"\n")
    return table


def measured(choices: list[Choice] | None = None) -> dict[str, dict[str, float]]:
    """Seconds of each way of each choice (default: of all), from the user's cache folder as far as they are there.

    A choice that could not be timed, because the machine is busy with other things, is missing from the result.
    """
    wanted = list(_choices.values()) if choices is None else choices
    file = _cache_file()
    try:
        kept = parse_json(file.read_text())["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    kept = kept if isinstance(kept, dict) else {}
    found = {choice.name: kept[choice.name] for choice in wanted if _is_whole(kept.get(choice.name), choice)}
    unknown = [choice for choice in wanted if choice.name not in found]
    new, deadline = {}, time.monotonic() + _MOST_SECONDS
    for left, choice in zip(range(len(unknown), 0, -1), unknown, strict=True):
        seconds = _time(choice, (deadline - time.monotonic()) / left)
        if seconds is not None:
            new[choice.name] = seconds
            # A later choice's trial may come to this one, which must not be timed again within it.
            _in_force.setdefault(choice.name, _fastest_of(seconds, choice.first))
    if new:
        with contextlib.suppress(OSError):  # where it cannot be kept, it is measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({"machine": machine(), "seconds": kept | new}, indent=1))
    return found | new


def _is_whole(seconds: Any, choice: Choice) -> bool:
    return (
        isinstance(seconds, dict)
        and set(seconds) == set(choice.ways)
        and all(isinstance(each, float) for each in seconds.values())
    )


def machine() -> dict[str, Any]:
    """What decides which way is fastest here."""
    return {
        **_processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ[name] for name in _CAPS if name in os.environ},
    }


def _processor() -> dict[str, str]:
    """The CPU's name, and what tells two of one name apart: virtual machines may hide a part of what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return {"cpu": platform.processor() or platform.machine()}
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = hashlib.sha256(facts.get("flags", "").encode()).hexdigest()[:8]
    return {key: facts[key] for key in ("model name", "cpu family", "model", "stepping") if key in facts} | {
        "flags": flags
    }


def _cache_file() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vishwamai_mp"
    key = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"ways-{key}.json"


def _time(choice: Choice, most_seconds: float) -> dict[str, float] | None:
    """Least seconds of each way, None where they say nothing after `most_seconds` of the clock.

    The ways take turns, so that a busy machine slows all alike. A time counts when it was nearly reached twice. One
    thread's time is the processor's, which other programs take less from than from the clock's.
    """
    taken: dict[str, list[float]] = {name: [] for name in choice.ways}
    deadline = time.monotonic() + most_seconds
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode(False), torch.set_grad_enabled(choice.trained):
        calls = choice.trial()
        for attempt in range(_ATTEMPTS):
            for name, way in choice.ways.items():
                start = clock()
                for arguments in calls:
                    out = way(*arguments)
                    if choice.trained:
                        out.sum().backward()
                taken[name].append(clock() - start)
            least = {name: sorted(seconds)[:2] for name, seconds in taken.items()}
            if attempt + 1 >= _FEWEST and all(second < _NEARLY * first for first, second in least.values()):
                return {name: first for name, (first, _) in least.items()}
            if time.monotonic() > deadline:
                break
    return None


def _fastest_of(seconds: Mapping[str, float], first: str) -> str:
    best = min(seconds, key=lambda way: seconds[way])
    return best if seconds[best] < _CLEARLY * seconds[first] else first
