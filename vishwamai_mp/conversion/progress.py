"""How far a conversion is: a bar with MB/s and the time left; in a log, a line every half minute."""

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """Counts bytes on stderr.

    Args:
        what: a word before the bar.
        total: bytes.
        done: bytes that an earlier run has finished; they do not count for the speed.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=what,
            total=total,
            initial=done,
            unit="B",
            unit_scale=True,
            mininterval=0.3 if on_terminal else 30,
            delay=0.3 if on_terminal else 5,
            dynamic_ncols=True,
        )

    def update(self, count: int) -> None:
        self._bar.update(count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
