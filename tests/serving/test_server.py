"""The endpoint over real HTTP: a server on a thread in a worker, and Python's own client and OpenAI's."""

import http.client
import io
import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.browser import browser_window, why_no_browser
from tests.serving.served import PROMPT, Letters, events, in_parallel, post, send, server
from tests.workers import WorkerPool

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


def to_a_web_socket(port: int, text: str) -> tuple[int, str]:
    """Runs in a worker: the answer, of which the server warns nobody."""
    log, output = logging.getLogger("uvicorn.error"), io.StringIO()
    level, handler = log.level, logging.StreamHandler(output)
    log.setLevel(logging.WARNING)
    log.addHandler(handler)
    try:
        log.warning("a warning of another kind")
        status, answer = send(port, text, Connection="Upgrade", Upgrade="websocket")
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert output.getvalue() == "a warning of another kind\n"
    return status, answer


def conversation() -> dict[str, Any]:
    """Runs in a worker."""
    from vishwamai_mp.inference import SamplingOptions

    with server() as (service, port):
        generator = service.generator
        (expected,) = generator.generate([service.prompts.encode(PROMPT)], SamplingOptions(9, 0.8, seed=4))
        body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0.8, "seed": 4}
        found = {
            "expected": generator.text(expected),
            "whole": post(port, **body),
            "stream": post(port, **body, stream=True),
            "stopped": post(port, **body, stop=generator.text(expected)[3:5]),
            "tree": post(port, prompt=PROMPT, strategy="tree", stream=True),
            "tree whole": post(port, prompt=PROMPT, strategy="tree"),
            "bad": [
                post(port, prompt=""),
                post(port, prompt="x" * 64),
                post(port, prompt="x", top_p=2.0, stream=True),
                post(port, prompt="x", colour="blue"),
                post(port, prompt="x", max_tokens=0),
                post(port),
                post(port, prompt="x", strategy="tree", top_p=0.5),
                post(port, prompt="x", beam_width=2),
                send(port, "{oops"),
            ],
            "at the door": [
                send(port, json.dumps(body), Host="other.example"),
                send(port, json.dumps(body), Origin="http://other.example"),
                send(port, json.dumps(body), **{"Content-Type": "text/plain"}),
            ],
            "to a WebSocket": to_a_web_socket(port, json.dumps(body)),
            "by another name": send(port, json.dumps(body), Host="models.example"),
            "parallel": in_parallel(port, body),
        }
        # A client that leaves in the middle of its stream: 60 slow tokens take longer than it takes to notice.
        step, submit, submitted = generator.step, generator.submit, []

        def slow_step() -> None:
            time.sleep(0.1)
            step()

        def noted_submit(*request: Any) -> Any:
            submitted.append(submit(*request))
            return submitted[-1]

        generator.step, generator.submit = slow_step, noted_submit
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps({"prompt": "a", "max_tokens": 60, "stream": True}),
            {"content-type": "application/json"},
        )
        response = connection.getresponse()
        response.read(1)
        response.close()  # it shares the socket, which stays open for as long as one of them is
        connection.close()
        deadline = time.monotonic() + 20
        while (generator.busy or generator.engine.pool.used_blocks) and time.monotonic() < deadline:
            time.sleep(0.02)
        found["blocks"] = generator.engine.pool.used_blocks
        found["left"] = [completion.finish for completion in submitted]
        return found


def test_the_endpoint(workers: WorkerPool) -> None:
    found = workers.run(conversation, 1)[0]
    expected = found["expected"]
    status, text = found["whole"]
    assert status == 200
    whole = json.loads(text)
    assert whole["choices"][0] == {"text": expected, "index": 0, "logprobs": None, "finish_reason": "length"}
    usage = {"prompt_tokens": 16, "completion_tokens": 9, "total_tokens": 25}
    assert whole["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    pieces = events(found["stream"][1])
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected
    assert len(pieces) == 9
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    stopped = json.loads(found["stopped"][1])["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == expected[: expected.index(expected[3:5])]
    assert found["parallel"] == [expected] * 4
    assert [status for status, _ in found["at the door"]] == [403, 403, 415]
    assert {json.loads(text)["error"]["type"] for _, text in found["at the door"]} == {"invalid_request_error"}
    for name in ("to a WebSocket", "by another name"):
        assert json.loads(found[name][1])["choices"] == whole["choices"]
    grown = events(found["tree"][1])
    sizes = [len(event["tree"]["nodes"]) for event in grown]
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 3
    assert all(event["svg"].startswith("<svg") for event in grown)
    assert len(grown[-1]["choices"][0]["text"]) == grown[-1]["tree"]["answer_tokens"]
    whole_tree = json.loads(found["tree whole"][1])
    assert (whole_tree["choices"], whole_tree["tree"]) == (grown[-1]["choices"], grown[-1]["tree"])
    assert whole_tree["usage"]["completion_tokens"] == whole_tree["tree"]["generated_tokens"]
    assert {status for status, _ in found["bad"]} == {400}
    errors = [json.loads(text)["error"] for _, text in found["bad"]]
    assert {error["type"] for error in errors} == {"invalid_request_error"}
    messages = [error["message"] for error in errors]
    assert messages[0] == "the prompt is empty; give at least one token"
    assert messages[2] == "top_p: input should be less than or equal to 1"
    assert messages[-1].startswith("the request is not JSON: ")
    assert messages[3:-1] == [
        "colour: is not known here; leave it out",
        "max_tokens: input should be greater than or equal to 1, or echo true",
        "prompt: field required",
        "top_p has no effect on strategy tree; leave it out",
        "beam_width has no effect on strategy sample; leave it out",
    ]
    fields = ["prompt", "prompt", "top_p", "colour", "max_tokens", "prompt", "top_p", "beam_width", None]
    assert [error["param"] for error in errors] == fields
    assert found["left"] == ["cancelled"]
    assert found["blocks"] == 0


def by_openais_client() -> dict[str, Any]:
    """Runs in a worker: what the official client makes of the server."""
    import openai

    with server() as (service, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        base: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "seed": 4}
        chat: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 3}

        def text(**more: Any) -> Any:
            return client.completions.create(**{**base, **more})

        def refused(call: Callable[[], Any]) -> tuple[int, str | None]:
            try:
                call()
            except openai.APIStatusError as error:
                return error.status_code, error.param
            return 200, None

        def streamed(create: Any, **body: Any) -> list[Any]:
            return list(create(**body, stream=True, stream_options={"include_usage": True}))

        plain = text().choices[0].text
        return {
            "plain": text(),
            "again": text(prompt=service.prompts.encode(PROMPT)),
            "several": text(prompt=[PROMPT, "other"], n=2),
            "lists": text(prompt=[service.prompts.encode(PROMPT), service.prompts.encode("other")]),
            "stream": streamed(client.completions.create, **base, n=2),
            "best": text(best_of=4, logprobs=0),
            "all four": text(n=4, logprobs=0),
            "logprobs": text(logprobs=2, temperature=0),
            "stopped": [text(stop=stop).choices[0] for stop in (plain[2:4], [plain[2:4], "never"], ["never"], [])],
            "echo": text(echo=True, logprobs=1, max_tokens=2),
            "scored": text(echo=True, logprobs=1, max_tokens=0),
            "chat": client.chat.completions.create(**chat, max_tokens=5, logprobs=True, top_logprobs=2),
            "chat stream": streamed(client.chat.completions.create, **chat, max_completion_tokens=5, n=2),
            "models": [model.id for model in client.models.list()],
            "model": client.models.retrieve("tiny").id,
            "expected": service.generator.score([service.prompts.encode(PROMPT)])[0],
            "refused": [
                refused(lambda: text(model="other")),
                refused(lambda: client.models.retrieve("other")),
                refused(lambda: text(frequency_penalty=0.5)),
                refused(lambda: text(n=99)),
                refused(lambda: text(prompt=["x"] * 99)),
                refused(lambda: text(n=3, best_of=2)),
                refused(lambda: client.chat.completions.create(**chat, tools=[{"type": "function"}])),  # type: ignore
                refused(lambda: client.embeddings.create(model="tiny", input="x")),
            ],
        }


def by_langchain() -> dict[str, Any]:
    """Runs in a worker: the same server as LangChain's models of OpenAI."""
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI

    with server() as (_, port):
        common: dict[str, Any] = {"model": "tiny", "base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none"}
        common |= {"seed": 4, "max_retries": 0}
        texts = OpenAI(**common, max_tokens=6)
        talk = ChatOpenAI(**common, max_tokens=5, stream_usage=True, logprobs=True, top_logprobs=2)  # type: ignore
        messages = [SystemMessage("be brief"), HumanMessage("hi")]
        plain = texts.invoke(PROMPT)
        return {
            "text": plain,
            "stream": "".join(texts.stream(PROMPT)),
            "stopped": texts.invoke(PROMPT, stop=[plain[2:4]]),
            "several": texts.generate([PROMPT, "other"]),
            "two": OpenAI(**common, max_tokens=6, n=2, best_of=3).generate([PROMPT]),
            "answer": talk.invoke(messages),
            "answer stream": list(talk.stream(messages)),
            "answers": talk.batch([messages, "hi"]),
        }


def test_langchain(workers: WorkerPool) -> None:
    pytest.importorskip("langchain_openai")
    found = workers.run(by_langchain, 1)[0]
    assert len(found["text"]) == 6
    assert found["stream"] == found["text"]
    assert found["stopped"] == found["text"][: len(found["stopped"])]
    assert len(found["stopped"]) <= 2
    assert [len(one) for one in found["several"].generations] == [1, 1]
    assert found["several"].generations[0][0].text == found["text"]
    assert found["several"].llm_output["token_usage"]["completion_tokens"] == 12
    assert [len(one) for one in found["two"].generations] == [2]
    answer, chunks = found["answer"], found["answer stream"]
    assert len(answer.content) == 5
    assert answer.usage_metadata["output_tokens"] == 5
    assert len(answer.response_metadata["logprobs"]["content"]) == 5
    assert answer.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in chunks) == answer.content
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [5]
    assert found["answers"][0].content == answer.content


def test_openais_own_client(workers: WorkerPool) -> None:
    pytest.importorskip("openai")
    found = workers.run(by_openais_client, 1)[0]
    plain = found["plain"].choices[0].text
    assert len(plain) == 6
    assert found["again"].choices[0].text == plain
    assert found["again"].usage.prompt_tokens_details.cached_tokens == 0
    *stopped, never, none = found["stopped"]
    assert {choice.text for choice in stopped} == {plain[: plain.index(plain[2:4])]}
    assert {choice.finish_reason for choice in stopped} == {"stop"}
    assert never == none
    assert never.text == plain
    assert never.finish_reason == "length"
    several = found["several"]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == plain != several.choices[1].text
    assert several.usage.prompt_tokens == len(PROMPT) + len("other")
    assert several.usage.completion_tokens == 24
    assert [choice.text for choice in found["lists"].choices] == [several.choices[0].text, several.choices[2].text]
    for name, of_one in (("stream", lambda c: c.text), ("chat stream", lambda c: c.delta.content)):
        *chunks, last = found[name]
        assert not last.choices
        assert last.usage.completion_tokens == sum(len(of_one(c)) for chunk in chunks for c in chunk.choices)
        assert all(chunk.usage is None for chunk in chunks)
        ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        assert sorted(ends) == [0, 1]
    texts = ["".join(c.text for chunk in found["stream"] for c in chunk.choices if c.index == i) for i in range(2)]
    assert texts == [several.choices[0].text, several.choices[1].text]

    means = {c.text: sum(c.logprobs.token_logprobs) / 6 for c in found["all four"].choices}
    assert found["best"].choices[0].text == max(means, key=means.__getitem__)
    assert found["best"].usage.completion_tokens == 24
    logprobs = found["logprobs"].choices[0].logprobs
    assert "".join(logprobs.tokens) == found["logprobs"].choices[0].text
    assert logprobs.text_offset == list(range(6))
    for token, log_prob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == pytest.approx(log_prob, abs=1e-6)
        assert len(top) <= 2
    letters = Letters()
    prompt = letters.decode(letters.encode(PROMPT))
    echo = found["echo"].choices[0]
    assert echo.text[: len(PROMPT)] == PROMPT
    assert "".join(echo.logprobs.tokens) == prompt + echo.text[len(PROMPT) :]
    assert echo.logprobs.token_logprobs[0] is None
    assert echo.logprobs.token_logprobs[1:16] == pytest.approx(found["expected"], abs=1e-5)
    assert echo.logprobs.text_offset == list(range(18))
    scored = found["scored"].choices[0]
    assert scored.text == PROMPT
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(found["expected"], abs=1e-5)
    assert found["scored"].usage.completion_tokens == 0

    message = found["chat"].choices[0].message
    assert (message.role, len(message.content)) == ("assistant", 5)
    content = found["chat"].choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == message.content
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert (found["models"], found["model"]) == (["tiny"], "tiny")
    assert found["refused"] == [
        (404, "model"),
        (404, "model"),
        (400, "frequency_penalty"),
        (400, "n"),
        (400, "prompt"),
        (400, "best_of"),
        (400, "tools"),
        (404, None),
    ]


def announced(port: int, size: int) -> tuple[int, str]:
    """What is answered to a request of this many bytes before the first of them is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-length", str(size))
    connection.endheaders()
    response = connection.getresponse()
    return response.status, response.read().decode()


def under_pressure() -> dict[str, Any]:
    """Runs in a worker: limits, and a search that does not hold up a text."""
    with server(waiting=4, seconds=1.0, body_bytes=2000, search_nodes=32) as (service, port):
        generator = service.generator
        step, run = generator.step, service._searcher.run
        found: dict[str, Any] = {
            "too many": post(port, prompt=["a"] * 5),
            "too long": post(port, prompt="x" * 3000),
            "too wide": post(port, prompt="a", strategy="tree", beam_width=8, max_depth=8),
            "no page": send(port, "", "/v1/nothing", "GET"),
            "not so": send(port, "", "/v1/completions", "GET"),
            "announced": announced(port, 10**12),
            "no name": send(port, "", "/v1/models/", "GET"),
            "beyond": send(
                port, json.dumps({"messages": [{"role": "user", "content": "x" * 99}]}), "/v1/chat/completions"
            ),
        }

        def slow_run(*given: Any, **named: Any) -> Any:
            time.sleep(0.05)
            return run(*given, **named)

        service._searcher.run = slow_run
        trees: list[Any] = []
        searching = threading.Thread(target=lambda: trees.append(post(port, prompt="a", strategy="tree")))
        searching.start()
        time.sleep(0.1)
        found["beside"] = post(port, prompt="b", max_tokens=2)
        found["still searching"] = searching.is_alive()
        searching.join()
        found["tree"] = trees[0]

        def slow_step() -> None:
            time.sleep(0.1)
            step()

        generator.step = slow_step
        found["late"] = post(port, prompt="a", max_tokens=60)
        found["late stream"] = post(port, prompt="a", max_tokens=60, stream=True)
        pools = generator.engine.pool, service._searcher.pool
        deadline = time.monotonic() + 20  # what is told that it is late is cancelled at the next step, not before
        while any(pool.used_blocks for pool in pools) and time.monotonic() < deadline:
            time.sleep(0.02)
        found["blocks"] = sum(pool.used_blocks for pool in pools)
        generator.step = step
        found["after"] = post(port, prompt="a", max_tokens=2)
        return found


def test_no_client_holds_up_the_others(workers: WorkerPool) -> None:
    found = workers.run(under_pressure, 1)[0]
    assert {name: found[name][0] for name in ("too many", "too long", "too wide", "no page", "not so", "late")} == {
        "too many": 429,
        "too long": 413,
        "too wide": 400,
        "no page": 404,
        "not so": 405,
        "late": 504,
    }
    assert found["announced"][0] == 413
    assert [model["id"] for model in json.loads(found["no name"][1])["data"]] == ["tiny"]
    beyond = json.loads(found["beyond"][1])["error"]
    assert (beyond["param"], beyond["code"]) == ("messages", "context_length_exceeded")
    assert all("message" in json.loads(found[name][1])["error"] for name in ("too many", "no page", "late"))
    assert found["beside"][0] == 200
    assert found["still searching"]
    assert found["tree"][0] == 200
    status, text = found["late stream"]
    assert status == 200
    *pieces, last = events(text)
    assert pieces
    assert "longer than 1 s" in last["error"]["message"]
    assert found["blocks"] == 0
    assert found["after"][0] == 200


def after_a_mistake() -> dict[str, Any]:
    """Runs in a worker: a text that cannot be told, and one after it."""
    with server() as (service, port):
        decode, service.generator.decode = service.generator.decode, lambda ids: ids[10**6]
        body = {"prompt": PROMPT, "max_tokens": 3}
        found: dict[str, Any] = {"whole": post(port, **body), "stream": post(port, **body, stream=True)}
        service.generator.decode = decode
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("PUT", "/v1/completions", "{}", {"Content-Type": "application/json"})
        found["allowed"] = connection.getresponse().getheader("allow")
        return {**found, "after": post(port, **body), "blocks": service.generator.engine.pool.used_blocks}


def test_a_text_that_cannot_be_told_ends_alone(workers: WorkerPool) -> None:
    found = workers.run(after_a_mistake, 1)[0]
    assert (found["whole"][0], found["stream"][0], found["after"][0]) == (500, 500, 200)
    assert "IndexError" in found["whole"][1]
    assert found["blocks"] == 0
    assert found["allowed"] == "POST"


def seen_in_a_browser() -> dict[str, Any]:
    """Runs in a worker: what the page shows when text is streamed, a tree grows, a reader stops, and of mistakes."""
    with server() as (service, port), browser_window() as browser:
        generator = service.generator
        step = generator.step

        def slow_step() -> None:
            time.sleep(0.03)
            step()

        generator.step = slow_step
        browser.resize(1280)
        browser.open(f"http://127.0.0.1:{port}/")

        def idle() -> bool:
            return not browser.run("return document.querySelector('#ask button').disabled")

        def watch(what: Any, button: str) -> list[Any]:
            browser.click(button)
            states = [what()]
            while not idle():
                if (state := what()) != states[-1]:
                    states.append(state)
            return [*states, what()]

        def free() -> bool:
            return not (generator.busy or generator.engine.pool.used_blocks)

        browser.type("#prompt", PROMPT)
        found: dict[str, Any] = {"texts": watch(lambda: browser.text("#answer"), "button[value=sample]")}
        found["tree"] = watch(lambda: browser.count("#tree .node"), "button[value=tree]")
        found["state"] = browser.text("#state")
        browser.hover("#tree .node")
        found["tip"] = browser.text("#tip")
        found["prompt"] = generator.decode(service.prompts.encode(PROMPT))
        # A reader who stops, and one who goes away.
        for leave in (lambda: browser.click("#stop"), lambda: browser.open("about:blank")):
            browser.type("#prompt", "a")
            browser.click("button[value=sample]")
            browser.wait(lambda: browser.text("#answer"))
            found["used"] = generator.engine.pool.used_blocks
            leave()
            browser.wait(free)
        browser.open(f"http://127.0.0.1:{port}/")
        browser.type("#prompt", "x" * 80)
        browser.click("button[value=sample]")
        browser.wait(idle)
        found["mistake"] = browser.text("#state")
        browser.resize(480)
        found["fits"] = browser.run("return document.documentElement.scrollWidth <= innerWidth")
        # The browser tells of the refused request, and of a picture for its tab that is not there.
        found["complaints"] = [text for text in browser.complaints() if "400" not in text and "favicon" not in text]
        return found


@pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser())
def test_the_page_in_a_browser(workers: WorkerPool) -> None:
    found = workers.run(seen_in_a_browser, 1)[0]
    texts = found["texts"]
    assert len(texts) > 3  # it was seen to grow
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert found["tree"] == sorted(found["tree"])
    assert found["tree"][-1] > 4
    assert re.fullmatch(r"\d+ thoughts, \d+ tokens", found["state"])
    assert found["tip"].startswith(found["prompt"])
    assert found["used"] > 0
    assert "context" in found["mistake"]
    assert found["fits"]
    assert found["complaints"] == []
