"""What a checkpoint stores of the data, and what is said when the data has changed."""

import json
from dataclasses import replace

import pytest

from vishwamai_mp.config import ConfigError
from vishwamai_mp.data.blends import SourceIdentity
from vishwamai_mp.data.position import DataFingerprint, DataPosition

BOOKS = SourceIdentity("books", 2000, 100, "b")
CODE = SourceIdentity("code", 4000, 100, "c")
WEB = SourceIdentity("web", 8000, 100, "w")
STORED = DataFingerprint((BOOKS, CODE), (0.5, 0.5), 512, "99,1,0", 1234)
POSITION = DataPosition(800, STORED)


def test_a_position_survives_json():
    assert DataPosition.from_dict(json.loads(json.dumps(POSITION.to_dict()))) == POSITION


def test_unchanged_data_has_nothing_to_say():
    assert POSITION.changes(STORED) == []


def test_a_renamed_source_is_the_same_source():
    assert POSITION.changes(replace(STORED, sources=(replace(BOOKS, name="old-books"), CODE))) == []


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (
            {"shares": (0.7, 0.3)},
            ["data.train: weight of books 0.5 -> 0.7", "data.train: weight of code 0.5 -> 0.3"],
        ),
        (
            {"sources": (BOOKS,), "shares": (1.0,)},
            ["data.train: code is no longer read (weight 0.5)", "data.train: weight of books 0.5 -> 1"],
        ),
        (
            {"sources": (BOOKS, CODE, WEB), "shares": (0.5, 0.25, 0.25)},
            ["data.train: web is new (weight 0.25)", "data.train: weight of code 0.5 -> 0.25"],
        ),
        (
            {"sources": (replace(BOOKS, digest="x", bin_bytes=3000), CODE)},
            ["data.train: books holds other data than before (2,000 -> 3,000 bytes of tokens)"],
        ),
        ({"sources": (CODE, BOOKS)}, ["data.train: its sources come in another order"]),
        ({"split": "98,2,0"}, ["data.split 99,1,0 -> 98,2,0: the documents for training changed"]),
        ({"split": None}, ["data.split 99,1,0 -> unused: the documents for training changed"]),
        ({"seed": 1}, ["training.seed 1234 -> 1: samples come in another order"]),
    ],
)
def test_each_change_is_said(change, sentences):
    said = POSITION.changes(replace(STORED, **change))
    assert len(said) == len(sentences)
    for sentence, expected in zip(said, sentences, strict=True):
        assert sentence.startswith(expected)
        assert "samples already seen may repeat" in sentence


def test_another_sequence_length_is_refused_with_both_lengths_and_the_position():
    with pytest.raises(ConfigError, match=r"training.sequence_length 512 -> 1024: the position, 800 samples of 512"):
        POSITION.changes(replace(STORED, sequence_length=1024))
