"""Reads JSON that users hand over or a crash may have torn."""

import json
from collections import Counter
from typing import Any


class DuplicateKeyError(ValueError):
    """An object has two values under one key, of which `json.loads` would silently take the last.

    Args:
        key: the key.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:60]!r} stands twice in one object; keep one of them")
        self.key = key


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(name for name, _ in pairs)
        raise DuplicateKeyError(next(name for name in found if times[name] > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_key_once)  # made once: corpora are read line by line


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`; but a key that stands twice in an object, and nesting that is too deep for it, are damage as any
    other, a `ValueError`."""
    try:
        if isinstance(text, str) and not options:
            return _DECODER.decode(text)
        return json.loads(text, object_pairs_hook=_each_key_once, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None
