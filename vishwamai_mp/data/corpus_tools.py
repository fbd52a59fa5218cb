"""What tools that read a corpus have in common: arguments, the progress they show, and how they are asked to stop."""

import argparse
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from vishwamai_mp.data.corpus import Malformed

_SKIPPED_SHOWN = 10


def corpus_parser(description: str, inputs: str, unit: str) -> argparse.ArgumentParser:
    """A parser that knows `--input` and `--on-error`.

    Args:
        description: the tool's docstring.
        inputs: which files it reads.
        unit: what is read at a time, "document" or "line".
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=inputs)
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help=f"at a malformed {unit}: stop with its file:line, or leave it out and count it (default: stop)",
    )
    return parser


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """Let the parser know `--tokenizer` and `--workers`, for a tool that encodes what it reads."""
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="SentencePiece .model, tokenizer.json, or a folder with one"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that encode (default: 1)")


def byte_bar(total: int | None, what: str = "", done: int = 0) -> tqdm:
    """A bar on stderr: the share, MB/s and the time left. On a terminal it moves; a log gets a line every half minute.

    Args:
        total: bytes; None: not known yet.
        what: a word before the bar.
        done: bytes that an earlier run has finished; they do not count for the speed.
    """
    on_terminal = sys.stderr.isatty()
    return tqdm(
        desc=what or None,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        mininterval=0.3 if on_terminal else 30,
        delay=0.3 if on_terminal else 5,
        dynamic_ncols=True,
    )


class CorpusProgress:
    """`byte_bar` with documents/s; the first malformed documents left out are printed above it."""

    def __init__(self, total_bytes: int | None = None) -> None:
        self._started = time.perf_counter()
        self._num_skipped = 0
        self._on_terminal = sys.stderr.isatty()
        self._bar = byte_bar(total_bytes)

    def update(self, documents: int, bytes_read: int, total_bytes: int | None = None) -> None:
        """Show that `documents` and `bytes_read` of the input (bytes on disk) are done."""
        if total_bytes is not None:
            self._bar.total = total_bytes
        rate = documents / max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{documents} docs, {rate:.0f} docs/s", refresh=False)
        self._bar.update(bytes_read - self._bar.n)

    def skipped(self, document: "Malformed") -> None:
        """Print one document left out, up to a limit."""
        self._num_skipped += 1
        if self._num_skipped <= _SKIPPED_SHOWN:
            self.say(f"skipped {document}")
        elif self._num_skipped == _SKIPPED_SHOWN + 1:
            self.say("skipped more documents; the count comes at the end")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._on_terminal:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "CorpusProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stop_on_sigterm() -> None:
    """Let a scheduler's SIGTERM unwind the program as an interrupt does, so that it removes what it began."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signum)

    signal.signal(signal.SIGTERM, interrupt)
