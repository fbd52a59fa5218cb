"""How a user names data: blends and splits, and what is refused."""

from pathlib import Path

import pytest

from vishwamai_mp.config import ConfigError
from vishwamai_mp.data.blends import Source, parse_blend, parse_split


@pytest.mark.parametrize(
    ("value", "sources"),
    [
        ("a", [("a", None)]),
        ("a  b", [("a", None), ("b", None)]),
        ("0.3 a 0.7 b", [("a", 0.3), ("b", 0.7)]),
        (["my books", "b"], [("my books", None), ("b", None)]),
        ([3, "a", "1e1", "b"], [("a", 3.0), ("b", 10.0)]),
        ("my data #1/c", [("my data #1/c", None)]),
        ("2024", [("2024", None)]),
        ([2024], [("2024", None)]),
    ],
)
def test_ways_to_write_a_blend(value, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my data #1").mkdir()
    for prefix in ("a", "b", "my data #1/c"):
        Path(f"{prefix}.idx").touch()
    assert parse_blend("data.train", value) == [Source(*source) for source in sources]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "data.train is empty"),
        ([], "data.train is empty"),
        ([0.5, "a", "b"], "a weight before each prefix"),
        (["a", 0.5], "a weight before each prefix"),
        ([0.5, "a", "b", 0.5], "a weight before each prefix"),
        ([0.5, 0.5], "a weight before each prefix"),
        ([-1.0, "a", 2.0, "b"], "weight -1 of a"),
        ([0.0, "a"], "weight 0 of a"),
        (["nan", "a"], "weight nan of a"),
        (["inf", "a"], "weight inf of a"),
        (["a", "b", "a"], "names a twice"),
        ("my data/books", r"is split at white space, and there is no my\.bin; write .* data.train='\[\"my data/books"),
        ("0.5 'books", "split at white space, and there is no 'books.bin"),
    ],
)
def test_blends_that_make_no_sense(value, message):
    with pytest.raises(ConfigError, match=message):
        parse_blend("data.train", value)


def test_splits():
    assert parse_split("3,1") == [(0.0, 0.75), (0.75, 1.0), (1.0, 1.0)]
    assert parse_split("100,0,0") == [(0.0, 1.0), (1.0, 1.0), (1.0, 1.0)]


@pytest.mark.parametrize("value", ["", "a", "99,1,0,0", "-1,2", "0,1,1", "nan,1", "99;1"])
def test_splits_that_make_no_sense(value):
    with pytest.raises(ConfigError, match=r"data\.split="):
        parse_split(value)
