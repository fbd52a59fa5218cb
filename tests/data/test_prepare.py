"""Prepared rows: packing, marks, what is written, what is refused, and the batches that training makes of them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_preprocess import documents_of, left_in
from vishwamai_mp.config import ConfigError, UserError, load_config, resolve
from vishwamai_mp.data.batches import DocumentRules, make_batch
from vishwamai_mp.data.bins import best_fit
from vishwamai_mp.data.chat import ChatEncoder, conversation
from vishwamai_mp.data.corpus import Malformed
from vishwamai_mp.data.datasets import TokenSamples, build_datasets
from vishwamai_mp.data.marks import BEGINS, LEARNT
from vishwamai_mp.data.prepare import prepare
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer

LENGTH = 48
TALKS = [{"question": f"{i} + {j}?", "answer": f"It is {i + j}. " * (1 + i % 3)} for i in range(12) for j in range(5)]
_TOOL = Path(__file__).parents[2] / "tools/prepare_chat_data.py"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"### User:\n{t['question']}\n\n### Assistant:\n{t['answer']}" for t in TALKS]
    return train_tokenizer(texts, 390, tmp_path_factory.mktemp("tokenizer") / "small").path


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def talks(tmp_path):
    return write(tmp_path / "talks.jsonl", TALKS)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=120), st.integers(40, 60))
@settings(max_examples=60, deadline=None)
def test_bins_hold_every_piece_once_and_are_few(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(piece for pieces in bins for piece in pieces) == list(range(len(lengths)))
    filled = [sum(lengths[piece] for piece in pieces) for pieces in bins]
    assert max(filled) <= capacity
    assert bins == best_fit(lengths, capacity)
    fewest = math.ceil(sum(lengths) / capacity)  # or more: so the bound below is weaker than the theorem's
    assert len(bins) <= 2 * fewest
    # Best fit: no bin's pieces could all have gone into the room of another.
    assert all(a + b > capacity for i, a in enumerate(filled) for b in filled[:i])


def test_best_fit_prefers_the_fullest_bin():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_each_conversation_whole_with_its_marks(tmp_path, tokenizer, talks, packing):
    report = prepare([talks], tokenizer, tmp_path / "out", sequence_length=LENGTH, packing=packing)
    vocabulary = Tokenizer(tokenizer)
    chat = ChatEncoder(vocabulary)
    expected = sorted(tuple(zip(*chat.encode(conversation(talk)), strict=True)) for talk in TALKS)
    found = []
    rows, marks = documents_of(tmp_path / "out"), documents_of(tmp_path / "out_marks")
    for row, marked in zip(rows, marks, strict=True):
        assert len(row) == len(marked) == LENGTH + 1
        starts = [at for at, mark in enumerate(marked) if mark & BEGINS]
        for start, end in zip(starts, [*starts[1:], LENGTH + 1], strict=True):
            piece = tuple(zip(row[start:end], marked[start:end], strict=True))
            if any(mark & LEARNT for _, mark in piece):
                found.append(piece)
            else:  # padding, which ends the row
                assert (set(row[start:end]), end) == ({vocabulary.pad_id}, LENGTH + 1)
    assert sorted(found) == expected
    assert report.conversations == len(TALKS)
    assert report.tokens == sum(map(len, expected))
    assert report.learnt_tokens == sum(mark & LEARNT for piece in expected for _, mark in piece)
    assert report.rows == len(rows)
    bins = best_fit([len(piece) for piece in expected], LENGTH + 1)
    assert report.rows == (len(bins) if packing else len(TALKS))
    assert len(bins) < len(TALKS)


def test_workers_change_nothing(tmp_path, tokenizer, talks):
    for workers in (1, 2):
        prepare([talks, talks], tokenizer, tmp_path / f"w{workers}", sequence_length=LENGTH, workers=workers)
    for name in (".bin", ".idx", "_marks.bin", "_marks.idx"):
        assert (tmp_path / f"w1{name}").read_bytes() == (tmp_path / f"w2{name}").read_bytes()


def test_too_long_conversations(tmp_path, tokenizer):
    long = {"question": "1 + 1?", "answer": "It is 2. " * 40}
    asked_at_length = {"question": "1 + 1? " * 40, "answer": "2"}
    path = write(tmp_path / "long.jsonl", [TALKS[0], long, asked_at_length])
    with pytest.raises(UserError, match=r"long\.jsonl:2: \d+ tokens, and a row has 49; raise --sequence-length"):
        prepare([path], tokenizer, tmp_path / "out", sequence_length=LENGTH)
    assert left_in(tmp_path) == []
    skipped: list[Malformed] = []
    report = prepare(
        [path], tokenizer, tmp_path / "out", too_long="skip", on_skip=skipped.append, sequence_length=LENGTH
    )
    assert (report.conversations, report.too_long, report.truncated) == (1, 2, 0)
    assert [str(item).split(":")[1] for item in skipped] == ["2", "3"]
    # What is cut off before its answer has nothing to learn.
    report = prepare([path], tokenizer, tmp_path / "out", too_long="truncate", sequence_length=LENGTH)
    assert (report.conversations, report.too_long, report.truncated) == (2, 1, 1)
    rows = documents_of(tmp_path / "out")
    ids, _ = ChatEncoder(Tokenizer(tokenizer)).encode(conversation(long))
    assert ids[: LENGTH + 1] in rows


def test_a_malformed_line_is_named_or_left_out(tmp_path, tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(TALKS[0]) + '\n{"text": "x"}\n\nnot JSON\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: no 'messages'.*--on-error skip"):
        prepare([path], tokenizer, tmp_path / "out", sequence_length=LENGTH)
    report = prepare([path], tokenizer, tmp_path / "out", sequence_length=LENGTH, on_error="skip")
    assert (report.conversations, report.malformed) == (1, 2)
    path.write_text("not JSON\n")
    with pytest.raises(UserError, match="no conversation to learn from"):
        prepare([path], tokenizer, tmp_path / "none", sequence_length=LENGTH, on_error="skip")
    with pytest.raises(UserError, match=r"read from \.jsonl"):
        prepare([tmp_path / "x.txt"], tokenizer, tmp_path / "none", sequence_length=LENGTH)
    assert left_in(tmp_path) == ["out.bin", "out.idx", "out_marks.bin", "out_marks.idx"]


def test_a_batch_of_rows():
    """Two conversations of 3 and 4 tokens and padding: which labels count, positions, documents."""
    text = torch.tensor([[11, 12, 13, 21, 22, 23, 24, 3, 3]])
    marks = torch.tensor([[BEGINS, 0, LEARNT, BEGINS | LEARNT, LEARNT, LEARNT, 0, BEGINS, 0]])
    batch = make_batch(torch.stack([text, marks], 1), DocumentRules(marked=True, reset_attention_mask=True))
    assert batch.tokens.tolist() == text[:, :-1].tolist()
    assert batch.labels.tolist() == text[:, 1:].tolist()
    assert batch.loss_mask.tolist() == [[0, 1, 0, 1, 1, 0, 0, 0]]  # 21 begins: nothing predicts it
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[1, 1, 1, 2, 2, 2, 2, 3]]
    assert batch.verdicts is not None
    assert batch.verdicts.isnan().all()


def configured(prefix, *overrides):
    own = [
        "model.vocab_size=390",
        f"data.train={prefix}",
        "data.prepared_rows=true",
        f"training.sequence_length={LENGTH}",
    ]
    return resolve(load_config("tiny", [*own, *overrides]))


def test_datasets_of_rows(tmp_path, tokenizer, talks):
    prepare([talks], tokenizer, tmp_path / "out", sequence_length=LENGTH)
    rows = documents_of(tmp_path / "out")
    config = configured(tmp_path / "out", "data.split=80,20,0")
    assert config.data.reset_attention_mask
    assert config.data.reset_position_ids
    datasets = build_datasets(config)
    assert isinstance(datasets.train, TokenSamples)
    assert isinstance(datasets.valid, TokenSamples)
    size = datasets.train.samples_per_epoch
    assert size + datasets.valid.samples_per_epoch == len(rows)
    epochs = [[datasets.train[i + epoch * size][0].tolist() for i in range(size)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(rows[:size])
    assert epochs[0] != epochs[1]
    assert epochs[0] != rows[:size]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.sequence_length=32"], "prepared with --sequence-length 48 but training.sequence_length=32"),
        (["data.consecutive=true"], "data.consecutive=false"),
        (["data.eod_mask_loss=true"], "data.eod_mask_loss=true has no effect"),
        (["tree.enabled=true", "tree.value_signal=verdicts"], "there are none in data.train .*add rows"),
    ],
)
def test_settings_that_cannot_work(tmp_path, tokenizer, talks, overrides, message):
    prepare([talks], tokenizer, tmp_path / "out", sequence_length=LENGTH)
    with pytest.raises((ConfigError, UserError), match=message):
        build_datasets(configured(tmp_path / "out", *overrides))


def test_files_that_are_no_rows(tmp_path, tokenizer, talks):
    for name, length in (("a", LENGTH), ("b", LENGTH)):
        prepare([talks], tokenizer, tmp_path / name, sequence_length=length, packing=name == "a")
    for suffix in (".bin", ".idx"):
        (tmp_path / f"b_marks{suffix}").replace(tmp_path / f"a_marks{suffix}")
    with pytest.raises(UserError, match="a_marks does not belong to"):
        build_datasets(configured(tmp_path / "a"))
    (tmp_path / "a_marks.idx").unlink()
    with pytest.raises(UserError, match=r"no data file .*a_marks\.idx"):
        build_datasets(configured(tmp_path / "a"))


def test_the_tool(tmp_path, tokenizer, talks):
    command = [sys.executable, str(_TOOL), "--input", str(talks), "--tokenizer", str(tokenizer)]
    command += ["--output-prefix", str(tmp_path / "out"), "--sequence-length"]
    done = subprocess.run([*command, "48"], capture_output=True, text=True, check=True)
    assert "60 conversations in" in done.stdout
    assert f"data.train={tmp_path / 'out'} data.prepared_rows=true training.sequence_length=48" in done.stdout
    written = write(talks, [talk | {"id": "7"} for talk in TALKS])
    named = subprocess.run([*command, "48"], capture_output=True, text=True, check=False)
    assert named.stderr.startswith(
        f"error: {written}:1: the record has 'id', which cannot be learnt (--ignore-keys id "
    )
    subprocess.run([*command, "48", "--ignore-keys", "id"], capture_output=True, text=True, check=True)
    write(talks, TALKS)
    failed = subprocess.run([*command, "8"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "talks.jsonl:1:" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert np.fromfile(tmp_path / "out.bin", np.uint16).size % 49 == 0
