"""What kinds of values a `config.json` may have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vishwamai_mp.config import UserError

NUMBER = (int, float)
_NAMES = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], path: Path) -> None:
    """Raises `UserError` for a value of another kind; any may be null, and lists are of texts."""
    for key, wanted in kinds.items():
        value = values.get(key)
        if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise UserError(f"{path}: {key}={value!r} is not {_NAMES[wanted[0]]}")
        if isinstance(value, list) and not all(isinstance(one, str) for one in value):
            raise UserError(f"{path}: {key}={value!r} is not a list of texts")
