#!/usr/bin/env python3
"""Runs the benchmarks of this folder one after another and keeps their ratios, beside those of earlier runs.

    python examples/benchmarks/all.py                        # half an hour; results/all.json and results/all.html
    python examples/benchmarks/all.py --only decode search --quick
    python examples/benchmarks/all.py --instructions avx2    # as on a CPU without AVX-512

Only ratios are kept: seconds of a machine say little on another, and little on the same one when it is busy. What
needs a peer that pip does not install is left out unless its folder is named; the benchmark's `--help` says how to get
it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment

from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.observability.page import page

FOLDER = Path(__file__).resolve().parent
_OUTPUT = "{output}"  # in arguments: the folder of results


@dataclass(frozen=True)
class Benchmark:
    """A program of this folder.

    Attributes:
        quick: arguments of a run that only shows that it works.
        peer: option of `all.py`, a peer's folder, that is passed on.
        needs_peer: whether there is nothing to measure without it.
    """

    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    peer: str | None = None
    needs_peer: bool = False


BENCHMARKS = {
    "training_step": Benchmark(quick=("--rounds", "1")),
    "decode": Benchmark(("--batch", "1", "4", "16"), ("--rounds", "1", "--new-tokens", "8", "--layers", "2")),
    "packed_weights": Benchmark(
        ("--output", _OUTPUT),
        ("--rounds", "1", "--new-tokens", "4", "--layers", "1", "--hidden", "256", "--steps", "3"),
    ),
    "drafts": Benchmark(
        quick=("--rounds", "1", "--new-tokens", "8", "--layers", "1", "--hidden", "64", "--steps", "3"),
    ),
    "search": Benchmark(quick=("--prompt-tokens", "128", "--thought-tokens", "2")),
    "components": Benchmark(quick=("--rounds", "1", "--model", "tiny")),
    "precision": Benchmark(("--most", "10"), ("--most", "1000", "--rounds", "1", "--layers", "1")),
    "neural_memory": Benchmark(("--output", _OUTPUT), ("--passes", "1"), peer="titans"),
    "cache_augmentation": Benchmark(quick=("--part", "cost", "--tokens", "2048", "--rounds", "1")),
    "scaling": Benchmark(quick=("--rounds", "1", "--steps", "1")),
    "growth": Benchmark(("--output", _OUTPUT), ("--rounds", "1", "--most", "512")),
    "journal": Benchmark(quick=("--steps", "2")),
    "startup": Benchmark(quick=("--rounds", "1", "--part", "help")),
    "preprocess": Benchmark(("--input", str(FOLDER.parents[1] / "README.md")), peer="megatron_lm", needs_peer=True),
}
# Highest instruction set that each library may use. A library that does not know a name ignores it.
INSTRUCTIONS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
}


@dataclass
class Run:
    """What one call of this program found.

    Attributes:
        machine: its CPU and versions.
        ratios: by benchmark, then by what is beside what.
        left_out: by benchmark, why.
        seconds: by benchmark.
    """

    when: str
    machine: dict[str, Any]
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(BENCHMARKS), choices=BENCHMARKS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="as little as possible: whether they run, not how fast")
    parser.add_argument("--instructions", choices=INSTRUCTIONS, default="native", help="default: %(default)s")
    parser.add_argument("--megatron-lm", metavar="FOLDER", help="a checkout, for `preprocess`")
    parser.add_argument("--titans", metavar="FOLDER", help="titans-pytorch, as another arm of `neural_memory`")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of all.json and all.html")
    options = parser.parse_args()
    run = measure({name: BENCHMARKS[name] for name in options.only}, options)
    runs = [*earlier_runs(options.output / "all.json"), asdict(run)]
    options.output.mkdir(parents=True, exist_ok=True)
    write_whole(options.output / "all.json", json.dumps(runs, indent=1) + "\n")
    write_whole(options.output / "all.html", html(runs))
    print(f"{options.output / 'all.html'}: {len(runs)} runs")
    return 1 if any(reason.startswith("failed") for reason in run.left_out.values()) else 0


def measure(benchmarks: Mapping[str, Benchmark], options: argparse.Namespace) -> Run:
    """Run them in turn; one that fails is named and the others go on."""
    run = Run(datetime.now(UTC).isoformat(timespec="minutes"), describe_machine(options.instructions))
    for name, benchmark in benchmarks.items():
        words = [str(FOLDER / f"{name}.py"), *benchmark.arguments, *(benchmark.quick if options.quick else ())]
        if benchmark.peer:
            option, folder = f"--{benchmark.peer.replace('_', '-')}", getattr(options, benchmark.peer)
            if benchmark.needs_peer and not folder:
                run.left_out[name] = f"needs {option} FOLDER"
                print(f"{name}: left out, {run.left_out[name]}", flush=True)
                continue
            words += [option, folder] if folder else []
        words = [str(options.output) if word == _OUTPUT else word for word in words]
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        ratios, status = ratios_of(words, os.environ | INSTRUCTIONS[options.instructions])
        run.seconds[name] = round(time.perf_counter() - start, 1)
        run.ratios[name] = ratios
        if status:
            run.left_out[name] = f"failed with status {status}"
            print(f"{name}: {run.left_out[name]}", flush=True)
    return run


def ratios_of(words: list[str], environment: Mapping[str, str]) -> tuple[dict[str, float], int]:
    """Run a program, show what it prints, and collect what `say_ratio` said; and its exit status."""
    ratios = {}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *words], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("ratio  "):
                _, what, value = line.strip().split("  ")
                ratios[what] = float(value)
    return ratios, process.returncode


def describe_machine(instructions: str) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    cpu = next(
        (line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": instructions,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def earlier_runs(path: Path) -> list[dict[str, Any]]:
    """Of this file, oldest first."""
    if not path.is_file():
        return []
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
        return [asdict(Run(**run)) for run in runs]
    except (ValueError, TypeError):
        raise UserError(f"{path}: not a file that this program wrote; move it away or name another --output") from None


_STYLE = """
table { border-collapse: collapse; font-variant-numeric: tabular-nums; background: var(--card); }
th, td { text-align: left; padding: 4px 14px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--faint); } th.name { color: var(--ink); padding-top: 18px; }
td.value { text-align: right; } td.newest { font-weight: 600; }
"""
_BODY = """<h1>Benchmarks</h1>
<p class="facts">Ratios, newest run first. What stands before the stroke is divided by what stands after it.</p>
<table><tr><th></th>{% for run in runs %}<th>{{ run.when }}<br>{{ run.machine.cpu }}, {{ run.machine.cores }} cores<br>
{{ run.machine.instructions }} ({{ run.machine.capability }}), torch {{ run.machine.torch }}</th>{% endfor %}</tr>
{% for name, whats in rows.items() %}<tr><th class="name" colspan="{{ runs | length + 1 }}">{{ name }}</th></tr>
{% for what in whats %}<tr><td>{{ what }}</td>{% for run in runs %}<td class="value{{ ' newest' if loop.first }}">
{{- run.ratios[name][what] if what in run.ratios.get(name, {}) else '–' }}</td>{% endfor %}</tr>{% endfor %}
<tr><td class="facts">seconds, or why left out</td>{% for run in runs %}<td class="value facts">
{{- run.left_out.get(name) or run.seconds.get(name, '–') }}</td>{% endfor %}</tr>{% endfor %}</table>"""


def html(runs: list[dict[str, Any]]) -> str:
    """A page of all runs side by side."""
    newest_first = runs[::-1]
    names = list(dict.fromkeys(name for run in newest_first for name in [*run["ratios"], *run["left_out"]]))
    rows = {
        name: list(dict.fromkeys(what for run in newest_first for what in run["ratios"].get(name, {})))
        for name in names
    }
    body = Environment(autoescape=True).from_string(_BODY).render(runs=newest_first, rows=rows)
    return page("Benchmarks", body, _STYLE, "")


if __name__ == "__main__":
    run_program(main)
