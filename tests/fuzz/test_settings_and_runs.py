"""Damaged recipes, overrides, files of metrics, prepared rows and prompts: read, or refused in one line."""

import json
import zlib
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.mutations import damaged, emptied, fuzzed, outcome
from vishwamai_mp.checkpoint import lock
from vishwamai_mp.checkpoint.manifest import NAME, FileRecord, Manifest, TensorRecord, check_files, read_manifest
from vishwamai_mp.components.standalone import read_section
from vishwamai_mp.config import PretrainConfig, TreeConfig, UserError, load_config, preset_names
from vishwamai_mp.conversion.journal import Journal
from vishwamai_mp.data.file_kinds import foreign_tokenizer
from vishwamai_mp.data.indexed import IndexedWriter, check_indexed
from vishwamai_mp.data.lines import json_records
from vishwamai_mp.data.marks import BEGINS, LEARNT
from vishwamai_mp.data.prepared_rows import IndexedDataset, PreparedRows, check_rows
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.observability.report import render_report
from vishwamai_mp.observability.run_folder import Run, read_run
from vishwamai_mp.observability.writers import JsonLines
from vishwamai_mp.runtime.choices import read_table
from vishwamai_mp.training.callbacks.search_samples import Search, search_callbacks

PRESETS = resources.files("vishwamai_mp.config") / "presets"
METRICS = [{"step": step, "lm_loss": 8 / step, "consumed_tokens": step * 512, "mfu": None} for step in range(1, 40)]
LENGTH = 8


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
@fuzzed
@given(data=st.data())
def test_recipes(tmp_path: Path, name: str, data: st.DataObject) -> None:
    preset = (PRESETS / f"{data.draw(st.sampled_from(preset_names()))}.yaml").read_bytes()
    guide = json.dumps({"model_config": {"dim": 128, "num_attention_heads": 4, "vocab_size": 400}}).encode()
    (tmp_path / name).write_bytes(data.draw(damaged(preset if name == "a.yaml" else guide)))
    found = outcome(lambda: load_config(tmp_path / name))
    assert isinstance(found, PretrainConfig | str)


KEYS = ["model.hidden_size", "data.train", "data.split", "optimizer.learning_rate", "logging.report_to", "precision"]
KEYS += ["model", "memory.layers", "training.output_dir", "", ".", "model.", "a.b.c"]
VALUES = [
    "010",
    "1e9999",
    "[1,",
    "{a: b}",
    "null",
    "true",
    "-1",
    "x" * 3000,
    "&a [*a]",
    "!!python/none",
    "2001-01-01",
    "?",
]


@fuzzed
@given(
    key=st.one_of(st.sampled_from(KEYS), st.text(max_size=12)),
    sign=st.sampled_from(["=", ""]),
    value=st.one_of(st.sampled_from(VALUES), st.text(max_size=12)),
)
@example(key="[", sign="=", value="010")
@example(key="a\nb", sign="=", value="1")
@example(key="model.hidden_size", sign="=", value="\x1f\n")
@example(key="model", sign="", value="\n")
def test_overrides(key: str, sign: str, value: str) -> None:
    found = outcome(lambda: load_config("tiny", [f"{key}{sign}{value}"]))
    assert isinstance(found, PretrainConfig | str)


@fuzzed
@given(data=st.data())
def test_metrics(tmp_path: Path, data: st.DataObject) -> None:
    whole = "".join(json.dumps(record) + "\n" for record in METRICS).encode()
    folder = emptied(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(data.draw(damaged(whole)))
    found = outcome(lambda: read_run(folder))
    if isinstance(found, Run):
        assert outcome(lambda: render_report([found])).startswith("<!doctype html>")
    outcome(lambda: list(json_records(folder / "metrics.jsonl")))
    outcome(lambda: JsonLines(folder / "metrics.jsonl", 10).close())
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_bytes().split(b"\n") if line]
    assert all(step <= 10 for step in steps)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl"]


MANIFEST = Manifest(
    step=4,
    model={"hidden_size": 8},
    layout={"world_size": 2},
    precision="fp32",
    versions={"torch": "2"},
    tensors={"decoder.weight": TensorRecord([8, 4], "float32"), "optimizer.state.a": TensorRecord([3], "float32")},
    objects=["scale"],
    files={"__0_0.distcp": FileRecord(5, zlib.crc32(b"12345")), "trainer.json": FileRecord(2, zlib.crc32(b"{}"))},
)


def _read_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    problems = check_files(folder, manifest.files, checksums=True)
    assert all("\n" not in problem for problem in problems)
    assert manifest.parameters >= 0
    assert sum(record.size for record in manifest.tensors.values()) >= 0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "__0_0.distcp").write_bytes(b"12345")
    (tmp_path / "trainer.json").write_bytes(b"{}")
    return tmp_path


@fuzzed
@given(data=st.data())
def test_manifests(checkpoint: Path, data: st.DataObject) -> None:
    (checkpoint / NAME).write_bytes(data.draw(damaged(MANIFEST.to_json().encode())))
    outcome(lambda: _read_manifest(checkpoint))


OTHER_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 2), st.just(10**30), st.floats(), st.sampled_from(["", "a\0"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["size", "crc32", "shape", "a\0", "a"]), inner)
    ),
    max_leaves=6,
)


@fuzzed
@given(change=st.dictionaries(st.sampled_from([*asdict(MANIFEST), "more"]), OTHER_VALUES, max_size=3))
def test_strange_manifests(checkpoint: Path, change: dict[str, Any]) -> None:
    (checkpoint / NAME).write_text(json.dumps({**asdict(MANIFEST), **change}))
    outcome(lambda: _read_manifest(checkpoint))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of three prepared rows, by the end of their name."""
    folder = tmp_path_factory.mktemp("rows")
    marks = np.full(3 * (LENGTH + 1), LEARNT, dtype=np.uint8)
    marks[:: LENGTH + 1] |= BEGINS
    for name, values in (("a", np.arange(len(marks), dtype=np.uint16)), ("a_marks", marks)):
        with IndexedWriter(folder / name, values.dtype) as writer:
            writer.add(values.tobytes(), np.full(3, LENGTH + 1))
            writer.publish()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["a.bin", "a.idx", "a_marks.bin", "a_marks.idx"])
@fuzzed
@given(data=st.data())
def test_prepared_rows(tmp_path: Path, rows: dict[str, bytes], name: str, data: st.DataObject) -> None:
    folder = emptied(tmp_path / "rows")
    for file, content in rows.items():
        (folder / file).write_bytes(data.draw(damaged(content)) if file == name else content)

    def read() -> list[Any]:
        check_indexed(folder / "a")
        corpus = IndexedDataset(str(folder / "a"))
        check_rows(str(folder / "a"), corpus, LENGTH)
        prepared = PreparedRows(corpus, range(len(corpus)), seed=1)
        return [prepared.text(index) for index in range(len(prepared))]

    found = outcome(read)
    assert isinstance(found, str) or all(row.shape == (2, LENGTH + 1) for row in found)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["some words to learn"] * 9, 370, tmp_path_factory.mktemp("tokenizer") / "small")


@fuzzed
@given(content=damaged("one\tyes\n\u2028two\tno\r\n\nthree\t3\n".encode()))
@example(content=b"")
def test_prompts(tmp_path: Path, tokenizer: Tokenizer, content: bytes) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    config = PretrainConfig(tree=TreeConfig(enabled=True, prompts=str(tmp_path / "prompts.txt")))
    found = outcome(lambda: search_callbacks(config, tokenizer))
    if isinstance(found, list):
        (search,) = found
        assert isinstance(search, Search)
        assert search.prompts


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_deep_recipes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 3000)
    assert "not valid" in outcome(lambda: load_config(tmp_path / name))


def test_what_lies_too_deep_is_damage_to_every_reader_of_json(tmp_path: Path) -> None:
    """Python's reader gives up on it with an error that is no ValueError."""
    deep = b'{"a":' * 100_000
    for name in ("ways.json", "lock", "config.json", ".conversion.json"):
        (tmp_path / name).write_bytes(deep)
    with pytest.raises(UserError, match="no table of ways can be read"):
        read_table(tmp_path / "ways.json")
    with pytest.raises(UserError, match="is no JSON"):
        read_section(tmp_path, "memory")
    with pytest.raises(UserError, match="cannot be read; empty"):
        Journal(tmp_path, {})
    assert foreign_tokenizer(deep) is None
    owner = lock._read(tmp_path / "lock")
    assert owner is not None
    assert owner.host == "unknown"
