"""A room imports only the rooms above it (`_ORDER` is that order), and a file's name says what it alone does."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent
_PACKAGE = _REPOSITORY / "vishwamai_mp"
# A room imports only rooms of lines above its own, and itself.
_ORDER = [
    {"config"},
    {"planning"},
    {"diagnosis"},
    {"runtime"},
    {"precision"},
    {"components"},
    {"neural_memory", "cache_augmentation"},
    {"model"},
    {"data"},
    {"checkpoint"},
    {"inference"},
    {"conversion"},
    {"opening"},
    {"tree_of_thoughts"},
    {"observability"},
    {"serving"},
    {"training"},
    {"verification"},
    {"pretrain", "trainer", "launch"},
]
_LEVEL = {room: level for level, rooms in enumerate(_ORDER) for room in rooms}
_WITHOUT_TORCH = ("config", "planning", "diagnosis")
_FILES = sorted(_PACKAGE.rglob("*.py"))
# Two files have one name where they do the same for two things: the device and its simulation, a tokenizer as it is
# read and as Hugging Face's folders hold it.
_SHARED_NAMES = {"__init__.py", "__main__.py", "device.py", "tokenizer.py"}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Absolute names that a source imports, wherever in it; `package` is what its relative imports start from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from vishwamai_mp import model` imports vishwamai_mp.model
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(room: str, modules: Iterator[str]) -> list[str]:
    """What a file of `room` must not import."""
    wrong = []
    for module in modules:
        top, *rest = module.split(".")
        if top in ("tests", "tools", "examples"):
            wrong.append(f"{module}: the package does not import {top}/")
        if top == "torch" and room in _WITHOUT_TORCH:
            wrong.append(f"{module}: {room} imports no torch")
        if top != "vishwamai_mp" or not rest or rest[0] == "__version__":
            continue
        if rest[0] not in _LEVEL:
            wrong.append(f"{module}: no room of that name in the order of this test")
        elif rest[0] != room and _LEVEL[rest[0]] >= _LEVEL[room]:
            wrong.append(f"{module}: {rest[0]} is not above {room}")
    return wrong


def _room(path: Path) -> str:
    return path.relative_to(_PACKAGE).parts[0].removesuffix(".py")


def _package(path: Path) -> str:
    return ".".join(path.relative_to(_REPOSITORY).parent.parts)


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_PACKAGE)))
def test_a_file_imports_only_rooms_above_its_own(path):
    modules = imported_modules(path.read_text(encoding="utf-8"), _package(path))
    if path == _PACKAGE / "__init__.py":
        assert not [module for module in modules if module.startswith("vishwamai_mp.")]
    else:
        assert violations(_room(path), modules) == []


def test_every_folder_of_the_package_is_a_known_room():
    assert {_room(path) for path in _FILES} - {"__init__"} <= set(_LEVEL)


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in _FILES)
    assert {name for name, times in names.items() if times > 1} - _SHARED_NAMES == set()


def test_tools_and_examples_import_no_tests():
    for folder in ("tools", "examples"):
        for path in (_REPOSITORY / folder).rglob("*.py"):
            modules = imported_modules(path.read_text(encoding="utf-8"), "")
            assert not [module for module in modules if re.match(r"tests\b", module)], path


@pytest.mark.parametrize(
    ("room", "source", "count"),
    [
        ("model", "import vishwamai_mp.training.loop", 1),
        ("model", "from vishwamai_mp import training, config", 1),
        ("model", "def f():\n    from vishwamai_mp.data import blend", 1),
        ("model", "from ..data import blend", 1),
        ("model", "from . import layer\nfrom vishwamai_mp.model.layer import Layer", 0),
        ("neural_memory", "from vishwamai_mp.cache_augmentation import x", 1),
        ("config", "import torch.nn", 1),
        ("planning", "from torch import nn", 1),
        ("runtime", "import torch\nfrom vishwamai_mp.config import PretrainConfig", 0),
        ("runtime", "import tests.workers", 1),
        ("runtime", "from vishwamai_mp.attic import x", 1),
        ("training", "from vishwamai_mp import __version__", 0),
    ],
)
def test_the_test_itself(room, source, count):
    assert len(violations(room, imported_modules(source, f"vishwamai_mp.{room}"))) == count
