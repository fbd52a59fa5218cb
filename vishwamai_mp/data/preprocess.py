"""A corpus to indexed token files, on several processes, in the corpus's order and in flat memory.

This process reads blocks of raw bytes and writes tokens; parsing and encoding, nearly all of the work, happen in the
workers. At most a few blocks per worker are under way at once, whatever the size of the corpus. What is written waits
in an `UnfinishedRun`, from which the next run goes on if this one is killed.
"""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, Literal, Protocol, TypeVar, cast

import numpy as np

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.corpus import Block, CorpusReader, Malformed, Position, read_block
from vishwamai_mp.data.corpus_tools import byte_bar
from vishwamai_mp.data.deduplication import Dedup, KeptPrints, prints
from vishwamai_mp.data.indexed import IndexedWriter, token_dtype
from vishwamai_mp.data.piece_cache import DocumentEncoder
from vishwamai_mp.data.shuffling import DocumentShuffler
from vishwamai_mp.data.tokenizer import Tokenizer, kept_files
from vishwamai_mp.data.unfinished import UnfinishedRun, identities

OnError = Literal["stop", "skip"]
SplitAt = Literal["blank-lines"]
T_co = TypeVar("T_co", covariant=True)
_BLOCKS_PER_WORKER = 3


@dataclass
class PreprocessReport:
    """What became of a corpus. `tokens` and `prefixes` are by key; sizes are in bytes on disk of the input."""

    documents: int = 0
    empty_documents: int = 0
    skipped_documents: int = 0
    repeated_documents: int = 0  # dropped
    tokens: dict[str, int] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)
    bytes_read: int = 0
    total_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class EncodedBlock:
    """A worker's answer: for each key the token bytes and (documents,) lengths, and what had to be left out.

    Attributes:
        empty: (documents,) which lack a text under some key.
        prints: of documents, where repeated ones are to be dropped.
        end: the position in the corpus after them.
    """

    tokens: list[bytes]
    lengths: list[np.ndarray]
    empty: np.ndarray
    malformed: list[Malformed]
    prints: list[bytes]
    end: Position

    def only(self, kept: np.ndarray) -> "EncodedBlock":
        """Without the documents for which `kept` (documents,) is False."""
        if kept.all():
            return self
        tokens = []
        for of_key, lengths in zip(self.tokens, self.lengths, strict=True):
            ends = np.cumsum(lengths) * (len(of_key) // max(1, int(lengths.sum())))
            starts = np.concatenate(([0], ends[:-1]))
            tokens.append(b"".join(of_key[starts[at] : ends[at]] for at in np.flatnonzero(kept)))
        lengths_of_keys = [lengths[kept] for lengths in self.lengths]
        return EncodedBlock(tokens, lengths_of_keys, self.empty[kept], self.malformed, [], self.end)


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output_prefix: str | Path,
    *,
    keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    append_bos: bool = False,
    split_documents_at: SplitAt | None = None,
    dedup: Dedup | None = None,
    shuffle_seed: int | None = None,
    workers: int = 1,
    on_error: OnError = "stop",
    restart: bool = False,
    on_progress: Callable[[PreprocessReport], None] | None = None,
    on_skip: Callable[[Malformed], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> PreprocessReport:
    """Encode every document under each of `keys` into `<output_prefix>_<key>_document.bin/.idx`.

    A document without text is kept as a document without tokens, as Megatron-LM does, and counted. The pairs appear
    together at the end, or not at all. A run that is killed, is stopped or fails after `unfinished.MARK_SECONDS` leaves
    `<output_prefix>.partial`, and the next one of the same arguments goes on from there; `workers` may be others, and
    `on_error` "skip" after "stop". Pairs that are there already stay until these replace them.

    Args:
        inputs: files, by suffix as in `corpus.py`.
        tokenizer: a SentencePiece `.model`, a `tokenizer.json`, or a folder with one.
        append_eod: end every document that has tokens with the end-of-document token.
        append_bos: begin every such document with the beginning-of-sequence token.
        split_documents_at: where a plain text file is cut into documents; None: it is one.
        dedup: how repeated documents are found, which are dropped (see `deduplication.py`); None: all stay.
        shuffle_seed: names the order of documents, the same under every key (see `shuffling.py`); None: the corpus's.
        workers: processes that encode; 1 encodes in this one. They change nothing of what is written.
        on_error: "stop" at the first malformed document, or "skip" and count it (under every key).
        restart: do not go on from what an earlier run has left.
        on_progress: called after each block with the report so far.
        on_skip: called with each document left out.
        say: called with what is gone on from, or left to go on from, files that are given twice, and pairs to replace.

    Raises `UserError` for files that are missing or damaged, a malformed document under "stop", a corpus with no
    text, a full disk, a worker that died, or what a run of other arguments has left.
    """
    _check_arguments(keys, workers)
    for path, count in Counter(os.path.realpath(path) for path in inputs).items():
        if count > 1 and say:
            say(f"warning: {path} is given {count} times, and so are its documents written")
    reader = CorpusReader(inputs, keys, paragraphs=split_documents_at == "blank-lines")
    vocabulary = Tokenizer(tokenizer)
    begin = [vocabulary.require_bos()] if append_bos else []
    end = [vocabulary.require_eod()] if append_eod else []
    make = partial(BlockEncoder, str(tokenizer), tuple(keys), begin, end, on_error == "stop", dedup)
    decides = {
        "--input": identities([Path(path) for path in inputs]),
        "--tokenizer": _digest(vocabulary),
        "--json-keys": list(keys),
        "--append-eod": append_eod,
        "--append-bos": append_bos,
        "--split-documents-at": split_documents_at,
        "--dedup": dedup,
        "--shuffle-documents": shuffle_seed is not None,
        "--seed": shuffle_seed,
    }
    prefixes = {key: f"{output_prefix}_{key}_document" for key in keys}
    if say and (there := [f"{prefix}.bin" for prefix in prefixes.values() if Path(f"{prefix}.bin").exists()]):
        say(f"{', '.join(there)}: made by an earlier run, replaced when this one is done")
    with contextlib.ExitStack() as stack:
        unfinished = stack.enter_context(UnfinishedRun(Path(f"{output_prefix}.partial"), decides, restart, say))
        report, token_bytes = _begin(unfinished, reader, on_error, say)
        started = time.perf_counter() - report.seconds
        so_far = KeptPrints(dedup, unfinished.open("prints")) if dedup else None
        dtype = token_dtype(vocabulary.vocab_size)
        open_files = [partial(_open_of_key, unfinished, number) for number in range(len(keys))]
        writers = [
            stack.enter_context(IndexedWriter(prefix, dtype, open_file))
            for prefix, open_file in zip(prefixes.values(), open_files, strict=True)
        ]
        takers: Sequence[IndexedWriter | DocumentShuffler] = writers
        shufflers: list[DocumentShuffler] = []
        if shuffle_seed is not None:
            takers = shufflers = [
                stack.enter_context(
                    DocumentShuffler(
                        *(open_file, dtype.itemsize, shuffle_seed, reader.total_bytes, 1 / len(keys)),
                        taken=(report.documents, token_bytes[number] if token_bytes else 0),
                    )
                )
                for number, open_file in enumerate(open_files)
            ]

        def mark() -> None:
            taken = [shuffler.token_bytes for shuffler in shufflers]
            unfinished.mark({"position": position, "report": asdict(report), "token_bytes": taken})

        position = reader.start
        for block in stack.enter_context(encoded_blocks(reader, workers, make)):
            for malformed in block.malformed:
                if on_error == "stop":
                    raise UserError(f"{malformed} (--on-error skip leaves such documents out)")
                if on_skip:
                    on_skip(malformed)
            read = len(block.lengths[0])
            if so_far:
                block = block.only(np.array([so_far.is_new(found) for found in block.prints], dtype=bool))
            for taker, tokens, lengths in zip(takers, block.tokens, block.lengths, strict=True):
                taker.add(tokens, lengths)
            report.documents += len(block.lengths[0])
            report.repeated_documents += read - len(block.lengths[0])
            report.empty_documents += int(block.empty.sum())
            report.skipped_documents += len(block.malformed)
            report.bytes_read = reader.bytes_read
            report.seconds = time.perf_counter() - started
            if on_progress:
                on_progress(report)
            position = block.end
            if unfinished.due:
                mark()
        if shuffle_seed is not None:
            if unfinished.state:
                mark()
            _write_shuffled(shufflers, writers)
        report.tokens = {key: writer.num_tokens for key, writer in zip(keys, writers, strict=True)}
        _publish(writers, report, unfinished)
    report.prefixes = prefixes
    report.seconds = time.perf_counter() - started
    return report


class BlockEncoder:
    """Parses and encodes blocks; one per worker. `begin` and `end` are tokens around each document that has any."""

    def __init__(
        self,
        tokenizer: str,
        keys: Sequence[str],
        begin: list[int],
        end: list[int],
        stop_at_malformed: bool,
        dedup: Dedup | None = None,
    ) -> None:
        vocabulary = Tokenizer(tokenizer)
        dtype = token_dtype(vocabulary.vocab_size)
        self._documents = DocumentEncoder(vocabulary, dtype)
        self._itemsize = dtype.itemsize
        self._keys = keys
        self._begin, self._end = (np.array(ids, dtype=dtype).tobytes() for ids in (begin, end))
        self._stop_at_malformed = stop_at_malformed
        self._prints = prints(dedup, dtype.itemsize) if dedup else None

    def encode(self, block: Block) -> EncodedBlock:
        encoded: list[list[bytes]] = [[] for _ in self._keys]
        malformed: list[Malformed] = []
        empty: list[bool] = []
        found: list[bytes] = []
        for document in read_block(block, self._keys):
            if isinstance(document, Malformed):
                malformed.append(document)
                if self._stop_at_malformed:
                    break
                continue
            plain = [self._documents.encode(text) for text in document]
            for tokens_of_key, tokens in zip(encoded, plain, strict=True):
                tokens_of_key.append(self._begin + tokens + self._end if tokens else tokens)
            empty.append(not all(document))
            if self._prints:
                found.append(self._prints.of(document, plain))
        lengths = [np.array([len(tokens) for tokens in key], dtype=np.int64) // self._itemsize for key in encoded]
        tokens_of_keys = [b"".join(key) for key in encoded]
        return EncodedBlock(tokens_of_keys, lengths, np.array(empty, dtype=bool), malformed, found, block.end)


def _check_arguments(keys: Sequence[str], workers: int) -> None:
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    if not keys or len(set(keys)) < len(keys):
        raise UserError(f"--json-keys {' '.join(keys)}: name each key once")
    for key in keys:
        if os.sep in key:
            raise UserError(f"--json-keys {key}: a key becomes part of a file name and cannot hold {os.sep!r}")


def _digest(tokenizer: Tokenizer) -> str:
    """Of its files, those that say which tokens begin and end a text too."""
    digest = hashlib.sha256()
    for name, path in sorted(kept_files(tokenizer.path).items()):
        digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _open_of_key(unfinished: UnfinishedRun, number: int, name: str) -> IO[bytes]:
    return unfinished.open(f"{number}.{name}")


def _begin(
    unfinished: UnfinishedRun, reader: CorpusReader, on_error: OnError, say: Callable[[str], None] | None
) -> tuple[PreprocessReport, list[int]]:
    """The report so far, and for each key the bytes of tokens to shuffle; the reader is set to what comes next."""
    if not unfinished.state:
        return PreprocessReport(total_bytes=reader.total_bytes), []
    report = PreprocessReport(**unfinished.state["report"])
    if report.skipped_documents and on_error == "stop":
        raise UserError(
            f"{unfinished.folder} has left out {counted(report.skipped_documents, 'malformed document')}: go on with"
            " --on-error skip, or begin anew with --restart"
        )
    reader.start = Position(*unfinished.state["position"])
    if say:
        say(f"going on from {unfinished.folder}: {counted(report.documents, 'document')} done")
    return report, unfinished.state["token_bytes"]


def _write_shuffled(shufflers: Sequence[DocumentShuffler], writers: Sequence[IndexedWriter]) -> None:
    total = sum(shuffler.token_bytes for shuffler in shufflers)
    with byte_bar(total, "shuffle") as progress:
        for shuffler, writer in zip(shufflers, writers, strict=True):
            for tokens, lengths in shuffler.shuffled():
                writer.add(tokens, lengths)
                progress.update(len(tokens))


def _publish(writers: Sequence[IndexedWriter], report: PreprocessReport, unfinished: UnfinishedRun) -> None:
    for key, tokens in report.tokens.items():
        if tokens == 0:
            of_what = f"{counted(report.documents, 'document')} read, {report.skipped_documents} skipped"
            raise UserError(f"no text under {key!r} in the input ({of_what}); nothing was written")
    for writer in writers:
        writer.finish()
    unfinished.done()
    for writer in writers:
        writer.publish()


class Encoder(Protocol[T_co]):
    """Parses and encodes blocks; one per worker."""

    def encode(self, block: Block) -> T_co: ...


@contextlib.contextmanager
def encoded_blocks(
    blocks: Iterable[Block], workers: int, make: Callable[[], Encoder[T_co]]
) -> Iterator[Iterator[T_co]]:
    """The encoded blocks in order. Leaving early, by an error or an interrupt, ends the workers at once.

    The standard library's `ProcessPoolExecutor` is not used: its workers outlive a parent that is killed, for each
    holds both ends of the queue it waits at, and up to Python 3.13 it cannot end those that are at work.

    Args:
        workers: processes; 1 encodes in this one.
        make: what makes an encoder, where it is used; with several workers it is pickled.

    Raises:
        UserError: a worker died.
    """
    if workers == 1:
        yield map(make().encode, blocks)
        return
    pool: list[_Worker] = []
    try:
        yield _in_order(pool, workers, make, blocks)
    except (EOFError, ConnectionError) as error:
        raise UserError("a worker died, most likely for want of memory: use fewer --workers") from error
    finally:
        for worker in pool:
            worker.process.terminate()
        for worker in pool:
            worker.process.join()


def _in_order(
    pool: list["_Worker"], workers: int, make: Callable[[], Encoder], blocks: Iterable[Block]
) -> Iterator[Any]:
    """Give each block to an idle worker; hand on the answers in the order of the blocks. Workers are begun, and put
    into `pool`, when there is a block for them: a small corpus needs few, whatever `workers` says.

    A worker has one block at a time, so neither side ever waits to send while the other does. Answers that came early
    wait in `done`; the slowest block may hold up at most `_BLOCKS_PER_WORKER` per worker.
    """
    idle: deque[_Worker] = deque()
    busy: dict[Connection, tuple[int, _Worker]] = {}
    done: dict[int, Any] = {}
    next_out = 0

    def collect() -> None:
        for connection in wait(list(busy)):
            number, worker = busy.pop(cast(Connection, connection))
            done[number] = worker.connection.recv()
            idle.append(worker)

    for number, block in enumerate(blocks):
        if not idle and len(pool) < workers:
            pool.append(_Worker(make))
            idle.append(pool[-1])
        while not idle or number - next_out >= _BLOCKS_PER_WORKER * workers:
            collect()
            while next_out in done:
                yield done.pop(next_out)
                next_out += 1
        worker = idle.popleft()
        worker.connection.send(block)
        busy[worker.connection] = number, worker
    while busy or done:
        while next_out in done:
            yield done.pop(next_out)
            next_out += 1
        if busy:
            collect()


class _Worker:
    """A fresh interpreter that encodes; it inherits neither this process's threads nor its memory."""

    def __init__(self, make: Callable[[], Encoder]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        resource_tracker.ensure_running()  # which unblocks signals when it starts
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the parent decides what an interrupt means
        try:
            self.process.start()  # and the worker inherits the mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()  # so that either side's death is the end of file for the other


def _serve(connection: Connection, make: Callable[[], Encoder]) -> None:
    encoder = make()
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has gone
        while True:
            connection.send(encoder.encode(connection.recv()))
