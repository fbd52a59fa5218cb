"""Checks of NVIDIA GPUs by what `nvidia-smi` says of them, for `preflight`.

Field names are nvidia-smi's own (`nvidia-smi --help-query-gpu`). Tried with programs that answer like it, not yet with
a real one.
"""

import shutil
import subprocess
from collections import Counter

from vishwamai_mp.config.wording import counted
from vishwamai_mp.launch.checks import Finding, judge

_CHECKS = ("gpus", "gpu memory", "driver", "clocks", "ecc")
_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.max.sm",
    "clocks_throttle_reasons.hw_slowdown",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
_UNKNOWN = ("[N/A]", "N/A", "[Not Supported]", "[Unknown Error]")
_SECONDS = 60  # a driver that takes longer hangs
_OTHERS_SHARE = 0.05  # of memory, in use before the job starts: the driver itself keeps a per cent or less

Gpu = dict[str, str]


def check_gpus(wanted: int | None, least_driver: str | None) -> list[Finding]:
    """All checks of this machine's GPUs.

    Args:
        wanted: how many there must be; None: any number, zero as well.
        least_driver: the oldest driver that will do, such as "535"; None: any.
    """
    if wanted == 0:
        return [Finding(check, "does not apply", "no GPUs wanted") for check in _CHECKS]
    if shutil.which("nvidia-smi") is None:
        if wanted:
            return [Finding("gpus", "fault", f"{wanted} GPUs wanted, and there is no nvidia-smi; install the driver")]
        return [Finding(check, "does not apply", "no nvidia-smi: no NVIDIA driver here") for check in _CHECKS]
    gpus = _query()
    if isinstance(gpus, str):
        return [Finding("gpus", "fault", gpus)]
    return [
        *_count(gpus, wanted),
        *_memory(gpus),
        *_driver(gpus, least_driver),
        *_clocks(gpus),
        *_ecc(gpus),
    ]


def _query() -> list[Gpu] | str:
    """The GPUs, or in one line why nvidia-smi does not tell."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi does not answer within {_SECONDS} s; the driver hangs, restart the machine"
    except OSError as error:
        return f"nvidia-smi cannot be run ({error.strerror})"
    if answer.returncode:
        said = (answer.stderr + answer.stdout).strip().splitlines() or ["nothing"]
        return f"nvidia-smi ended with status {answer.returncode}: {said[0][:200]}"
    rows = [[value.strip() for value in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    wrong = [row for row in rows if len(row) != len(_FIELDS)]
    if wrong:
        return f"nvidia-smi answers {','.join(wrong[0])[:120]!r}, not {len(_FIELDS)} fields"
    return [dict(zip(_FIELDS, row, strict=True)) for row in rows]


def _count(gpus: list[Gpu], wanted: int | None) -> list[Finding]:
    faults = []
    if wanted is not None and len(gpus) != wanted:
        faults.append(f"{wanted} GPUs wanted, nvidia-smi lists {len(gpus)}")
    faults += [f"GPU {gpu['index']} is a {gpu['name']}, the others are {usual}" for gpu, usual in _odd(gpus, "name")]
    names = ", ".join(f"{number} × {name}" for name, number in Counter(gpu["name"] for gpu in gpus).items())
    return judge("gpus", faults, names or "none", count=len(gpus))


def _memory(gpus: list[Gpu]) -> list[Finding]:
    faults = [
        f"GPU {gpu['index']} has {gpu['memory.total']} MiB, the others {usual} MiB"
        for gpu, usual in _odd(gpus, "memory.total")
    ]
    for gpu in gpus:
        used, total = _number(gpu["memory.used"]), _number(gpu["memory.total"])
        if used is not None and total and used > total * _OTHERS_SHARE:
            faults.append(f"GPU {gpu['index']}: {used:.0f} of {total:.0f} MiB are in use by another process")
    totals = sorted({gpu["memory.total"] for gpu in gpus})
    return judge("gpu memory", faults, f"{', '.join(totals) or 'no'} MiB per GPU", total_mib=totals)


def _driver(gpus: list[Gpu], least: str | None) -> list[Finding]:
    versions = sorted({gpu["driver_version"] for gpu in gpus})
    faults = [
        f"driver {version}, {least} or later wanted"
        for version in versions
        if least is not None and _version(version) < _version(least)
    ]
    return judge("driver", faults, f"driver {', '.join(versions) or 'unknown'}", versions=versions)


def _clocks(gpus: list[Gpu]) -> list[Finding]:
    """A GPU whose clocks are held down slows every other one of a job."""
    faults = [
        f"GPU {gpu['index']}: clocks up to {gpu['clocks.max.sm']} MHz, the others {usual} MHz"
        for gpu, usual in _odd(gpus, "clocks.max.sm")
    ]
    faults += [
        f"GPU {gpu['index']}: the hardware holds its clocks down (heat or power)"
        for gpu in gpus
        if gpu["clocks_throttle_reasons.hw_slowdown"] == "Active"
    ]
    return judge("clocks", faults, f"up to {gpus[0]['clocks.max.sm'] if gpus else 0} MHz")


def _ecc(gpus: list[Gpu]) -> list[Finding]:
    faults = []
    for gpu in gpus:
        name = f"GPU {gpu['index']}"
        errors = _number(gpu["ecc.errors.uncorrected.volatile.total"])
        if gpu["ecc.mode.current"] == "Disabled":
            faults.append(f"{name}: ECC is off; nvidia-smi -e 1 and a restart")
        if errors:
            faults.append(f"{name}: {counted(int(errors), 'uncorrected memory error')} since the driver was loaded")
        if gpu["remapped_rows.failure"] == "Yes":
            faults.append(f"{name}: a row of memory could not be remapped; the GPU must be replaced")
        elif gpu["remapped_rows.pending"] == "Yes":
            faults.append(f"{name}: a row of memory waits to be remapped; reset the GPU")
    unknown = all(gpu["ecc.mode.current"] in _UNKNOWN for gpu in gpus)
    if unknown and not faults:
        return [Finding("ecc", "does not apply", "these GPUs do not tell of ECC")]
    return judge("ecc", faults, "on, no uncorrected errors")


def _odd(gpus: list[Gpu], key: str) -> list[tuple[Gpu, str]]:
    """GPUs that differ from most of this machine's in `key`, each with what most have."""
    if not gpus:
        return []
    usual = Counter(gpu[key] for gpu in gpus).most_common(1)[0][0]
    return [(gpu, usual) for gpu in gpus if gpu[key] != usual]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _version(text: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in text.split(".")]
