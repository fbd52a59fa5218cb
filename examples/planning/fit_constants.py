#!/usr/bin/env python3
"""Fit the constants of `vishwamai_mp/planning/stacks.py` to published throughput, and say how far off other rows are.

    python examples/planning/fit_constants.py published.csv [--memory published_memory.csv]

Of the distinct layouts of a program, GPU and number format, in the order of the table, every other one is fitted to
(all its rows); the rest is held out. One coordinate at a time is moved while the mean of |log(predicted / measured)|
falls, each row's share bounded so that outliers do not decide. With `--memory` the constants of what programs keep are
fitted likewise, to every other row of a program.
"""

import argparse
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from vishwamai_mp.config.errors import run_program
from vishwamai_mp.planning import stacks
from vishwamai_mp.planning.published import PublishedRun, read_published
from vishwamai_mp.planning.published_memory import peak_bytes
from vishwamai_mp.planning.step_time import step_time, tokens_per_second_per_gpu

# Constants of a stack that are fitted, and where they may lie.
_RANGES = {
    "elementwise": (0.8, 4.0),
    "tensor_overlap": (0.0, 0.5),
    "tensor_overlap_asynchronous": (0.6, 0.95),
    "context_overlap": (0.0, 0.95),
    "context_attention": (1.0, 2.5),
    "data_overlap": (0.0, 0.97),
    "pipeline_overlap": (0.0, 0.9),
    "link": (0.4, 0.85),
    "latency": (5e-6, 60e-6),
    "layer": (0.1e-3, 3e-3),
    "jitter": (0.002, 0.08),
}
# Shares of a peak: least, usual, most.
_SHARES = {
    "16": (0.4, 0.68, 0.8),
    "fp8": (0.35, 0.6, 0.78),
    "fp8_rowwise": (0.2, 0.4, 0.6),
    "mxfp8": (0.35, 0.56, 0.75),
    "nvfp4": (0.25, 0.42, 0.65),
    "attention": (0.15, 0.45, 0.75),
}
# What a layer keeps, and what a program keeps besides.
_KEPT_RANGES = {
    "residual": (6.0, 24.0),
    "mlp": (3.0, 6.0),
    "logit": (4.0, 16.0),
    "gradient": (0.0, 4.0),
    "reserved": (1.0, 1.2),
    "libraries": (0.5 * 2**30, 4.0 * 2**30),
}
_PULL = 0.003  # towards what is usual, where the rows hardly tell
_WORST = 0.4  # a row's largest share in what is minimised


def split(runs: list[PublishedRun]) -> tuple[list[PublishedRun], list[PublishedRun]]:
    """Rows to fit to, and the others."""
    order: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    sides: tuple[list[PublishedRun], list[PublishedRun]] = ([], [])
    for run in runs:
        group = order[run.machine.stack.name, run.machine.gpu.name, str(run.machine.format)]
        sides[group.setdefault(run.label, len(group)) % 2].append(run)
    return sides


def errors(runs: list[PublishedRun]) -> list[float]:
    """predicted / measured − 1, with the constants as they are now."""
    found = []
    for run in runs:
        assert run.measured is not None
        own = stacks.STACKS[run.machine.stack.name]
        if run.machine.stack.tensor_overlap == run.machine.stack.tensor_overlap_asynchronous:
            own = replace(own, tensor_overlap=own.tensor_overlap_asynchronous)
        time = step_time(run.config, run.world_size, replace(run.machine, stack=own))
        found.append(tokens_per_second_per_gpu(run.config, run.world_size, time) / run.measured - 1)
    return found


def fit(name: str, runs: list[PublishedRun], rounds: int) -> None:
    """Move the constants of one stack."""

    def loss() -> float:
        pull = sum(abs(math.log(table[kind] / _SHARES[kind][1])) for table in tables.values() for kind in table)
        own = stacks.STACKS[name]
        pull += sum(abs(getattr(own, k) - getattr(usual, k)) / (high - low) for k, (low, high) in _RANGES.items())
        return _PULL * pull + sum(min(abs(math.log(1 + error)), _WORST) for error in errors(runs)) / len(runs)

    usual, tables = stacks.STACKS[name], stacks.REACHED[name]
    used = {(run.machine.gpu.name, kind) for run in runs for kind in (str(run.machine.format), "attention", "16")}
    best = loss()
    for scale in (0.3, 0.1, 0.03, 0.01)[:rounds]:
        for _ in range(3):
            before = best
            for field, (low, high) in _RANGES.items():
                for sign in (1, -1):
                    old = stacks.STACKS[name]
                    value = getattr(old, field) + sign * scale * (high - low)
                    stacks.STACKS[name] = replace(old, **{field: round(min(max(value, low), high), 7)})
                    now = loss()
                    best, stacks.STACKS[name] = (now, stacks.STACKS[name]) if now < best else (best, old)
            for gpu, kind in sorted(used):
                for sign in (1, -1):
                    share = tables[gpu][kind]
                    low, _, high = _SHARES[kind]
                    tables[gpu][kind] = round(min(max(share * (1 + sign * scale), low), high), 3)
                    now = loss()
                    if now < best:
                        best = now
                    else:
                        tables[gpu][kind] = share
            if before - best < 1e-4:
                break


def memory_errors(runs: list[PublishedRun]) -> list[float]:
    """predicted / measured − 1 of the peaks."""
    found = []
    for run in runs:
        assert run.memory is not None
        found.append(peak_bytes(run.config, run.world_size, stacks.KEPT[run.machine.stack.name]) / run.memory - 1)
    return found


def fit_memory(names: set[str], runs: list[PublishedRun], rounds: int) -> None:
    """Move what one program keeps, under all of its names."""

    def loss(kept: stacks.Kept) -> float:
        stacks.KEPT.update(dict.fromkeys(names, kept))
        pull = sum(abs(getattr(kept, k) - getattr(usual, k)) / (high - low) for k, (low, high) in _KEPT_RANGES.items())
        return _PULL * pull + sum(min(abs(math.log(1 + error)), _WORST) for error in memory_errors(runs)) / len(runs)

    usual = best = stacks.KEPT[min(names)]
    least = loss(usual)
    for scale in (0.3, 0.1, 0.03, 0.01)[:rounds]:
        for _ in range(3):
            for field, (low, high) in _KEPT_RANGES.items():
                for sign in (1, -1):
                    value = min(max(getattr(best, field) + sign * scale * (high - low), low), high)
                    moved = replace(best, **{field: value})
                    if (now := loss(moved)) < least:
                        least, best = now, moved
    stacks.KEPT.update(dict.fromkeys(names, best))


def by_layout(runs: list[PublishedRun]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Measured and predicted rates of each source's model on a kind of GPU, and of each of its layouts."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for run, error in zip(runs, errors(runs), strict=True):
        assert run.measured is not None
        key = f"{run.source[:24]} {run.model} {run.machine.gpu.name}"
        groups[key][run.label].append((run.measured, run.measured * (1 + error)))
    return groups


def release_spread(runs: list[PublishedRun]) -> float:
    """How much faster a layout's fastest row is than its slowest: the median of layouts with several rows."""
    every = [pairs for layouts in by_layout(runs).values() for pairs in layouts.values() if len(pairs) > 1]
    spreads = sorted(max(pairs)[0] / min(pairs)[0] - 1 for pairs in every)
    return spreads[len(spreads) // 2] if spreads else 0.0


def rank_agreement(runs: list[PublishedRun], closer: float = 0.0) -> dict[str, float]:
    """Kendall's tau-b of predicted and measured rates, of sources that have four or more layouts of a model.

    Args:
        closer: pairs of layouts whose measured rates differ by a smaller share are left out.
    """
    found = {}
    for key, layouts in by_layout(runs).items():
        points = [tuple(sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1)) for pairs in layouts.values()]
        if len(points) >= 4:
            couples = [(a, b) for i, a in enumerate(points) for b in points[:i]]
            couples = [(a, b) for a, b in couples if max(a[0], b[0]) >= (1 + closer) * min(a[0], b[0])]
            signs = [(_sign(a[0] - b[0]), _sign(a[1] - b[1])) for a, b in couples]
            norm = math.sqrt(sum(x * x for x, _ in signs) * sum(y * y for _, y in signs))
            found[key] = sum(x * y for x, y in signs) / norm if norm else 0.0
    return found


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def report(title: str, found: list[float]) -> None:
    sizes = sorted(map(abs, found))
    median, ninth = sizes[len(sizes) // 2], sizes[int(0.9 * len(sizes))]
    print(f"{title}: {len(sizes)} rows, median {median:.1%}, 90th percentile {ninth:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--rounds", type=int, default=4, help="of ever finer moves; 0 only reports (default 4)")
    parser.add_argument("--memory", type=Path, metavar="TABLE", help="of published peaks")
    options = parser.parse_args()
    runs = [run for run in read_published(options.table)[0] if run.measured]
    fitted, held_out = split(runs)
    for name in {run.machine.stack.name for run in fitted}:
        fit(name, [run for run in fitted if run.machine.stack.name == name], options.rounds)
        print(stacks.STACKS[name], stacks.REACHED[name], sep="\n")
    report("fitted to", errors(fitted))
    report("held out", errors(held_out))
    spread = release_spread(runs)
    print(f"Kendall's tau; of pairs that are at least {spread:.1%} apart, the median spread of one layout's rows")
    beyond = rank_agreement(runs, spread)
    for key, tau in rank_agreement(runs).items():
        print(f"tau {tau:+.2f}; {beyond[key]:+.2f}  {key}")
    if options.memory:
        of_memory(options.memory, options.rounds)


def of_memory(table: Path, rounds: int) -> None:
    """Fit what programs keep to every other row of each, and say how far off the rows are."""
    runs = [run for run in read_published(table)[0] if run.memory and run.machine.stack.name in stacks.KEPT]
    programs: dict[str, list[PublishedRun]] = defaultdict(list)
    for run in runs:
        programs[run.machine.stack.name.removesuffix("-eager")].append(run)
    fitted, held_out = [], []
    for program, rows in programs.items():
        fit_memory({name for name in stacks.KEPT if name.startswith(program)}, rows[::2], rounds)
        print(stacks.KEPT[program])
        fitted += rows[::2]
        held_out += rows[1::2]
    report("memory, fitted to", memory_errors(fitted))
    report("memory, held out", memory_errors(held_out))


if __name__ == "__main__":
    run_program(main)
