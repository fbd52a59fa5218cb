"""The documentation builds without a warning, needs no network, and names only what exists."""

import ast
import dataclasses
import functools
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from vishwamai_mp.config.schema import PretrainConfig

_REPOSITORY = Path(__file__).resolve().parent.parent
_DOCS = _REPOSITORY / "docs"
_PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(_DOCS.glob("*.md"))}
_FOLDERS = "vishwamai_mp|tools|examples|tests|launch|docs"
_FILES = "setup.py|constraints.txt|README.md|CHANGELOG.md|pyproject.toml"
_SECTIONS = {field.name for field in dataclasses.fields(PretrainConfig)}


def code_spans(text: str) -> list[str]:
    """What stands between backticks, outside blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def paths(text: str) -> list[str]:
    """Paths of the repository that a page names, in prose and in commands."""
    return re.findall(rf"(?<![\w./-])((?:{_FOLDERS})/[\w./-]*\w/?|{_FILES})(?![\w/])", text)


def missing_keys(text: str) -> list[str]:
    """Settings that a page names and the schema lacks."""
    keys = [re.fullmatch(r"(\w+)\.(\w+)(?:=.*)?", span) for span in code_spans(text)]
    named = [(key[1], key[2]) for key in keys if key and key[1] in _SECTIONS]
    return [f"{section}.{key}" for section, key in named if key not in _fields_of(section)]


def _fields_of(section: str) -> set[str]:
    kind = typing.get_type_hints(PretrainConfig)[section]
    return {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()


def functions(text: str) -> list[str]:
    """`function()` and `Class.function()`, without the parentheses."""
    return re.findall(r"`((?:\w+\.)?\w+)\(\)`", text)


@functools.cache
def defined() -> set[str]:
    """The functions and methods of the package and the tools, methods as `Class.method`."""
    found: set[str] = set()
    for path in [*(_REPOSITORY / "vishwamai_mp").rglob("*.py"), *(_REPOSITORY / "tools").glob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


# How a block begins that is not run here, and why.
_NOT_RUN = {
    "sbatch ": "needs a Slurm cluster; tests/launch/test_slurm.py runs the script beside a stand-in",
}


def blocks() -> list[tuple[str, str, str]]:
    """Page, language and text of each code block of a program, but those of `_NOT_RUN`."""
    pattern = re.compile(r"^```(python|bash)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    found = [(page, *block) for page, text in _PAGES.items() for block in pattern.findall(text)]
    return [block for block in found if not block[2].startswith(tuple(_NOT_RUN))]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run([*command, str(_DOCS), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_strict_build_has_every_page(built):
    assert {path.stem for path in built.glob("*.html")} >= {Path(name).stem for name in _PAGES}
    assert not list(built.rglob("*.md"))


def test_built_pages_load_nothing_from_other_hosts(built):
    """Links that a reader may follow are no loads; scripts, styles, pictures and fonts are."""
    host = "[\"']?(?:https?:)?//"
    loads = re.compile(rf"<(?:script|img|iframe|link)\b[^>]*(?:src|href)={host}|url\({host}|@import")
    for path in [*built.rglob("*.html"), *built.rglob("*.css")]:
        assert not loads.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    ("page", "warning"),
    [("[there](nowhere.md)", "nowhere.md"), ("[there](index.md#no-heading)", "no-heading"), ("", "toctree")],
)
def test_the_build_is_strict(tmp_path, page, warning):
    """Broken links are errors, and so is a page that no table of contents names."""
    (tmp_path / "conf.py").write_text((_DOCS / "conf.py").read_text())
    toctree = "```{toctree}\npage\n```\n" if page else ""
    (tmp_path / "index.md").write_text(f"# Title\n\n{toctree}")
    (tmp_path / "page.md").write_text(f"# Page\n\n{page}\n")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "dummy", str(tmp_path), str(tmp_path / "built")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert warning in done.stderr


@pytest.mark.parametrize("page", _PAGES)
def test_what_a_page_names_exists(page):
    text = _PAGES[page]
    assert [path for path in paths(text) if not (_REPOSITORY / path).exists()] == []
    assert missing_keys(text) == []
    assert [name for name in functions(text) if name not in defined()] == []


def test_the_checks_find_what_is_wrong():
    text = "`tools/none.py` and tools/generate.py, `training.max_steps=3`, `training.steps`, `precision`, `no_such()`"
    assert paths(text) == ["tools/none.py", "tools/generate.py"]
    assert missing_keys(text) == ["training.steps"]
    assert functions(text) == ["no_such"]
    assert "no_such" not in defined()
    everything = "".join(_PAGES.values())
    assert len(paths(everything)) > 60
    assert len(functions(everything)) > 30


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The repository as seen from its root, where what a block writes stays away from it."""
    for path in _REPOSITORY.iterdir():
        if path.name not in ("runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_every_block_has_a_language_and_is_run_or_argued():
    plain = ("text", "{toctree}")
    for page, text in _PAGES.items():
        languages = re.findall(r"^```([^\n]*)\n.*?^```", text, flags=re.MULTILINE | re.DOTALL)
        assert {language.split(" ")[0] for language in languages} <= {"bash", "python", *plain}, page
    everything = "".join(_PAGES.values())
    assert all(f"\n{beginning}" in everything for beginning in _NOT_RUN)


@pytest.mark.parametrize(("page", "language", "text"), blocks())
def test_blocks_run(checkout, page, language, text):
    program = [sys.executable, "-c", text] if language == "python" else ["bash", "-ec", text]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(_REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(program, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}: {done.stderr}"
