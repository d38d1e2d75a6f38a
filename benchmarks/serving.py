"""serve.py under load, by real HTTP over loopback: the part of bench.py that needs servers.

    measure_serving(folder, rounds=3, device=torch.device("cpu"))     # rates, times to the first token, gaps
    soak(folder, minutes=10, device=torch.device("cpu"))              # many clients, of which a third go away

Each token has to be an event of its own for its time to be known, so one token with a text is made the only likely one
by logit_bias; a step costs the same whatever it draws. Prompts are random tokens, sent as ids.
"""

import contextlib
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.startup import GENERATE, HERE, compiled_command
from checkpoint import load_config
from errors import UserError, log

CLIENTS = 16
PLACES = (8, 16)
SHORT, LONG = 64, 512  # tokens of the prompts of many clients
NEW = 256  # tokens of their answers
SOAK_CLIENTS, SOAK_NEW = 64, 48
TIE = 0.1  # nats
WAIT = 600  # seconds that a client waits for the next bytes


@dataclass
class Answer:
    """What a client got, and when."""

    sent: float
    times: list[float] = field(default_factory=list)  # of each event with a text
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def rate(self) -> float:
        """Tokens a second after the first one."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """When each of the gaps between two events ended, and how long it was."""
        return [(end, end - begin) for begin, end in zip(self.times, self.times[1:], strict=False)]


class Server:
    """`serve.py --compile` as a process, on a free port, from the moment on when it listens."""

    def __init__(self, folder: Path, device: torch.device, *more: str):
        command, self.environment = compiled_command(HERE / "serve.py", folder, device)
        self.command = [*command, "--port", "0", *more]
        self.start()
        text = "a"
        (*_, last) = self.post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
        self.forced = {"logit_bias": {str(last): 100.0}, "ignore_eos": True}
        self.token = last

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, env=self.environment, stderr=subprocess.PIPE, text=True)
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.fullmatch(r"serving http://127\.0\.0\.1:(\d+)\n", line):
                self.port = int(found[1])
                break
        else:
            raise UserError(f"serve.py fails: {''.join(lines[-3:]).strip()}")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # so that it never waits for a reader

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._sent(path, body) as response:
            return json.loads(response.read())

    def metric(self, name: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])

    def ask(self, prompt: list[int], new: int, drop_after: int | None = None, **more: Any) -> Answer:
        """Streams an answer of `new` tokens, or hangs up after so many events."""
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True, **more}
        answer = Answer(time.perf_counter())
        with self._sent("/v1/completions", body | {"stream_options": {"include_usage": True}}) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {response.read().decode()[:200]}")
            while (line := response.readline()) and not line.startswith(b"data: [DONE]"):
                if not line.startswith(b"data: "):
                    continue
                part = json.loads(line.removeprefix(b"data: "))
                answer.usage = part.get("usage") or answer.usage
                text = part["choices"][0]["text"] if part["choices"] else ""
                if text:
                    answer.times.append(time.perf_counter())
                    answer.text += text
                if drop_after is not None and len(answer.times) >= drop_after:
                    break
        return answer

    @contextlib.contextmanager
    def _sent(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            yield connection.getresponse()

    def memory(self) -> int:
        """Bytes that the process holds (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024


def measure_serving(folder: Path, rounds: int, device: torch.device) -> dict[str, Any]:
    """Medians over the rounds; rates in tokens a second, times in seconds. Each is beside what it is compared with:

    - one client against `generate.py` on a prompt of 256 tokens, both after the first token, taking turns;
    - 16 clients at once against one, prompts of 64 to 512 tokens and answers of 256, from sending to the last token:
      prefills are in it;
    - the time to the first token of a chat's second turn, 2,000 tokens and an answer later, against the first one's;
    - the longest gap between two tokens of 4 streams while a prompt of 4,000 tokens is taken in;
    - from the start of a process after a kill -9, with all that is compiled in the caches, to an answer's first token.
    """
    draw = random.Random(0)
    vocab_size, context = load_config(folder).vocab_size, load_config(folder).context_length

    def prompt(length: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(min(length, context // 2))]

    result: dict[str, Any] = {"generate": [], "one": [], "first_turn": [], "second_turn": [], "gap": [], "restart": []}
    with Server(folder, device, "--batch_size", str(PLACES[0])) as server:
        server.ask(prompt(SHORT), 8, **server.forced)
        for _ in range(rounds):
            result["generate"].append(generate_rate(folder, device))
            result["one"].append(server.ask(prompt(256), 128, **server.forced).rate)
            log(f"one client {result['one'][-1]:.2f} tok/s, generate.py {result['generate'][-1]:.2f}")
        for _ in range(rounds):
            said = prompt(2000)
            result["first_turn"].append(server.ask(said, 32, **server.forced).first)
            said = [*said, *[server.token] * 32, *prompt(32)]
            result["second_turn"].append(server.ask(said, 2, **server.forced).first)
            log(f"turns: {result['first_turn'][-1]:.2f} s, {result['second_turn'][-1]:.3f} s")
        for _ in range(rounds):
            result["gap"].append(longest_gap(server, [prompt(SHORT) for _ in range(4)], prompt(4000)))
            log(f"longest gap {result['gap'][-1]:.3f} s")
        for _ in range(rounds):
            server.stop()
            begun = time.perf_counter()
            server.start()
            result["restart"].append(server.ask(prompt(SHORT), 2, **server.forced).times[0] - begun)
            log(f"restart {result['restart'][-1]:.2f} s")
    for places in PLACES:
        single, together = result[f"single_{places}"], result[f"together_{places}"] = [], []
        with Server(folder, device, "--batch_size", str(places)) as server, ThreadPoolExecutor(CLIENTS) as pool:
            for _ in range(rounds):
                prompts = [prompt(draw.randint(SHORT, LONG)) for _ in range(CLIENTS)]
                begun = time.perf_counter()
                server.ask(prompt((SHORT + LONG) // 2), NEW, **server.forced)
                single.append(NEW / (time.perf_counter() - begun))
                begun = time.perf_counter()
                list(pool.map(lambda ids: server.ask(ids, NEW, **server.forced), prompts))
                together.append(CLIENTS * NEW / (time.perf_counter() - begun))
                log(f"{places} places: {single[-1]:.1f} tok/s, {CLIENTS} clients {together[-1]:.1f}")
    median = {f"{name}_median": statistics.median(values) for name, values in result.items()}
    ratios = {f"times_one_{n}": median[f"together_{n}_median"] / median[f"single_{n}_median"] for n in PLACES}
    ratios["of_generate"] = median["one_median"] / median["generate_median"]
    ratios["of_first_turn"] = median["second_turn_median"] / median["first_turn_median"]
    return result | median | ratios


def generate_rate(folder: Path, device: torch.device) -> float:
    """Tokens a second of generate.py's decode steps."""
    command, environment = compiled_command(GENERATE, folder, device)
    command += ["--json", "--prompt", "256", "--max_new_tokens", "128", "--temperature", "0", "--ignore_eos"]
    output = subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL, text=True)
    return json.loads(output)["stats"]["decode_rate"]


def longest_gap(server: Server, prompts: list[list[int]], long: list[int]) -> float:
    """Seconds, of streams that run while the long prompt is taken in."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        running = [pool.submit(server.ask, ids, 600, **server.forced) for ids in prompts]
        while server.metric("brisk_new_tokens_total") < 1 or server.metric("brisk_requests_running") < len(prompts):
            time.sleep(0.05)
        time.sleep(2)
        asked = server.ask(long, 1, **server.forced)
        streams = [one.result() for one in running]
    during = [gap for stream in streams for end, gap in stream.gaps if asked.sent <= end <= asked.times[0] + 1]
    if asked.times[0] > min(stream.times[-1] for stream in streams):
        raise RuntimeError("a stream ended before the long prompt was taken in")
    return max(during)


def soak(folder: Path, minutes: float, device: torch.device) -> dict[str, Any]:
    """Many clients for so long, of which a third hang up at random -> what was counted.

    Each answer is compared with the one that its prompt had alone. Sums of a batch are rounded in another order than
    those of one row, so where two tokens are about as likely the other one may be drawn: such answers are `ties`, and
    `widest_tie` is how much less likely it was, in nats. An answer that is neither is `wrong`.
    """
    draw = random.Random(0)
    vocab_size = load_config(folder).vocab_size
    prompts = [[draw.randrange(vocab_size) for _ in range(draw.randint(SHORT, LONG))] for _ in range(2 * PLACES[0])]
    counts: dict[str, float] = dict.fromkeys(("answers", "ties", "widest_tie", "wrong", "hung_up"), 0)
    lock = threading.Lock()
    with Server(folder, device, "--batch_size", str(PLACES[0])) as server:
        alone = [Alone(server, ids) for ids in prompts]
        end = time.monotonic() + 60 * minutes

        def client(number: int) -> None:
            own = random.Random(number)
            while time.monotonic() < end:
                which, drop = own.randrange(len(prompts)), own.randint(1, 40) if own.random() < 1 / 3 else None
                answer = server.ask(prompts[which], SOAK_NEW, drop, ignore_eos=True)
                lead = alone[which].lead_where_they_part(answer.text, is_whole=drop is None)
                with lock:
                    counts["answers" if drop is None else "hung_up"] += 1
                    counts["ties"] += lead is not None and lead <= TIE
                    counts["wrong"] += lead is not None and lead > TIE
                    counts["widest_tie"] = max(counts["widest_tie"], lead or 0)

        with ThreadPoolExecutor(SOAK_CLIENTS) as pool:
            clients = [pool.submit(client, number) for number in range(SOAK_CLIENTS)]
            time.sleep(6 * minutes)  # a tenth: all that is allocated once is there by then
            before = server.memory()
            for one in clients:
                one.result()
        time.sleep(2)  # until what was dropped last is free
        busy = server.metric("brisk_requests_running") + server.metric("brisk_requests_waiting")
        return {**counts, "still_busy": busy, "memory_growth": server.memory() / before - 1}


class Alone:
    """The answer that a prompt has while nobody else asks."""

    def __init__(self, server: Server, prompt: list[int]):
        body = {"prompt": prompt, "max_tokens": SOAK_NEW, "temperature": 0, "ignore_eos": True, "logprobs": 2}
        choice = server.post("/v1/completions", body)["choices"][0]
        self.text, self.offsets = choice["text"], choice["logprobs"]["text_offset"]
        tops = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
        self.leads = [top[0] - top[1] for top in tops]  # of the likeliest token over the next one, in nats

    def lead_where_they_part(self, text: str, is_whole: bool) -> float | None:
        """How far ahead the token was that another answer does not have; None where both are the same, as far as the
        other one goes. Of the tokens that the first different character may belong to it takes the closest call."""
        same = len(os.path.commonprefix((text, self.text)))  # noqa: RUF071  that is what is wanted
        if same == len(text) and (same == len(self.text) or not is_whole):
            return None
        last = bisect_right(self.offsets, same)
        return min(self.leads[max(last - 3, 0) : last + 1])
