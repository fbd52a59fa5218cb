#!/usr/bin/env python3
"""Compare tools/preprocess_data.py with Megatron-LM's tool of that name: the same bytes, how fast, in how much memory.

Both run as whole commands on the same JSON lines with the same tokenizer and as many workers, in turn. Each runs on
one copy of the corpus and on several: the first includes starting up, the difference between the two does not.

example:
  git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM
  python examples/benchmarks/preprocess.py --megatron-lm Megatron-LM --input gsm8k_train.jsonl --json-key question
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from turns import say_ratio

from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.data.byte_level_training import train_byte_level
from vishwamai_mp.data.corpus import Malformed, read_documents
from vishwamai_mp.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


class Run(NamedTuple):
    seconds: float
    cpu_seconds: float  # of all its processes; other work on the machine disturbs it less
    peak_mib: float  # of the largest process


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron-lm", metavar="FOLDER", help="a checkout whose tools/preprocess_data.py runs here")
    parser.add_argument("--input", required=True, metavar="FILE", help="JSON lines, or plain text: then its paragraphs")
    parser.add_argument("--json-key", default="text", help="default: %(default)s")
    parser.add_argument(
        "--type",
        choices=("bpe", "byte-bpe"),
        default="bpe",
        help="of that tokenizer: a SentencePiece model, or a tokenizer.json (default: %(default)s)",
    )
    parser.add_argument("--vocab-size", type=int, default=4000, help="tokens of the tokenizer trained here")
    parser.add_argument("--workers", type=int, default=2, help="of each tool (default: %(default)s)")
    parser.add_argument("--copies", type=int, default=8, help="of the corpus in the larger run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="alternations; medians are shown (default: %(default)s)")
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Path, dict[int, Path], int]:
    """The tokenizer, the corpus as JSON lines under one key: once, and `copies` times; and the tokens of one copy."""
    source, key, copies = arguments.input, arguments.json_key, arguments.copies
    documents = list(read_documents([source], key))
    texts = [text for text in documents if not isinstance(text, Malformed)]
    if len(texts) == 1:
        texts = texts[0].split("\n\n")
    lines = "".join(json.dumps({key: text}) + "\n" for text in texts)
    corpora = {count: folder / f"corpus_{count}.jsonl" for count in (1, copies)}
    for count, path in corpora.items():
        path.write_text(lines * count)
    train = train_byte_level if arguments.type == "byte-bpe" else train_tokenizer
    (folder / "tokenizer").mkdir()
    tokenizer = train(texts, arguments.vocab_size, folder / "tokenizer/tokenizer")
    if arguments.type == "byte-bpe":
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts if text)
    return tokenizer.path, corpora, tokens


def timed(command: list[str], environment: dict[str, str], log: Path) -> Run:
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=log.parent)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text().strip().splitlines()[-1:]
        raise UserError(f"{command[1]} failed: {' '.join(last)}")
    return Run(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def commands(arguments: argparse.Namespace, tokenizer: Path, corpus: Path, folder: Path) -> dict[str, list[str]]:
    shared = ["--input", str(corpus), "--json-keys", arguments.json_key, "--append-eod"]
    shared += ["--workers", str(arguments.workers)]
    ours = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *shared, "--tokenizer", str(tokenizer)]
    theirs = [sys.executable, str(Path(arguments.megatron_lm).resolve() / "tools/preprocess_data.py"), *shared]
    if arguments.type == "byte-bpe":
        theirs += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer.parent)]
    else:
        theirs += ["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", str(tokenizer)]
    both = {"vishwamai_mp": ours, "Megatron-LM": theirs}
    return {name: [*command, "--output-prefix", str(folder / name)] for name, command in both.items()}


def identical(folder: Path, key: str) -> bool:
    names = (f"{key}_document.bin", f"{key}_document.idx")
    return all((folder / f"vishwamai_mp_{n}").read_bytes() == (folder / f"Megatron-LM_{n}").read_bytes() for n in names)


def main() -> int:
    arguments = parse_arguments()
    if not arguments.megatron_lm or not Path(arguments.megatron_lm, "tools/preprocess_data.py").is_file():
        raise UserError("--megatron-lm: name a checkout of Megatron-LM, with its tools/preprocess_data.py")
    if arguments.copies < 2:
        raise UserError(f"--copies {arguments.copies}: at least 2")
    path = os.environ.get("PYTHONPATH", "")
    environments = {
        "vishwamai_mp": os.environ | {"PYTHONPATH": f"{ROOT}:{path}"},
        "Megatron-LM": os.environ | {"PYTHONPATH": f"{Path(arguments.megatron_lm).resolve()}:{path}"},
    }
    runs: dict[tuple[str, int], list[Run]] = {}
    same = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key = arguments.json_key
        tokenizer, corpora, tokens = prepare(arguments, folder)
        size = corpora[1].stat().st_size / 1e6
        for _ in range(arguments.rounds):
            for count, corpus in corpora.items():
                for tool, command in commands(arguments, tokenizer, corpus, folder).items():
                    runs.setdefault((tool, count), []).append(timed(command, environments[tool], folder / "log"))
                same &= identical(folder, key)
    return report(runs, size, tokens, arguments, same)


def report(
    runs: dict[tuple[str, int], list[Run]], size: float, tokens: int, arguments: argparse.Namespace, same: bool
) -> int:
    copies = arguments.copies
    print(f"{arguments.input}: {size:.2f} MB, {arguments.workers} workers each, medians of {arguments.rounds} rounds")
    print(f"bytes of .bin and .idx: {'identical' if same else 'DIFFERENT'}")
    speeds: dict[str, list[float]] = {}
    for tool in ("vishwamai_mp", "Megatron-LM"):
        small, large = runs[tool, 1], runs[tool, copies]
        wall = [statistics.median(run.seconds for run in some) for some in (small, large)]
        cpu = [statistics.median(run.cpu_seconds for run in some) for some in (small, large)]
        peak = [max(run.peak_mib for run in some) for some in (small, large)]
        steady, steady_cpu = (size * (copies - 1) / (seconds[1] - seconds[0]) for seconds in (wall, cpu))
        speeds[tool] = [size / wall[0], size * copies / wall[1], steady, steady_cpu]
        print(
            f"{tool:12}  1 copy {wall[0]:6.2f} s, {copies} copies {wall[1]:6.2f} s; beyond starting up {steady:.2f} MB "
            f"per second, {steady_cpu:.2f} MB per CPU second ({steady * tokens / size / 1e3:.0f} and"
            f" {steady_cpu * tokens / size / 1e3:.0f} thousand tokens); peak {peak[0]:.0f} and {peak[1]:.0f} MiB"
        )
    ratios = [ours / theirs for ours, theirs in zip(speeds["vishwamai_mp"], speeds["Megatron-LM"], strict=True)]
    for what, ratio in zip(("1 copy", f"{copies} copies", "beyond starting up", "per CPU second"), ratios, strict=True):
        say_ratio(f"speed of preprocessing, {what}, ours / Megatron-LM", ratio)
    return 0 if same else 1


if __name__ == "__main__":
    run_program(main)
