"""Compressed input: damage, windows of Zstandard, and files that unpack to far more than memory should hold."""

import gzip
import subprocess
import sys
from collections.abc import Callable

import pytest
import zstandard

from vishwamai_mp.config import UserError
from vishwamai_mp.data.corpus import read_documents
from vishwamai_mp.data.streams import ZSTD_WINDOW_LOG, open_stream, zstd

LINE = b'{"text": "one"}\n'
PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd.compress}


def read(path):
    with open_stream(path) as (stream, _):
        return stream.read()


def framed(content, window_log):
    """A frame of another library that says nothing of its size, so that its window stands in its header."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("suffix", PACKERS)
def test_every_member_is_read_and_every_cut_is_found(tmp_path, suffix):
    whole = PACKERS[suffix](LINE * 9)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole + whole)
    assert read(path) == LINE * 18
    for cut in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        with pytest.raises(UserError, match=f"damaged or cut short {suffix} data"):
            read(path)


def test_windows_up_to_the_stated_one(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(framed(LINE, ZSTD_WINDOW_LOG))
    assert list(read_documents([path])) == ["one"]
    for window_log in (ZSTD_WINDOW_LOG + 1, 31):
        path.write_bytes(framed(LINE, window_log))
        with pytest.raises(UserError, match=r"window is too large, over 128 MiB; unpack it first, with zstd -d"):
            list(read_documents([path]))


BOMB = """
import resource, sys
from vishwamai_mp.config import UserError
from vishwamai_mp.data import corpus
corpus.MAX_DOCUMENT_BYTES = 1 << 24
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for document in corpus.read_documents(sys.argv[1:]):
        pass
except UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak_of(path):
    """What reading a corpus with documents of up to 16 MiB printed, and the MiB it took."""
    done = subprocess.run([sys.executable, "-c", BOMB, path], capture_output=True, text=True, check=True)
    *printed, grown = done.stdout.splitlines()
    return printed, float(grown)


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_unpacks_to_a_gigabyte_is_not_held(tmp_path, suffix):
    part = PACKERS[suffix](b" " * (1 << 26))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(PACKERS[suffix](LINE * 100_000) + part * 16)
    assert path.stat().st_size < 1 << 21
    printed, grown = peak_of(path)
    assert printed[0].startswith(f"{path}:100001: a line over ")
    assert grown < 100
