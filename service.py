"""Between the thread of HTTP and the one that computes: requests one way, tokens the other.

    service = Service(scheduler, max_waiting=128)
    service.run()                                  # in the main thread, until it is stopped

    stream = service.submit(requests)              # all the rest in the event loop's thread
    async for index, token in stream: ...
    service.cancel(stream)

The main thread alone calls the scheduler; what it is to do comes through a queue. Tokens go to the event loop once a
step, all together, and there to the client's own stream: a client that reads slowly lets its own pile up, no more than
its requests may have, and nobody waits for it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from engine import Request
from scheduler import Scheduler, Token

SHUTTING_DOWN = "the server is shutting down"


class Refused(Exception):
    """A request that is not taken, or not gone on with. `status`: of HTTP. The message is for the client."""

    def __init__(self, status: int, message: str):
        super().__init__(status, message)
        self.status, self.message = status, message

    def again(self) -> "Refused":
        """The same, to be raised once more."""
        return Refused(self.status, self.message)


@dataclass(eq=False)
class Stream:
    """The tokens of one client's requests, as they come."""

    requests: list[Request]
    logprobs: bool
    numbers: dict[int, int] = field(default_factory=dict)  # the scheduler's number of each request that runs -> index
    open: set[int] = field(default_factory=set)  # the indices of those that have not ended
    ready: deque[tuple[int, Token]] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    error: Refused | None = None

    async def get(self) -> list[tuple[int, Token]]:
        """What has come since the last call, at least one token, each with the index of its request; nothing at the
        end. Raises Refused where the rest will not come."""
        while not self.ready:
            if self.error is not None:
                raise self.error.again()
            if not self.open:
                return []
            self.changed.clear()
            await self.changed.wait()
        tokens = list(self.ready)
        self.ready.clear()
        return tokens

    def put(self, index: int, token: Token) -> None:
        self.ready.append((index, token))
        if token.finish_reason is not None:
            self.open.discard(index)
        self.changed.set()

    def fail(self, error: Refused) -> None:
        self.error = error
        self.changed.set()


class Service:
    """Runs the requests of all clients."""

    def __init__(self, scheduler: Scheduler, max_waiting: int, top_logprobs: int):
        """max_waiting: requests beyond those that have a row. top_logprobs: how many of the likeliest tokens come with
        a token of a request that wants log-probabilities."""
        self.scheduler, self.top_logprobs = scheduler, top_logprobs
        self.rows = len(scheduler.rows)
        self.capacity = self.rows + max_waiting
        self.loop: asyncio.AbstractEventLoop | None = None  # of HTTP, once that runs
        self.streams: set[Stream] = set()  # of the event loop's thread: those that are open
        self.cancelled = 0  # requests whose clients went away
        self.refusal: Refused | None = None  # of what comes from now on
        self.commands: SimpleQueue[tuple[str, Stream | None, Set[int]]] = SimpleQueue()
        self.deadline: float | None = None  # once it is to end
        self.running: dict[int, Stream] = {}  # of the main thread: by the scheduler's numbers

    # In the event loop's thread

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return sum(len(stream.open) for stream in self.streams)

    def submit(self, requests: list[Request], logprobs: bool = False) -> Stream:
        """Takes all of the requests, or raises Refused."""
        if self.refusal is not None:
            raise self.refusal.again()
        if len(requests) > self.capacity:
            raise Refused(
                400, f"{len(requests)} choices are more than the {self.capacity} that may wait; ask for fewer"
            )
        if self.load + len(requests) > self.capacity:
            raise Refused(429, f"{self.load} requests are running or waiting, and no more may; try again later")
        stream = Stream(requests, logprobs, open=set(range(len(requests))))
        self.streams.add(stream)
        self.commands.put(("add", stream, frozenset(stream.open)))
        return stream

    def cancel(self, stream: Stream, index: int | None = None) -> None:
        """Ends one request of a stream, or all that is left of it."""
        ended = stream.open & ({index} if index is not None else stream.open)
        stream.open -= ended
        if index is None:
            self.streams.discard(stream)
            self.cancelled += len(ended)
        if ended:
            self.commands.put(("cancel", stream, ended))

    def _deliver(self, tokens: list[tuple[Stream, int, Token]]) -> None:
        for stream, index, token in tokens:
            stream.put(index, token)

    def _fail(self, error: Refused) -> None:
        self.refusal = error
        for stream in self.streams:
            stream.fail(error)

    # In the main thread

    def run(self) -> None:
        """Computes until `stop` is called and all is done, or time is up. An exception ends all requests."""
        try:
            while True:
                self._obey()
                if self.deadline is not None and (self.scheduler.idle or time.monotonic() >= self.deadline):
                    break
                self._step()
            error = Refused(503, SHUTTING_DOWN)
        except BaseException as failure:
            interrupted = isinstance(failure, KeyboardInterrupt)
            error = Refused(503, SHUTTING_DOWN) if interrupted else Refused(500, "the server has failed, and ends")
            raise
        finally:
            self._call(self._fail, error)

    def stop(self, grace: float) -> None:
        """Lets `run` end, at the latest after so many seconds. May be called by a signal's handler."""
        self.refusal = Refused(503, SHUTTING_DOWN)
        self.deadline = time.monotonic() + grace
        self.commands.put(("wake", None, frozenset()))

    def _obey(self) -> None:
        """Does what has been asked for meanwhile; while there is nothing else to do, waits for it."""
        wait = self.scheduler.idle and self.deadline is None
        while True:
            try:
                kind, stream, indices = self.commands.get(block=wait)
            except Empty:
                return
            wait = False
            if kind == "add":
                for index, request in enumerate(stream.requests):
                    number = self.scheduler.add(request)
                    stream.numbers[number] = index
                    self.running[number] = stream
            elif kind == "cancel":
                for number in [number for number, index in stream.numbers.items() if index in indices]:
                    self.scheduler.cancel(number)
                    self._forget(number)

    def _step(self) -> None:
        wanted = any(stream.logprobs for stream in self.running.values())
        self.scheduler.engine.logprobs = self.top_logprobs if wanted else None
        tokens = []
        for token in self.scheduler.step():
            stream = self.running[token.request]
            tokens.append((stream, stream.numbers[token.request], token))
            if token.finish_reason is not None:
                self._forget(token.request)
        if tokens:
            self._call(self._deliver, tokens)

    def _forget(self, number: int) -> None:
        stream = self.running.pop(number)
        del stream.numbers[number]

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        """Has the event loop call a function, if it still runs."""
        try:
            self.loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # it has ended
            self.refusal = Refused(503, SHUTTING_DOWN)
