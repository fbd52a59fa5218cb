#!/usr/bin/env python3
"""Make a tokenizer.json of a tiktoken file, or of Mistral's tekken.json, for --tokenizer of every tool.

examples:
  python tools/convert_tokenizer.py --input Meta-Llama-3-8B/tokenizer.model --pattern llama3 \\
      --special-tokens "<|begin_of_text|>" "<|end_of_text|>" --output tokenizer.json
  python tools/convert_tokenizer.py --input tekken.json --output tokenizer.json

A tiktoken file has neither the rule by which texts are cut nor the special tokens: both stand in the program that loads
it. Special tokens get the numbers after those of the file, in the order given.
"""

import argparse
from pathlib import Path

from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.data.cutting import PATTERNS
from vishwamai_mp.data.tiktoken_files import tokenizer_json
from vishwamai_mp.data.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="the tiktoken file or tekken.json")
    parser.add_argument(
        "--pattern",
        metavar="NAME",
        help=f"how texts are cut: {', '.join(PATTERNS)}, or a regular expression (default: what the file says)",
    )
    parser.add_argument(
        "--special-tokens", nargs="+", default=[], metavar="TOKEN", help="found wherever they are spelled in a text"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write")
    arguments = parser.parse_args()
    content = tokenizer_json(arguments.input, arguments.pattern, arguments.special_tokens)
    try:
        write_whole(arguments.output, content)
    except OSError as error:
        raise UserError(f"cannot write {arguments.output}: {error.strerror}") from error
    tokenizer = Tokenizer(arguments.output)
    print(f"{arguments.output}: {tokenizer.vocab_size} tokens, {len(tokenizer.control_tokens())} of them special")


if __name__ == "__main__":
    run_program(main)
