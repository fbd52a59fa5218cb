"""Text of new tokens behind a prompt: the whole is decode(prompt + new) beyond decode(prompt), however it comes."""

import random
from pathlib import Path

import pytest
import sentencepiece

from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.inference.added_text import AddedText, added_text, find_stop, without_begun_stop

_TEXTS = ["The quick brown fox jumps over the lazy dog. Once upon a time there was a house by the sea."] * 20


@pytest.fixture(scope="module", params=["dummy prefix", "plain", "removes spaces"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama's are: with a space before each text, which decoding takes away; as ours; and one that trims spaces."""
    prefix = tmp_path_factory.mktemp("spm") / "t"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        pad_id=3,
        add_dummy_prefix=request.param != "plain",
        remove_extra_whitespaces=request.param == "removes spaces",
        normalization_rule_name="identity",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return Tokenizer(Path(f"{prefix}.model"))


def test_piece_by_piece_is_the_whole(tokenizer: Tokenizer) -> None:
    """Random tokens, of which most are bytes, spaces and control tokens; prompts may end within a character."""
    chance = random.Random(0)
    space, bytes_of = tokenizer.token_to_id("▁"), [tokenizer.token_to_id(f"<0x{b:02X}>") for b in "é€😀 ".encode()]
    for _ in range(600):
        ids = [
            chance.choice([chance.randrange(tokenizer.vocab_size), *bytes_of, *bytes_of, space, 1, 2])
            for _ in range(chance.randrange(1, 14))
        ]
        cut = chance.randrange(len(ids) + 1)
        before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
        start = len(before)
        while not whole.startswith(before[:start]):
            start -= 1
        pieces = AddedText(tokenizer.decode, ids[:cut])
        grown = ""
        for token in ids[cut:]:
            grown += pieces.add([token])
            assert whole[start:].startswith(grown), (ids, cut)
        assert grown == pieces.text
        grown += pieces.end()
        assert grown == pieces.text == whole[start:] == added_text(tokenizer.decode, ids[:cut], ids[cut:]), (ids, cut)
        assert pieces.end() == ""


def test_no_half_character_and_no_lost_space(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Once upon")
    new = tokenizer.encode("Once upon a 😀 time")[len(prompt) :]
    text = AddedText(tokenizer.decode, prompt)
    pieces = [text.add([token]) for token in new]
    assert "".join(pieces) == " a 😀 time"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces[0].startswith(" ")


def test_a_fork_goes_on_by_itself(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("Once upon a time 😀")
    cut = len(whole) - 2  # within the character
    above = AddedText(tokenizer.decode, whole[:3])
    above.add(whole[3:cut])
    children = [above.fork(), above.fork()]
    children[0].add(whole[cut:])
    children[1].add(tokenizer.encode("sea"))
    assert tokenizer.decode(whole[:3]) + above.text + children[0].text == "Once upon a time 😀"
    assert children[1].text.count("\N{REPLACEMENT CHARACTER}") == 2
    assert children[1].text.endswith("sea")


def test_a_long_prompt_is_decoded_a_few_times_only() -> None:
    lengths = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return "".join(map(chr, ids))

    text = AddedText(decode, [97] * 1000)
    for _ in range(50):
        text.add([98])
    assert text.text == "b" * 50
    assert sum(length >= 1000 for length in lengths) == 2
    assert max(lengths[4:]) < 4


@pytest.mark.parametrize(
    ("text", "stops", "start", "found"),
    [
        (" the end", [" the"], 0, " the"),
        ("a b c", ["c", "b"], 0, "b"),
        ("ab", ["b", "ab"], 1, "ab"),
        ("aab", ["aa"], 2, None),
        ("", ["x"], 0, None),
        ("x", [], 0, None),
    ],
)
def test_the_first_stop_in_the_text(text: str, stops: list[str], start: int, found: str | None) -> None:
    assert find_stop(text, stops, start) == found


def test_what_may_become_a_stop_is_held_back() -> None:
    assert without_begun_stop("one tw", ["two", "x"]) == "one "
    assert without_begun_stop("one two", ["oo"]) == "one tw"
    assert without_begun_stop("aaa", ["aab", "ab"]) == "a"
    assert without_begun_stop("text", []) == "text"
