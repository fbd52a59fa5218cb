"""tiktoken's files as a `tokenizer.json`: the same tokens as tiktoken's own rule gives."""

import base64
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from tests.data.test_tokenizer_kinds import TEXTS, byte_level
from vishwamai_mp.config.errors import UserError
from vishwamai_mp.data.byte_level_training import train_byte_level
from vishwamai_mp.data.cutting import PATTERNS, SPACE_CUTTING
from vishwamai_mp.data.json_vocabulary import byte_alphabet
from vishwamai_mp.data.piece_cache import DocumentEncoder
from vishwamai_mp.data.tiktoken_files import tokenizer_json
from vishwamai_mp.data.tokenizer import Tokenizer

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]
MIXED = [
    "I'LL  pay 1234567 for naïve\r\n\r\n\tcafé\n  東京 🙂",
    "aaaaaa",
    " ",
    "",
    "x" * 40,
    "don't <|end_of_text|>",
    "你好",
]


@pytest.fixture(scope="module")
def ranks():
    """Of a vocabulary trained on bytes; the numbers are in the order in which bytes were joined."""
    described = json.loads(byte_level().to_str())["model"]
    alphabet = byte_alphabet()
    joined = [left + right for left, right in described["merges"]]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"".join(alphabet[character] for character in token) for token in joined]
    return {token: rank for rank, token in enumerate(tokens)}


def encoded(text, ranks, pattern):
    """By tiktoken's rule (openai/tiktoken, `_byte_pair_merge`), a cut at a time."""
    cuts = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated").pre_tokenize_str(text)
    for cut, _ in cuts:
        parts = [bytes([byte]) for byte in cut.encode()]
        while cut.encode() not in ranks and len(parts) > 1:
            joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            at = joined.index(min(joined))
            if joined[at] == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield from [ranks[cut.encode()]] if cut.encode() in ranks else [ranks[part] for part in parts]


def lines(ranks):
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_texts_are_the_tokens_that_tiktoken_makes(tmp_path, ranks, pattern):
    (tmp_path / "a.tiktoken").write_text(lines(ranks) + f"= {len(ranks)}\n")  # and Whisper's empty one
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(tmp_path / "a.tiktoken", pattern, SPECIAL))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(ranks) + 3
    assert (tokenizer.bos_id, tokenizer.eod_id) == (len(ranks) + 1, len(ranks) + 2)
    for text in [*TEXTS[:20], *MIXED]:
        before, end, _ = text.partition(SPECIAL[1])
        expected = [*encoded(before, ranks, pattern), *([tokenizer.eod_id] if end else [])]
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == before


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("abT'sl19.,/!_ \n\r\t\u3000\x1c\x85\u180eé東ー\u0301 <[]"), max_size=60))
@pytest.mark.parametrize("rule", [*sorted(SPACE_CUTTING), None])
def test_a_text_in_parts_has_the_tokens_of_the_whole(parted, rule, text):
    encoder, tokenizer = parted[rule]
    whole = np.array(tokenizer.encode(text), np.uint16).tobytes()
    assert encoder.encode(text) == whole
    assert (
        encoder.encode(f"{text} {text}a{text}")
        == np.array(tokenizer.encode(f"{text} {text}a{text}"), np.uint16).tobytes()
    )


@pytest.fixture(scope="module")
def parted(tmp_path_factory, ranks):
    """By rule, an encoder of documents with short slices and the tokenizer; None: of our own training."""
    root, found = tmp_path_factory.mktemp("parted"), {}
    (root / "a.tiktoken").write_text(lines(ranks))
    for number, rule in enumerate([*SPACE_CUTTING, None]):
        path = root / f"{number}.json"
        if rule is None:
            train_byte_level(TEXTS, 300, root / str(number))
        else:
            path.write_text(tokenizer_json(root / "a.tiktoken", rule, SPECIAL))
        tokenizer = Tokenizer(path)
        found[rule] = DocumentEncoder(tokenizer, np.dtype(np.uint16)), tokenizer
        assert tokenizer.vocabulary.cuts_at_spaces
    return found


def test_what_looks_over_spaces_is_not_parted(tmp_path, ranks):
    (tmp_path / "a.tiktoken").write_text(lines(ranks))
    described = json.loads(tokenizer_json(tmp_path / "a.tiktoken", "gpt2", SPECIAL))
    for changes in (
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"added_tokens": [{**described["added_tokens"][0], "lstrip": True}]},
        {"added_tokens": [{**described["added_tokens"][0], "content": "a b"}]},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**described, **changes}))
        assert not Tokenizer(tmp_path).vocabulary.cuts_at_spaces, changes


def tekken(ranks, **changes):
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    more = {"rank": len(ranks), "token_bytes": base64.b64encode(b"unused").decode(), "token_str": "unused"}
    config = {
        "pattern": PATTERNS["gpt2"],
        "num_vocab_tokens": len(ranks) + 1,
        "default_vocab_size": len(ranks) + 5,
        "default_num_special_tokens": 5,
    }
    return json.dumps({"config": config, "vocab": [*vocabulary, more], **changes})


def test_special_tokens_of_tekken_come_first(tmp_path, ranks):
    path, target = tmp_path / "tekken.json", tmp_path / "tokenizer.json"
    path.write_text(tekken(ranks, special_tokens=[{"rank": 1, "token_str": "<s>", "is_control": True}]))
    target.write_text(tokenizer_json(path, None, []))
    tokenizer = Tokenizer(target)
    assert tokenizer.vocab_size == len(ranks) + 5
    assert tokenizer.bos_id == 1
    assert tokenizer.id_to_token(4) == "<SPECIAL_4>"
    with pytest.raises(UserError, match=r"is a tekken.json: .*tools/convert_tokenizer.py"):
        Tokenizer(path)
    assert tokenizer.encode(MIXED[0]) == [5 + rank for rank in encoded(MIXED[0], ranks, "gpt2")]
    with pytest.raises(UserError, match=r"--special-tokens: .* names its own"):
        tokenizer_json(path, None, ["<s>"])
    path.write_text(tekken(ranks))
    with pytest.raises(UserError, match="does not name its 5 special tokens"):
        tokenizer_json(path, None, [])
    target.write_text(tokenizer_json(path, None, ["<unk>", "<s>", "</s>"]))
    assert Tokenizer(target).eod_id == 2


@pytest.mark.parametrize(
    ("content", "pattern", "special", "message"),
    [
        ("IQ== 0\n?? 1\n", "gpt2", [], "a:2 is no line of a tiktoken file"),
        ("IQ== 0\n", "gpt2", [], "it lacks 255 of the 256 bytes"),
        (None, None, [], "does not say how texts are cut: give --pattern, one of gpt2"),
        (None, "gpt2", ["e"], "--special-tokens e: a token of"),
        ("{}", "gpt2", [], "neither a tiktoken file nor a tekken.json"),
        ("", "gpt2", [], "is empty"),
        ("IQ== -1\n", "gpt2", [], "a:1 is no line of a tiktoken file"),
        ("IQ== 9999999999\n", "gpt2", [], "a:1 is no line of a tiktoken file"),
        ("IQ== 0\nIQ== 1\n", "gpt2", [], "a:2 has a token that an earlier line has"),
        ("IQ== 7\nIg== 7\n", "gpt2", [], "gives the rank 7 to more than one token"),
        (None, "llama", [], "--pattern llama is not known: write one of gpt2"),
        (None, "(", [], "makes no tokenizer with the rule"),
        (None, "gpt2", ["<s>", "<s>"], "one is empty or stands twice"),
        (None, "gpt2", [""], "one is empty or stands twice"),
        ("tekken", None, list("abcdef"), "has room for 5 special tokens, and none for f"),
        ("tekken with dust", None, ["<s>"], "neither a tiktoken file nor a tekken.json"),
    ],
)
def test_what_cannot_be_converted_is_told(tmp_path, ranks, content, pattern, special, message):
    made = {None: lines(ranks), "tekken": tekken(ranks)}
    made["tekken with dust"] = made["tekken"].replace('"token_bytes": "', '"token_bytes": "*')
    (tmp_path / "a").write_text(made.get(content, content))
    with pytest.raises(UserError, match=message):
        tokenizer_json(tmp_path / "a", pattern, special)
