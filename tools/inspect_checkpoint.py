#!/usr/bin/env python3
"""Show what is in a checkpoint, and whether it is whole.

examples:
  python tools/inspect_checkpoint.py runs/mine                                   its newest checkpoint
  python tools/inspect_checkpoint.py runs/mine/checkpoints/step_00000100 --verify
  python tools/inspect_checkpoint.py runs/mine --json | jq .parameters

Shapes are those of whole tensors, before sharding; sizes are bytes in binary units (1 KiB = 1024 B). Nothing is
unpickled. The exit code is 1 if a file is missing, of a wrong size or, with --verify, damaged.
"""

import argparse
import json
from pathlib import Path

from vishwamai_mp.checkpoint import locate
from vishwamai_mp.checkpoint.description import describe, render
from vishwamai_mp.config.errors import UserError, run_program


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, a checkpoints/ folder or a run folder")
    parser.add_argument("--verify", action="store_true", help="read all files and compare their checksums")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text; sizes in bytes")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    facts = describe(locate(arguments.path), arguments.verify)
    print(json.dumps(facts, indent=1) if arguments.json else render(facts))
    if facts["problems"]:
        raise UserError(f"{facts['path']} is broken: {'; '.join(facts['problems'])}")


if __name__ == "__main__":
    run_program(main)
