"""The fine-tuning example on sums that the test makes: it runs, and held-out answers become likelier."""

import json
import random
import subprocess
import sys
from pathlib import Path

_PROGRAM = Path(__file__).resolve().parents[2] / "examples/finetuning/gsm8k.py"


def test_answers_become_likelier_in_both_arms(tmp_path: Path) -> None:
    rng = random.Random(0)
    pairs = [(rng.randrange(100), rng.randrange(100)) for _ in range(300)]
    sums = [
        {
            "question": f"Tom has {a} apples and finds {b} more. How many has he?",
            "answer": f"He has {a} + {b} = {a + b}.",
        }
        for a, b in pairs
    ]
    talks = tmp_path / "sums.jsonl"
    talks.write_text("".join(json.dumps(item) + "\n" for item in sums))
    corpus = tmp_path / "corpus.jsonl"
    words = ["the", "cat", "and", "a", "dog", "sat", "on", "some", "old", "mats", "near", "nine", "trees"]
    texts = [" ".join(rng.choice(words) for _ in range(60)) for _ in range(60)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, str(_PROGRAM), "--data", str(talks), "--corpus", str(corpus)]
    command += ["--work-dir", str(tmp_path / "run"), "--pretrain-steps", "6", "--steps", "12", "--vocab-size", "400"]
    done = subprocess.run(
        [*command, "--hidden-size", "32", "--sequence-length", "128"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    arms = json.loads((tmp_path / "run/results.json").read_text())["arms"]
    everything, adapters = arms["all parameters"], arms["adapters (LoRA)"]
    assert everything["before"] == adapters["before"]  # fresh adapters change nothing
    assert everything["after"] < everything["before"] - 0.2
    assert adapters["after"] < adapters["before"] - 0.2
    assert adapters["trained_parameters"] < everything["trained_parameters"] / 3
