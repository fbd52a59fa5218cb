"""Tokenizer: round trips, special tokens, the cached encoder against SentencePiece itself, and bad files."""

import io
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.data.piece_cache import DocumentEncoder, separators_of
from vishwamai_mp.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "counted", "1234", "mice", "in", "Ünïcode", "café")
CORPUS = [
    "".join(f"{WORDS[(i * j) % len(WORDS)]}{' ' * (1 + (j % 5 == 0))}" for j in range(1, 40)) + "\n    def f(x):\n"
    for i in range(1, 60)
]
# Text that meets the rules: words of the corpus, runs of spaces and newlines, specials, and anything else in UTF-8.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from((*WORDS, " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u2581", *SPECIAL_TOKENS, "</s>", "<0x41>")),
        st.text(st.characters(codec="utf-8"), max_size=12),
    ),
    max_size=40,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(CORPUS, 420, tmp_path_factory.mktemp("tokenizer") / "small")


def _train_foreign(path, **changes):
    """A model made with SentencePiece's own defaults, other than ours."""
    model = io.BytesIO()
    arguments: dict[str, Any] = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "minloglevel": 2}
    arguments |= changes
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **arguments)
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def test_vocabulary_is_as_promised(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer) == 420
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eod_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert tokenizer.special_ids == dict(zip(SPECIAL_TOKENS, (4, 5, 6, 7), strict=True))
    assert tokenizer.has_byte_fallback()
    assert len(set(tokenizer.tokens())) == 420


def test_special_tokens_are_single_ids_anywhere(tokenizer):
    ids = tokenizer.encode("a[STEP]b [CACHE] c")
    assert ids.count(tokenizer.special_ids["[STEP]"]) == 1
    assert ids.count(tokenizer.special_ids["[CACHE]"]) == 1


def test_digits_stand_alone(tokenizer):
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("x1234")][-4:] == ["1", "2", "3", "4"]


def test_control_tokens_cannot_be_written_in_text(tokenizer):
    assert tokenizer.eod_id not in tokenizer.encode("</s><s><pad>")
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eod_id]) == "a b"


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_cached_encoder_gives_sentencepiece_tokens(tokenizer, text):
    assert separators_of(tokenizer) == " \u2581\n"
    encoder = DocumentEncoder(tokenizer, np.dtype(np.uint16))
    for _ in range(2):  # the second time from the table
        assert np.frombuffer(encoder.encode(text), np.uint16).tolist() == tokenizer.encode(text)


def test_cached_encoder_cuts_long_documents_exactly(tokenizer, monkeypatch):
    monkeypatch.setattr("vishwamai_mp.data.piece_cache._SLICE_CHARS", 50)
    monkeypatch.setattr("vishwamai_mp.data.piece_cache._MAX_ENTRIES", 3)
    text = "".join(CORPUS) + "x" * 200 + " " * 200
    encoded = np.frombuffer(DocumentEncoder(tokenizer, np.dtype(np.int32)).encode(text), np.int32)
    assert encoded.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("changes", "separators"),
    [
        ({}, ""),  # a dummy prefix and squeezed spaces
        ({"model_type": "unigram", "vocab_size": 290}, ""),
        ({"byte_fallback": False, "vocab_size": 80}, ""),
        ({"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False, "remove_extra_whitespaces": False}, ""),
        ({"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": True}, ""),
        (
            {
                "normalization_rule_name": "identity",
                "add_dummy_prefix": False,
                "remove_extra_whitespaces": False,
                "user_defined_symbols": ["cat sat"],
            },
            "",
        ),
        (
            {
                "normalization_rule_name": "identity",
                "add_dummy_prefix": False,
                "remove_extra_whitespaces": False,
                "user_defined_symbols": [";\n"],
            },
            " \u2581",
        ),
    ],
)
def test_foreign_models_are_cut_only_where_exact(tmp_path, changes, separators):
    foreign = _train_foreign(tmp_path / "foreign.model", **changes)
    assert separators_of(foreign) == separators
    encoder = DocumentEncoder(foreign, np.dtype(np.uint16))
    for text in ("the cat sat  on;\n a mat ", " \u2581the\n\ncafé ☃☃ ☃", "the cat sat", "", "; \n;\n\n"):
        assert np.frombuffer(encoder.encode(text), np.uint16).tolist() == foreign.encode(text)


def test_lone_surrogate_and_foreign_ids_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(UserError, match=r"token id 420 is outside the vocabulary .*: 0 to 419"):
        tokenizer.decode([5, 420])
    with pytest.raises(UserError, match="outside the vocabulary"):
        tokenizer.decode([-1])
    with pytest.raises(UserError, match="no token 'zzzz'"):
        tokenizer.token_to_id("zzzz")


def test_vocabulary_without_eod(tmp_path):
    with pytest.raises(UserError, match="no end-of-document token"):
        _train_foreign(tmp_path / "foreign.model", eos_id=-1).require_eod()


@pytest.mark.parametrize("content", [b"not a model" * 20, b"\x0a\x05"])
def test_damaged_tokenizer_file(tmp_path, content):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.model is not a whole SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")


def test_truncated_tokenizer_file(tokenizer, tmp_path):
    whole = tokenizer.path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 5, 7):
        (tmp_path / "cut.model").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.model is not a whole SentencePiece model"):
            Tokenizer(tmp_path / "cut.model")


def test_missing_and_empty_tokenizer_file(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer file .*none\.model"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "empty.model").touch()
    with pytest.raises(UserError, match=r"empty\.model is empty"):
        Tokenizer(tmp_path / "empty.model")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 420, "no text to train"),
        (["  \n", "\n"], 420, "no text to train"),
        (CORPUS, 100, "--vocab-size 100 is too small: .* need at least 3"),
        (CORPUS, 90000, "--vocab-size 90000 is more than this text can fill: at most [0-9]+, or"),
        (CORPUS, -1, "--vocab-size -1"),
    ],
)
def test_training_that_cannot_work_writes_nothing(tmp_path, texts, vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, vocab_size, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_training_into_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        train_tokenizer(CORPUS, 420, tmp_path / "none" / "out")


def test_training_is_reproducible(tmp_path):
    first, second = (train_tokenizer(CORPUS, 400, tmp_path / name).path.read_bytes() for name in ("a", "b"))
    assert first == second


def test_a_piece_that_is_no_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "damaged.model").write_bytes(tokenizer.path.read_bytes().replace(b"<unk>", b"\xbcunk>", 1))
    with pytest.raises(UserError, match="is not a whole SentencePiece model"):
        Tokenizer(tmp_path / "damaged.model")


def test_a_model_without_an_unknown_piece_is_not_whole(tokenizer, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        tokenizer.path.read_bytes()
    )
    (unknown,) = (piece for piece in model.pieces if piece.type == piece.UNKNOWN)
    unknown.type = unknown.USER_DEFINED
    (tmp_path / "none.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"is not a whole SentencePiece model \(no unknown piece"):
        Tokenizer(tmp_path / "none.model")
