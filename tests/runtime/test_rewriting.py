"""Rewritten modules: their bytecode is kept, and taken only where it was made from the same source in the same way."""

import ast
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from vishwamai_mp.runtime import rewriting


class Doubles(ast.NodeTransformer):
    """Every number becomes its double."""

    calls = 0

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        Doubles.calls += 1
        assert isinstance(node.value, int)
        return ast.copy_location(ast.Constant(2 * node.value), node)


class _Loader(rewriting.RewritingLoader):
    transformer = Doubles

    def rewrites(self, source: bytes) -> bool:
        return b"as it is" not in source


@pytest.fixture(autouse=True)
def _bytecode_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(Doubles, "calls", 0)


def _value(path: Path) -> int:
    space: dict = {}
    code = _Loader("module", str(path)).get_code("module")
    assert code is not None
    exec(code, space)
    return space["x"]


def _kept(path: Path) -> Path:
    return Path(importlib.util.cache_from_source(str(path), optimization="Doubles"))


def _module(tmp_path: Path, source: str = "x = 4\n") -> Path:
    path = tmp_path / "module.py"
    path.write_text(source)
    return path


def test_it_is_rewritten_once(tmp_path):
    path = _module(tmp_path)
    assert [_value(path), _value(path)] == [8, 8]
    assert Doubles.calls == 1


def test_another_source_of_the_same_size_and_time_is_rewritten_anew(tmp_path):
    path = _module(tmp_path)
    assert _value(path) == 8
    before = path.stat()
    path.write_text("x = 5\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert _value(path) == 10


def test_another_way_of_rewriting_does_not_take_it(tmp_path, monkeypatch):
    path = _module(tmp_path)
    _value(path)
    monkeypatch.setattr(rewriting, "_digest_of", lambda _: b"other")
    _value(path)
    assert Doubles.calls == 2


@pytest.mark.parametrize("spoil", [lambda data: data[:-3], lambda data: data[:90], lambda _: b""])
def test_a_part_of_it_is_not_taken(tmp_path, spoil):
    path = _module(tmp_path)
    _value(path)
    _kept(path).write_bytes(spoil(_kept(path).read_bytes()))
    assert _value(path) == 8
    assert Doubles.calls == 2


def test_python_s_own_bytecode_of_the_module_is_another(tmp_path):
    path = _module(tmp_path)
    _value(path)
    assert _kept(path).is_file()
    assert _kept(path) != Path(importlib.util.cache_from_source(str(path)))


def test_none_is_kept_where_python_keeps_none(tmp_path, monkeypatch):
    path = _module(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert _value(path) == 8
    assert not _kept(path).exists()


def test_nobody_who_may_not_write_is_disturbed(tmp_path):
    path = _module(tmp_path)
    (tmp_path / "__pycache__").write_text("a file, where a folder would be")
    assert [_value(path), _value(path)] == [8, 8]


def test_what_needs_no_rewriting_is_loaded_as_it_is(tmp_path):
    assert _value(_module(tmp_path, "x = 4  # as it is\n")) == 4
