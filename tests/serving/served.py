"""A server of a small model over real HTTP, on a thread of a worker, and Python's own client of it."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PROMPT = "once upon a time"


class Letters:
    """A token is a letter; a conversation is its messages in a row."""

    template: str | None = "{{ messages }}"

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(self.spell, ids))

    def ends(self, stops: Sequence[str]) -> tuple[int, ...]:
        return ()

    def spell(self, token: int) -> str:
        return chr(97 + token % 26)

    def content_of(self, token: int) -> bytes:
        return self.spell(token).encode()

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.encode("".join(f"{message['role'][0]}:{message['content']} " for message in messages))


@contextlib.contextmanager
def server(generator: Any = None, **limits: Any) -> Iterator[tuple[Any, int]]:
    """Runs in a worker: the service and its port; `generator` None: of a small model."""
    import uvicorn

    from tests.model.builds import build
    from vishwamai_mp.inference import Generator
    from vishwamai_mp.serving import WEB_OPTIONS, Limits, Service, build_app

    prompts = Letters()
    if generator is None:
        settings = ["training.global_batch_size=8", "tree.enabled=true", "tree.max_thought_tokens=4"]
        config, runtime, (model,) = build(*settings)
        generator = Generator(config, runtime, model, decode=prompts.decode)
    service = Service(generator, prompts, generator.engine.config.tree, {"stop_tokens": (5,)}, Limits(**limits))
    app = build_app(service, "tiny", ["models.example"])
    web = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **WEB_OPTIONS))
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


def send(
    port: int, text: str, address: str = "/v1/completions", method: str = "POST", **headers: str
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, address, text, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    return response.status, response.read().decode()


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


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
