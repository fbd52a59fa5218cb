"""`AutoTokenizer` on exported files splits text as SentencePiece does."""

import inspect
import json
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.conversion.tokenizer_files import (
    generation_config,
    imported_files,
    tokenizer_files,
    with_named_templates,
)
from vishwamai_mp.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer

VOCAB = 900
# Without "<", which control tokens begin with: where a text spells one, it is the token to transformers, by convention.
_TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<\0"))
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


@settings(deadline=None)
@given(text=_TEXTS)
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

    @settings(deadline=None)
    @given(text=_TEXTS)
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids)

    check()


def edited(path: Path, edit: Callable[[Any], None]) -> Path:
    """A model after `edit` of its protobuf."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    edit(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def test_runs_of_spaces_that_have_one_score(tmp_path: Path) -> None:
    """As Llama 2's and Mistral's do: the last choice of all, of 2 to 16 spaces but 15."""

    def add_runs(proto: Any) -> None:
        present = {piece.piece: piece for piece in proto.pieces}
        for spaces in ("▁" * length for length in range(2, 17) if length != 15):
            piece = present.get(spaces) or proto.pieces.add(piece=spaces, type=1)
            piece.score = -1e9

    path = edited(train(tmp_path, add_dummy_prefix=True), add_runs)
    ours, theirs = Tokenizer(path), automatic(path, tmp_path / "auto", vocab_size=520)
    for text in [" " * length + word for length in range(70) for word in ("", "the")]:
        assert theirs(text).input_ids == ours.encode(text)
    assert len(ours.encode("the" + " " * 40 + "the")) < 10

    @settings(deadline=None)
    @given(text=st.lists(st.sampled_from([" " * 3, " " * 9, "the", "\n"]) | _TEXTS).map("".join))
    def check(text: str) -> None:
        assert theirs(text).input_ids == ours.encode(text)

    check()


def test_pieces_of_equal_score_are_refused(tmp_path: Path) -> None:
    """As vocabularies have them that were put together of several."""

    def level(proto: Any) -> None:
        for piece in proto.pieces:
            piece.score = 0.0

    path = edited(train(tmp_path, add_dummy_prefix=False), level)
    with pytest.raises(UserError, match="several of its pieces have one score"):
        tokenizer_files(path, ModelConfig(vocab_size=500), None)


def test_symbols_that_contain_each_other(tmp_path: Path) -> None:
    symbols = ["<|a|>", "<|a|><|b|>", "ab", "abc", "\n", "\r\n", "é", "日本"]
    path = train(tmp_path, add_dummy_prefix=False, user_defined_symbols=symbols)
    ours, theirs = Tokenizer(path), automatic(path, tmp_path / "auto", vocab_size=500)

    @settings(deadline=None)
    @given(text=st.lists(st.sampled_from([*symbols, *"<|ab>\r é日本 ", "  "]) | _TEXTS).map("".join))
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids)

    check()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "its type is not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes text"),
        ({"remove_extra_whitespaces": True}, "it removes extra whitespace"),
        ({"byte_fallback": False, "vocab_size": 300}, "it has no byte fallback"),
        ({"treat_whitespace_as_suffix": True}, "it marks spaces at the end of words"),
        ({"user_defined_symbols": ["<|sep|>"]}, r".* begins with a symbol of its own such as \['<\|sep\|>'\]"),
        ({"user_defined_symbols": ["two words"], "add_dummy_prefix": False}, r"its symbol \['two words'\] has a space"),
    ],
)
def test_what_cannot_be_converted_is_said(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    path = train(tmp_path, **options)
    model = ModelConfig(vocab_size=Tokenizer(path).vocab_size)
    with pytest.raises(UserError, match=f"cannot be converted: {reason}"):
        tokenizer_files(path, model, None)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 900 tokens, the model 899; give the one"):
        tokenizer_files(path, ModelConfig(vocab_size=899), None)
    with pytest.raises(UserError, match="--chat-template needs a tokenizer"):
        tokenizer_files(None, ModelConfig(vocab_size=901), "x")
    assert len(automatic(path, tmp_path / "auto", vocab_size=1024)) == VOCAB  # rows beyond the tokenizer are no matter


def test_llama_cpp_finds_prefix_space_and_types_of_tokens(path: Path, tmp_path: Path) -> None:
    """Its converter reads them from tokenizer_config.json."""
    automatic(path, tmp_path / "auto")
    settings = json.loads((tmp_path / "auto/tokenizer_config.json").read_text())
    special = {token["content"]: token["special"] for token in settings["added_tokens_decoder"].values()}
    assert special == {
        **dict.fromkeys(("<unk>", "<s>", "</s>", "<pad>"), True),
        **dict.fromkeys((*SPECIAL_TOKENS, "\n"), False),
    }
    assert settings["add_prefix_space"] is False
    (tmp_path / "other").mkdir()
    other = train(tmp_path / "other", add_dummy_prefix=True)
    automatic(other, tmp_path / "prefixed", vocab_size=500)
    assert json.loads((tmp_path / "prefixed/tokenizer_config.json").read_text())["add_prefix_space"] is True


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def run_folder(folder: Path, run: Path, vocab_size: int) -> str | None:
    """What an import keeps of a folder."""
    kept, note = imported_files(folder, vocab_size)
    run.mkdir()
    for file in kept:
        (run / file.name).write_bytes(file.read_bytes())
    return note


def test_imported_files_go_back_as_they_came(path: Path, tmp_path: Path) -> None:
    """Of our own exports, and of tokenizers that are no SentencePiece models."""
    automatic(path, tmp_path / "hf", "{{ messages[0].content }}")
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages }}")
    files = files_of(tmp_path / "hf")
    model = ModelConfig(vocab_size=VOCAB)
    assert run_folder(tmp_path / "hf", tmp_path / "run", VOCAB) is None
    assert tokenizer_files(tmp_path / "run/tokenizer.model", model, None, imported=True).contents == files
    other = tokenizer_files(tmp_path / "run/tokenizer.model", model, "{{ other }}", imported=True).contents
    assert "chat_template.jinja" not in other
    assert json.loads(other["tokenizer_config.json"])["chat_template"] == "{{ other }}"

    (tmp_path / "hf/tokenizer.model").unlink()
    del files["tokenizer.model"]
    assert run_folder(tmp_path / "hf", tmp_path / "without", VOCAB) is None
    kept = tokenizer_files(tmp_path / "without", model, None, imported=True)
    assert kept.contents == files
    assert kept.token_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def test_a_tokenizer_json_alone_gets_the_settings_that_transformers_needs(path: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    automatic(path, tmp_path / "hf")
    (tmp_path / "alone").mkdir()
    file = tmp_path / "alone/tokenizer.json"
    file.write_bytes((tmp_path / "hf/tokenizer.json").read_bytes())
    contents = tokenizer_files(file, ModelConfig(vocab_size=VOCAB), None).contents
    assert contents["tokenizer.json"] == file.read_bytes()
    (tmp_path / "out").mkdir()
    for name, content in contents.items():
        (tmp_path / "out" / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    assert theirs("some text", add_special_tokens=False).input_ids == Tokenizer(path).encode("some text")


def test_templates_in_a_folder_of_their_own_are_kept_beside_the_settings(path: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    automatic(path, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}\u2028")
    expected = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert expected == {"default": "{{ messages }}", "tool_use": "{{ tools }}\u2028"}
    kept = with_named_templates(files_of(tmp_path), tmp_path)
    shutil.rmtree(tmp_path / "additional_chat_templates")
    (tmp_path / "chat_template.jinja").unlink()
    assert kept.keys() == files_of(tmp_path).keys()
    assert with_named_templates(kept, tmp_path) == kept
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == expected


def test_an_import_takes_the_file_that_has_all_tokens(path: Path, tmp_path: Path) -> None:
    """Fine-tuned models often have tokens that were added to `tokenizer.json` only."""
    automatic(path, tmp_path / "hf")
    file = tmp_path / "hf/tokenizer.json"
    described = json.loads(file.read_text())
    described["added_tokens"].append({**described["added_tokens"][-1], "id": VOCAB, "content": "<|im_end|>"})
    file.write_text(json.dumps(described))
    note = run_folder(tmp_path / "hf", tmp_path / "run", VOCAB + 1)
    assert note is not None
    assert "tokenizer.model lacks tokens that its tokenizer.json has" in note
    assert Tokenizer(tmp_path / "run").find("<|im_end|>") == VOCAB


def test_an_import_takes_the_file_that_transformers_goes_by(path: Path, tmp_path: Path) -> None:
    automatic(path, tmp_path / "hf")
    assert run_folder(tmp_path / "hf", tmp_path / "alike", VOCAB) is None
    assert (tmp_path / "alike/tokenizer.model").exists()
    file = tmp_path / "hf/tokenizer.json"
    described = json.loads(file.read_text())
    described["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, described["normalizer"]]}
    file.write_text(json.dumps(described))
    note = str(run_folder(tmp_path / "hf", tmp_path / "run", VOCAB))
    assert "its tokenizer.model cuts 'Hello world' otherwise than its tokenizer.json" in note
    assert Tokenizer(tmp_path / "run").encode("Hello") == Tokenizer(path).encode("hello")


def test_settings_beside_a_sentencepiece_model_are_added_to_what_is_made_of_it(path: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "chat_template": "{{ messages }}"}')
    model = ModelConfig(vocab_size=VOCAB)
    contents = tokenizer_files(tmp_path / "tokenizer.model", model, None, imported=True).contents
    (tmp_path / "hf").mkdir()
    for name, content in contents.items():
        (tmp_path / "hf" / name).write_bytes(content)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(path)
    assert theirs("some text").input_ids == [ours.bos_id, *ours.encode("some text")]
    assert theirs("some text", add_special_tokens=False).input_ids == ours.encode("some text")
    assert theirs.chat_template == "{{ messages }}"


def test_an_import_says_what_its_tokenizer_lacks(path: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/tokenizer.model").write_bytes(path.read_bytes())
    assert "has 900 tokens, the model 1024: no text" in str(run_folder(tmp_path / "hf", tmp_path / "more", 1024))
    assert (tmp_path / "more/tokenizer.model").exists()
    assert "the model only 899, and is left behind" in str(run_folder(tmp_path / "hf", tmp_path / "fewer", 899))
    assert not (tmp_path / "fewer/tokenizer.model").exists()


def test_token_ids_of_both_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7], "top_p": 0.9, "pad_token_id": null}')
    assert generation_config(tmp_path, {"eos_token_id": 5, "bos_token_id": 3, "pad_token_id": 6}) == {
        "eos_token_id": [5, 7],
        "bos_token_id": 3,
        "pad_token_id": 6,
        "top_p": 0.9,
    }
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        generation_config(tmp_path, {})
