#!/usr/bin/env python3
"""Verifies what this package makes of your own Hugging Face folder: a line for each thing that holds or does not.

    python tools/verify_family.py Qwen3-0.6B
    python tools/verify_family.py Llama-3.1-8B --layers 4 --json

The folder is imported; logits and greedy tokens are compared with transformers' in fp32; the export is compared with
the folder, bit by bit; two training steps are taken at two layouts (TP1 and TP2, or another where heads do not divide);
generation is compared with one pass over the text, and adapters (LoRA) merged into the weights with adapters beside
them. Needs 18 bytes of memory and 12 to 16 bytes of disk per parameter; --layers verifies the first layers alone.

No code in the folder is run, and nothing is left behind. Exit status 0: all that applies holds.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from vishwamai_mp.config.errors import UserError, run_program


def main() -> int:
    options = parse_arguments()
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is no folder; give one with config.json and safetensors files")
    if options.work_dir is not None and not options.work_dir.is_dir():
        raise UserError(f"--work-dir {options.work_dir} is no folder; make it first")
    if options.tokens < 1:
        raise UserError(f"--tokens {options.tokens}: use 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was written is removed on the way
    with tempfile.TemporaryDirectory(prefix="vishwamai-verify-", dir=options.work_dir) as place:
        # The stack takes seconds to import; mistakes are told before.
        from vishwamai_mp.verification.family_checks import verify
        from vishwamai_mp.verification.gloo_ranks import GlooRanks

        with GlooRanks() as run_ranks:
            report = verify(
                options.folder,
                Path(place),
                run_ranks,
                layers=options.layers,
                tokens=options.tokens,
                say=lambda finding: print(f"{finding.check}: {finding.status}", file=sys.stderr),
            )
    print(json.dumps(report.to_dict(), indent=1) if options.json else report.render())
    return 0 if report.holds else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with config.json and safetensors files")
    parser.add_argument("--layers", type=int, metavar="N", help="verify the first N layers alone (default: all)")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens to compare per prompt (default: 64)")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="where to write meanwhile (default: the system's)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
