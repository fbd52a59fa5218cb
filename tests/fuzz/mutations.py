"""Damaged inputs: what a disk, a network, an editor or an adversary makes of a file that was right.

Each reader meets `EXAMPLES` of them, the same ones in every run; more, and others each time, with
FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz
"""

import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from vishwamai_mp.config import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
CPU_SECONDS = 5.0  # for an input of a few kilobytes
MEMORY_BYTES = 512 << 20  # of address space beyond what the test had

fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 2**63 - 1, 2**64 - 1)
_SCRAPS = (
    *(struct.pack("<Q", number) for number in _NUMBERS),
    *(struct.pack("<I", number) for number in _NUMBERS[:9]),
    *(b"\0", b"\xff", b"\n", b"\r", b'"', b"{", b"}", b"[" * 2000, b"null", b"NaN", b"-1e999", b"9" * 5000),
    *("\u2028".encode(), "\ufeff".encode(), b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b" " * 3000),
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` after one to four changes."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        span = draw(st.one_of(st.integers(0, 16), st.integers(0, len(data))))
        change = draw(st.sampled_from(("flip", "cut", "remove", "repeat", "overwrite", "insert")))
        if change == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif change == "cut":
            del data[at:]
        elif change == "remove":
            del data[at : at + span]
        elif change == "repeat":
            data[at:at] = data[at : at + span] * draw(st.integers(1, 3))
        else:
            scrap = draw(st.one_of(st.sampled_from(_SCRAPS), st.binary(max_size=16)))
            data[at : at + len(scrap) if change == "overwrite" else at] = scrap
    return bytes(data)


def emptied(folder: Path) -> Path:
    """`folder`, there and empty: of one test's inputs each has it for itself."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@contextmanager
def limited() -> Iterator[None]:
    """Bounds time and memory of what runs inside; more memory is a `MemoryError`."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    started = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    taken = time.process_time() - started
    assert taken < CPU_SECONDS, f"took {taken:.1f} s"


def outcome(read: Callable[[], Any]) -> Any:
    """What `read` returns, or the message, of one line, of the only error that it may raise."""
    with limited():
        try:
            return read()
        except UserError as error:
            message = str(error)
    assert message
    assert "\n" not in message
    return message
