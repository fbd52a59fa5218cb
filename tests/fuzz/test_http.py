"""Damaged bodies of requests: answered, or refused as OpenAI's clients read it; the server never fails by them."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette")

from tests.fuzz.mutations import damaged, fuzzed, limited
from vishwamai_mp.config import TreeConfig
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.inference.generation import check_prompt
from vishwamai_mp.opening.prompts import PromptTokenizer
from vishwamai_mp.serving.app import build_app
from vishwamai_mp.serving.limits import Limits
from vishwamai_mp.serving.service import Job, Piece, Service

TEMPLATE = "{% for m in messages %}<{{ m.role | trim }}>{{ m.content[:90] + '\n' }}{% endfor %}"
BODIES = {
    "/v1/completions": {
        "prompt": ["one", "two"],
        "max_tokens": 3,
        "n": 1,
        "best_of": 2,
        "echo": True,
        "logprobs": 2,
        "stop": ["a"],
        "temperature": 0.5,
        "seed": 4,
        "top_p": 0.9,
        "user": "me",
        "logit_bias": {},
        "model": "tiny",
    },
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 3,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
}


class Parrot:
    """A service that says what it was asked."""

    def __init__(self, prompts: PromptTokenizer) -> None:
        self.prompts, self.limits, self.tree = prompts, Limits(), TreeConfig()

    async def complete(self, jobs: Sequence[Job]) -> AsyncIterator[Piece]:
        for job in jobs:
            check_prompt(job.prompt, 384, 512)
        for index, job in enumerate(jobs):
            tokens = job.prompt[:2]
            scores = [(-1.0, [(token, -1.0)]) for token in tokens]
            asked = job.options is not None and job.options.log_probs
            told = None if job.scores is None else [(-1.0, [(1, -1.0)]) for _ in job.prompt[1:]]
            yield Piece(index, self.prompts.decode(tokens), tokens, scores if asked else [], "length", told)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("served")
    path: Path = train_tokenizer(["one two three"] * 9, 370, folder / "small").path
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    service = Parrot(PromptTokenizer(path, 384))
    return build_app(cast(Service, service), "tiny")


async def _ask(app: Any, address: str, body: bytes) -> tuple[int, bytes]:
    """As a web server calls an application (ASGI)."""
    head = {"type": "http", "http_version": "1.1", "method": "POST", "path": address, "raw_path": address.encode()}
    scope = {**head, "query_string": b"", "headers": [], "asgi": {"version": "3.0"}, "scheme": "http", "root_path": ""}
    asked, answered = False, asyncio.Event()
    status, found = 0, bytearray()

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        found.extend(message.get("body", b""))
        if message["type"] == "http.response.body" and not message.get("more_body"):
            answered.set()

    await app(scope, receive, send)
    return status, bytes(found)


def ask(app: Any, address: str, body: bytes) -> None:
    """Raises `AssertionError` where the answer is neither one nor a refusal."""
    with limited():
        status, found = asyncio.run(_ask(app, address, body))
    if status == 200 and found.startswith(b"data: "):
        *chunks, last = (part.removeprefix("data: ") for part in found.decode().strip().split("\n\n"))
        assert last == "[DONE]"
        assert all("choices" in json.loads(chunk) for chunk in chunks)
        return
    answer = json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    if status == 200:
        assert answer["choices"]
        return
    assert status in (400, 404), (status, answer)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize("address", BODIES)
@fuzzed
@given(data=st.data())
def test_damaged_bodies(app: Any, address: str, data: st.DataObject) -> None:
    ask(app, address, data.draw(damaged(json.dumps(BODIES[address]).encode())))


FIELDS = [
    *("prompt", "messages", "max_tokens", "max_completion_tokens", "n", "best_of", "echo", "logprobs", "top_logprobs"),
    *("stop", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stream", "stream_options"),
    *(
        "model",
        "user",
        "tools",
        "tool_choice",
        "response_format",
        "logit_bias",
        "frequency_penalty",
        "suffix",
        "\ud800",
    ),
]
WORDS = [
    "",
    "a",
    "\ud800",
    "\0",
    "\u2028",
    "user",
    "tiny",
    "system",
    "text",
    "x" * 3000,
    "<",
    "type",
    "role",
    "content",
]
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, -1, 99, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")]),
    st.sampled_from(WORDS),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)),
    max_leaves=8,
)


@pytest.mark.parametrize("address", BODIES)
@fuzzed
@given(given=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), left_out=st.sampled_from(["", *FIELDS]))
def test_strange_fields(app: Any, address: str, given: dict[str, Any], left_out: str) -> None:
    body = {**BODIES[address], **given}
    body.pop(left_out, None)
    ask(app, address, json.dumps(body).encode())


@pytest.mark.parametrize("address", BODIES)
@pytest.mark.parametrize(
    "whole", [b"{" + b'"a":[' * 900 + b"]" * 900 + b"}", b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}"]
)
def test_deep_bodies(app: Any, address: str, whole: bytes) -> None:
    ask(app, address, whole)
