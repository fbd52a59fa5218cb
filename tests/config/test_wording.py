"""Words that follow from what they tell of."""

import runpy
from pathlib import Path

import pytest
import setuptools

from vishwamai_mp.config import wording

_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("number", "noun", "spec", "text"),
    [
        (1, "document", "", "1 document"),
        (0, "malformed document", "", "0 malformed documents"),
        (2, "process", "", "2 processes"),
        (1, "pass", "", "1 pass"),
        (3, "entry", "", "3 entries"),
        (4, "day", "", "4 days"),
        (12345, "batch", ",", "12,345 batches"),
    ],
)
def test_a_noun_agrees_with_its_number(number: int, noun: str, spec: str, text: str) -> None:
    assert wording.counted(number, noun, spec) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (1234, "1.23 k"), (999_600, "1000 k"), (2_030_000, "2.03 M"), (98_123_000_000, "98.1 B"), (2e12, "2 T")],
)
def test_a_large_number_has_a_unit(number: float, text: str) -> None:
    assert wording.count_text(number) == text


def test_each_package_is_in_the_extra_that_is_named_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    described: dict[str, dict[str, list[str]]] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **named: described.update(named))
    runpy.run_path(str(_ROOT / "setup.py"))
    for package, extra in wording.EXTRAS.items():
        assert any(line.startswith(package.replace("_", "-")) for line in described["extras_require"][extra]), package


def test_what_to_type_is_right_where_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the checkout, in another folder, and where the package was installed without its checkout."""
    monkeypatch.chdir(_ROOT)
    told = wording.lacks("verifying", "transformers")
    assert told == ("verifying needs transformers, which is not installed: pip install -c constraints.txt -e '.[hf]'")
    monkeypatch.chdir(tmp_path)
    assert wording.lacks("", "gguf").endswith(f": pip install -c {_ROOT}/constraints.txt -e '{_ROOT}[gguf]'")
    monkeypatch.setattr(wording, "_CHECKOUT", tmp_path)
    assert wording.lacks("", "gguf").endswith(": pip install 'vishwamai-mp[gguf]'")
