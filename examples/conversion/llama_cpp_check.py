#!/usr/bin/env python3
"""What does llama.cpp compute of a GGUF file, beside transformers on the folder that it was made of?

    python examples/conversion/llama_cpp_check.py --python /path/to/python

--python is an interpreter with llama-cpp-python (`pip install llama-cpp-python` compiles it; default: this one). The
models are those of families.py, written as f32 and as q8_0, with keys and values in f32. Each reads a prompt of 20
tokens and what transformers continues it with greedily, 44 tokens: logits are compared, and the choice at each place.
Texts are encoded by both with two tokenizers of ours. Writes llama_cpp_check.json and its section of docs/families.md.
Needs the extras `hf` and `gguf`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vishwamai_mp.config.errors import UserError, run_program

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs/families.md", Path(__file__).with_suffix(".json")
BEGIN, END = "<!-- table: examples/conversion/llama_cpp_check.py writes it -->", "<!-- end of the figures -->"
PROMPT, LENGTH = 20, 64  # tokens
TEXTS = [
    "Hello world, 12345 times!",
    "  two spaces\n\n\tand tabs  ",
    "naïve café — “quotes” 你好 🙂",
    "[STEP] one [STEP]two",
    "it's they're I'VE DON'T",
    "x = y[3:17] ** 2 # π≈3.14159\r\nend",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="an interpreter with llama-cpp-python (default: this)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = [*write_models(Path(place)), *write_tokenizers(Path(place))]
        command = [options.python, str(Path(__file__).with_name("run_llama_cpp.py")), place, str(PROMPT)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"--python {options.python}: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout)
    results = {
        "llama_cpp_python": found.pop("version"),
        "models": [{**row, **found.get(row["file"], {})} for row in rows],
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    from families import write_section

    write_section(PAGE, BEGIN, END, table(results))
    print(table(results))
    return 0 if all(row.get("equal") == row.get("places") for row in results["models"]) else 1


def write_models(place: Path) -> list[dict[str, Any]]:
    """Folders, files and what transformers computes, of each variant of families.py; or why there is no file."""
    import numpy as np
    import torch
    from families import title, variants, write_model
    from transformers import AutoModelForCausalLM, GenerationConfig

    from vishwamai_mp.conversion.families import family_named
    from vishwamai_mp.conversion.folder import open_folder
    from vishwamai_mp.conversion.to_gguf import write_gguf

    rows: list[dict[str, Any]] = []
    for number, (architecture, variant) in enumerate(variants()):
        folder = place / f"model-{number:02d}"
        write_model(architecture, variant, folder)
        rows.append({"variant": title(architecture, variant), "file": folder.name})
        try:
            for kind in ("f32", "q8_0"):
                config = open_folder(folder).config.model
                write_gguf(folder, family_named(architecture), config, kind, place / f"{folder.name}.{kind}.gguf")
        except UserError as error:
            rows[-1]["refused"] = str(error).removeprefix("--gguf: ").partition(";")[0]
            continue
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config = GenerationConfig()
        prompt = torch.randint(3, 301, (1, PROMPT), generator=torch.Generator().manual_seed(number))
        lengths = {"max_new_tokens": LENGTH - PROMPT, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **lengths)[0]
            logits = model(text[None]).logits[0]
        np.savez(place / f"{folder.name}.npz", text=text.numpy(), logits=logits.numpy())
    return rows


def write_tokenizers(place: Path) -> list[dict[str, Any]]:
    """Files of a small model with each kind of tokenizer, and what it encodes texts as."""
    from families import Variant, write_model

    from vishwamai_mp.conversion.families import family_named
    from vishwamai_mp.conversion.folder import open_folder
    from vishwamai_mp.conversion.to_gguf import write_gguf
    from vishwamai_mp.data.byte_level_training import train_byte_level
    from vishwamai_mp.data.tokenizer import Tokenizer
    from vishwamai_mp.data.tokenizer_training import train_tokenizer

    corpus = [(ROOT / "README.md").read_text(encoding="utf-8")] * 2
    rows = []
    for kind, train in {
        "SentencePiece's byte pairs": train_tokenizer,
        "byte-level byte pairs": train_byte_level,
    }.items():
        folder = place / f"tokenizer-{train.__name__}"
        write_model("LlamaForCausalLM", Variant(kind, {"vocab_size": 1100, "num_hidden_layers": 1}), folder)
        train(corpus, 1024, folder / "tokenizer")
        write_gguf(
            folder,
            family_named("LlamaForCausalLM"),
            open_folder(folder).config.model,
            "f16",
            place / f"{folder.name}.f16.gguf",
        )
        tokenizer = Tokenizer(folder)
        (place / f"{folder.name}.json").write_text(json.dumps([[text, tokenizer.encode(text)] for text in TEXTS]))
        rows.append({"variant": f"tokenizer: {kind}", "file": folder.name})
    return rows


def table(results: dict[str, Any]) -> str:
    """A row of each model."""
    lines = [
        f"llama-cpp-python {results['llama_cpp_python']}:",
        "",
        "| model | logits, f32 | logits, q8_0 | choices or texts equal |",
        "| --- | --- | --- | --- |",
    ]
    for row in results["models"]:
        if "refused" in row:
            lines.append(f"| {row['variant']} | refused: {row['refused']} | | |")
        else:
            figures = [f"{row[kind]:.0e}" if kind in row else "" for kind in ("f32", "q8_0")]
            lines.append(f"| {row['variant']} | {' | '.join(figures)} | {row['equal']}/{row['places']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
