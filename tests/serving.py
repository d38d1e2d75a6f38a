"""serve.py as a process, for the tests of its API."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# All that may be in its log.
LINES = re.compile(
    r"loaded .*|serving http://\S+|this model has no chat template.*|warming up.*|warmed up.*|warning: anybody who.*"
)


class Server:
    """`python serve.py ARGS...` on a free port. `code`: Python that runs before, in the same process; `ranks`: of a
    torchrun; `clean`: nothing unexpected may be in the log."""

    def __init__(self, *args, code="", ranks=1, clean=True):
        script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import errors, serve\n{code}\nerrors.run(serve.main)"
        command = [sys.executable, "-c", script] if code else [sys.executable, str(ROOT / "serve.py")]
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            command[1:1] = launcher
        self.process = subprocess.Popen(
            [*command, "--port", "0", *map(str, args)],
            env={"OMP_NUM_THREADS": "1"} | dict(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines, self.clean, self.address = [], clean, None
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        end = time.monotonic() + 300
        while self.address is None:
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                self.reader.join()
                raise RuntimeError("".join(self.lines))
            time.sleep(0.02)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.fullmatch(r"serving (http://(\S+):(\d+))\n", line):
                self.host, self.port, self.address = found[2], int(found[3]), found[1]

    @property
    def log(self):
        return "".join(self.lines)

    def client(self, **options):
        import openai

        options = {"api_key": "none", "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.address}/v1", **options)

    def request(self, method, path, body=None, headers=None):
        """-> status, headers, body."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            headers = {"Content-Type": "application/json"} | (headers or {})
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def post(self, path, **body):
        status, _, data = self.request("POST", path, body)
        return status, json.loads(data)

    def get(self, path):
        status, _, data = self.request("GET", path)
        return status, json.loads(data)

    def metric(self, name, **labels):
        text = self.request("GET", "/metrics")[2].decode()
        inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
        found = re.search(rf"^{name}{re.escape('{' + inside + '}') if inside else ''} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_until_idle(self, seconds=10):
        end = time.monotonic() + seconds
        while self.metric("brisk_requests_running") + self.metric("brisk_requests_waiting"):
            assert time.monotonic() < end, "a request still has its place"
            time.sleep(0.02)

    def open_stream(self, path="/v1/chat/completions", size=None, **body):
        """A socket on which a request has been sent, and nothing been read of the answer."""
        connection = socket.socket()
        if size is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        connection.settimeout(60)
        connection.connect((self.host, self.port))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def memory(self):
        """Bytes in use."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024

    def end(self, how=signal.SIGTERM, seconds=60):
        """-> the exit code."""
        self.process.send_signal(how)
        return self.wait(seconds)

    def wait(self, seconds=60):
        code = self.process.wait(seconds)
        self.reader.join()
        return code

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.end()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        if kind is None and self.clean:
            wrong = [line for line in self.lines if not LINES.fullmatch(line.rstrip("\n"))]
            assert not wrong, wrong


def events(data):
    """The JSON of server-sent events; they end with [DONE]."""
    parts = data.decode().split("\n\n")
    assert parts[-1] == "" and parts[-2] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
