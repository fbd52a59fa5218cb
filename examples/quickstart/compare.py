#!/usr/bin/env python3
"""How well does the quickstart's model predict text it has not seen, beside two yardsticks?

    python examples/quickstart/compare.py --run RUN --held-out TOKENS_PREFIX --text FOLDER/held_out.jsonl

Prints the held-out loss in nats per token and in bits per byte, the entropy of the held-out tokens taken one by one
(what a model that knows only their frequencies could reach), and what `xz -9` makes of the same bytes.
"""

import argparse
import json
import lzma
import math
from pathlib import Path

import numpy as np

from vishwamai_mp.config import UserError, run_program
from vishwamai_mp.data.lines import json_records, text_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--held-out", required=True, help="prefix of the held-out .bin/.idx")
    parser.add_argument("--text", type=Path, required=True, help="the JSONL it was made from")
    options = parser.parse_args()
    nats = validation_loss(options.run / "metrics.jsonl")
    text = "".join(json.loads(line)["text"] for line in text_lines(options.text)).encode()
    tokens = np.fromfile(f"{options.held_out}.bin", dtype=np.uint16)
    bits_per_nat_token = len(tokens) / len(text) / math.log(2)  # tokens per byte, in bits
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    unigram = float(-(shares * np.log(shares)).sum())
    xz = 8 * len(lzma.compress(text, preset=9)) / len(text)
    print(f"held out: {len(text):,} bytes, {len(tokens):,} tokens, {len(text) / len(tokens):.2f} bytes per token")
    print(f"{'':26}{'nats/token':>12}{'bits/byte':>12}")
    print(f"{'this model':26}{nats:12.3f}{nats * bits_per_nat_token:12.3f}")
    print(f"{'token-unigram entropy':26}{unigram:12.3f}{unigram * bits_per_nat_token:12.3f}")
    print(f"{'xz -9 on the same bytes':26}{xz / bits_per_nat_token:12.3f}{xz:12.3f}")
    if nats >= unigram:
        raise UserError(
            f"the model's loss {nats:.3f} is not below the unigram entropy {unigram:.3f}: it has not learned"
        )


def validation_loss(metrics: Path) -> float:
    """The last validation loss of a run, nats per token."""
    losses = [record["validation_loss"] for record in json_records(metrics) if record.get("validation_loss")]
    if not losses:
        raise UserError(f"{metrics} has no validation_loss; set training.evaluate_every")
    return losses[-1]


if __name__ == "__main__":
    run_program(main)
