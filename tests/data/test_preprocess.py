"""Preprocessing: what is written for which documents, in what order, and what happens when something goes wrong."""

import gzip
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.files import aside_of
from vishwamai_mp.data import preprocess as module
from vishwamai_mp.data import shuffling
from vishwamai_mp.data.corpus import CorpusReader, Malformed
from vishwamai_mp.data.indexed import check_indexed
from vishwamai_mp.data.preprocess import BlockEncoder, preprocess
from vishwamai_mp.data.streams import zstd
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.data.unfinished import UnfinishedRun

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "counted", "1234", "mice", "in", "Ünïcode"]
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 9 + i % 40)) + "\n" * (i % 3) for i in range(700)]
TEXTS[5] = TEXTS[600] = ""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tokenizer") / "small").path


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": text[:3] or "?"}) + "\n" for text in TEXTS))
    return path


def documents_of(prefix):
    """Read a pair by the format's own description, without our writer's code."""
    stats = check_indexed(prefix)
    index = Path(f"{prefix}.idx").read_bytes()
    lengths = np.frombuffer(index, "<i4", stats.num_sequences, 34)
    boundaries = np.frombuffer(index, "<i8", stats.num_documents + 1, 34 + 12 * stats.num_sequences)
    starts = np.concatenate(([0], np.cumsum(lengths)))[boundaries]
    tokens = np.fromfile(f"{prefix}.bin", stats.dtype)
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".partial"))


@pytest.mark.parametrize("append_bos", [False, True])
@pytest.mark.parametrize("append_eod", [False, True])
def test_every_document_in_order(tmp_path, tokenizer, corpus, append_eod, append_bos):
    report = preprocess([corpus], tokenizer, tmp_path / "out", append_eod=append_eod, append_bos=append_bos)
    vocabulary = Tokenizer(tokenizer)
    begin = [vocabulary.bos_id] if append_bos else []
    end = [vocabulary.eod_id] if append_eod else []
    expected = [begin + vocabulary.encode(text) + end if text else [] for text in TEXTS]
    assert documents_of(tmp_path / "out_text_document") == expected
    assert (report.documents, report.empty_documents, report.skipped_documents) == (700, 2, 0)
    assert report.tokens == {"text": sum(map(len, expected))}
    assert report.prefixes == {"text": str(tmp_path / "out_text_document")}
    assert report.bytes_read == report.total_bytes == corpus.stat().st_size


def test_workers_change_nothing(tmp_path, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(module, "CorpusReader", lambda paths, keys, **more: CorpusReader(paths, keys, 3000, **more))
    for workers in (1, 2):
        preprocess([corpus, corpus], tokenizer, tmp_path / f"w{workers}", keys=["text", "title"], workers=workers)
    for name in ("text_document.bin", "text_document.idx", "title_document.bin", "title_document.idx"):
        assert (tmp_path / f"w1_{name}").read_bytes() == (tmp_path / f"w2_{name}").read_bytes()


def test_as_many_workers_as_there_is_work_and_a_word_about_files_given_twice(tmp_path, tokenizer, corpus, monkeypatch):
    begun: list[Any] = []
    said: list[str] = []
    kind = module._Worker

    def counted(make: Any) -> Any:
        begun.append(kind(make))
        return begun[-1]

    monkeypatch.setattr(module, "_Worker", counted)
    (tmp_path / "link.jsonl").symlink_to(corpus)
    inputs = [corpus, tmp_path / "link.jsonl"]
    report = preprocess(inputs, tokenizer, tmp_path / "out", workers=500, say=said.append)
    assert report.documents == 2 * len(TEXTS)
    assert len(begun) == 1  # for one block
    assert said == [f"warning: {corpus} is given 2 times, and so are its documents written"]


@pytest.mark.parametrize("dedup", [None, "exact", "minhash"])
def test_repeated_documents_are_dropped_and_the_rest_shuffled_whatever_the_workers(
    tmp_path, tokenizer, monkeypatch, dedup
):
    draw = random.Random(1)
    long = [" ".join(draw.choices(WORDS, k=80)) for _ in range(40)]
    texts = [*long, "a mat", long[3] + " mice", "a mat", long[4], "", "a", ""]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": text[:9]}) + "\n" for text in texts))
    monkeypatch.setattr(module, "CorpusReader", lambda paths, keys, **more: CorpusReader(paths, keys, 3000, **more))
    monkeypatch.setattr(shuffling, "_BUCKET_BYTES", 5000)  # of several buckets
    vocabulary = Tokenizer(tokenizer)
    dropped = {None: [], "exact": [42, 43, 46], "minhash": [41, 42, 43, 46]}[dedup]
    kept = [vocabulary.encode(text) for number, text in enumerate(texts) if number not in dropped]
    written = []
    for workers, seed in ((1, None), (1, 5), (2, 5), (1, 6)):
        out = tmp_path / f"{workers}{seed}"
        report = preprocess(
            [path], tokenizer, out, keys=["text", "title"], dedup=dedup, shuffle_seed=seed, workers=workers
        )
        assert report.repeated_documents == len(dropped)
        assert report.documents == len(kept)
        assert report.empty_documents == (1 if dedup else 2)
        written.append(documents_of(f"{out}_text_document"))
        titles = documents_of(f"{out}_title_document")
        starts = [vocabulary.decode(document)[:9] for document in written[-1]]
        assert [vocabulary.decode(title) for title in titles] == starts
    assert written[0] == kept
    assert written[1] == written[2]
    assert sorted(written[1]) == sorted(written[3]) == sorted(kept)
    assert len({str(some) for some in written}) == 3
    numbers = shuffling.order_numbers(0, len(kept), 5)
    assert written[1] == [kept[i] for i in np.argsort(numbers)]


def test_an_order_is_fair():
    """Where the first of eight documents comes, over seeds."""
    places = [int(np.argsort(shuffling.order_numbers(0, 8, seed)).tolist().index(0)) for seed in range(4000)]
    counts = np.bincount(places, minlength=8)
    assert np.abs(counts - 500).max() < 5 * 500**0.5


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), min_size=1))
def test_text_survives_the_way_to_disk(tmp_path_factory, tokenizer, texts):
    folder = tmp_path_factory.mktemp("survives")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "end"]))
    preprocess([folder / "a.jsonl"], tokenizer, folder / "a", append_eod=True)
    decoded = [Tokenizer(tokenizer).decode(document) for document in documents_of(folder / "a_text_document")]
    assert decoded == [text.replace("\u2581", " ") for text in [*texts, "end"]]


def test_wide_vocabulary_takes_four_bytes(tmp_path, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(module, "token_dtype", lambda vocab_size: np.dtype(np.int32))
    preprocess([corpus], tokenizer, tmp_path / "out")
    assert check_indexed(tmp_path / "out_text_document").dtype == np.int32


def test_stop_and_skip(tmp_path, tokenizer, corpus):
    lines = corpus.read_bytes().split(b"\n")
    lines[2:2] = [b"broken", b'{"text": 1}']
    corpus.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"corpus\.jsonl:3: not JSON: .*\(--on-error skip leaves such documents out\)"):
        preprocess([corpus], tokenizer, tmp_path / "out")
    assert left_in(tmp_path) == []
    seen: list[Malformed] = []
    report = preprocess([corpus], tokenizer, tmp_path / "out", on_error="skip", on_skip=seen.append)
    assert (report.documents, report.skipped_documents) == (700, 2)
    assert [document.where for document in seen] == [f"{corpus}:3", f"{corpus}:4"]


def test_a_finished_corpus_is_replaced_and_that_is_said_first(tmp_path, tokenizer, corpus):
    said: list[str] = []
    first = preprocess([corpus], tokenizer, tmp_path / "out", append_eod=True, say=said.append)
    assert said == []
    again = preprocess([corpus], tokenizer, tmp_path / "out", say=said.append)
    assert again.tokens["text"] < first.tokens["text"]
    assert said == [f"{tmp_path / 'out_text_document.bin'}: made by an earlier run, replaced when this one is done"]


@pytest.mark.parametrize("workers", [1, 2])
def test_failure_under_way_leaves_the_old_pair(tmp_path, tokenizer, corpus, workers):
    preprocess([corpus], tokenizer, tmp_path / "out")
    before = (tmp_path / "out_text_document.bin").read_bytes()
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"\x1f\x8b\x08 not gzip")
    with pytest.raises(UserError, match="damaged or cut short gz"):
        preprocess([corpus, broken], tokenizer, tmp_path / "out", workers=workers)
    assert (tmp_path / "out_text_document.bin").read_bytes() == before
    assert left_in(tmp_path) == ["out_text_document.bin", "out_text_document.idx"]


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (b"", {}, "the file is empty"),
        (b"", {"on_error": "skip"}, "no text under 'text' in the input .*1 skipped"),
        (b'{"text": ""}\n', {}, "no text under 'text' in the input .1 document read"),
        (b'{"text": "a"}\n', {"workers": 0}, "--workers 0: at least 1"),
        (b'{"text": "a"}\n', {"keys": ["a", "a"]}, "--json-keys a a: name each key once"),
        (b'{"text": "a"}\n', {"keys": ["a/b"]}, "becomes part of a file name"),
    ],
)
def test_input_that_cannot_work_writes_nothing(tmp_path, tokenizer, content, changes, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        preprocess([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", **changes)
    assert left_in(tmp_path) == []


def test_a_vocabulary_without_the_tokens_asked_for_is_refused(tmp_path, corpus):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=33, bos_id=-1, eos_id=-1, minloglevel=2
    )
    (tmp_path / "bare.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="has no beginning-of-sequence token"):
        preprocess([corpus], tmp_path / "bare.model", tmp_path / "out", append_bos=True)
    with pytest.raises(UserError, match="has no end-of-document token"):
        preprocess([corpus], tmp_path / "bare.model", tmp_path / "out", append_eod=True)
    assert left_in(tmp_path) == []


def test_one_key_without_text_publishes_no_pair(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"q": "text", "a": ""}\n')
    with pytest.raises(UserError, match="no text under 'a'"):
        preprocess([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", keys=["q", "a"])
    assert left_in(tmp_path) == []


def test_document_of_50_megabytes(tmp_path, tokenizer):
    line = "the-cat-sat-on-a-mat-and-then-counted-1234-mice-in-it\n"
    copies = 50_000_000 // len(line)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": line * copies}) + "\n" + '{"text": "end"}\n')
    preprocess([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out")
    expected = np.array(Tokenizer(tokenizer).encode(line), np.uint16)
    tokens = np.fromfile(tmp_path / "out_text_document.bin", np.uint16)
    assert check_indexed(tmp_path / "out_text_document").num_documents == 2
    assert (tokens[: copies * expected.size].reshape(copies, -1) == expected).all()
    assert tokens[copies * expected.size :].tolist() == Tokenizer(tokenizer).encode("end")


def die(connection, settings):
    os._exit(9)


def die_at_work(connection, settings):
    connection.recv()
    os._exit(9)


@pytest.mark.parametrize("end", [die, die_at_work])
def test_worker_that_dies_is_one_clear_line(tmp_path, tokenizer, corpus, monkeypatch, end):
    monkeypatch.setattr(module, "_serve", end)
    with pytest.raises(UserError, match="a worker died, most likely for want of memory: use fewer --workers"):
        preprocess([corpus], tokenizer, tmp_path / "out", workers=2)
    assert left_in(tmp_path) == []


def test_encoder_stops_at_the_first_malformed_document(tokenizer, corpus):
    corpus.write_bytes(b'bad\n{"text": "a"}\nbad\n')
    (block,) = module.CorpusReader([corpus], ["text"])
    assert len(BlockEncoder(str(tokenizer), ["text"], [], [], True).encode(block).malformed) == 1
    assert len(BlockEncoder(str(tokenizer), ["text"], [], [], False).encode(block).malformed) == 2


PEAK = """
import resource, sys
from vishwamai_mp.data.preprocess import preprocess
preprocess([sys.argv[1]] * int(sys.argv[4]), sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "torch" in sys.modules)
"""


def test_memory_is_flat_and_torch_is_not_imported(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 25))
    peaks = []
    for copies in (1, 8):
        command = [sys.executable, "-c", PEAK, tmp_path / "a.jsonl", tokenizer, tmp_path / "out", str(copies)]
        peak, torch_imported = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert torch_imported == "False"
        peaks.append(int(peak))
    assert peaks[1] < peaks[0] * 1.05


def runs(cases):
    """What `killed_preprocess.py` says of each; a process of its own, which forks before any library has threads."""
    program = Path(__file__).with_name("killed_preprocess.py")
    done = subprocess.run(
        [sys.executable, program], input=json.dumps(cases), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def corpora(tmp_path, tokenizer):
    """Files of every kind that is read in parts, some documents twice, and settings without an output prefix."""
    lines = "".join(json.dumps({"text": text, "title": text[:3] or "?"}) + "\n" for text in TEXTS[:90]).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[: lines.index(b"\n", 9000) + 1]))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(lines[lines.index(b"\n", 4000) + 1 :]))
    (tmp_path / "d.txt").write_text("\n\n".join(TEXTS[90:200]))
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt")]
    return tmp_path, {"inputs": names[:3], "tokenizer": str(tokenizer)}, names[3]


def test_killed_at_any_time_a_run_goes_on_and_writes_the_same(corpora):
    folder, settings, text = corpora
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"keys": ["text", "title"], "append_eod": True, "append_bos": True},
        "workers": {"workers": 2, "shuffle_seed": 5, "keys": ["text", "title"]},
        "exact": {"dedup": "exact", "shuffle_seed": 5, "append_eod": True},
        "minhash": {"dedup": "minhash"},
        "split": {"inputs": [text, settings["inputs"][1]], "split_documents_at": "blank-lines"},
        "parquet": {"inputs": [str(folder / "e.parquet"), settings["inputs"][1]], "append_eod": True},
    }
    columns = {"text": TEXTS[:90], "other": list(range(90))}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "e.parquet", row_group_size=40)
    cases = []
    for name, own in kinds.items():
        whole, again = ({**settings, **own, "output_prefix": str(folder / f"{name}_{part}")} for part in "wa")
        cases += [[whole, 0], [again, 3], [again, 4], [{**again, "workers": 1}, "shuffled"], [again, 0]]
    found = runs(cases)
    for at in range(0, len(cases), 5):
        assert [status for status, _ in found[at : at + 5]] == [0, *[-signal.SIGKILL] * 3, 0], found[at : at + 5]
        done = [int(said.partition(": ")[2].split()[0]) for _, said in found[at + 2 : at + 5]]
        assert 0 < done[0] < done[1] < done[2]
    for whole in folder.glob("*_w_*"):
        assert whole.read_bytes() == (folder / whole.name.replace("_w_", "_a_")).read_bytes(), whole.name
    assert len(list(folder.glob("*_a_*"))) == 16
    assert not list(folder.glob("*.partial"))


def test_what_a_killed_run_left_is_not_gone_on_from_by_another(corpora):
    folder, settings, text = corpora
    run = {**settings, "output_prefix": str(folder / "out"), "append_eod": True}
    bad = folder / "bad.jsonl"
    bad.write_text('{"text": "a"}\n' * 400 + "bad\n" + '{"text": "b"}\n')
    malformed = {**run, "inputs": [str(bad)], "output_prefix": str(folder / "bad")}
    skipping = {**malformed, "on_error": "skip", "output_prefix": str(folder / "skip")}
    skipping["inputs"] = [str(bad), *run["inputs"]]
    cases = [
        [run, 3],
        [{**run, "append_eod": False}, 0],
        [{**run, "dedup": "exact"}, 0],
        [{**run, "shuffle_seed": 3}, 0],
        [{**run, "inputs": run["inputs"][:2]}, 0],
        [{**run, "inputs": [*run["inputs"][:2], text]}, 0],
        [{**run, "append_eod": False, "restart": True}, 0],
        [malformed, 0],
        [{**malformed, "on_error": "skip"}, 0],
        [skipping, 5],
        [{**skipping, "on_error": "stop"}, 0],
    ]
    found = runs(cases)
    assert [status for status, _ in found] == [-9, 1, 1, 1, 1, 1, 0, 1, 0, -9, 1]
    for (_, said), reason in zip(
        found[1:6],
        (
            "--append-eod was given, now not given",
            "--dedup was not given, now exact",
            "--shuffle-documents was not given, now given",
            "3 input files, now 2",
            "c.jsonl.zst was where",
        ),
        strict=True,
    ):
        assert reason in said
        assert "begin anew with --restart" in said
    assert found[6][1] == ""
    assert "bad.jsonl:401: not JSON" in found[7][1]
    assert "bad.partial keeps what is done; run the same command again to go on" in found[7][1]
    assert "going on from" in found[8][1]
    assert len(documents_of(folder / "bad_text_document")) == 401
    assert "has left out 1 malformed document: go on with --on-error skip, or begin anew" in found[10][1]


def test_changed_or_damaged_files_are_not_gone_on_from(corpora):
    folder, settings, _ = corpora
    run = {**settings, "output_prefix": str(folder / "out")}
    assert runs([[run, 3]])[0][0] == -9
    tokens = folder / "out.partial/0.tokens"
    kept = tokens.read_bytes()
    tokens.write_bytes(kept[:-2])
    assert "0.tokens is shorter than it was; --restart begins anew" in runs([[run, 0]])[0][1]
    tokens.write_bytes(kept)
    os.utime(run["inputs"][1], (1, 1))
    assert "b.jsonl.gz has changed since" in runs([[run, 0]])[0][1]
    os.utime(run["inputs"][1])
    other = folder / "other.partial"
    other.mkdir()
    (other / "thesis.txt").write_text("a life's work")
    assert (
        "other.partial has files of something else"
        in runs([[{**run, "output_prefix": str(folder / "other")}, 0]])[0][1]
    )
    assert (other / "thesis.txt").exists()
    (other / "thesis.txt").unlink()
    aside_of(other / "mark.json").write_text("{")  # of a run that was killed while it wrote its first mark
    with UnfinishedRun(other, {}, False) as begun:
        assert begun.state is None
    with UnfinishedRun(Path(f"{run['output_prefix']}.partial"), {}, True):
        assert "is another run's, which is at work" in runs([[run, 0]])[0][1]
