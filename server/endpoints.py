"""The HTTP side: OpenAI's endpoints over a Service, with FastAPI.

app = make_app(service, model, Access(keys, origins), page)
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from errors import UserError
from scheduler import Token
from server.answers import Answer, ChatAnswer, CompletionAnswer
from server.api import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Model,
    TokenizeBody,
    chat_work,
    check_ids,
    completion_work,
    token_ids,
)
from server.front import (
    MAX_BODY,
    MAX_BODY_WITH_IMAGES,
    Access,
    Front,
    error_body,
    error_response,
    user_error,
    validation_error,
)
from server.metrics import Metrics, Timer
from server.service import Refused, Service, Stream

PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
NO_SUCH_PATH = "there is nothing at this path; the API is at /v1, and /docs describes it"
NO_TELEMETRY = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}
PARTS = list[dict[str, Any]]  # each is what a chunk has in `choices`


def make_app(service: Service, model: Model, access: Access, page: Path) -> FastAPI:
    """The application, with all endpoints. `page`: the file of the chat page."""
    app = FastAPI(title="gpt-brisk", telemetry=NO_TELEMETRY)
    metrics, created = Metrics(service), int(time.time())
    max_body = MAX_BODY if model.target.images is None else MAX_BODY_WITH_IMAGES
    app.add_middleware(Front, access=access, count=metrics.count, max_body=max_body)
    if access.origins:
        allowed = ["Authorization", "Content-Type"]
        app.add_middleware(
            CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"], allow_headers=allowed
        )

    @app.exception_handler(UserError)
    async def on_user_error(_: Request, error: UserError) -> Response:
        return user_error(error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> Response:
        return validation_error(error)

    @app.exception_handler(Refused)
    async def on_refused(_: Request, error: Refused) -> Response:
        return error_response(error.status, error.message)

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        message = NO_SUCH_PATH if error.detail == "Not Found" else str(error.detail)  # that is Starlette's
        return error_response(error.status_code, message, headers=error.headers)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """The next message of a chat: whole, or as a stream of server-sent events."""
        answer = ChatAnswer(await run_in_threadpool(chat_work, body, model), model)
        return await respond(body, answer, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """What follows each prompt: whole, or as a stream of server-sent events."""
        answer = CompletionAnswer(await run_in_threadpool(completion_work, body, model), model)
        return await respond(body, answer, request)

    async def respond(body: ChatBody | CompletionBody, answer: Answer, request: Request) -> Response:
        work = answer.work
        stream = service.submit(work.requests, work.logprobs is not None)
        parts = parts_of(service, stream, answer, Timer(metrics))
        if body.stream:
            return EventStream(service, stream, events(parts, answer, body.stream_options.include_usage))
        watcher = asyncio.create_task(fail_when_gone(stream, request))
        try:
            async for _ in parts:
                pass
        finally:
            watcher.cancel()
            service.cancel(stream)
        return JSONResponse(answer.whole())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What there is: the model, and with each adapter."""
        return {"object": "list", "data": [await retrieve_model(name) for name in model.names]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        """The model of this name."""
        if name not in model.names:
            raise HTTPException(404, "there is no model of this name; /v1/models lists what there is")
        owner, length = "gpt-brisk", model.target.limit
        senses = {"input_modalities": ["text", "image"] if model.sees else ["text"], "max_model_len": length}
        return {"id": name, "object": "model", "created": created, "owned_by": owner} | senses

    @app.post("/tokenize")
    def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """The tokens of a text, or of a chat."""
        ids = token_ids(body, model)
        return {"count": len(ids), "max_model_len": model.target.limit, "tokens": ids}

    @app.post("/detokenize")
    def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        """The text of tokens."""
        check_ids("tokens", body.tokens, model)
        return {"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)}

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """503 once the server ends, or has failed."""
        if service.refusal is not None:
            raise HTTPException(503, service.refusal.message)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics_text() -> Response:
        """Counts and times for Prometheus."""
        return Response(metrics.text(), media_type=metrics.media_type)

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        if not page.is_file():
            raise HTTPException(404, "there is no chat page here; the API is at /v1")
        return FileResponse(page, media_type="text/html", headers=PAGE_HEADERS)

    return app


async def parts_of(service: Service, stream: Stream, answer: Answer, timer: Timer) -> AsyncIterator[PARTS]:
    """Puts the tokens of a stream into the answer, as they come -> the parts that they make."""
    while tokens := await stream.get():
        by_index: dict[int, list[Token]] = {}
        for index, token in tokens:
            if token.finish_reason == "error":
                raise Refused(500, "no token is possible: the model's logits are not finite, or all are banned")
            if answer.choices[index].finish_reason is None:
                by_index.setdefault(index, []).append(token)
        parts: PARTS = []
        for index, own in by_index.items():
            parts += answer.put(index, own)
            if answer.choices[index].finish_reason is not None:
                service.finish(stream, index)  # it may be finished before its tokens end
        timer.saw(answer, by_index)
        if parts:
            yield parts


async def events(parts: AsyncIterator[PARTS], answer: Answer, with_usage: bool) -> AsyncIterator[bytes]:
    """A stream of server-sent events."""
    usage = {"usage": None} if with_usage else {}
    try:
        async for new in parts:
            yield b"".join(event(answer.chunk([part], **usage)) for part in new)  # clients read one part of an event
        if with_usage:
            yield event(answer.chunk([], usage=answer.usage()))
        yield b"data: [DONE]\n\n"
    except Refused as error:
        yield event(error_body(error.status, error.message))


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. When they end, also because the client went away, the requests that they come from do."""

    def __init__(self, service: Service, stream: Stream, content: AsyncIterator[bytes]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is for nginx
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self.service, self.stream = service, stream

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.service.cancel(self.stream)


async def fail_when_gone(stream: Stream, request: Request) -> None:
    """Ends an answer when its client is gone."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
        stream.fail(Refused(499, "the client is gone"))
