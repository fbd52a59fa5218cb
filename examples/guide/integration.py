#!/usr/bin/env python3
"""Hugging Face on both sides: a `datasets.Dataset` in, a folder that `transformers` loads out.

    python examples/guide/integration.py --output runs/integration                  # three minutes on one core

The texts are the help topics of the Python installation, so nothing is downloaded. Ends with the held-out loss of the
trained model here and of the exported one in transformers, which must agree, and a text that the latter writes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from vishwamai_mp.config import run_program
from vishwamai_mp.conversion.source import open_source
from vishwamai_mp.conversion.to_hf import ExportOptions, export_folder
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.trainer import TrainingArguments, VishwamAIPretrainer, load_model

_LENGTH = 128  # tokens
_VOCABULARY = 1024


def topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def in_rows(tokenizer: Tokenizer, texts: Dataset) -> Dataset:
    """Tokens of all texts end to end, cut into rows of T + 1, as language modelling with transformers does."""

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [token for text in batch["text"] for token in [*tokenizer.encode(text), tokenizer.require_eod()]]
        return {"input_ids": [ids[first : first + _LENGTH + 1] for first in range(0, len(ids) - _LENGTH, _LENGTH)]}

    return texts.map(cut, batched=True, batch_size=None, remove_columns=["text"])


def loss_in_transformers(model: Any, rows: Dataset) -> float:
    """Nats per token."""
    batch = torch.tensor(rows["input_ids"])
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/integration"))
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    texts = Dataset.from_dict({"text": topics()}).train_test_split(test_size=0.1, seed=0)
    tokenizer = train_tokenizer(texts["train"]["text"], _VOCABULARY, options.output / "tokenizer")
    rows = {part: in_rows(tokenizer, texts[part]) for part in texts}
    held_out = rows["test"].select(range(min(64, len(rows["test"]))))

    model = load_model(
        "tiny",
        [
            f"model.vocab_size={_VOCABULARY}",
            f"data.tokenizer={tokenizer.path}",
            f"training.sequence_length={_LENGTH}",
        ],
    )
    trainer = VishwamAIPretrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output / "run"),
            max_steps=options.steps,
            learning_rate=3e-3,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            logging_steps=10,
        ),
        train_dataset=rows["train"],
        eval_dataset=held_out,
    )
    trainer.train()
    ours = trainer.evaluate()["eval_loss"]
    trainer.save_model(options.output / "model")

    export_folder(
        open_source(options.output / "model"), options.output / "hf", ExportOptions(tokenizer=Path(tokenizer.path))
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported: Any = AutoModelForCausalLM.from_pretrained(options.output / "hf", dtype=torch.float32)
    theirs = loss_in_transformers(exported, held_out)
    print(f"held-out loss  here {ours:.5f}  in transformers {theirs:.5f}")
    reader = AutoTokenizer.from_pretrained(options.output / "hf")
    prompt = reader("The statement", return_tensors="pt", add_special_tokens=False)
    text = exported.generate(**prompt, max_new_tokens=24, do_sample=False)
    print(reader.decode(text[0]))


if __name__ == "__main__":
    run_program(main)
