"""Whether layers can be Transformer Engine's: compiled, on a GPU, or doubled, where one is simulated.

Its Python without its compiled part cannot live where Python looks for packages, for others find and import it there.
It lies in a folder of its own:

    pip install --no-deps --target .venv/transformer_engine transformer-engine    # .venv: the environment's folder
"""

import importlib.util
import os
import sys
from pathlib import Path

from vishwamai_mp.runtime.device import device

_doubled = False  # `simulated.transformer_engine_double` is in place


def has_transformer_engine() -> bool:
    """Whether Transformer Engine computes on the present device."""
    if device().type == "cuda":
        return importlib.util.find_spec("transformer_engine") is not None
    return device().type == "simulated" and _doubled


def python_folder() -> Path | None:
    """Where Transformer Engine's Python lies alone: the folder that TRANSFORMER_ENGINE_FOLDER names, or else
    `transformer_engine` in Python's own (`sys.prefix`); None: it is in neither."""
    folder = Path(os.environ.get("TRANSFORMER_ENGINE_FOLDER") or Path(sys.prefix) / "transformer_engine")
    return folder if (folder / "transformer_engine" / "pytorch").is_dir() else None


def is_doubled() -> bool:
    """Whether this process has the double of Transformer Engine's compiled part, and so can only simulate."""
    return _doubled


def use_double() -> None:
    """The double is in place from now on."""
    global _doubled
    _doubled = True
