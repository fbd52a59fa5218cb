"""One interface over all kinds of tokenizer files: what holds of each."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Fast
from transformers import PreTrainedTokenizerFast

from vishwamai_mp.config import UserError
from vishwamai_mp.data.byte_level_training import train_byte_level
from vishwamai_mp.data.piece_cache import DocumentEncoder
from vishwamai_mp.data.tokenizer import SPECIAL_TOKENS, Tokenizer, kept_files
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.inference.added_text import AddedText
from vishwamai_mp.opening.prompts import PromptTokenizer

TEXTS = [f"The quick brown fox, number {i}, jumps over {i * 7} lazy dogs; naïve café 東京.\n" for i in range(60)]
KINDS = ("sentencepiece", "byte_level", "metaspace", "unigram")


def byte_level() -> Fast:
    """As GPT-2, Llama 3, Qwen: bytes written as characters. BOS comes first by itself."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(TEXTS, trainer)
    fast.add_tokens([AddedToken("[STEP]", special=False, normalized=False)])
    fast.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return fast


def metaspace() -> Fast:
    """As Llama 2: spaces marked, bytes as `<0x0A>`, a space before every text."""
    fast = Fast(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    fast.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=220, special_tokens=special, show_progress=False))
    described = json.loads(fast.to_str())
    vocabulary = described["model"]["vocab"]
    for byte in range(256):  # plain tokens, which a trainer cannot be asked for
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    fast = Fast.from_str(json.dumps(described))
    fast.add_tokens([AddedToken("[STEP]", special=False, normalized=False)])
    return fast


def unigram() -> Fast:
    """As XLM-R, ALBERT: pieces chosen by probability."""
    fast = Fast(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=sorted(set("".join(TEXTS))),
        show_progress=False,
    )
    fast.train_from_iterator(TEXTS, trainer)
    fast.add_tokens([AddedToken("[STEP]", special=False, normalized=False)])
    return fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind."""
    root = tmp_path_factory.mktemp("kinds")
    for kind, make in (("byte_level", byte_level), ("metaspace", metaspace), ("unigram", unigram)):
        (root / kind).mkdir()
        make().save(str(root / kind / "tokenizer.json"))
    (root / "sentencepiece").mkdir()
    train_tokenizer(TEXTS, 420, root / "sentencepiece" / "tokenizer")
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def tokenizer(request, folders) -> Tokenizer:
    return Tokenizer(folders[request.param])


def test_texts_survive_the_round_trip(tokenizer):
    for text in ("The lazy fox", " lazy  dogs", "naïve café 東京", "over [STEP]", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(["fox", "dogs 7"]) == [tokenizer.encode("fox"), tokenizer.encode("dogs 7")]


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_any_text_survives_where_bytes_are_tokens(folders, kind, text):
    tokenizer = Tokenizer(folders[kind])
    assert tokenizer.has_byte_fallback()
    expected = text.replace("▁", " ") if kind == "metaspace" else text
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_tokens_have_names_and_ends(tokenizer):
    step = tokenizer.token_to_id("[STEP]")
    assert tokenizer.special_ids == {token: tokenizer.find(token) for token in tokenizer.special_ids}
    assert tokenizer.special_ids["[STEP]"] == step
    assert tokenizer.encode("a[STEP]b").count(step) == 1
    assert tokenizer.id_to_token(step) == "[STEP]"
    assert 0 <= tokenizer.bos_id != tokenizer.eod_id == tokenizer.require_eod()
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eod_id]) == "a b"
    assert (
        len(tokenizer.tokens())
        == tokenizer.vocab_size
        == max(map(tokenizer.find, filter(None, tokenizer.tokens()))) + 1
    )
    with pytest.raises(UserError, match="has no token 'zzzz'"):
        tokenizer.token_to_id("zzzz")
    with pytest.raises(UserError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("ab\ud800")


def test_what_a_token_alone_stands_for_adds_up(tokenizer):
    text = "fox 東京[STEP]"
    content = b"".join(tokenizer.content_of(i) for i in tokenizer.encode(text)).decode()
    assert content.removeprefix(" ") == text


def test_tokens_one_by_one_add_the_text_of_all(tokenizer):
    prompt, answer = tokenizer.encode("The quick"), tokenizer.encode(" brown 東京 fox\n\n x")
    added = AddedText(tokenizer.decode, prompt)
    for token in answer:
        added.add([token])
    added.end()
    whole = tokenizer.decode(prompt + answer)
    assert tokenizer.decode(prompt) + added.text == whole


def test_indexed_files_get_the_same_tokens(tokenizer):
    encoder = DocumentEncoder(tokenizer, np.dtype(np.uint16))
    for text in TEXTS[:3]:
        assert np.frombuffer(encoder.encode(text), np.uint16).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "unigram"])
def test_ids_are_those_of_transformers(folders, kind):
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folders[kind] / "tokenizer.json"))
    ours = Tokenizer(folders[kind])
    for text in [*TEXTS[:5], "a</s>b", "<|eot_id|>"]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_bos_comes_first_where_the_file_puts_it(folders):
    assert PromptTokenizer(folders["byte_level"], 500).first == [0]
    assert PromptTokenizer(folders["byte_level"], 500, add_bos=False).first == []
    assert PromptTokenizer(folders["unigram"], 500).first == []
    assert PromptTokenizer(folders["unigram"], 500, add_bos=True).first == [1]


def test_settings_beside_the_file_say_what_ends_a_text(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}, "bos_token": None}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eod_id == 2
    assert PromptTokenizer(tmp_path, 500).end_tokens == (1, 2)
    assert sorted(kept_files(tmp_path)) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    settings_file.write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer(tmp_path)


_LISTED = {"content": "<|extra|>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"401": {**_LISTED, "special": True}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"401": {**_LISTED, "special": False}}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|extra|>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<|extra|>"}}),
        ("tokenizer_config.json", {"sep_token": "<|extra|>"}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": {**_LISTED, "content": "[STEP]"}}}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|extra|>"]}),
        ("added_tokens.json", {"<|extra|>": 401}),
    ],
)
def test_tokens_that_files_beside_it_add_are_those_of_transformers(folders, tmp_path, name, content):
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / name).write_text(json.dumps(content if name != "tokenizer_config.json" else settings | content))
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer(tmp_path)
    assert len(theirs) == ours.vocab_size
    encoder = DocumentEncoder(ours, np.dtype(np.uint16))
    for text in ("The <|extra|> fox", "a <|eot_id|>b", "a [STEP] <|extra|><|extra|>"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        assert np.frombuffer(encoder.encode(text), np.uint16).tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_new_token_for_padding_alone_needs_no_row_of_the_model(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    assert Tokenizer(tmp_path).vocab_size == Tokenizer(folders["byte_level"]).vocab_size
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]", "sep_token": "[PAD2]"}')
    assert Tokenizer(tmp_path).pad_id == 401


@pytest.mark.parametrize(("kind", "puts_first", "said"), [("byte_level", True, False), ("unigram", False, True)])
def test_whether_bos_comes_first_is_said_by_the_file_and_not_by_settings(folders, tmp_path, kind, puts_first, said):
    (tmp_path / "tokenizer.json").write_bytes((folders[kind] / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": said}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)("fox").input_ids
    prompts = PromptTokenizer(tmp_path, Tokenizer(tmp_path).vocab_size)
    assert prompts.encode("fox") == theirs
    assert bool(prompts.first) == puts_first
    assert f"add_bos_token={json.dumps(said)}, but tokenizer.json puts" in prompts.notes[0]


def test_a_stop_text_that_spells_a_control_token_is_that_token(folders):
    prompts = PromptTokenizer(folders["byte_level"], 401)
    assert prompts.ends([" fox", "<|eot_id|>"]) == (1, 2)  # the text itself never has it
    assert PromptTokenizer(folders["sentencepiece"], 420).ends(["<s>"]) == (1, 2)


def test_half_a_surrogate_pair_is_no_token(folders, tmp_path, tokenizer):
    """JSON can spell one: as a stop text, or as the name of a token."""
    assert tokenizer.find("\ud800<s>") is None
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 1"):
        tokenizer.encode("a\ud800b")
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "\\ud800<s>"}')
    assert PromptTokenizer(tmp_path, 500, add_bos=False).encode("fox")


def test_a_conversation_is_encoded_as_transformers_does(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}assistant:"
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}'
    )
    messages = [{"role": "user", "content": "The fox?"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True)
    theirs = theirs if isinstance(theirs, list) else theirs["input_ids"]
    assert PromptTokenizer(tmp_path, 500).chat(messages) == theirs


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}', '{"version": "1.0", "model": {"type": "None"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot be read as a tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer(tmp_path)


TRAINED: dict[str, Callable[..., Tokenizer]] = {
    "bpe": train_tokenizer,
    "unigram": partial(train_tokenizer, model_type="unigram"),
    "byte-bpe": train_byte_level,
}


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_trained_encodes_any_text_without_loss(kind, tmp_path):
    texts = Path(argparse.__file__).read_text(encoding="utf-8").splitlines(keepends=True) + ["1234\n"] * 50
    tokenizer = TRAINED[kind](texts, 500, tmp_path / "trained")
    assert tokenizer.vocab_size == 500
    assert sorted(tokenizer.special_ids) == sorted(SPECIAL_TOKENS)
    assert min(tokenizer.bos_id, tokenizer.eod_id, tokenizer.pad_id) >= 0
    for text in ("", "  two  spaces\t\n\n", "a[STEP] b", "漢字 \U0001f600 naïve", "1234"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == 4  # digits stand alone
    assert tokenizer.encode("a[STEP]")[-1] == tokenizer.special_ids["[STEP]"]
    encoder = DocumentEncoder(tokenizer, np.dtype(np.uint16))
    assert all(encoder.encode(text) == np.array(tokenizer.encode(text), np.uint16).tobytes() for text in TEXTS)


def test_a_byte_level_vocabulary_that_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--vocab-size 262 is too small: .* 263"):
        train_byte_level(TEXTS, 262, tmp_path / "small")
    with pytest.raises(UserError, match="more than this text can fill: at most"):
        train_byte_level(TEXTS, 9999, tmp_path / "large")
    assert not list(tmp_path.iterdir())


def test_a_panic_of_the_package_is_a_users_error(tmp_path):
    described = json.loads(byte_level().to_str())
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"cannot be read as a tokenizer\.json"):
        Tokenizer(tmp_path)
