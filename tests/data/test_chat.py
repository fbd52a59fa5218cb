"""Conversations: what JSON is one, and the tokens and marks that it becomes with several kinds of vocabulary."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from vishwamai_mp.config import UserError
from vishwamai_mp.data.chat import ChatEncoder, Turn, UnusableRecord, conversation
from vishwamai_mp.data.marks import BEGINS, LEARNT
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXTS = [f"What is {i} plus {j}? It is {i + j}, said the User to the System.\n" for i in range(30) for j in range(9)]
HEADINGS = ("<|system|>", "<|user|>", "<|assistant|>")
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 plus 3?"},
        {"role": "assistant", "content": "It is 5."},
        {"role": "user", "content": "And plus 4?"},
        {"role": "assistant", "content": "9"},
        {"role": "user", "content": "Thanks."},
    ]
}
ANSWER = {"role": "assistant", "content": "y"}
WRITTEN = (
    "### System:\nBe brief.\n\n### User:\nWhat is 2 plus 3?\n\n### Assistant:\nIt is 5.|### User:\nAnd plus 4?\n\n"
)
WRITTEN += "### Assistant:\n9|"


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Ours; one that puts a space before every text, as Llama's does; one with pieces for headings; one with neither
    bytes nor line breaks."""
    folder = tmp_path_factory.mktemp("vocabularies")
    made = {"ours": train_tokenizer(TEXTS, 400, folder / "ours")}
    common: dict[str, Any] = {
        "vocab_size": 400,
        "model_type": "bpe",
        "minloglevel": 2,
        "pad_id": 3,
        "hard_vocab_limit": False,
    }
    kinds: dict[str, dict[str, Any]] = {
        "spaced": {
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": True,
        },
        "headed": {"byte_fallback": True, "control_symbols": list(HEADINGS)},
        "narrow": {"vocab_size": 120, "normalization_rule_name": "nmt_nfkc"},
    }
    for name, options in kinds.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=model, **{**common, **options}
        )
        (folder / f"{name}.model").write_bytes(model.getvalue())
        made[name] = Tokenizer(folder / f"{name}.model")
    return made


def learnt_runs(tokenizer, ids, marks):
    """The texts that are learnt, each with whether it ends with the end-of-document token."""
    runs, run = [], []
    for token, mark in zip(ids, marks, strict=True):
        if mark & LEARNT:
            run.append(token)
            if token == tokenizer.eod_id:
                runs.append((tokenizer.decode(run), True))
                run = []
    return runs + ([(tokenizer.decode(run), False)] if run else [])


@pytest.mark.parametrize("kind", ["ours", "spaced", "headed", "narrow"])
def test_answers_and_their_ends_are_learnt_and_nothing_else(vocabularies, kind):
    tokenizer = vocabularies[kind]
    ids, marks = ChatEncoder(tokenizer).encode(conversation(TALK))
    assert learnt_runs(tokenizer, ids, marks) == [("It is 5.", True), ("9", True)]
    assert [mark & BEGINS for mark in marks] == [BEGINS] + [0] * (len(marks) - 1)
    assert set(ids) <= set(range(tokenizer.vocab_size))


@pytest.mark.parametrize("kind", ["ours", "spaced"])
def test_the_template_is_what_the_documentation_says(vocabularies, kind):
    tokenizer = vocabularies[kind]
    ids, _ = ChatEncoder(tokenizer).encode(conversation(TALK))
    parts: list[str] = []
    part: list[int] = []
    for token in ids:
        if token == tokenizer.eod_id:
            parts.append(tokenizer.decode(part))
            part = []
        else:
            part.append(token)
    assert "|".join([*parts, ""]) == WRITTEN
    assert part == []


def test_the_template_for_hugging_face_is_the_same(vocabularies):
    """Of `convert_checkpoint.py to-hf --chat-template`, rendered as transformers does."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((_EXAMPLES / "finetuning/chat_template.jinja").read_text())
    messages = TALK["messages"]
    assert template.render(messages=messages[:-1], eos_token="|") == WRITTEN
    asked = template.render(messages=messages[1:2], eos_token="|", add_generation_prompt=True)
    tokenizer = vocabularies["ours"]
    assert tokenizer.encode(asked) == ChatEncoder(tokenizer).prompt([Turn("user", messages[1]["content"])])


def test_headings_of_the_vocabulary_are_used(vocabularies):
    tokenizer = vocabularies["headed"]
    ids, _ = ChatEncoder(tokenizer).encode(conversation(TALK))
    assert [tokenizer.id_to_token(i) for i in ids if tokenizer.id_to_token(i) in HEADINGS] == [
        "<|system|>", "<|user|>", "<|assistant|>", "<|user|>", "<|assistant|>",
    ]  # fmt: skip
    assert "Assistant" not in tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["ours", "spaced"])
def test_a_first_answer_is_tokens_that_continue_the_prompt_as_typed(vocabularies, kind):
    """The prompt's text alone, as a user types it at inference, gives the tokens that the answer was learnt after."""
    tokenizer = vocabularies[kind]
    turns = [Turn("user", "What is 2 plus 3?")]
    typed = tokenizer.encode("### User:\nWhat is 2 plus 3?\n\n### Assistant:\n")
    chat = ChatEncoder(tokenizer)
    assert chat.prompt(turns) == typed
    ids, _ = chat.encode([*turns, Turn("assistant", "It is 5.", learnt=True)])
    assert ids[: len(typed)] == typed
    assert tokenizer.decode(ids) == "### User:\nWhat is 2 plus 3?\n\n### Assistant:\nIt is 5."


def test_other_records_and_the_beginning_of_a_sequence(vocabularies):
    tokenizer = vocabularies["ours"]
    shared = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    asked = {"question": "Hi", "answer": "Ho"}
    chat = ChatEncoder(tokenizer, begin=True)
    assert chat.encode(conversation(shared)) == chat.encode(conversation(asked))
    ids, marks = chat.encode(conversation(asked))
    assert (ids[0], marks[:2]) == (tokenizer.bos_id, [BEGINS, 0])
    plain, marks = ChatEncoder(tokenizer).encode(conversation({"prompt": "2 plus 3", "completion": " is 5"}))
    assert plain == [*tokenizer.encode("2 plus 3"), *tokenizer.encode(" is 5"), tokenizer.eod_id]
    assert learnt_runs(tokenizer, plain, marks) == [(" is 5", True)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "not a JSON object"),
        ({"text": "x"}, "keys: 'text'"),
        ({"question": "x", "answer": 3}, "'answer' is number, not a string"),
        ({"question": "x\0", "answer": "y"}, "NUL"),
        ({"messages": "x"}, "'messages' is no array"),
        ({"messages": [{"role": "user"}]}, "message 1 is no object with 'role' and 'content'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'role'='tool'; known: human"),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no answer"),
        ({"messages": [ANSWER | {"weight": 0}]}, "has no answer to learn"),
        (
            {"messages": [ANSWER | {"tool_calls": [{"id": "1"}]}]},
            "message 1 has 'tool_calls'.*--ignore-keys tool_calls",
        ),
        ({"messages": [ANSWER | {"content": None, "tool_calls": [{}]}]}, "message 1 has 'tool_calls'"),
        ({"messages": [ANSWER], "tools": [{"name": "f"}]}, "the record has 'tools'.*--ignore-keys tools"),
        ({"messages": [ANSWER], "conversations": [{"from": "gpt", "value": "y"}]}, "the record has 'conversations'"),
        ({"question": "x", "answer": "y", "system": "Be brief."}, "the record has 'system'"),
        ({"prompt": "x", "completion": "y", "weight": 0}, "the record has 'weight'"),
        ({"messages": [ANSWER | {"weight": 0.5}]}, "'weight'=0.5; use true or 1, false or 0"),
        ({"messages": [ANSWER | {"loss": "no"}]}, "'loss'='no'; use true"),
        (
            {"messages": [{"role": "user", "content": "x", "train": True}, ANSWER]},
            "message 1 has 'train'=True, but only",
        ),
        ({"messages": [ANSWER | {"weight": 1, "loss": False}]}, "marks that disagree: weight=1, loss=False"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "'value' is null, not a string"),
    ],
)
def test_what_is_no_conversation(record, reason):
    with pytest.raises(UnusableRecord, match=reason):
        conversation(record)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": 0.0}, {"trainable": False, "weight": 0}])
def test_an_answer_marked_so_is_context_without_loss(vocabularies, mark):
    tokenizer = vocabularies["ours"]
    messages: list[dict[str, Any]] = [dict(message) for message in TALK["messages"]]
    messages[2] |= mark
    messages[4] |= {"weight": 1, "train": True, "loss": None}
    chat = ChatEncoder(tokenizer)
    ids, marks = chat.encode(conversation({"messages": messages}))
    assert ids == chat.encode(conversation(TALK))[0]
    assert learnt_runs(tokenizer, ids, marks) == [("9", True)]


def test_keys_that_say_nothing_or_are_ignored():
    messages = [{"role": "user", "content": "x", "name": "Ann"}, ANSWER | {"tool_calls": None, "refusal": ""}]
    record = {"messages": messages, "id": 7, "tools": []}
    with pytest.raises(UnusableRecord, match="the record has 'id'"):
        conversation(record)
    with pytest.raises(UnusableRecord, match="message 1 has 'name'"):
        conversation(record, ["id"])
    expected = conversation({"messages": [{"role": "user", "content": "x"}, ANSWER]})
    assert conversation(record, ["id", "name"]) == expected


def test_a_vocabulary_without_an_end_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, eos_id=-1, bos_id=-1, minloglevel=2
    )
    (tmp_path / "endless.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="no end-of-document token"):
        ChatEncoder(Tokenizer(tmp_path / "endless.model"))
