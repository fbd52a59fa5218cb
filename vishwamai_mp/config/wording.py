"""What messages have in common: a number with its noun, a number in its unit, the command that installs an extra."""

import re
import shlex
from pathlib import Path

EXTRAS = {  # by package, which of setup.py's extras brings it
    "datasets": "datasets",
    "gguf": "gguf",
    "matplotlib": "plots",
    "pyarrow": "parquet",
    "rensa": "dedup",
    "starlette": "serve",
    "tokenizers": "hf",
    "transformer_engine": "te",
    "transformers": "hf",
    "uvicorn": "serve",
    "wandb": "wandb",
}
_CHECKOUT = Path(__file__).resolve().parents[2]


def counted(number: int, noun: str, spec: str = "") -> str:
    """A number with its noun: "1 document", "2 documents".

    Args:
        noun: in the singular, its adjectives before it.
        spec: how the number is written, as in f"{number:,}".
    """
    if number != 1:
        sibilant = re.search("(s|x|z|ch|sh)$", noun)
        noun = re.sub("(?<=[^aeiou])y$", "ie", noun) + ("es" if sibilant else "s")
    return f"{number:{spec}} {noun}"


def count_text(number: float) -> str:
    """A large number in three digits and a letter, as in 1.35 M."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 999.5 * size else f"{number / size:.0f}{letter}"
    return f"{number:.0f}"


def lacks(what: str, package: str) -> str:
    """A message for where `what` needs a package of `EXTRAS` that is not installed; it ends with what to type."""
    extra = EXTRAS[package]
    if (_CHECKOUT / "setup.py").is_file():
        constraints, here = _CHECKOUT / "constraints.txt", str(_CHECKOUT)
        if Path.cwd() == _CHECKOUT:
            constraints, here = Path("constraints.txt"), "."
        command = shlex.join(["pip", "install", "-c", str(constraints), "-e", f"{here}[{extra}]"])
    else:
        command = f"pip install 'vishwamai-mp[{extra}]'"
    return f"{what} needs {package}, which is not installed: {command}"
