#!/usr/bin/env python3
"""An OpenAI-compatible completions endpoint over a checkpoint, and a page that shows a tree of thoughts grow.

    pip install -c constraints.txt -e .[serve]
    python examples/serving/server.py --load runs/tiny --port 8000
    curl localhost:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"prompt": "Once upon", "max_tokens": 40, "stream": true}'

`"strategy": "tree"` searches instead; open http://localhost:8000/ to watch. One process, one model.
"""

import argparse
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from service import Service

from vishwamai_mp.config import UserError
from vishwamai_mp.inference import Completion, SamplingOptions
from vishwamai_mp.observability.page import page as html_page
from vishwamai_mp.observability.tree_page import SCRIPT, STYLE
from vishwamai_mp.tree_of_thoughts import SearchResult
from vishwamai_mp.tree_of_thoughts.picture import to_svg

_OF_SAMPLE = {"max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop"}
_OF_TREE = {"beam_width", "max_depth"}
_PAGE = Path(__file__).with_name("page.html")  # what is within <main>


class Body(BaseModel):
    """OpenAI's request, as far as it is understood here, and `strategy`; anything else is refused."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    stop: str | list[str] | None = None
    stream: bool = False
    strategy: Literal["sample", "tree"] = "sample"
    beam_width: Annotated[int, Field(ge=1, le=64)] | None = None
    max_depth: Annotated[int, Field(ge=1, le=64)] | None = None


def build_app(service: Service, name: str, end_token: int | None) -> FastAPI:
    """The application.

    Args:
        service: the model's thread.
        name: of the model, for clients.
        end_token: ends a text.
    """
    app = FastAPI(title="VishwamAI")

    @app.exception_handler(UserError)
    async def mistake(_: Request, error: UserError) -> JSONResponse:
        return refusal(str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refusal(f"the request is not JSON: {first['ctx']['error']}")
        return refusal(f"{'.'.join(map(str, first['loc'][1:])) or 'the request'}: {first['msg'].lower()}")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return html_page("Watch a tree of thoughts grow", _PAGE.read_text(encoding="utf-8"), STYLE, SCRIPT)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "vishwamai-mp"}]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: Body) -> StreamingResponse | dict[str, Any]:
        useless = body.model_fields_set & (_OF_SAMPLE if body.strategy == "tree" else _OF_TREE)
        if useless:
            raise UserError(f"{min(useless)} has no effect on strategy {body.strategy}; leave it out")
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        events = tree_events(service, body) if body.strategy == "tree" else text_events(service, body, end_token)
        if not body.stream:
            text, last = "", {}
            async for last in events:
                text += last["choices"][0]["text"]
            last["choices"][0]["text"] = text
            return {**head, **last}
        first = await anext(events)  # a mistake is told before the stream begins
        return StreamingResponse(server_sent(head, first, events), media_type="text/event-stream")

    return app


def refusal(message: str) -> JSONResponse:
    """As OpenAI's clients read it."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, 400)


async def server_sent(
    head: dict[str, Any], first: dict[str, Any], events: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI's clients read them. What goes wrong on the way is the last but one of them."""
    yield f"data: {json.dumps({**head, **first})}\n\n"
    try:
        async for event in events:
            yield f"data: {json.dumps({**head, **event})}\n\n"
    except (UserError, RuntimeError) as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"
    yield "data: [DONE]\n\n"


async def text_events(service: Service, body: Body, end_token: int | None) -> AsyncIterator[dict[str, Any]]:
    """A piece of text each; the last has the reason why it ends and the token counts."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    greedy = body.temperature == 0
    options = SamplingOptions(
        max_new_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=None if greedy or body.top_p == 1 else body.top_p,
        top_k=None if greedy else body.top_k,
        min_p=None if greedy else body.min_p,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        stop_tokens=() if end_token is None else (end_token,),
        stop_strings=tuple(stops),
    )
    async for event in service.complete(body.prompt, options):
        if isinstance(event, Completion):
            yield {**choice("", event.finish), "usage": usage(len(event.prompt), len(event.tokens))}
        else:
            yield choice(event, None)


async def tree_events(service: Service, body: Body) -> AsyncIterator[dict[str, Any]]:
    """The tree as it grows, as JSON and SVG; the last has the text."""
    changes = {"seed": body.seed} | {
        key: value for key, value in (("beam_width", body.beam_width), ("max_depth", body.max_depth)) if value
    }
    result: SearchResult | None = None
    async for grown in service.search(body.prompt, changes):
        if result is not None:
            yield {**choice("", None), "tree": result.to_dict(), "svg": to_svg(result)}
        result = grown
    assert result is not None
    text = "".join(result.texts[i] for i in result.path[1:])
    yield {
        **choice(text, "stop"),
        "usage": usage(len(result.nodes[0].tokens), result.generated_tokens),
        "tree": result.to_dict(),
        "svg": to_svg(result),
    }


def choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": reason}]}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="a run folder, its checkpoints folder, or one checkpoint")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    import uvicorn

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
    from generate import find_tokenizer, generation_config

    from vishwamai_mp.checkpoint import CheckpointManager
    from vishwamai_mp.checkpoint.store import locate
    from vishwamai_mp.data.tokenizer import Tokenizer
    from vishwamai_mp.inference import Generator
    from vishwamai_mp.model import build_model
    from vishwamai_mp.runtime import distributed_session
    from vishwamai_mp.tree_of_thoughts import ending_of_thoughts

    checkpoint = locate(Path(options.load).resolve()).path
    assert checkpoint is not None
    config = generation_config(checkpoint, options.overrides)
    tokenizer = Tokenizer(find_tokenizer(checkpoint, config))
    with distributed_session(config) as runtime:
        (model,) = build_model(config, runtime, initialize=False)
        CheckpointManager(checkpoint.parent, config, runtime).load(checkpoint, [model])
        ending = ending_of_thoughts(tokenizer, config.tree.stop)
        generator = Generator(config, runtime, model, decode=tokenizer.decode)
        tree = config.tree if config.tree.enabled else replace(config.tree, value_weight=0.0, logprob_weight=1.0)
        service = Service(generator, tokenizer.encode, tree, ending)
        app = build_app(service, checkpoint.parent.parent.name, ending["end_token"])
        uvicorn.run(app, host=options.host, port=options.port)
        service.close()


if __name__ == "__main__":
    from vishwamai_mp.config import run_program

    run_program(main)
