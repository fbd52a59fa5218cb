"""Reads JSON that users hand over or a crash may have torn."""

import json
from typing import Any


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`; but nesting that is too deep for it is damage as any other, a `ValueError`."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None
