"""Tokens added to an imported model: texts lead to them, their rows are means, all else is as it was."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.conversion import models
from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.conversion.folder import open_folder
from vishwamai_mp.conversion.from_hf import import_folder
from vishwamai_mp.conversion.new_tokens import with_new_tokens
from vishwamai_mp.conversion.tokenizer_files import tokenizer_files
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer

VOCAB = 400
NEW = ["[LOOK]", "<|turn|>"]
TEXT = "def [LOOK]look(self):<|turn|> return"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = train_tokenizer([inspect.getsource(json)], VOCAB, tmp_path_factory.mktemp("tokenizer") / "t").path
    return tokenizer_files(path, ModelConfig(vocab_size=VOCAB), None).contents


def folder_with(path: Path, files: dict[str, bytes], rows: int, **options: Any) -> Path:
    """A Llama of transformers with `rows` in its tables, beside a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, **options
    )
    LlamaForCausalLM(config).save_pretrained(path)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("without", ["", "tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(("rows", "tied"), [(VOCAB, False), (VOCAB + 1, True), (VOCAB + 50, False)])
def test_texts_lead_to_them_here_and_in_transformers(
    tmp_path: Path, files: dict[str, bytes], without: str, rows: int, tied: bool
) -> None:
    kept = {name: content for name, content in files.items() if name != without}
    folder = folder_with(tmp_path / "hf", kept, rows, tie_word_embeddings=tied)
    notes = import_folder(open_folder(folder), tmp_path / "run", None, NEW)
    assert f"[LOOK] is {VOCAB}, <|turn|> is {VOCAB + 1}" in notes[-1]
    assert ("grows" in notes[-1]) == (rows < VOCAB + 2)
    left = " ".join(notes[:-1])
    assert ("tokenizer.model lacks tokens" in left) == (not without)
    assert ("has 402 tokens, 2 new ones among them, the model 450" in left) == (rows == VOCAB + 50)

    ours, before = Tokenizer(tmp_path / "run"), Tokenizer(folder)
    ids = ours.encode(TEXT)
    assert [i for i in ids if i >= VOCAB] == [VOCAB, VOCAB + 1]
    assert ours.decode(ids) == TEXT
    assert ours.encode("def look") == before.encode("def look")

    models.export(tmp_path / "run", tmp_path / "out", tokenizer=tmp_path / "run")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT, add_special_tokens=False).input_ids == ids
    assert r"| Added tokens | [LOOK] (400), <\|turn\|> (401) |" in (tmp_path / "out/README.md").read_text()
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        if tensor.shape[0] != rows:
            assert new[name].equal(tensor)
            continue
        assert new[name].shape[0] == max(rows, VOCAB + 2)
        assert new[name][:VOCAB].equal(tensor[:VOCAB])
        assert new[name][VOCAB + 2 :].equal(tensor[VOCAB + 2 :])
        torch.testing.assert_close(new[name][VOCAB : VOCAB + 2], tensor[:VOCAB].mean(0).expand(2, -1))


def test_a_model_may_get_components_as_well(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = folder_with(tmp_path / "hf", files, VOCAB)
    cache = ["cache.enabled=true", "cache.num_heads=2", "cache.segment_length=8"]
    import_folder(open_folder(folder, cache), tmp_path / "run", None, NEW)
    models.export(tmp_path / "run", tmp_path / "out", tokenizer=tmp_path / "run")
    new = load_file(tmp_path / "out/model.safetensors")
    assert new["model.embed_tokens.weight"].shape[0] == VOCAB + 2
    assert [name for name in new if ".cache." in name]


def test_an_interrupted_import_goes_on_with_the_same_tokens_only(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = open_folder(folder_with(tmp_path / "hf", files, VOCAB)), tmp_path / "run"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vishwamai_mp.conversion.from_hf._complete", stop)
        with pytest.raises(KeyboardInterrupt):
            import_folder(folder, run, None, NEW)
    with pytest.raises(UserError, match="another"):
        import_folder(folder, run, None, NEW[:1])
    import_folder(folder, run, None, NEW)
    assert Tokenizer(run).find(NEW[1]) == VOCAB + 1
    assert not (run / "added").exists()


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (["[STEP]"], "has it already, as "),
        (["[A]", "[A]"], "is named twice"),
        (["two words"], "without spaces"),
        ([""], "without spaces"),
        (["\ud800"], "printable"),
    ],
)
def test_what_cannot_be_added_is_said(tmp_path: Path, files: dict[str, bytes], tokens: list[str], reason: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        with_new_tokens([tmp_path / name for name in files], tokens)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the model's tokenizer"):
        with_new_tokens([], NEW)
