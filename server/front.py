"""What all requests pass before an endpoint sees them: keys, the size of a body, counting. And errors as OpenAI's."""

import hmac
import ipaddress
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import UserError, log
from server.api import (
    NAMES,
    ChatBody,
    CompletionBody,
    ContextExceeded,
    DetokenizeBody,
    JsonSchema,
    ResponseFormat,
    StreamOptions,
    UnknownModel,
)

MAX_BODY = 8 << 20  # bytes,
MAX_BODY_WITH_IMAGES = 32 << 20  # or where there may be images in it
KEYLESS = ("/", "/health", "/docs", "/openapi.json", "/docs/oauth2-redirect")  # nothing of a model or a client is there
RETRY_AFTER = 1  # seconds
KINDS = {  # OpenAI's, of an error with a status
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(RETRY_AFTER)}}
BODIES = (ChatBody, CompletionBody, DetokenizeBody, StreamOptions, ResponseFormat, JsonSchema)
FIELDS = {field.alias or name for body in BODIES for name, field in body.model_fields.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's JSON of an error. `param`: the field that is wrong."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message, param = (text and text.encode(errors="replace").decode() for text in (message, param))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The response to what went wrong, with the headers that its status wants."""
    return JSONResponse(error_body(status, message, param, code), status, HEADERS.get(status, headers))


def user_error(error: UserError) -> JSONResponse:
    """A 400. If the message begins with a field of the body, or what is called so here, that is the `param`."""
    message = " ".join(str(error).split())
    if isinstance(error, UnknownModel):
        return error_response(404, message, "model", "model_not_found")
    first, _, rest = message.partition(" ")
    message = f"{NAMES.get(first, first)} {rest}"
    for name in ("max_new_tokens", "min_new_tokens"):
        message = message.replace(name, NAMES[name])
    subject = message.split(" ")[0].rstrip(":;,")
    param = subject if subject.split("[")[0].split(".")[0] in FIELDS else None
    code = "context_length_exceeded" if isinstance(error, ContextExceeded) else None
    return error_response(400, message, param, code)


def validation_error(error: RequestValidationError) -> JSONResponse:
    """A 400 for the first thing that pydantic found wrong."""
    first = error.errors()[0]
    kind, place = first["type"], [part for part in first["loc"] if part != "body"]
    if kind == "json_invalid":
        return error_response(400, f"the body is not valid JSON ({first['ctx']['error']}); correct it")
    if not place:
        return error_response(400, "the body must be a JSON object, sent as application/json")
    # In a union pydantic also names the types that it tried.
    names = place if kind == "extra_forbidden" else [part for part in place if isinstance(part, int) or part in FIELDS]
    name = ".".join(map(str, names))[:80]
    if kind == "extra_forbidden":
        return error_response(400, f"{name} is not supported; leave it out", name)
    if kind == "missing":
        return error_response(400, f"{'.'.join(map(str, place))} is missing; give it", name)
    return error_response(400, f"{name}: {first['msg'][:200]}", name)


# ---------------------------------------------------------------------------------------------------------------------
# Middleware


@dataclass(frozen=True)
class Access:
    """Who may use the server: without keys anybody. `origins`: the web sites whose pages may. `local`: what any other
    page in a browser on this machine says is refused, also if its site's name leads to this machine."""

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    local: bool = False

    def allows(self, authorization: bytes) -> bool:
        """Whether the header holds a key, found out in a time that says nothing about the right ones."""
        kind, _, key = authorization.partition(b" ")
        same = [hmac.compare_digest(key.strip(), own.encode()) for own in self.keys]
        return not self.keys or (kind.lower() == b"bearer" and any(same))

    def expects(self, host: bytes) -> bool:
        """Whether a request to this host is meant for this server. A site can give its own name any address (DNS
        rebinding), so the name of one that is local is that of this machine, a number, or that of an origin."""
        if not self.local or "*" in self.origins:
            return True
        try:
            name = urlsplit(f"//{host.decode('latin-1')}").hostname or ""
        except ValueError:
            return False
        if name in ("", "localhost") or name.endswith(".localhost"):  # browsers always send one
            return True
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name in {urlsplit(origin).hostname for origin in self.origins}


class Front:
    """ASGI middleware: a 401 without a key, a 403 for another host, a 413 for a body that is too large, a 500 for a bug
    here. It counts all responses."""

    def __init__(self, app: ASGIApp, access: Access, count: Callable[[Scope, int], None], max_body: int = MAX_BODY):
        self.app, self.access, self.count, self.max_body = app, access, count, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0
        size = 0

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.count(scope, status)
            await send(message)

        async def bounded_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(413, too_large(self.max_body))
            return message

        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        app = self.app
        if scope["path"] not in KEYLESS and not self.access.allows(headers.get(b"authorization", b"")):
            wrong = "not the right one" if b"authorization" in headers else "missing"
            message = f"the API key is {wrong}; send it as `Authorization: Bearer KEY`"
            app = error_response(401, message, code="invalid_api_key")
        elif not self.access.expects(headers.get(b"host", b"")):
            message = "the host that the request names is not this server's; use its address, --cors or --api_key"
            app = error_response(403, message)
        elif length.isdigit() and int(length[:20]) > self.max_body:
            app = error_response(413, too_large(self.max_body))
        try:
            await app(scope, bounded_receive, counted_send)
        except Exception as error:
            # The message could hold what a client sent.
            frames = "".join(traceback.format_tb(error.__traceback__))
            path = getattr(scope.get("route"), "path", "a path that is none of ours")
            log(f"bug: {type(error).__name__} at {path}\n{frames}")
            if status:
                raise
            await error_response(500, "the server has a bug, which its log tells of")(scope, receive, counted_send)


def too_large(max_body: int) -> str:
    """What a 413 says."""
    return f"the body is larger than {max_body >> 20} MiB; send less"
