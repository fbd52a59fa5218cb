"""What of an answer depends on the tokenizer, without a server."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette")

from tests.data.test_tokenizer_kinds import byte_level
from vishwamai_mp.config import UserError
from vishwamai_mp.inference import ContextLengthError
from vishwamai_mp.opening.prompts import PromptTokenizer
from vishwamai_mp.serving.answers import chat_chunks, chat_job, completion_jobs, whole
from vishwamai_mp.serving.app import _refuse
from vishwamai_mp.serving.limits import Limits, Refusal
from vishwamai_mp.serving.requests import ChatRequest, CompletionRequest, parse
from vishwamai_mp.serving.service import Piece


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return PromptTokenizer(folder, 512)


def test_the_bytes_of_tokens_make_up_characters_that_no_token_has_alone(prompts: PromptTokenizer) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1}
    request = parse(ChatRequest, json.dumps(body).encode(), Limits())
    tokens = prompts.tokenizer.encode("😀")
    assert len(tokens) > 1

    async def complete(_: Any) -> Any:
        yield Piece(0, "😀", tokens, [(-1.0, [(token, -1.0)]) for token in tokens], "length")

    service: Any = SimpleNamespace(prompts=prompts, complete=complete)
    answer = asyncio.run(whole(chat_chunks(request, service, "tiny", chat_job(request, prompts))))
    scored = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in scored) == "😀".encode()
    assert b"".join(bytes(one["top_logprobs"][0]["bytes"]) for one in scored) == "😀".encode()


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("token", [-1, 500, 2**70])  # 500: a row of the model that no text leads to
def test_an_id_that_no_text_has_is_the_prompts_fault(prompts: PromptTokenizer, token: int, echo: bool) -> None:
    request = parse(CompletionRequest, json.dumps({"prompt": [[5], [5, token]], "echo": echo}).encode(), Limits())
    with pytest.raises(Refusal, match=f"prompt: token id {token} is outside the vocabulary of tokenizer.json") as found:
        completion_jobs(request, prompts, Limits())
    assert found.value.parameter == "prompt"


def test_a_chats_prompt_is_its_messages_and_a_field_of_that_name_is_not(tmp_path: Path) -> None:
    def parameter(error: Exception) -> str:
        request: Any = SimpleNamespace(url=SimpleNamespace(path="/v1/chat/completions"))
        answer = asyncio.run(_refuse(request, error))
        return json.loads(bytes(answer.body))["error"]["param"]

    assert parameter(ContextLengthError("the prompt has 5 tokens, the model's context 4")) == "messages"
    assert parameter(UserError("the prompt has no tokens")) == "messages"
    assert parameter(Refusal("prompt: is not known here; leave it out", "prompt")) == "prompt"
