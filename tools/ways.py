#!/usr/bin/env python3
"""Show which of several equal ways this machine computes by, and what each was measured to take.

examples:
  python tools/ways.py
  OMP_NUM_THREADS=1 python tools/ways.py --json

What is measured depends on the CPU, the number of threads and torch, and is kept in the user's cache folder. A training
run keeps the ways that it began with in `ways.json` of its folder. VISHWAMAI_WAYS=FILE decides otherwise for a process
(a JSON object: name of the choice to name of the way); VISHWAMAI_WAYS=first takes the first way of each choice.
"""

import argparse
import json

from vishwamai_mp.config.errors import run_program


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object: machine, seconds of each way, ways")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Modules with choices make them known when imported.
    from vishwamai_mp.inference import packed_weights  # noqa: F401
    from vishwamai_mp.model import core_attention  # noqa: F401
    from vishwamai_mp.runtime.choices import decide, machine, measured

    seconds, ways = measured(), decide()
    if arguments.json:
        print(json.dumps({"machine": machine(), "seconds": seconds, "ways": ways}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    for name, taken in seconds.items():
        times = ", ".join(f"{way} {1e3 * each:.2f} ms" for way, each in taken.items())
        print(f"{name:18} {ways[name]:16} ({times})")


if __name__ == "__main__":
    run_program(main)
