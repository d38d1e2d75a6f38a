"""An OpenAI-compatible server on loopback for tests of the page: it answers what the test has scripted.

    with PageServer() as server:
        server.script(Answer("Hello"), Answer("Bye", usage=(12, 8, 2)))   # one for each request, in order
        page.goto(server.url)
        server.completions      # the bodies of the requests for completions

It is strict: a body with a field that OpenAI's API, or this project's few additions to it, does not have is refused, as
is a field of the wrong type.
"""

import contextlib
import json
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parent.parent / "web" / "index.html"
NUMBER = (int, float)
FIELDS = {
    "model": str,
    "messages": list,
    "stream": bool,
    "stream_options": dict,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": int,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "max_tokens": int,
    "min_tokens": int,
    "seed": int,
    "stop": list,
    "response_format": dict,
    "logprobs": bool,
    "top_logprobs": int,
}


@dataclass
class Answer:
    """One answer: its pieces, and where it stops for the test or goes wrong."""

    pieces: str | Iterable[str | dict]  # each a chunk: content, or a whole delta
    usage: tuple[int, int, int] = (10, 0, 5)  # prompt tokens, those of them that were cached, completion tokens
    finish: str = "stop"
    logprobs: dict[int, list[dict]] = field(default_factory=dict)  # number of a piece -> logprobs.content
    hold_after: int | None = None  # pieces; then the server waits until `release` is set
    release: threading.Event = field(default_factory=threading.Event)
    drop_after: int | None = None  # pieces; then the connection is reset
    error_after: int | None = None  # pieces; then an error comes as an event
    refusal: tuple[int, dict] | None = None  # HTTP status and body, in place of an answer
    truncated: bool = False  # the stream ends after the last piece, without finish_reason, usage and [DONE]
    bytes_at_a_time: int | None = None  # cuts the events into network writes of this size


class PageServer(ThreadingHTTPServer):
    """`disconnects` counts the clients that hung up while an answer was held."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0, api_key: str | None = None):
        super().__init__(("127.0.0.1", port), Handler)
        self.api_key = api_key
        self.models = ["brisk-1b"]
        self.sees = False  # images
        self.answers: deque[Answer] = deque()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.completions: list[dict] = []
        self.refused: list[str] = []  # what was wrong with requests
        self.disconnects = 0
        self.connections: list[socket.socket] = []
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def script(self, *answers: Answer) -> None:
        self.answers.extend(answers)

    def __enter__(self) -> "PageServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        for connection in self.connections:  # a browser keeps them open and would use them again
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        pass  # a client that hangs up is part of some tests


def fault_of(body: dict) -> str | None:
    """What is wrong with the body of a request for a completion."""
    for name, value in body.items():
        if name not in FIELDS:
            return f"Unrecognized request argument supplied: {name}"
        if not isinstance(value, FIELDS[name]) or (isinstance(value, bool) and FIELDS[name] is not bool):
            return f"Invalid type for '{name}'"
    roles = [message.get("role") for message in body["messages"]]
    if not roles or roles[-1] != "user" or any(set(message) != {"role", "content"} for message in body["messages"]):
        return "Invalid messages"
    if "top_logprobs" in body and not body.get("logprobs"):
        return "top_logprobs needs logprobs"
    if body.get("stream_options") and not body.get("stream"):
        return "stream_options needs stream"
    return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PageServer

    def setup(self) -> None:
        super().setup()
        self.server.connections.append(self.connection)

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, content: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        self.server.refused.append(message)
        self.reply(
            status, json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
        )

    def is_allowed(self) -> bool:
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        key = self.server.api_key
        if self.path == "/" or not key or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self.refuse(401, "Incorrect API key provided", "authentication_error")
        return False

    def do_GET(self) -> None:
        if not self.is_allowed():
            return
        if self.path == "/":
            self.reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/v1/models":
            senses = {"input_modalities": ["text", "image"] if self.server.sees else ["text"]}
            head = {"object": "model", "created": 0, "owned_by": "test"} | senses
            data = [{"id": name} | head for name in self.server.models]
            self.reply(200, json.dumps({"object": "list", "data": data}).encode())
        else:
            self.refuse(404, f"No such address: {self.path}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            return
        if self.path == "/tokenize":
            tokens = list(range(len(body["prompt"].split())))
            self.reply(200, json.dumps({"tokens": tokens, "count": len(tokens)}).encode())
        elif self.path == "/v1/chat/completions":
            self.complete(body)
        else:
            self.refuse(404, f"No such address: {self.path}")

    def complete(self, body: dict) -> None:
        self.server.completions.append(body)
        answer = self.server.answers.popleft() if self.server.answers else Answer("?")
        if fault := fault_of(body):
            self.refuse(400, fault)
        elif answer.refusal:
            self.reply(answer.refusal[0], json.dumps(answer.refusal[1]).encode())
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.stream(answer, body)

    def stream(self, answer: Answer, body: dict) -> None:
        usage_wanted = body.get("stream_options", {}).get("include_usage", False)
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}

        def chunk(delta: dict, finish: str | None = None, logprobs: list[dict] | None = None) -> None:
            choice = {
                "index": 0,
                "delta": delta,
                "finish_reason": finish,
                "logprobs": logprobs and {"content": logprobs},
            }
            self.event(head | {"choices": [choice]} | ({"usage": None} if usage_wanted else {}))

        self.bytes_at_a_time = answer.bytes_at_a_time
        pieces = [answer.pieces] if isinstance(answer.pieces, str) else list(answer.pieces)
        chunk({"role": "assistant", "content": ""})
        for number in range(len(pieces) + 1):
            if number == answer.hold_after and not self.hold(answer):
                return
            if number == answer.drop_after:
                time.sleep(0.2)  # a reset discards what the client has not read yet
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close by a reset
                self.close_connection = True
                self.connection.close()
                return
            if number == answer.error_after:
                self.event({"error": {"message": "The cache is full", "type": "server_error", "code": None}})
                break
            if number < len(pieces):
                piece = pieces[number]
                delta = piece if isinstance(piece, dict) else {"content": piece}
                chunk(delta, logprobs=answer.logprobs.get(number) if body.get("logprobs") else None)
        else:
            if answer.truncated:
                self.wfile.write(b"0\r\n\r\n")
                return
            chunk({}, answer.finish)
            if usage_wanted:
                prompt, cached, completion = answer.usage
                counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
                counts["prompt_tokens_details"] = {"cached_tokens": cached}
                self.event(head | {"choices": [], "usage": counts})
        self.write(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def hold(self, answer: Answer) -> bool:
        """Waits for the test. False if the client hung up meanwhile."""
        while not answer.release.wait(0.02):
            if self.server.stopping.is_set():
                self.close_connection = True
                self.connection.close()
                return False
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                self.server.disconnects += 1
                self.close_connection = True
                return False
        return True

    def event(self, data: dict) -> None:
        self.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def write(self, data: bytes) -> None:
        size = self.bytes_at_a_time or len(data)
        for start in range(0, len(data), size):
            part = data[start : start + size]
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.flush()
            if size < len(data):
                time.sleep(0.001)
