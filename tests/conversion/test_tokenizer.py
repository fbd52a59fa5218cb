"""`AutoTokenizer` on exported files splits text as SentencePiece does."""

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.conversion.tokenizer import import_tokenizer, tokenizer_files
from vishwamai_mp.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

VOCAB = 900
CORPUS = [inspect.getsource(module) for module in (inspect, textwrap, json, json.decoder)]
AWKWARD = [
    "", " ", "\n", "\t\r\n", "  two  spaces ", "1234 5", "héllo wörld 😀 ᚠ", "[STEP]a[MEMORY] [REASONING]\n[CACHE]",
    "▁x ▁", "a" * 300, "[STEP", "\u200b\u0301",
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(CORPUS, VOCAB, tmp_path_factory.mktemp("tokenizer") / "t").path


def automatic(path: Path, folder: Path, chat_template: str | None = None, vocab_size: int = VOCAB) -> Any:
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    files = tokenizer_files(path, ModelConfig(vocab_size=vocab_size), chat_template)
    for name, content in files.contents.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def both(path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    return Tokenizer(path), automatic(path, tmp_path_factory.mktemp("auto"))


@pytest.mark.parametrize("text", [*AWKWARD, *CORPUS], ids=range(len(AWKWARD) + len(CORPUS)))
def test_texts_have_the_same_tokens(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    ids = ours.encode(text)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == ours.decode(ids)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<\0")))
def test_any_text_has_the_same_tokens(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert theirs(text).input_ids == ours.encode(text)


def test_special_tokens(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eod_id, ours.pad_id)
    assert len(theirs) == VOCAB
    for token in SPECIAL_TOKENS:
        assert theirs(token).input_ids == [ours.special_ids[token]]
    assert theirs.decode([ours.bos_id, *ours.encode("a[STEP]"), ours.eod_id], skip_special_tokens=True) == "a[STEP]"


def test_a_chat_template_is_carried(path: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = automatic(path, tmp_path / "auto", template)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi\n"


def train(tmp_path: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        **options,
    }
    sentences = iter("".join(CORPUS).split("\n"))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_prefix=str(tmp_path / "t"), **settings)
    return tmp_path / "t.model"


def test_a_tokenizer_that_puts_a_space_in_front(tmp_path: Path) -> None:
    """As Llama 2's does."""
    path = train(tmp_path, add_dummy_prefix=True)
    ours, theirs = Tokenizer(path), automatic(path, tmp_path / "auto", vocab_size=500)
    for text in ("hello world", "def main(argument):", " x", "1 2"):
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "its type is not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes text"),
        ({"remove_extra_whitespaces": True}, "it removes extra whitespace"),
        ({"byte_fallback": False, "vocab_size": 300}, "it has no byte fallback"),
    ],
)
def test_what_cannot_be_converted_is_said(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    path = train(tmp_path, **options)
    model = ModelConfig(vocab_size=Tokenizer(path).vocab_size)
    with pytest.raises(UserError, match=f"cannot be converted: {reason}"):
        tokenizer_files(path, model, None)


def test_a_tokenizer_of_another_size_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match="has 900 tokens, the model 901; give the one"):
        tokenizer_files(path, ModelConfig(vocab_size=901), None)
    with pytest.raises(UserError, match="--chat-template needs a tokenizer"):
        tokenizer_files(None, ModelConfig(vocab_size=901), "x")


def test_it_comes_back(path: Path, tmp_path: Path) -> None:
    automatic(path, tmp_path / "hf")
    run = tmp_path / "run"
    run.mkdir()
    assert import_tokenizer(tmp_path / "hf", run, VOCAB) is None
    assert (run / "tokenizer.model").read_bytes() == path.read_bytes()
    assert "tokens were added" in str(import_tokenizer(tmp_path / "hf", run, VOCAB + 1))
