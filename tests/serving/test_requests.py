"""Requests field by field, without a server."""

import json
import re
from typing import Any

import pytest

pytest.importorskip("starlette")

from vishwamai_mp.config import UserError
from vishwamai_mp.serving.limits import Limits, Refusal, refusal_of
from vishwamai_mp.serving.requests import ChatRequest, CompletionRequest, messages_of, parse, prompts_of

_LIMITS = Limits()


def completion(**body: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "x", **body}).encode(), _LIMITS)


def chat(**body: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": [{"role": "user", "content": "x"}], **body}).encode(), _LIMITS)


def test_null_is_as_if_left_out() -> None:
    names = [*CompletionRequest.model_fields.keys() - {"prompt"}, "suffix", "logit_bias", "user", "frequency_penalty"]
    assert completion(**dict.fromkeys(names)) == completion()
    assert (
        chat(**dict.fromkeys([*ChatRequest.model_fields.keys() - {"messages"}, "tools", "response_format"])) == chat()
    )


@pytest.mark.parametrize(
    "body",
    [
        {"n": 1, "best_of": 1, "echo": False, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0},
        {"user": "u", "metadata": {"a": "b"}, "suffix": "", "top_p": 1, "stop": []},
        {"top_k": -1, "min_p": 0.0},
        {"top_k": 0, "min_p": 0, "max_tokens": 5.0, "seed": 1.0, "temperature": 1},
        {"strategy": "tree", "n": 1, "best_of": 1, "echo": False, "user": "u"},
    ],
)
def test_values_that_change_nothing_are_taken(body: dict[str, Any]) -> None:
    completion(**body)


def test_neutral_fields_of_chats_are_taken() -> None:
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, store=False, service_tier="auto")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"suffix": "end"}, "suffix"),
        ({"colour": "blue"}, "colour"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"colour": 1}}, "stream_options"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"top_k": False}, "top_k"),
        ({"top_p": 7, "temperature": 0}, "top_p"),  # greedy texts have no use for it, but it is no share
        ({"top_k": -5, "temperature": 0}, "top_k"),
        ({"min_p": 2, "temperature": 0}, "min_p"),
        ({"stream": "false"}, "stream"),
        ({"echo": 1}, "echo"),
        ({"seed": -1}, "seed"),
        ({"strategy": "tree", "n": 2}, "n"),
        ({"strategy": "tree", "temperature": 0.5}, "temperature"),
        ({"beam_width": 2}, "beam_width"),
        ({"strategy": "guess"}, "strategy"),
    ],
)
def test_others_are_refused_by_name(body: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal) as refused:
        completion(**body)
    assert refused.value.parameter == field
    assert str(refused.value).startswith(field)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt": "x"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_chats_likewise(body: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal) as refused:
        chat(**body)
    assert refused.value.parameter == field


@pytest.mark.parametrize("raw", [b"{oops", b"[1]", b"", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object(raw: bytes) -> None:
    with pytest.raises(Refusal, match="the request is not"):
        parse(CompletionRequest, raw, _LIMITS)


@pytest.mark.parametrize(
    ("raw", "key", "field"),
    [
        (b'{"prompt": "x", "seed": 1, "seed": 2}', "seed", "seed"),
        (b'{"prompt": "x", "metadata": {"a": 1, "a": 1}}', "a", "a"),
        (b'{"\\ud800": 1, "\\ud800": 2}', r"\ud800", None),
    ],
)
def test_a_key_that_stands_twice(raw: bytes, key: str, field: str | None) -> None:
    with pytest.raises(Refusal, match=f"the key '{re.escape(key)}' stands twice") as refused:
        parse(CompletionRequest, raw, _LIMITS)
    assert refused.value.parameter == field


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_prompts(prompt: Any, found: list[Any]) -> None:
    assert prompts_of(completion(prompt=prompt), _LIMITS) == found


@pytest.mark.parametrize("prompt", [[], [[]], 5, [1.5], [True], {"a": 1}, ["a", 1], ["x"] * 65])
def test_what_is_no_prompt(prompt: Any) -> None:
    with pytest.raises(Refusal, match="prompt") as refused:
        prompts_of(completion(prompt=prompt), _LIMITS)
    assert refused.value.parameter == "prompt"


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [
        {"role": "system", "content": "s", "name": None},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "c", "tool_calls": [], "refusal": None},
    ]
    assert messages_of(chat(messages=given)) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "x"}, "messages.0.role"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content: is missing"),
        ({"role": "system"}, "messages.0.content: is missing"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages.0.tool_calls"),
    ],
)
def test_what_is_no_message(message: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        messages_of(chat(messages=[message]))
    with pytest.raises(Refusal, match="messages: is empty"):
        messages_of(chat(messages=[]))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("messages.3: the chat template leaves this message out", "messages"),
        ("messages: the chat template does not take them", "messages"),
        ("top_p=2.0: use a number up to 1", "top_p"),
        ("the prompt is empty; give at least one token", "prompt"),
        ("the model has no chat template", None),
    ],
)
def test_what_is_refused_behind_the_request_names_its_field(message: str, field: str | None) -> None:
    assert refusal_of(UserError(message)).parameter == field


def test_a_stop_text_of_another_kind_is_named_without_the_names_of_types() -> None:
    with pytest.raises(Refusal, match=r"^stop: input should be a valid string"):
        completion(stop=5)
