"""The completions endpoint over real HTTP: a server on a thread in a worker, and Python's own client."""

import contextlib
import http.client
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browser_window, why_no_browser
from tests.workers import WorkerPool

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
_FOLDER = Path(__file__).resolve().parents[2] / "examples/serving"
_PROMPT = "once upon a time"


@contextlib.contextmanager
def server() -> Iterator[tuple[Any, int]]:
    """Runs in a worker: the service and its port. A token is a letter."""
    import uvicorn

    sys.path.insert(0, str(_FOLDER))
    from server import build_app
    from service import Service

    from tests.model.builds import build
    from vishwamai_mp.inference import Generator

    config, runtime, (model,) = build("training.global_batch_size=8", "tree.enabled=true", "tree.max_thought_tokens=4")
    generator = Generator(config, runtime, model, decode=lambda ids: "".join(chr(97 + i % 26) for i in ids))
    service = Service(generator, lambda text: [ord(c) for c in text], config.tree, {"stop_tokens": (5,)})
    web = uvicorn.Server(uvicorn.Config(build_app(service, "tiny", None), port=0, log_level="error"))
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    while not web.started:
        time.sleep(0.02)
    try:
        yield service, web.servers[0].sockets[0].getsockname()[1]
    finally:
        web.should_exit = True
        thread.join()
        service.close()


def post(port: int, **body: Any) -> tuple[int, str]:
    return send(port, json.dumps(body))


def send(port: int, text: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", text, {"content-type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def conversation() -> dict[str, Any]:
    """Runs in a worker."""
    from vishwamai_mp.inference import SamplingOptions

    with server() as (service, port):
        generator = service.generator
        (expected,) = generator.generate([service.encode(_PROMPT)], SamplingOptions(9, 0.8, seed=4))
        body = {"prompt": _PROMPT, "max_tokens": 9, "temperature": 0.8, "seed": 4}
        found = {
            "expected": generator.text(expected),
            "whole": post(port, **body),
            "stream": post(port, **body, stream=True),
            "stopped": post(port, **body, stop=generator.text(expected)[3:5]),
            "tree": post(port, prompt=_PROMPT, strategy="tree", stream=True),
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


def in_parallel(port: int, body: dict[str, Any]) -> list[str]:
    texts = [""] * 4

    def ask(i: int) -> None:
        texts[i] = json.loads(post(port, **body)[1])["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return texts


def test_the_endpoint(workers: WorkerPool) -> None:
    found = workers.run(conversation, 1)[0]
    expected = found["expected"]
    status, text = found["whole"]
    assert status == 200
    whole = json.loads(text)
    assert whole["choices"][0] == {"text": expected, "index": 0, "logprobs": None, "finish_reason": "length"}
    assert whole["usage"] == {"prompt_tokens": 16, "completion_tokens": 9, "total_tokens": 25}
    pieces = events(found["stream"][1])
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected
    assert len(pieces) == 10
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    stopped = json.loads(found["stopped"][1])["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == expected[: expected.index(expected[3:5])]
    assert found["parallel"] == [expected] * 4
    grown = events(found["tree"][1])
    sizes = [len(event["tree"]["nodes"]) for event in grown]
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 3
    assert all(event["svg"].startswith("<svg") for event in grown)
    assert len(grown[-1]["choices"][0]["text"]) == grown[-1]["tree"]["answer_tokens"]
    assert {status for status, _ in found["bad"]} == {400}
    messages = [json.loads(text)["error"]["message"] for _, text in found["bad"]]
    assert messages[0] == "the prompt is empty; give at least one token"
    assert "top_p=2.0" in messages[2]
    assert messages[-1].startswith("the request is not JSON: ")
    assert messages[3:-1] == [
        "colour: extra inputs are not permitted",
        "max_tokens: input should be greater than or equal to 1",
        "prompt: field required",
        "top_p has no effect on strategy tree; leave it out",
        "beam_width has no effect on strategy sample; leave it out",
    ]
    assert found["left"] == ["cancelled"]
    assert found["blocks"] == 0


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

        browser.type("#prompt", _PROMPT)
        found: dict[str, Any] = {"texts": watch(lambda: browser.text("#answer"), "button[value=sample]")}
        found["tree"] = watch(lambda: browser.count("#tree .node"), "button[value=tree]")
        found["state"] = browser.text("#state")
        browser.hover("#tree .node")
        found["tip"] = browser.text("#tip")
        found["prompt"] = generator.decode(service.encode(_PROMPT))
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
