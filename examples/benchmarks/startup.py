#!/usr/bin/env python3
"""How long until a program does something? CPU seconds to `--help`, to the first step, to the first generated token.

    python examples/benchmarks/startup.py [--rounds 3] [--part help step token]

CPU seconds of whole processes, the least of the rounds: other work on the machine disturbs them less than the clock.
Ratios are beside a process that only imports torch and megatron-core's transformer, which training cannot do without.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from turns import say_ratio

from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, "-W", "ignore"]
IMPORTS = [*PYTHON, "-c", "import torch, megatron.core.transformer, megatron.core.optimizer, megatron.core.distributed"]

_FRESH = "{fresh}"  # in a command: a folder that no run has written to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["help", "step", "token"], choices=["help", "step", "token"])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, of which the shortest counts (default: 3)")
    options = parser.parse_args()
    base = seconds(IMPORTS, options.rounds)
    print(f"importing torch and megatron-core: {base:.2f} CPU seconds")
    with tempfile.TemporaryDirectory() as folder:
        for what, command in commands(Path(folder), options.part).items():
            needed = seconds(command, options.rounds)
            print(f"{what:40} {needed:6.2f} CPU seconds")
            say_ratio(f"CPU time, {what} / importing", needed / base)


def commands(folder: Path, parts: list[str]) -> dict[str, list[str]]:
    """What is timed. The checkpoint that a token is generated from is trained first."""
    programs = {path.stem: [str(path)] for path in sorted((ROOT / "tools").glob("*.py"))}
    programs |= {"pretrain": ["-m", "vishwamai_mp.pretrain"], "server": [str(ROOT / "examples/serving/server.py")]}
    found = {f"{name} --help": [*PYTHON, *program, "--help"] for name, program in programs.items() if "help" in parts}
    if parts == ["help"]:
        return found
    train = [*PYTHON, "-m", "vishwamai_mp.pretrain", "--config", "tiny", *data(folder), "training.max_steps=1"]
    if "step" in parts:
        found["first step of tiny"] = [*train, f"training.output_dir={_FRESH}"]
    if "token" in parts:
        run = folder / "run"
        seconds([*train, f"training.output_dir={run}"], 1)
        generate = [*PYTHON, str(ROOT / "tools/generate.py"), "--load", str(run), "--prompt", "The"]
        found["first token of tiny"] = [*generate, "--max-new-tokens", "1"]
    return found


def data(folder: Path) -> list[str]:
    """Settings of a corpus, the project's own pages, and of a tokenizer trained on it."""
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    tokenizer = train_tokenizer(texts, 1000, folder / "tokenizer").path
    corpus = folder / "pages.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--input", str(corpus), "--tokenizer", str(tokenizer), "--output-prefix", str(folder / "pages")]
    seconds([*PYTHON, str(ROOT / "tools/preprocess_data.py"), *options, "--append-eod"], 1)
    files = [f"data.train={folder / 'pages_text_document'}", "data.split=100,0,0", f"data.tokenizer={tokenizer}"]
    return [*files, "model.vocab_size=1024", "training.evaluate_every=null"]


def seconds(command: list[str], rounds: int) -> float:
    """Least CPU seconds, user and system, of a command and its children."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as fresh:
            words = [word.replace(_FRESH, f"{fresh}/run") for word in command]
            process = subprocess.Popen(words, stdout=output, stderr=output, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                output.seek(0)
                raise UserError(
                    f"{' '.join(command)} failed:", *output.read().decode(errors="replace")[-2000:].split("\n")
                )
        found.append(usage.ru_utime + usage.ru_stime)
    return min(found)


if __name__ == "__main__":
    run_program(main)
