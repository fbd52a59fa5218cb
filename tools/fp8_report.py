#!/usr/bin/env python3
"""Show what FP8 or NVFP4 does to the operands of each linear layer of a run: amax, scale, what is rounded away.

    python -m vishwamai_mp.pretrain --config RECIPE precision=fp8_delayed fp8.report_every=100
    python tools/fp8_report.py runs/mine                              the last reported step
    python tools/fp8_report.py runs/mine --step 300 --sort underflow  worst first

underflow: share of the numbers, other than zero, that became zero. overflow: share that was clipped to the end of the
format's range. A tensor with one scale shows it; one with many (fp8_blockwise, fp8_mx, nvfp4) shows the smallest and
the largest.
"""

import argparse
from pathlib import Path

from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.data.lines import json_records

_FILE = "fp8.jsonl"
_SHOWN = ("amax", "smallest_scale", "largest_scale", "underflow", "overflow")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, metavar="N", help="which reported step (default: the last)")
    parser.add_argument("--sort", choices=("layer", *_SHOWN), default="layer", help="by layer, or largest first")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    records = read(options.run / _FILE)
    step = options.step if options.step is not None else max(records)
    if step not in records:
        raise UserError(f"--step {step}: not reported; there are {', '.join(map(str, sorted(records)))}")
    rows = table(records[step])
    if options.sort != "layer":
        rows.sort(key=lambda row: -row[2].get(options.sort, 0.0))
    print(f"step {step}")
    print(render(rows))


def read(path: Path) -> dict[int, dict[str, float | None]]:
    """Numbers by step and by `layer/operand/what`."""
    if not path.is_file():
        raise UserError(f"{path} is not there; train with fp8.report_every=N, which writes it every N steps")
    records = {record.pop("step", None): record for record in json_records(path)}
    if not records:
        raise UserError(f"{path} is empty: no step was reported yet")
    if not all(isinstance(step, int) and all(map(_is_figure, record.items())) for step, record in records.items()):
        raise UserError(
            f"{path} is no FP8 report: a line lacks its step, or has other than numbers by layer/operand/what"
        )
    return records


def _is_figure(item: tuple[str, object]) -> bool:
    return item[0].count("/") == 2 and (item[1] is None or isinstance(item[1], int | float))


def table(record: dict[str, float | None]) -> list[tuple[str, str, dict[str, float]]]:
    """(layer, operand, numbers) in the order of the file; a number that was not finite is NaN."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in record.items():
        layer, operand, what = key.split("/")
        rows.setdefault((layer, operand), {})[what] = float("nan" if value is None else value)
    for (layer, operand), numbers in rows.items():
        if missing := set(_SHOWN) - set(numbers):
            raise UserError(f"{_FILE} is no whole FP8 report: {layer}/{operand} lacks {', '.join(sorted(missing))}")
    return [(layer, operand, numbers) for (layer, operand), numbers in rows.items()]


def render(rows: list[tuple[str, str, dict[str, float]]]) -> str:
    width = max(len(layer) for layer, _, _ in rows)
    lines = [f"{'layer':{width}}  operand       amax           scale              underflow  overflow"]
    for layer, operand, numbers in rows:
        low, high = numbers["smallest_scale"], numbers["largest_scale"]
        scale = f"{low:.3g}" if low == high else f"{low:.3g} – {high:.3g}"
        lines.append(
            f"{layer:{width}}  {operand:8}  {numbers['amax']:9.3g}  {scale:>22}  {numbers['underflow']:9.3%}"
            f"  {numbers['overflow']:8.3%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
