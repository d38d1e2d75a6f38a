"""Between the thread of HTTP and the one that computes: requests one way, tokens the other.

    service = Service(Computer(scheduler, group, top_logprobs=20, grammars), max_waiting=128)
    service.run()                                  # in the main thread, until it is stopped

    stream = service.submit(requests)              # all the rest in the event loop's thread
    while tokens := await stream.get(): ...        # [(index of the request, Token), ...]
    service.cancel(stream)

The main thread alone calls the scheduler; what it is to do comes through a queue. Tokens go to the event loop once a
step, all together, and there to the client's own stream: a client that reads slowly lets its own pile up, no more than
its requests may have, and nobody waits for it. Of several ranks this one tells the others what it is told, and all
compute the same.
"""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

import torch

from engine import Request
from grammar import Grammars
from scheduler import Scheduler, Token
from tp import Group

SHUTTING_DOWN = "the server is shutting down"


@dataclass(frozen=True)
class Add:
    """A request to run; `key` is its name from now on."""

    key: int
    request: Request
    logprobs: bool


@dataclass(frozen=True)
class Cancel:
    """The end of a request."""

    key: int


@dataclass(frozen=True)
class End:
    """The last command."""


Command = Add | Cancel | End


class Computer:
    """A scheduler that follows commands. Every rank has one, and all are given the same."""

    def __init__(self, scheduler: Scheduler, group: Group, top_logprobs: int, grammars: Callable[[], Grammars]):
        """top_logprobs: how many of the likeliest tokens come with each one, while a request wants log-probabilities.
        grammars: called where a request of another rank's has one."""
        self.scheduler, self.group, self.top_logprobs, self.grammars = scheduler, group, top_logprobs, grammars
        self.numbers: dict[int, int] = {}  # of running and waiting requests: key -> the scheduler's number
        self.keys: dict[int, int] = {}  # and back
        self.scored: set[int] = set()  # keys of those that want log-probabilities

    def follow(self) -> None:
        """What the other ranks do: the same as rank 0, to the end."""
        while self.round(list) is not None:
            pass

    def round(self, take: Callable[[], list[Command]]) -> list[tuple[int, Token]] | None:
        """Does what rank 0's `take` returns, then a step -> the new tokens, each with its request's key; None at the
        end."""
        for command in self._agree(take):
            match command:
                case Add(key, request, logprobs):
                    if request.grammar is not None and self.group.rank > 0:
                        request = replace(request, grammar=self.grammars().bind(request.grammar))
                    number = self.scheduler.add(request)
                    self.numbers[key], self.keys[number] = number, key
                    if logprobs:
                        self.scored.add(key)
                case Cancel(key) if key in self.numbers:
                    self.scheduler.cancel(self.numbers[key])
                    self._forget(key)
                case End():
                    return None
        self.scheduler.engine.logprobs = self.top_logprobs if self.scored else None
        tokens = [(self.keys[token.request], token) for token in self.scheduler.step()]
        for key, token in tokens:
            if token.finish_reason is not None:
                self._forget(key)
        return tokens

    def _forget(self, key: int) -> None:
        del self.keys[self.numbers.pop(key)]
        self.scored.discard(key)

    def _agree(self, take: Callable[[], list[Command]]) -> list[Command]:
        """What `take` returns on rank 0."""
        if self.group.size == 1 or self.scheduler.idle:
            return self.group.from_rank_0(take)  # which may take its time
        commands = take() if self.group.rank == 0 else []
        some = torch.tensor([float(bool(commands))], device=self.group.device)
        return self.group.from_rank_0(lambda: commands) if self.group.all_reduce(some).item() else []


class Refused(Exception):
    """A request that is not accepted, or was ended. `status`: of HTTP. The message is for the client."""

    def __init__(self, status: int, message: str):
        super().__init__(status, message)
        self.status, self.message = status, message

    def again(self) -> "Refused":
        """The same, to be raised once more."""
        return Refused(self.status, self.message)


@dataclass(eq=False)
class Stream:
    """The tokens of the requests of one client's call, as they come."""

    keys: list[int]
    open: set[int]  # the indices of the requests that have not ended
    ready: deque[tuple[int, Token]] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    error: Refused | None = None

    async def get(self) -> list[tuple[int, Token]]:
        """What has come since the last call, at least one token, each with the index of its request; nothing at the
        end. Raises Refused where the rest will not come."""
        while not self.ready:
            if not self.open:
                return []
            if self.error is not None:
                raise self.error.again()
            self.changed.clear()
            await self.changed.wait()
        tokens = list(self.ready)
        self.ready.clear()
        return tokens

    def put(self, index: int, token: Token) -> None:
        """Adds a token of one of the requests."""
        if index in self.open:
            self.ready.append((index, token))
            if token.finish_reason is not None:
                self.open.discard(index)
            self.changed.set()

    def fail(self, error: Refused) -> None:
        """No more tokens will come, for this reason."""
        self.error = error
        self.changed.set()


class Service:
    """Runs the requests of all clients."""

    def __init__(self, computer: Computer, max_waiting: int):
        """max_waiting: requests beyond those that have a row."""
        self.computer = computer
        self.rows = len(computer.scheduler.rows)
        self.capacity = self.rows + max_waiting
        self.loop: asyncio.AbstractEventLoop | None = None  # of HTTP, once that runs
        self.commands: SimpleQueue[Command | None] = SimpleQueue()  # None only wakes who waits for one
        self.refusal: Refused | None = None  # of what comes from now on
        self.deadline: float | None = None  # once it is to end
        # Of the event loop's thread
        self.streams: set[Stream] = set()  # those that are open
        self.places: dict[int, tuple[Stream, int]] = {}  # key -> whose tokens those are
        self.keys = itertools.count()
        self.cancelled = 0  # requests whose clients went away

    # In the event loop's thread

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return len(self.places)

    def submit(self, requests: list[Request], logprobs: bool = False) -> Stream:
        """Takes all of the requests, or raises Refused."""
        count = len(requests)
        if self.refusal is not None:
            raise self.refusal.again()
        if count > self.capacity:
            raise Refused(400, f"{count} choices are more than may run and wait, {self.capacity}; ask for fewer")
        if self.load + count > self.capacity:
            raise Refused(429, f"{self.load} requests are running or waiting, and no more may; try again later")
        stream = Stream([next(self.keys) for _ in requests], set(range(count)))
        self.streams.add(stream)
        for index, (key, request) in enumerate(zip(stream.keys, requests, strict=True)):
            self.places[key] = stream, index
            self.commands.put(Add(key, request, logprobs))
        return stream

    def finish(self, stream: Stream, index: int) -> None:
        """No more tokens of one of a stream's requests are wanted."""
        if index in stream.open:
            stream.open.discard(index)
            del self.places[stream.keys[index]]
            self.commands.put(Cancel(stream.keys[index]))

    def cancel(self, stream: Stream) -> None:
        """Ends what is left of a stream, if anything is."""
        self.streams.discard(stream)
        self.cancelled += len(stream.open)
        for index in list(stream.open):
            self.finish(stream, index)

    def _deliver(self, tokens: list[tuple[int, Token]]) -> None:
        for key, token in tokens:
            if key in self.places:  # otherwise it was cancelled meanwhile
                stream, index = self.places[key]
                stream.put(index, token)
                if token.finish_reason is not None:
                    del self.places[key]

    def _fail(self, error: Refused) -> None:
        self.refusal = error
        for stream in self.streams:
            stream.fail(error)

    # In the main thread

    def run(self) -> None:
        """Computes until `stop` is called and all is done, or time is up. An exception ends all requests."""
        error = Refused(503, SHUTTING_DOWN)
        try:
            while (tokens := self.computer.round(self._take)) is not None:
                if tokens:
                    self._call(self._deliver, tokens)
        except Exception:
            error = Refused(500, "the server has failed, and ends")
            raise
        finally:
            self._call(self._fail, error)

    def stop(self, grace: float) -> None:
        """Lets `run` end, at the latest after so many seconds. May be called by a signal's handler."""
        self.refusal = Refused(503, SHUTTING_DOWN)
        self.deadline = time.monotonic() + grace
        self.commands.put(None)

    def _take(self) -> list[Command]:
        """What has been asked for meanwhile; while there is nothing else to do, waits for it."""
        taken: list[Command | None] = []
        while True:
            idle = self.computer.scheduler.idle and not taken
            try:
                taken.append(self.commands.get(block=idle and self.deadline is None))
            except Empty:
                break
        if self.deadline is not None and (idle or time.monotonic() >= self.deadline):
            taken.append(End())
        return [command for command in taken if command is not None]

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        """Has the event loop call a function, if it still runs."""
        try:
            self.loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # it has ended
            self.refusal = self.refusal or Refused(503, SHUTTING_DOWN)
