"""The endpoint's addresses: OpenAI's `/v1/…`, and `/`, a page to try the model on."""

import asyncio
import contextlib
import html
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Collection
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vishwamai_mp.config import UserError
from vishwamai_mp.observability.page import page as html_page
from vishwamai_mp.observability.tree_page import SCRIPT, STYLE
from vishwamai_mp.serving import answers
from vishwamai_mp.serving.door import check_sender
from vishwamai_mp.serving.limits import Refusal, refusal_of
from vishwamai_mp.serving.requests import ChatRequest, Common, CompletionRequest, parse
from vishwamai_mp.serving.service import Service

_PAGE = Path(__file__).with_name("page.html")  # what is within <main>
_BODY_SECONDS = 30.0  # that a client may take to send its request
_LOOK_SECONDS = 0.2  # between two looks whether a client that waits is still there
# What uvicorn is to be told of the application. A request to change over to a WebSocket is answered as any other:
# uvicorn would hand it to a library for these, which leaves a POST without an answer.
WEB_OPTIONS: dict[str, Any] = {"ws": "none"}
# Of its warnings, those that call such a request unsupported and advise to install that library.
_UPGRADE_WARNINGS = ("Unsupported upgrade request", "No supported WebSocket library")

Result = TypeVar("Result")


def build_app(service: Service, name: str, hosts: Collection[str] = ()) -> Starlette:
    """The application.

    Args:
        service: the model's thread.
        name: of the model, for clients.
        hosts: names of this machine by which clients may reach it, beside localhost.
    """
    endpoint = _Endpoint(service, name)
    logging.getLogger("uvicorn.error").addFilter(_is_of_use)
    return Starlette(
        routes=[
            Route("/", endpoint.page),
            Route("/v1/models", endpoint.models),
            Route("/v1/models/", endpoint.models),  # else it would be a model without a name
            Route("/v1/models/{id:path}", endpoint.model),
            Route("/v1/completions", endpoint.completions, methods=["POST"]),
            Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        ],
        middleware=[Middleware(_Door, hosts=hosts)],
        exception_handlers=dict.fromkeys((Exception, HTTPException, UserError, ClientDisconnect), _refuse),
    )


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_UPGRADE_WARNINGS)


class _Door:
    """Lets in what no page of another site sends."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self._app
        if scope["type"] == "http":
            address, _ = scope.get("server") or ("", None)
            try:
                check_sender(scope["method"], Headers(scope=scope), address, self._hosts)
            except Refusal as refusal:
                answer = JSONResponse(refusal.body(), refusal.status)
        await answer(scope, receive, send)


class _Endpoint:
    def __init__(self, service: Service, name: str) -> None:
        self.service, self.name = service, name
        self.created = int(time.time())

    async def page(self, request: Request) -> Response:
        text = _PAGE.read_text(encoding="utf-8").replace("{{ABOUT}}", html.escape(json.dumps(self._about())))
        return HTMLResponse(html_page(self.name, text, STYLE, SCRIPT))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["id"])
        return JSONResponse(self._described())

    async def completions(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await self._body(request), self.service.limits)
        self._check_model(asked.model)
        # Encoding a long text takes a while, in which others are served.
        prompts, limits = self.service.prompts, self.service.limits
        texts, jobs = await asyncio.to_thread(answers.completion_jobs, asked, prompts, limits)
        make = answers.tree_chunks if asked.strategy == "tree" else answers.completion_chunks
        return await _answer(request, asked, make(asked, self.service, self.name, texts, jobs))

    async def chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await self._body(request), self.service.limits)
        self._check_model(asked.model)
        job = await asyncio.to_thread(answers.chat_job, asked, self.service.prompts)
        return await _answer(request, asked, answers.chat_chunks(asked, self.service, self.name, job))

    async def _body(self, request: Request) -> bytes:
        """What the client sends, as long as it is not too much and comes in time."""
        most, found = self.service.limits.body_bytes, bytearray()
        too_much = Refusal(f"the request has more than {most} bytes", status=413)
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > most:
            raise too_much
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    found += part
                    if len(found) > most:
                        raise too_much
        except TimeoutError:
            raise Refusal(f"the request was not sent within {_BODY_SECONDS:g} s", status=408) from None
        return bytes(found)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise Refusal(
                f"model={name}: there is none of this name; this server has {self.name}",
                "model",
                404,
                "model_not_found",
            )

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "vishwamai-mp"}

    def _about(self) -> dict[str, Any]:
        """What the page tells of the model."""
        engine = self.service.generator.engine
        return {
            "name": self.name,
            "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
            "context": engine.context,
            "vocabulary": engine.config.model.vocab_size,
            "precision": engine.config.precision,
            "components": [part for part in ("memory", "cache") if getattr(engine.config, part).enabled],
            "chat": self.service.prompts.template is not None,
        }


async def _answer(request: Request, asked: Common, chunks: AsyncIterator[answers.Chunk]) -> Response:
    """The chunks as a stream or in one. A client that goes away ends what is done for it."""
    if not asked.stream:
        return JSONResponse(await _unless_gone(request, answers.whole(chunks)))
    first = await anext(chunks)  # a mistake is told before the stream begins
    return StreamingResponse(_server_sent(asked, first, chunks), media_type="text/event-stream")


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_SECONDS))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _server_sent(asked: Common, first: answers.Chunk, chunks: AsyncIterator[answers.Chunk]) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI's clients read them. What goes wrong on the way is the last but one of them."""
    wants_usage = asked.stream_options.include_usage

    def sent(chunk: answers.Chunk) -> str:
        if not chunk["choices"] and not wants_usage:
            return ""
        return f"data: {json.dumps({'usage': None, **chunk} if wants_usage else chunk)}\n\n"

    yield sent(first)
    try:
        async for chunk in chunks:
            yield sent(chunk)
    except Exception as error:
        yield f"data: {json.dumps(refusal_of(error).body())}\n\n"
    yield "data: [DONE]\n\n"


async def _refuse(request: Request, error: Exception) -> Response:
    """As OpenAI's clients read it."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    headers = error.headers if isinstance(error, HTTPException) else None  # such as which methods are allowed
    if isinstance(error, HTTPException):
        error = Refusal(f"{request.method} {request.url.path}: {error.detail.lower()}", status=error.status_code)
    refusal = refusal_of(error, "messages" if request.url.path.endswith("/chat/completions") else "prompt")
    return JSONResponse(refusal.body(), refusal.status, headers)
