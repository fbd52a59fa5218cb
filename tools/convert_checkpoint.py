#!/usr/bin/env python3
"""Converts checkpoints to Hugging Face folders and back, on the CPU and in bounded memory.

    python tools/convert_checkpoint.py to-hf --load runs/mine --output mine-hf --dtype bf16 --verify
    python tools/convert_checkpoint.py to-hf --load runs/mine --output mine-hf --gguf q8_0
    python tools/convert_checkpoint.py from-hf --load Llama-3.2-1B --output runs/llama
    python tools/convert_checkpoint.py from-hf --load Llama-3.2-1B --output runs/more memory.enabled=true
    python tools/convert_checkpoint.py from-hf --load Llama-3.2-1B --output runs/steps --add-tokens "[STEP]"
    python tools/convert_checkpoint.py to-peft --load runs/adapted --output adapters --base Llama-3.2-1B
    python tools/convert_checkpoint.py verify --load runs/mine --output mine-hf --prompt "Once upon a time"

to-hf merges adapters (LoRA) into the weights, to-peft writes them alone. Run again, an interrupted to-hf or from-hf
continues. Sizes are in bytes: 5GB is 5,000,000,000, 5GiB is 5,368,709,120.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vishwamai_mp.config.errors import UserError, one_line, run_program
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe

if TYPE_CHECKING:
    from vishwamai_mp.conversion.families import Family
    from vishwamai_mp.conversion.source import Source

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = ("fp32", "bf16", "fp16", "fp8")


def main() -> None:
    options = parse_arguments()
    {"to-hf": to_hf, "to-peft": to_peft, "from-hf": from_hf, "verify": verify}[options.direction](options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    directions = parser.add_subparsers(dest="direction", required=True)
    export = directions.add_parser("to-hf", help="a checkpoint to a Hugging Face folder")
    adapters = directions.add_parser("to-peft", help="a checkpoint's adapters (LoRA) to a folder that peft loads")
    load = directions.add_parser("from-hf", help="a Hugging Face folder to a run folder with a checkpoint")
    check = directions.add_parser("verify", help="compare the logits and greedy tokens of a checkpoint and a folder")
    for command in (export, adapters, check):
        command.add_argument(
            "--load", required=True, type=Path, help="a run folder, its checkpoints folder, or one checkpoint"
        )
    adapters.add_argument("--output", required=True, type=Path, help="a new or empty folder")
    adapters.add_argument(
        "--base",
        default="",
        help="name of the Hugging Face model they were trained on, or its folder, which is compared",
    )
    for command in (export, check):
        command.add_argument("--tokenizer", help="its file or folder, or none (default: the run folder's)")
        command.add_argument("--prompt", action="append", default=[], help="text to compare on; may be repeated")
        command.add_argument("--tokens", type=int, default=64, help="greedy tokens to compare per prompt (default: 64)")
        command.add_argument(
            "--tolerance", type=float, default=1e-5, help="of logits, relative above 1 (default: 1e-5)"
        )
    load.add_argument("--load", required=True, type=Path, help="a folder with config.json and safetensors files")
    export.add_argument("--output", required=True, type=Path, help="a new or empty folder, or an unfinished export")
    load.add_argument("--output", required=True, type=Path, help="a new or empty folder, or an unfinished import")
    check.add_argument("--output", required=True, type=Path, help="the Hugging Face folder to compare with")
    export.add_argument(
        "--dtype", choices=_DTYPES, help="of the weights; fp8: in blocks of 128 × 128 (default: as stored)"
    )
    load.add_argument("--dtype", choices=_DTYPES[:-1], help="of the weights (default: as stored)")
    for command in (load, export, check):
        command.add_argument(
            "--family",
            help="what the folder is, by its architecture (MistralForCausalLM) or as package.module:Name, a family of"
            " your own, which is run (default: as config.json says, or the first that holds the model)",
        )
    load.add_argument(
        "additions",
        nargs="*",
        metavar="section.key=value",
        help="fresh components that change nothing until trained, such as memory.enabled=true",
    )
    load.add_argument(
        "--add-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="tokens of your own, such as [STEP], that the tokenizer is to find in texts; the vocabulary grows where it"
        " must",
    )
    export.add_argument(
        "--max-shard-size", type=size, default=5 * 10**9, help="most bytes of weights in a file (default: 5GB)"
    )
    export.add_argument(
        "--gguf",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="also write a file for llama.cpp into the folder, of numbers of this kind (needs the package gguf)",
    )
    export.add_argument("--chat-template", type=Path, help="a file with a Jinja template for the tokenizer")
    export.add_argument("--verify", action="store_true", help="compare afterwards; needs the memory of one fp32 model")
    return parser.parse_args()


def size(text: str) -> int:
    """Bytes, from `500MB` and the like."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    count = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB or 500MB")
    return int(count)


def to_hf(options: argparse.Namespace) -> None:
    from vishwamai_mp.conversion.dtypes import by_option
    from vishwamai_mp.conversion.to_hf import ExportOptions, export_folder

    source = open_source(options.load, options.family)
    tokenizer = tokenizer_path(options, source)
    template = read_text(options.chat_template) if options.chat_template else None
    dtype = by_option(options.dtype) if options.dtype else None
    prompts = prompts_to_compare(options, source) if options.verify else []  # a mistake in them costs no export
    chosen = ExportOptions(dtype, options.max_shard_size, tokenizer, template, options.gguf)
    for note in export_folder(source, options.output, chosen):
        print(note, file=sys.stderr)
    print(f"{source.path} → {options.output}")
    if options.verify:
        compare_with_folder(options, source, prompts)


def to_peft(options: argparse.Namespace) -> None:
    from vishwamai_mp.conversion.adapters import export_adapters

    source = open_source(options.load)
    for note in export_adapters(source, options.output, options.base):
        print(note, file=sys.stderr)
    print(f"adapters of {source.path} → {options.output}")


def from_hf(options: argparse.Namespace) -> None:
    from vishwamai_mp.conversion.dtypes import by_option
    from vishwamai_mp.conversion.folder import open_folder
    from vishwamai_mp.conversion.from_hf import import_folder
    from vishwamai_mp.conversion.tokenizer_files import tokenizer_of_run

    folder = open_folder(options.load, options.additions, named_family(options.family))
    dtype = by_option(options.dtype) if options.dtype else None
    notes = import_folder(folder, options.output, dtype, options.add_tokens)
    for note in notes:
        print(note, file=sys.stderr)
    checkpoint = options.output / "checkpoints/step_00000000"
    recipe = options.output / "config.yaml"  # this model and, otherwise, what is usual
    settings = ["--config", str(recipe), f"checkpoint.load={checkpoint}", "checkpoint.load_optimizer=false"]
    if tokenizer := tokenizer_of_run(options.output):
        settings.append(f"data.tokenizer={tokenizer}")
    print(f"{options.load} → {checkpoint}; train on with {shlex.join(settings)}")


def verify(options: argparse.Namespace) -> None:
    source = open_source(options.load, options.family)
    compare_with_folder(options, source, prompts_to_compare(options, source))


def prompts_to_compare(options: argparse.Namespace, source: "Source") -> list[list[int]]:
    """Token ids of --prompt, or some drawn at random, once all that a comparison needs is there."""
    from vishwamai_mp.conversion.verify import check_prompts, random_prompts, require_transformers

    if options.tokens < 1:
        raise UserError(f"--tokens {options.tokens}: use 1 or more")
    require_transformers()
    prompts = random_prompts(source, options.tokens)
    if options.prompt:
        from vishwamai_mp.data.tokenizer import Tokenizer

        path = tokenizer_path(options, source)
        if path is None:
            raise UserError(f"{source.run} has no tokenizer for --prompt; name one with --tokenizer")
        tokenizer = Tokenizer(path)
        prompts = [tokenizer.encode(prompt) for prompt in options.prompt]
    check_prompts(source, prompts, options.tokens)
    return prompts


def compare_with_folder(options: argparse.Namespace, source: "Source", prompts: list[list[int]]) -> None:
    from vishwamai_mp.conversion.verify import compare

    result = compare(source, options.output, prompts, options.tokens, options.tolerance)
    if not result.is_equal:
        raise UserError(f"{options.output} is not the model of {source.path}: {result.describe()}")
    print(f"equal: {result.describe()}")


def open_source(load: Path, family: str | None = None) -> "Source":
    from vishwamai_mp.conversion.source import open_source

    source = open_source(load, named_family(family))
    for reason in source.skipped:
        print(f"{reason}; taking {source.path.name}", file=sys.stderr)
    return source


def named_family(name: str | None) -> "type[Family] | None":
    from vishwamai_mp.conversion.families import family_named

    return family_named(name) if name else None


def tokenizer_path(options: argparse.Namespace, source: "Source") -> Path | None:
    """The tokenizer that is named, or else the run folder's."""
    if options.tokenizer == "none":
        return None
    if options.tokenizer:
        return Path(options.tokenizer)
    from vishwamai_mp.conversion.tokenizer_files import tokenizer_of_run

    return tokenizer_of_run(source.run)


def read_text(path: Path) -> str:
    try:
        refuse_pointer_or_pipe(path)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path} cannot be read ({one_line(error)})") from None


if __name__ == "__main__":
    run_program(main)
