#!/usr/bin/env python3
"""What llama_cpp_check.py runs under an interpreter that need have nothing but llama-cpp-python.

python examples/conversion/run_llama_cpp.py FOLDER PROMPT_TOKENS
"""

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

CONTEXT = 256  # tokens; llama.cpp rounds it up to that


def main(place: Path, prompt: int) -> None:
    """Print what llama.cpp makes of the files, by their names; `prompt` tokens of each text were given."""
    found: dict[str, Any] = {"version": llama_cpp.__version__}
    for reference in sorted(place.glob("*.npz")):
        text, expected = (np.load(reference)[name] for name in ("text", "logits"))
        figures: dict[str, Any] = {}
        for kind in ("f32", "q8_0"):
            options = {"n_ctx": CONTEXT, "n_batch": CONTEXT, "n_threads": 1, "type_k": 0, "type_v": 0}  # 0: f32
            path = str(reference.with_suffix(f".{kind}.gguf"))
            model = llama_cpp.Llama(path, logits_all=True, verbose=False, **options)
            model.eval(text.tolist())
            logits = np.array(model.scores[: len(text)])
            figures[kind] = float(np.abs(logits - expected).max() / np.abs(expected).max())
            if kind == "f32":
                chosen = logits[prompt - 1 : -1].argmax(-1)
                figures |= {"equal": int((chosen == text[prompt:]).sum()), "places": len(chosen)}
        found[reference.stem] = figures
    for reference in sorted(place.glob("*.json")):
        model = llama_cpp.Llama(str(reference.with_suffix(".f16.gguf")), vocab_only=True, verbose=False)
        pairs = json.loads(reference.read_text())
        equal = sum(model.tokenize(text.encode(), add_bos=False, special=True) == ids for text, ids in pairs)
        found[reference.stem] = {"equal": equal, "places": len(pairs)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
