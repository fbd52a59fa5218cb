#!/usr/bin/env python3
"""Find the fastest layout of a job that fits, from its recipe alone: nothing is run, no GPU is needed.

examples:
  python tools/plan.py --config vishwamai-120l --gpus 1024 --gpu h100
  python tools/plan.py --config 7b --gpus 8 --gpu a100-80 --explain --write-config 7b-on-8.yaml
  python tools/plan.py --check published.csv

Every layout of the recipe's model, sequence length and global batch is estimated: tensor, pipeline (with chunks),
context and data parallelism, sharding, micro-batch and recomputation; what fits is ranked by tokens/s. Speeds are those
of a job that runs undisturbed, and an estimate: `--check` holds them against published runs. Sizes are bytes; in text,
binary units (1 GiB = 2^30 B).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.config.schema import Precision
from vishwamai_mp.planning.check import check_rows, check_text, summary
from vishwamai_mp.planning.hardware import GPUS, find_gpu
from vishwamai_mp.planning.layout_search import nearest_that_fits, search
from vishwamai_mp.planning.plan_text import explanation, plan_dict, plan_text, recipe
from vishwamai_mp.planning.published import read_published
from vishwamai_mp.planning.stacks import STACKS, find_stack
from vishwamai_mp.planning.step_time import Machine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="R", help="a YAML file or the name of a preset")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of the whole job")
    parser.add_argument("--gpu", default="h100", metavar="KIND", help=f"default h100; {', '.join(GPUS)}")
    parser.add_argument(
        "--stack", default="megatron", metavar="PROGRAM", help=f"whose speed; default megatron; {', '.join(STACKS)}"
    )
    parser.add_argument(
        "--try-precision",
        action="append",
        default=[],
        choices=get_args(Precision),
        metavar="P",
        help="beside the recipe's",
    )
    parser.add_argument("--tokens", type=float, metavar="T", help="budget to cost; default: the recipe's steps")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="layouts to show (default 10)")
    parser.add_argument("--explain", action="store_true", help="break the best layout's memory and time down")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page too, which loads nothing")
    parser.add_argument("--write-config", type=Path, metavar="FILE", help="write the best layout's recipe")
    parser.add_argument("--check", type=Path, metavar="FILE.csv", help="compare with published runs instead")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.check:
        check(options.check, options.json)
        return
    if not options.config or options.gpus is None:
        raise UserError("--config and --gpus are needed, or --check")
    if options.gpus < 1 or options.top < 1 or (options.tokens is not None and not 0 < options.tokens < 1e18):
        raise UserError("--gpus, --top and --tokens must be positive")
    machine = Machine(find_gpu(options.gpu), find_stack(options.stack))
    config = load_config(options.config, options.overrides)
    plan = search(config, options.gpus, machine, tuple(options.try_precision))
    nearest = None if plan.fitting else nearest_that_fits(config, machine, options.gpus)
    training = config.training
    tokens = options.tokens or training.max_steps * training.global_batch_size * training.sequence_length
    if options.json:
        print(json.dumps(plan_dict(plan, options.top, tokens, nearest), indent=1))
    else:
        print(plan_text(plan, resolve(config), options.top, tokens, nearest))
        if options.explain and plan.fitting:
            print("\n" + explanation(plan))
    if options.html:
        from vishwamai_mp.observability.page import write_page
        from vishwamai_mp.observability.plan_page import plan_page

        write_page(options.html, plan_page(plan, config, tokens, nearest), "--html")
    if not plan.fitting and not plan.too_large:
        reason = next(iter(plan.refused), "see above")
        raise UserError(f"no layout of {options.config} is possible on {options.gpus} GPUs: {reason}")
    if not plan.fitting:
        raise UserError(f"{options.config} does not fit on {options.gpus} × {machine.gpu.title}")
    if options.write_config:
        head = f"# {options.config} on {options.gpus} × {machine.gpu.title}, as tools/plan.py lays it out.\n"
        try:
            write_whole(options.write_config, head + recipe(config, plan.fitting[0]))
        except OSError as error:
            raise UserError(f"--write-config {options.write_config}: cannot be written ({error.strerror})") from None


def check(table: Path, as_json: bool) -> None:
    """Print what is predicted of each published run."""
    runs, notes = read_published(table)
    for note in notes:
        print(note, file=sys.stderr)
    rows = check_rows(runs)
    found = {"rows": rows, "skipped": notes, "summary": summary(rows)}
    print(json.dumps(found, indent=1) if as_json else check_text(rows))


if __name__ == "__main__":
    run_program(main)
