#!/usr/bin/env python3
"""Show what is in indexed token files: how many documents, how long, and some of them.

examples:
  python tools/inspect_data.py corpus_text_document
  python tools/inspect_data.py corpus_text_document --tokenizer tokenizer.model --first 100 --count 2
  python tools/inspect_data.py corpus_text_document --tokenizer tokenizer.model --html corpus.html

PREFIX is what tools/preprocess_data.py printed: the path without .bin or .idx. Lengths are in tokens. The index is
checked on the way; the exit code is 1 if the pair is not whole.
"""

import argparse
from pathlib import Path

from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.data.inspection import inspect_indexed, render_html, render_text
from vishwamai_mp.data.tokenizer import Tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="of the pair PREFIX.bin, PREFIX.idx")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="decode with it: SentencePiece .model, tokenizer.json, or a folder with one"
    )
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first document shown (default: 0)")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="documents shown (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="shown of a document at most (default: %(default)s)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the histogram of lengths")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    for name in ("count", "max_tokens"):
        if getattr(arguments, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least 0")
    inspection = inspect_indexed(
        arguments.prefix,
        Tokenizer(arguments.tokenizer) if arguments.tokenizer else None,
        first=arguments.first,
        count=arguments.count,
        max_tokens=arguments.max_tokens,
    )
    print(render_text(inspection))
    if arguments.html:
        try:
            write_whole(arguments.html, render_html(inspection).encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(f"cannot write {arguments.html}: {error.strerror}") from error


if __name__ == "__main__":
    run_program(main)
