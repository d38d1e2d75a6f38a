"""Requests in, tokens out: who runs in which row of the engine. Requests come and go at any time.

    for token in generate(engine, tokenizer, requests):  # all of these, as many at a time as the engine has rows
        print(token.text, end="", flush=True)

    scheduler = Scheduler(engine, tokenizer)  # the same step by step
    number = scheduler.add(request)
    while not scheduler.idle:
        for token in scheduler.step():
            print(token.request, token.text)

On CUDA the host reads a step's tokens while the device works on the next step.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine import Engine, Request, Stats, peak_memory
from errors import UserError
from sampling import logprobs
from stopping import StopStrings
from tokenizer import StreamingDetokenizer, Tokenizer

if TYPE_CHECKING:
    from grammar import Matcher

ECHO_TOKENS = 64  # whose logits are computed at once: those of a whole prompt may be gigabytes


@dataclass(frozen=True)
class Token:
    """One token. `text` is what it made certain: whole characters only, sometimes none."""

    request: int  # its number
    id: int
    text: str
    # On a request's last token: "stop" (an end token, a stop string), "length", or "error" where the model has no next
    # token (the id is then -1).
    finish_reason: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their log-probabilities
    of_prompt: bool = False
    stats: Stats | None = None  # on a request's last token


@dataclass(eq=False)
class Row:
    """A request that is running."""

    number: int
    request: Request
    detokenizer: StreamingDetokenizer
    stops: StopStrings
    matcher: "Matcher | None"  # of the request's grammar
    stats: Stats = field(default_factory=Stats)
    done: bool = False

    @property
    def length(self) -> int:
        """Tokens of the whole text so far."""
        return self.request.start + len(self.request.prompt) + self.stats.new_tokens

    def put(self, token_id: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()) -> Token:
        """Takes the next token of the request; -1 where none is possible."""
        if token_id < 0:
            self.done = True
            return Token(self.number, token_id, "", "error", stats=self.stats)
        self.stats.new_tokens += 1
        ended = token_id in self.request.eos_ids
        text = "" if ended else self.detokenizer.put(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)
            ended = ended or self.matcher.finished
        final = ended or self.stats.new_tokens == self.request.max_new_tokens
        text = self.stops.put(text + self.detokenizer.finish() if final else text)
        if final and not self.stops.found:
            text += self.stops.finish()
        reason = None
        if ended or self.stops.found:
            reason = "stop"
        elif final:
            reason = "length"
        self.done = reason is not None
        return Token(self.number, token_id, text, reason, logprob, top, stats=self.stats if self.done else None)


@dataclass(eq=False)
class Step:
    """A step that the device has been given, and who was in which row."""

    result: tuple[Tensor, ...]  # as decode_step returns it
    k: int
    rows: list[Row | None]


class Scheduler:
    """Gives the rows of an engine to requests, first come, first served."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer
        self.stats = engine.stats = Stats(engine.speculates)  # of all requests
        self.waiting: deque[tuple[int, Request]] = deque()
        self.rows: list[Row | None] = [None] * engine.model.max_batch_size
        self._numbers = itertools.count()
        self._overlaps = engine.device.type == "cuda"
        self._unread: Step | None = None  # where steps overlap
        self._clock = 0.0  # when the last prefill or step was read

    @property
    def has_room(self) -> bool:
        """Whether a request that is added now would run at once."""
        return not self.waiting and None in self.rows

    @property
    def idle(self) -> bool:
        return not self.waiting and not any(self.rows)

    def add(self, request: Request) -> int:
        """Queues a request -> its number, from 0 on. ValueError where it does not fit the cache."""
        length, limit = len(request.prompt), self.engine.model.max_seq_length
        if not request.prompt or request.max_new_tokens < 1 or request.start + length + request.max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {length} tokens at {request.start} and {request.max_new_tokens} new ones "
                f"do not fit a cache of {limit}"
            )
        number = next(self._numbers)
        self.waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """Drops a request, waiting or running: it gets no more tokens. Does nothing if it has ended."""
        self.waiting = deque(item for item in self.waiting if item[0] != number)
        for at, row in enumerate(self.rows):
            if row is not None and row.number == number:
                self._free(at, row)

    def step(self) -> list[Token]:
        """Prefills a waiting request if a row is free, otherwise decodes a step of all rows -> the new tokens."""
        if self.waiting and None in self.rows:
            return self._prefill(self.rows.index(None), *self.waiting.popleft())
        if any(self.rows):
            return self._decode()
        self._unread = None
        return []

    def _prefill(self, at: int, number: int, request: Request) -> list[Token]:
        begun = time.perf_counter()
        matcher = None if request.grammar is None else request.grammar.start()
        row = Row(number, request, StreamingDetokenizer(self.tokenizer), StopStrings(request.stop), matcher)
        row.stats.speculates = self.engine.speculates
        if matcher is not None:
            self.engine.sampler.set_mask(at, matcher.fill)
        first, *top, hidden = self.engine.start(at, request)
        token_id = int(first[0, -1])
        self.rows[at] = row
        seconds = time.perf_counter() - begun
        for stats in (row.stats, self.stats):
            stats.add_prefill(len(request.prompt), seconds)
            stats.peak_memory = peak_memory(self.engine.device)
        tokens = self._echo(row, hidden) if request.echo else []
        tokens.append(self._put(at, row, token_id, [part.tolist() for part in top], 0, 0))
        self._clock = time.perf_counter()
        return tokens

    @torch.no_grad()
    def _echo(self, row: Row, hidden: Tensor) -> list[Token]:
        """The prompt's tokens; from the second on with their log-probabilities."""
        prompt, detokenizer, engine = row.request.prompt, StreamingDetokenizer(self.tokenizer), self.engine
        tokens = [Token(row.number, prompt[0], detokenizer.put(prompt[0]), of_prompt=True)]
        for first in range(1, len(prompt), ECHO_TOKENS):
            ids = prompt[first : first + ECHO_TOKENS]
            top = []
            if engine.logprobs is not None:
                logits = engine.model.logits(hidden[None, first - 1 : first - 1 + len(ids)])
                chosen = torch.tensor([ids], device=engine.device)
                top = [part.tolist() for part in logprobs(logits, chosen, engine.logprobs)]
            for i, token_id in enumerate(ids):
                text = detokenizer.put(token_id)
                if first + i == len(prompt) - 1:
                    text += detokenizer.finish()
                tokens.append(Token(row.number, token_id, text, None, *logprobs_of(top, 0, i), of_prompt=True))
        return tokens

    def _decode(self) -> list[Token]:
        constrained = [(at, row) for at, row in enumerate(self.rows) if row and row.matcher is not None]
        if constrained and self._unread is not None:  # what may come next depends on it
            step, self._unread = self._unread, None
            return self._read(step)
        for at, row in constrained:
            self.engine.sampler.set_mask(at, row.matcher.fill)
        k = 0 if constrained else self.engine.pace.choose()
        longest = max(row.length for row in self.rows if row)
        step = Step(self.engine.step(k, longest + k + 1), k, list(self.rows))
        if not self._overlaps or constrained:
            return self._read(step)
        before = self._unread
        self._unread = step
        return [] if before is None else self._read(before)

    def _read(self, step: Step) -> list[Token]:
        """The tokens of a step, and what it cost."""
        results = step.result[0].tolist()
        top = [part.tolist() for part in step.result[1:]]
        now = time.perf_counter()
        seconds = now - self._clock
        self._clock = now
        active = [(at, row) for at, row in enumerate(step.rows) if row is not None and not row.done]
        right = [results[at][0] for at, _ in active]
        self.engine.learn(step.k, seconds, right)
        nbytes = self.engine.step_bytes([row.length for _, row in active], step.k)
        self.stats.add_step(seconds, nbytes, step.k, right)
        tokens = []
        for at, row in active:
            row_right, new, *drawn = results[at]
            row.stats.add_step(seconds, nbytes, step.k, [row_right])
            for i in range(new):
                tokens.append(self._put(at, row, drawn[i], top, at, i))
                if row.done:
                    break
        return tokens

    def _put(self, at: int, row: Row, token_id: int, top: list[list], top_row: int, i: int) -> Token:
        """Hands a token to the row's request, and frees the row if it was the last."""
        token = row.put(token_id, *logprobs_of(top, top_row, i))
        self.stats.new_tokens += token_id >= 0
        if row.done:
            row.stats.peak_memory = self.stats.peak_memory = peak_memory(self.engine.device)
            self._free(at, row)
        return token

    def _free(self, at: int, row: Row) -> None:
        row.done = True
        self.rows[at] = None
        if row.matcher is not None:
            self.engine.sampler.set_mask(at, None)
        self.engine.sampler.park(at, row.request.start + len(row.request.prompt))


def generate(engine: Engine, tokenizer: Tokenizer, requests: Iterable[Request]) -> Iterator[Token]:
    """Continues the requests, as many at a time as the engine has rows; yields their tokens as they come.

    A request is taken when there is a row for it. What it yields does not depend on the others. `engine.stats` says how
    fast they went. Raises ValueError for a request that does not fit the cache, and UserError when the model has no
    next token.
    """
    scheduler, requests = Scheduler(engine, tokenizer), iter(requests)
    while True:
        request = next(requests, None) if scheduler.has_room else None
        if request is not None:
            scheduler.add(request)
        elif scheduler.idle:
            return
        for token in scheduler.step():
            if token.finish_reason == "error":
                raise UserError(
                    f"prompt {token.request + 1}: after {token.stats.new_tokens} new tokens no token is possible: the "
                    "model's logits are NaN or all -inf (is the checkpoint broken?), or everything is banned"
                )
            yield token


def logprobs_of(top: list[list], row: int, i: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Token i of a row in what sampling.logprobs returned: its log-probability, and (id, value) of the likeliest."""
    if not top:
        return None, ()
    chosen, values, ids = top
    return chosen[row][i], tuple(zip(ids[row][i], values[row][i], strict=True))
