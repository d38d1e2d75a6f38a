"""A Hugging Face hub on loopback for tests: the folders ORG/NAME below one folder are its repos. Faults to order.

    with FakeHub(folder) as hub:
        subprocess.run([...], env=os.environ | hub.env(hf_home))
        hub.requests      # [("GET", "/org/name/resolve/<sha>/config.json", headers), ...]

It speaks the part of the protocol that huggingface_hub uses to list and download: /api/models/ORG/NAME[/revision/R],
/api/models/ORG/NAME/tree/R, and HEAD and GET (with ranges) of /ORG/NAME/resolve/R/FILE.
"""

import hashlib
import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Repos whose name begins with "gated" or "private" answer as such repos do to those without the token."""

    daemon_threads = True

    def __init__(self, folder: Path, token: str = "hf_secret"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.token = folder, token
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.drops: dict[
            str, int
        ] = {}  # file -> how often its connection is dropped half way; -1: it never gets further
        self.reset = False  # drop with a TCP reset rather than a close

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def env(self, hf_home: Path) -> dict[str, str]:
        """What makes a huggingface_hub of its own process come here, with a cache of its own."""
        return {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_address[1]}",
            "HF_HOME": str(hf_home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order."""
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def handle_error(self, *_: object) -> None:
        pass  # a client that hangs up is part of some tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, dict(self.headers)))
        if path.startswith("/api/models/"):
            path = path.removeprefix("/api/models/")
            repo, _, rest = path.partition("/revision/") if "/revision/" in path else path.partition("/tree/")
        else:
            repo, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        folder, allowed = self.server.folder / repo, self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if not folder.is_dir() or (folder.name.startswith("private") and not allowed):
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if revision not in ("", "main", SHA):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if "/resolve/" in self.path:
            if folder.name.startswith("gated") and not allowed:
                return self.refuse(403, "GatedRepo", f"Access to model {repo} is restricted")
            return self.send_file(folder / name, name)
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        if "/tree/" in self.path:
            entries = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            self.send_json(entries)
        else:
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            self.send_json({"_id": "1", "id": repo, "modelId": repo, "sha": SHA, "siblings": siblings})

    def send_file(self, path: Path, name: str) -> None:
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data, start = path.read_bytes(), 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        body = data[start:]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.drops.get(name):
            self.server.drops[name] -= 1
            self.wfile.write(body[: max(len(data) // 2 - start, 0)])
            self.wfile.flush()
            if self.server.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
