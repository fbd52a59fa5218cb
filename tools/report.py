#!/usr/bin/env python3
"""Write a report of one run, or of several side by side, as one HTML page that needs no network.

    python tools/report.py runs/mine                               writes report.html
    python tools/report.py runs/a runs/b runs/c --output abc.html  compares them

Curves over steps or tokens, linear or logarithmic, smoothed or not: loss (nats per token), learning rate, gradient
norm, tokens per second, MFU, memory (GiB), and what memory, cache, value head and FP8 measured; tables of
configurations, environments, checkpoints, where the time of all attempts went and which ranks were slow; one step drawn
over all ranks. A run may still be going on. Long runs are thinned, which the page says, so that a curve takes at most
900 points.
"""

import argparse
import sys
from pathlib import Path

from vishwamai_mp.config.errors import run_program
from vishwamai_mp.observability.page import write_page
from vishwamai_mp.observability.report import render_report
from vishwamai_mp.observability.run_folder import read_run


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder (training.output_dir)")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    folders = list({folder.resolve(): folder for folder in options.runs}.values())
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        for note in run.notes:
            print(f"{run.folder}: {note}", file=sys.stderr)
    text = render_report(runs)
    write_page(options.output, text, "--output")
    print(f"{options.output}: {', '.join(run.name for run in runs)}; {len(text.encode()) / 2**10:,.0f} KiB")


if __name__ == "__main__":
    run_program(main)
