"""What is served of one model beside another or of earlier texts: adapters, beginnings that are kept, a draft model."""

import json
from typing import Any

import pytest

from tests.serving.served import PROMPT, events, in_parallel, post, send, server
from tests.workers import WorkerPool

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


def served_adapters() -> tuple[list[str], list[int], list[int]]:
    """Runs in a worker: what a model with adapters answers over HTTP, and what its full passes say, and the base's."""
    import torch

    from tests.inference.test_one_pass import adapted, full_pass
    from vishwamai_mp.model.lora import Adapter

    ours = adapted("lora.enabled=true", "lora.rank=4")
    prompt = list(PROMPT.encode())

    def greedy() -> list[int]:
        text = list(prompt)
        for _ in range(9):
            text.append(int(full_pass(ours, text)[-1].argmax()))
        return text[len(prompt) :]

    expected = greedy()
    with server(ours) as (_, port):
        answers = [json.loads(post(port, prompt=PROMPT, max_tokens=9, temperature=0)[1]) for _ in range(2)]
    for part in ours.engine.model.modules():
        if isinstance(part, Adapter):
            torch.nn.init.zeros_(part.b)
    return [answer["choices"][0]["text"] for answer in answers], expected, greedy()


def test_adapters_are_served(workers: WorkerPool) -> None:
    (answers, expected, base) = workers.run(served_adapters, 1)[0]
    assert answers == ["".join(chr(97 + token % 26) for token in expected)] * 2
    assert expected != base


def cached_tokens(answer: str) -> int:
    return json.loads(answer)["usage"]["prompt_tokens_details"]["cached_tokens"]


def asked_again() -> dict[str, Any]:
    """Runs in a worker: requests that begin as earlier ones did, over HTTP."""
    from tests.inference.test_one_pass import adapted
    from vishwamai_mp.inference import Generator

    first = adapted("lora.enabled=true", "lora.rank=4")
    engine = first.engine
    ours = Generator(engine.config, engine.runtime, engine.model, decode=first.decode, reuse_tokens=None)
    long = "x".join(PROMPT)  # 31 tokens, of which one block of 16 can be begun with
    body: dict[str, Any] = {"prompt": long, "max_tokens": 9, "temperature": 0, "logprobs": 1}
    talk: dict[str, Any] = {"messages": [{"role": "user", "content": long}], "max_tokens": 4, "n": 2, "seed": 5}
    with server(ours) as (_, port):
        found: dict[str, Any] = {
            "texts": [post(port, **body)[1] for _ in range(2)],
            "streamed": events(post(port, **body, stream=True, stream_options={"include_usage": True})[1])[-1]["usage"],
            "two prompts": post(port, prompt=[long, "a" * 40], n=2, max_tokens=2)[1],
            "best": post(port, prompt="b" * 40, best_of=3, max_tokens=2)[1],
            "chats": [send(port, json.dumps(talk), "/v1/chat/completions")[1] for _ in range(2)],
        }
    with server(first) as (_, port):  # keeps nothing
        found["read"] = [post(port, **body)[1] for _ in range(2)]
    return found


def test_usage_tells_what_was_not_read_again(workers: WorkerPool) -> None:
    found = workers.run(asked_again, 1)[0]
    assert [cached_tokens(answer) for answer in found["texts"]] == [0, 16]
    assert found["streamed"]["prompt_tokens_details"] == {"cached_tokens": 16}
    assert cached_tokens(found["two prompts"]) == 16  # the second was new to the first of its texts
    assert cached_tokens(found["best"]) == 0
    assert [cached_tokens(answer) for answer in found["chats"]] == [0, 32]
    assert [cached_tokens(answer) for answer in found["read"]] == [0, 0]
    choices = [json.loads(answer)["choices"][0] for answer in (*found["texts"], *found["read"])]
    assert len({choice["text"] for choice in choices}) == 1
    scores = [choice["logprobs"]["token_logprobs"] for choice in choices]
    assert all(each == pytest.approx(scores[0], abs=1e-5) for each in scores)
    chats = [[choice["message"]["content"] for choice in json.loads(answer)["choices"]] for answer in found["chats"]]
    assert chats[0] == chats[1]


def served_with_a_draft_model() -> tuple[list[str], int]:
    """Runs in a worker: four clients' sampled answers without and with a draft model, and what it read."""
    from tests.inference.test_draft_model import again, drafted
    from tests.inference.test_one_pass import adapted

    first = adapted()
    engine = drafted(first, ["model.num_layers=2"])
    body: dict[str, Any] = {"max_tokens": 9, "temperature": 0.8, "seed": 4}
    answers = []
    for ours in (first, again(first, speculate=4, draft=engine, reuse_tokens=None)):
        with server(ours) as (_, port):
            answers += in_parallel(port, {**body, "prompt": "x".join(PROMPT)})
    assert engine.pool.used_blocks == 0
    return answers, engine.computed_tokens


def test_a_draft_model_guesses_for_all_clients(workers: WorkerPool) -> None:
    answers, guessed = workers.run(served_with_a_draft_model, 1)[0]
    assert len(set(answers)) == 1
    assert guessed > 4 * 31
