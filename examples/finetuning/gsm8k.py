#!/usr/bin/env python3
"""Fine-tunes a small model on questions and answers: all parameters, and low-rank adapters, from one pretrained model.

    python examples/finetuning/gsm8k.py --data gsm8k_train.jsonl --work-dir runs/gsm8k

DATA has a {"question": …, "answer": …} a line, as GSM8K's files do. The model is pretrained here, briefly, on texts
that have nothing to do with them: the Python library and language reference, or --corpus. Then each arm trains on the
answers. What is compared is the loss of answers that no arm has seen, in nats per token, before and after. Writes
WORK_DIR/results.json. About five minutes on one core.
"""

import argparse
import json
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vishwamai_mp.config import load_config, resolve, run_program
from vishwamai_mp.data.corpus import read_documents
from vishwamai_mp.data.datasets import build_datasets
from vishwamai_mp.data.lines import text_lines
from vishwamai_mp.data.prepare import prepare
from vishwamai_mp.data.preprocess import preprocess
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.runtime import distributed_session
from vishwamai_mp.training.callbacks import Callback, Checkpointing, Metrics, Progress
from vishwamai_mp.training.loop import Trainer

_QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart/corpus.py"
_KEEP_ONE_IN = 8  # documents of the quickstart's corpus: more than the pretraining here can read
ARMS: dict[str, list[str]] = {
    "all parameters": ["optimizer.learning_rate=1e-3"],
    "adapters (LoRA)": ["optimizer.learning_rate=1e-2", "lora.enabled=true", "lora.rank=8"],
}


def main() -> None:
    options = parse_arguments()
    started = time.perf_counter()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    settings = prepare_data(options)
    pretrained = options.work_dir / "pretrained"
    pretraining = ["data.train=" + str(options.work_dir / "corpus_text_document"), "data.split=100,0,0"]
    run([*settings, *pretraining, *steps(options.pretrain_steps, 3e-3)], pretrained)
    rows = [f"data.train={options.work_dir / 'train'}", f"data.valid={options.work_dir / 'held_out'}"]
    start = [f"checkpoint.load={newest(pretrained)}", "checkpoint.load_optimizer=false", "data.prepared_rows=true"]
    results = {}
    for number, (arm, own) in enumerate(ARMS.items()):
        recipe = [*settings, *rows, *start, *steps(options.steps), *own]
        results[arm] = run(recipe, options.work_dir / f"arm_{number}")
        print(
            f"{arm}: {results[arm]['trained_parameters']:,} parameters trained, held-out answer loss"
            f" {results[arm]['before']:.4f} → {results[arm]['after']:.4f}"
        )
    seconds = time.perf_counter() - started
    document = {"steps": options.steps, "pretrain_steps": options.pretrain_steps, "arms": results, "seconds": seconds}
    (options.work_dir / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{seconds:.0f} s; {options.work_dir / 'results.json'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="JSON lines of question and answer")
    parser.add_argument("--work-dir", required=True, type=Path, help="a new folder for everything this writes")
    parser.add_argument("--corpus", type=Path, help="JSON lines with a text each to pretrain on")
    parser.add_argument("--pretrain-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=80, help="of fine-tuning, each arm")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer that is trained")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens; longer conversations are left out")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    return parser.parse_args()


def prepare_data(options: argparse.Namespace) -> list[str]:
    """Tokenizer, pretraining tokens, and rows to train on and to hold out; the settings that all runs share."""
    folder = options.work_dir
    texts = list(pretraining_texts(options.corpus))
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    lines = [line for line in text_lines(options.data) if line.strip()]
    every = max(2, min(40, len(lines) // 20))  # one conversation in so many is held out
    parts = {"held_out": lines[::every], "train": [line for n, line in enumerate(lines) if n % every]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer([*texts, *parts["train"]], options.vocab_size, folder / "tokenizer").path
    preprocess([folder / "corpus.jsonl"], tokenizer, folder / "corpus", append_eod=True, restart=True)
    for name in parts:
        source, length = folder / f"{name}.jsonl", options.sequence_length
        report = prepare([source], tokenizer, folder / name, sequence_length=length, too_long="skip")
        print(
            f"{name}: {report.conversations} conversations in {report.rows} rows, {report.filled:.0%} filled, loss on"
            f" {report.learnt_tokens / report.tokens:.0%} of their tokens; {report.too_long} too long"
        )
    return [
        f"data.tokenizer={tokenizer}",
        f"model.vocab_size={options.vocab_size}",
        f"model.hidden_size={options.hidden_size}",
        f"training.sequence_length={options.sequence_length}",
        f"model.max_position_embeddings={options.sequence_length}",
        f"training.global_batch_size={options.batch}",
    ]


def pretraining_texts(corpus: Path | None) -> Iterator[str]:
    """Texts of a file, or some of the quickstart's."""
    if corpus:
        yield from (text for text in read_documents([corpus]) if isinstance(text, str))
        return
    documents = runpy.run_path(str(_QUICKSTART))["documents"]()
    for number, (name, text) in enumerate(documents):
        if name.startswith("topics/") or number % _KEEP_ONE_IN == 0:
            yield text


def steps(count: int, learning_rate: float = 1e-3) -> list[str]:
    """A short schedule."""
    return [
        f"training.max_steps={count}",
        f"schedule.warmup_steps={count // 10}",
        f"optimizer.learning_rate={learning_rate}",
    ]


class HeldOutLoss(Callback):
    """The loss of the validation data, if there is any, before the first step and after the last."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        if trainer.datasets.valid is not None:
            self.seen.append(trainer.evaluate())

    on_train_end = on_train_begin


def run(overrides: list[str], output: Path) -> dict[str, Any]:
    """Train on this process: how much was trained, and the held-out loss before and after."""
    recipe = [
        *("precision=fp32", "model.num_layers=4", "model.num_attention_heads=4", "training.micro_batch_size=4"),
        *("training.evaluate_batches=100000", "logging.report_to=[]", f"training.output_dir={output}"),
    ]
    config = resolve(load_config({}, [*recipe, *overrides]), 1)
    with distributed_session(config) as runtime:
        assert config.data.tokenizer is not None
        datasets = build_datasets(config, Tokenizer(config.data.tokenizer), runtime)
        loss = HeldOutLoss()
        trainer = Trainer(config, runtime, datasets, [loss, Metrics(), Checkpointing(), Progress()])
        trained = sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters() if p.requires_grad)
        trainer.train()
    return {"trained_parameters": trained, **dict(zip(("before", "after"), loss.seen, strict=False))}


def newest(folder: Path) -> Path:
    """The checkpoint of a run's last step."""
    return folder / "checkpoints" / (folder / "checkpoints/latest").read_text().strip()


if __name__ == "__main__":
    run_program(main)
