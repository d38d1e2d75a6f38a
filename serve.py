"""A checkpoint behind OpenAI's API, for many clients at once, and a page to chat on.

    python serve.py                                                            # the embedded demo model
    python serve.py --compile --checkpoint_path checkpoints/meta-llama/Llama-3.2-1B-Instruct --batch_size 8
    torchrun --standalone --nproc_per_node 4 serve.py --compile --checkpoint_path ...          # a part on each GPU

Any client of OpenAI's works with http://127.0.0.1:8000/v1, and http://127.0.0.1:8000/ is the page. The main thread
computes, another one is the HTTP server; what stands between them is in server/: service.py has the queues between the
two, endpoints.py the endpoints, front.py what all requests pass, api.py what a client may ask for, answers.py what it
is told.
"""

import errors  # first, so that Ctrl-C is quiet while torch is imported

# isort: split
import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from arguments import add_adapters, add_device, add_model, add_speed, named_adapters
from attention import DECODE_QUERIES
from checkpoint import CHECKPOINTS, checksum, load_generation_config
from engine import Engine, cache_bytes
from errors import ArgumentParser, UserError, count, log
from files import check_memory, read_text
from generate import described, find_models, load_models
from lora_layers import Adapters, read_adapters
from prompts import Target, image_options
from scheduler import Scheduler
from server.api import MAX_LOGPROBS, Model, make_model
from server.endpoints import make_app
from server.front import Access
from server.service import Computer, Service
from tp import Group, join

LENGTH = 8192  # of a conversation, where the model's context is longer and no other is asked for
ELSEWHERE = ("checkpoint_path", "draft_checkpoint_path", "adapters", "api_key_file")  # what may differ between ranks
PAGE = Path(__file__).parent / "web" / "index.html"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LAST_WORDS = 5.0  # seconds in which clients may still take what has been said when the server ends
KEEP_ALIVE = 75  # seconds for which a connection without a request stays open


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Serve a checkpoint behind OpenAI's API.")
    add = parser.add_argument
    add_model(parser)
    add_adapters(parser, "--adapters", "NAME=PATH", 'a request chooses by `model`: "BASE:NAME"')
    add("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0: all of this machine's")
    add("--port", type=port, default=8000, help="0 takes a free one")
    add("--batch_size", type=count, default=8, help="requests that run at once")
    add("--max_waiting", type=number, default=128, help="requests that may wait for them; then clients are sent away")
    add("--max_seq_length", type=count, help=f"of a prompt and its answer; default: the context, at most {LENGTH}")
    add("--prefill_chunk", type=count, default=64, help="tokens of a prompt between two decode steps")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--api_key", metavar="KEY", help="what clients have to send; default: nothing")
    keys.add_argument("--api_key_file", type=Path, metavar="FILE", help="the same, one key a line")
    add("--cors", nargs="+", metavar="ORIGIN", help="web sites whose pages may use the server; * is any")
    add(
        "--grace",
        type=seconds,
        default=25.0,
        help="seconds for requests to end in after SIGTERM; torchrun waits 30",
    )
    add("--merge_system", action="store_true", help="system messages become part of the user's first one")
    add("--allow_image_urls", action="store_true", help="fetch images that clients name by URL, from public addresses")
    add_speed(parser)
    add_device(parser)
    args = parser.parse_args()
    args.adapters, _ = named_adapters(args.adapters)
    if args.speculate_k is not None:
        if not 0 <= args.speculate_k < DECODE_QUERIES:
            raise UserError(f"--speculate_k {args.speculate_k} is out of range; it must be below {DECODE_QUERIES}")
        if not (args.draft_checkpoint_path or args.prompt_lookup):
            raise UserError("--speculate_k needs --draft_checkpoint_path or --prompt_lookup; add it")
    return args


def port(text: str) -> int:
    return number(text, 65535)


def number(text: str, most: int = 2**31 - 1) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 11 else -1
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a number from 0 to {most}")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a number of seconds")
    return value


def main() -> None:
    args = parse_args()
    keys = read_keys(args)
    access = Access(keys, tuple(args.cors or ()), local=not keys and args.host in LOOPBACK)
    with join(args.device, args.backend, args.threads) as group:
        if group.rank == 0:
            with listening(args.host, args.port) as listener:
                lead(args, group, access, listener)
        else:
            computer, _ = load(args, group)
            signal.signal(signal.SIGTERM, lambda *_: None)  # rank 0 says when to end
            computer.follow()


def read_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """The keys that clients may use, none where none were asked for. UserError for empty ones."""
    if args.api_key_file is None:
        keys = [] if args.api_key is None else [args.api_key.strip()]
    else:
        keys = [line.strip() for line in read_text(args.api_key_file).splitlines() if line.strip()]
    if not all(keys) or (args.api_key_file and not keys):
        raise UserError("the API key is empty; give one, or leave out --api_key and --api_key_file")
    return tuple(keys)


def listening(host: str, port: int) -> socket.socket:
    """A socket at the address, which does not listen yet: while the model loads, clients are refused at once."""
    with refused_address(host, port):
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    return listener


@contextlib.contextmanager
def refused_address(host: str, port: int) -> Iterator[None]:
    """An OSError inside is a UserError about the address."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; choose another") from error


def lead(args: argparse.Namespace, group: Group, access: Access, listener: socket.socket) -> None:
    """Loads the model, and serves it until a signal ends that."""
    computer, model = load(args, group)
    service = Service(computer, args.max_waiting)
    server = HttpServer(make_app(service, model, access, PAGE), service, listener)
    signal.signal(signal.SIGTERM, lambda *_: server.stop(args.grace))
    if not access.keys and args.host not in LOOPBACK:
        log(f"warning: anybody who reaches {args.host} can use this server; --api_key asks for a key")
    sys.setswitchinterval(0.001)  # seconds that the thread that computes waits for another one's Python
    gc.collect()
    gc.freeze()  # what there is by now stays: no collection has to look at it
    with refused_address(args.host, args.port):
        listener.listen()  # another server may have loaded at the same time
    server.start()
    try:
        service.run()
    finally:
        server.end()


def load(args: argparse.Namespace, group: Group) -> tuple[Computer, Model]:
    """The computer, warmed up, and its model as clients see it."""
    begun = time.perf_counter()
    paths, config, tokenizer, context = find_models(args)
    tokenizer.check_chat_template()
    path = paths[0]
    group.check_flags(args, ELSEWHERE, lambda: list(map(checksum, paths)))
    adapters = read_adapters(args.adapters, path.parent)
    length = args.max_seq_length or min(context, LENGTH)
    models = load_models(args, paths, [group, group])
    inserted = Adapters(models[0], config, adapters, args.adapter_scale, group)
    del adapters  # whose matrices are float32
    needed = group.sharing * sum(cache_bytes(model, args.batch_size, length) for model in models)
    check_memory(needed, f"the KV cache for {args.batch_size} x {length} tokens", group.device)
    draft = models[1] if args.draft_checkpoint_path else None
    speculation = draft, args.speculate_k, args.prompt_lookup
    engine = Engine(models[0], args.compile, args.compile_prefill, *speculation, inserted)
    recommended = load_generation_config(path.parent)
    eos_ids = frozenset([*recommended["eos_token_ids"], *tokenizer.eos_ids])
    engine.setup(args.batch_size, length, eos_ids=eos_ids)
    log(f"loaded {path.parent} ({described(models, group)}) in {time.perf_counter() - begun:.1f} s")
    warm_up(engine)
    if not tokenizer.has_chat_template:
        log("this model has no chat template: chats are continued as plain text")
    limited_by, images = "context" if length == context else "cache", image_options(path.parent, config)
    target = Target(tokenizer, config.vocab_size, eos_ids, length, limited_by, tuple(inserted.names), images)
    model = make_model(name_of(path.parent), target, recommended, args.merge_system, args.allow_image_urls)
    scheduler = Scheduler(engine, tokenizer, args.prefill_chunk)
    return Computer(scheduler, group, MAX_LOGPROBS, lambda: target.grammars), model


def warm_up(engine: Engine) -> None:
    """Compiles all steps that may be needed, with log-probabilities and without."""
    if not engine.compiles_steps and not engine.fixed_lengths:
        return
    log("warming up ... (the first time, this compiles)")
    spent = engine.warm_up(constrained=True)
    engine.logprobs = MAX_LOGPROBS
    spent += engine.warm_up(constrained=True)
    engine.logprobs = None
    log(f"warmed up in {spent:.1f} s")


def name_of(folder: Path) -> str:
    """What clients call the model: ORG/NAME if it was converted, otherwise its folder, without the path to it."""
    folder, checkpoints = folder.resolve(), CHECKPOINTS.resolve()
    return folder.relative_to(checkpoints).as_posix() if folder.is_relative_to(checkpoints) else folder.name


class HttpServer:
    """uvicorn in a thread of its own."""

    def __init__(self, app: FastAPI, service: Service, listener: socket.socket):
        for name in ("uvicorn", "asyncio"):  # what they tell may hold what clients sent
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
        options |= {"lifespan": "off", "ws": "none", "timeout_keep_alive": KEEP_ALIVE}
        self.service, self.listener = service, listener
        self.server = uvicorn.Server(uvicorn.Config(app, **options))
        self.thread = threading.Thread(target=self._run, name="http", daemon=True)
        self.started = threading.Event()
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Returns when clients can connect."""
        self.thread.start()
        self.started.wait()
        if self.thread.is_alive():
            host, port = self.listener.getsockname()[:2]
            log(f"serving http://{f'[{host}]' if ':' in host else host}:{port}")

    def stop(self, grace: float) -> None:
        """Takes no more connections, and lets the service end. May be called by a signal's handler."""
        self.server.should_exit = True
        self.service.stop(grace)

    def end(self) -> None:
        """Gives clients a moment to read what they were sent. Raises what ended the thread, if it failed."""
        self.server.should_exit = True
        self.thread.join(LAST_WORDS)
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self.failure = error
        finally:
            self.started.set()
            self.service.stop(0)

    async def _serve(self) -> None:
        self.service.loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self.server.serve(sockets=[self.listener]))
        while not self.server.started and not serving.done():
            await asyncio.sleep(0.01)
        self.started.set()
        await serving


if __name__ == "__main__":
    errors.run(main)
