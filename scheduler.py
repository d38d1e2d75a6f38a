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

from engine import PREFILL_LENGTHS, Engine, Request, Stats, peak_memory
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
    """A request that has a row of the engine."""

    number: int
    request: Request
    at: int  # which row
    detokenizer: StreamingDetokenizer
    stops: StopStrings
    matcher: "Matcher | None"  # of the request's grammar
    stats: Stats = field(default_factory=Stats)
    hidden: list[Tensor] = field(default_factory=list)  # of the prompt so far: all of it to echo, else the last token's
    begun: float = field(default_factory=time.perf_counter)
    cached: int = 0  # tokens of the prompt that were in the row already
    last: int | None = None  # the newest token, which no step has run yet
    done: bool = False

    @property
    def length(self) -> int:
        """Tokens of the whole text so far."""
        return len(self.request.prompt) + self.stats.new_tokens

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
    rows: list[Row | None]  # of the result


class Scheduler:
    """Gives the rows of an engine to requests, first come, first served.

    Prompts are prefilled one after the other, in pieces. Between two steps of other rows come no more than
    `prefill_chunk` tokens of prompts, so that none of them waits for its next token longer than these and a step take.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, prefill_chunk: int = PREFILL_LENGTHS[-1]):
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk {prefill_chunk} is less than a token")
        self.engine, self.tokenizer, self.prefill_chunk = engine, tokenizer, prefill_chunk
        self.stats = engine.stats = Stats(engine.speculates)  # of all requests
        self.waiting: deque[tuple[int, Request]] = deque()
        self.rows: list[Row | None] = [None] * engine.model.max_batch_size
        engine.sampler.park(slice(None))
        self._prefilling: Row | None = None
        self._prefilled = 0  # tokens since the last step
        self._numbers = itertools.count()
        self._overlaps = engine.device.type == "cuda"
        self._unread: Step | None = None  # where steps overlap
        self._clock = 0.0  # when the last prefill or step was read

    @property
    def has_room(self) -> bool:
        """Whether a request that is added now would run at once."""
        return not self.waiting and self._prefilling is None and None in self.rows

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self.waiting and not any(self.rows)

    def add(self, request: Request) -> int:
        """Queues a request -> its number, from 0 on. ValueError where it does not fit the cache."""
        length, limit = len(request.prompt), self.engine.model.max_seq_length
        if not request.prompt or request.max_new_tokens < 1 or length + request.max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {length} tokens and {request.max_new_tokens} new ones do not fit a cache of {limit}"
            )
        number = next(self._numbers)
        self.waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """Drops a request, waiting or running: it gets no more tokens. Does nothing if it has ended."""
        self.waiting = deque(item for item in self.waiting if item[0] != number)
        for row in self.rows:
            if row is not None and row.number == number:
                self._free(row)

    def step(self) -> list[Token]:
        """Runs a piece of a prompt, or a decode step of all rows whose prompts have been run -> the new tokens."""
        free = [at for at, row in enumerate(self.rows) if row is None]
        if self.waiting and free and self._prefilling is None:
            self._admit(*self.waiting[0], free)
            self.waiting.popleft()
        decoding = [row for row in self.rows if row is not None and row is not self._prefilling]
        if self._prefilling is not None:
            if not decoding:
                return self._prefill(self._prefilling, max(self.prefill_chunk, PREFILL_LENGTHS[-1]))
            room = self.prefill_chunk - self._prefilled
            if room >= PREFILL_LENGTHS[0] or self._prefilled == 0:
                # What the device has ready comes first.
                return self._prefill(self._prefilling, room) if self._unread is None else self._read_late()
        self._prefilled = 0
        if decoding:
            return self._decode(decoding)
        self._unread = None
        return []

    def _admit(self, number: int, request: Request, free: list[int]) -> None:
        detokenizer = StreamingDetokenizer(self.tokenizer, request.shown_ids)
        stops = StopStrings(request.stop)
        matcher = None if request.grammar is None else request.grammar.start()
        begun = time.perf_counter()
        row = Row(number, request, self.engine.take(request, free), detokenizer, stops, matcher, begun=begun)
        row.stats.speculates = self.engine.speculates
        row.cached = len(self.engine.places[row.at].tokens)
        self.rows[row.at] = self._prefilling = row

    def _prefill(self, row: Row, most: int) -> list[Token]:
        """Runs the next piece of a prompt, at most so many tokens -> no tokens, or after the last piece the first."""
        begun, request, place = time.perf_counter(), row.request, self.engine.places[row.at]
        before = len(place.tokens)
        hidden = self.engine.prefill(row.at, request, most)
        # The fewest tokens take no less time than some more, since all weights are read.
        self._prefilled += max(len(place.tokens) - before, PREFILL_LENGTHS[0])
        row.hidden = [*row.hidden, hidden] if request.echo else [hidden]
        tokens, drawn = [], None
        if len(place.tokens) == len(request.prompt):
            if row.matcher is not None:
                self.engine.sampler.set_mask(row.at, row.matcher.fill)
            drawn, *top = [part.tolist() for part in self.engine.draw_first(row.at, request, hidden[-1:])]
        elif self.engine.device.type != "cpu":
            hidden[-1, 0].item()  # the device has done it: what follows is timed by itself
        self._clock = time.perf_counter()
        for stats in (row.stats, self.stats):
            stats.prefill_seconds += self._clock - begun
        if drawn is not None:
            self._prefilling = None
            for stats in (row.stats, self.stats):
                stats.add_prompt(len(request.prompt), row.cached, self._clock - row.begun)
                stats.peak_memory = peak_memory(self.engine.device)
            tokens = self._echo(row, torch.cat(row.hidden)) if request.echo else []
            row.hidden = []
            tokens.append(self._put(row, drawn[0][-1], top, 0, 0))
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

    def _decode(self, rows: list[Row]) -> list[Token]:
        constrained = [row for row in rows if row.matcher is not None]
        if constrained and self._unread is not None:
            return self._read_late()  # what may come next depends on it
        for row in constrained:
            self.engine.sampler.set_mask(row.at, row.matcher.fill)
        order = self.engine.fill_up([row.at for row in rows])
        k = 0 if constrained else self.engine.pace.choose(len(order))
        before = self._unread
        for row in rows:
            ahead = 0 if before is None else before.k + 1  # tokens that are not read yet
            place = self.engine.places[row.at]
            place.written = max(place.written, row.length + ahead + k)
        longest = max(row.length for row in rows)
        result = self.engine.step(k, longest + k + 1, order)
        step = Step(result, k, [self.rows[at] if self.rows[at] in rows else None for at in order])
        if not self._overlaps or constrained:
            return self._read(step)
        self._unread = step
        return [] if before is None else self._read(before)

    def _read_late(self) -> list[Token]:
        """The tokens of a step that the device was left alone with, if there is one."""
        step, self._unread = self._unread, None
        return [] if step is None else self._read(step)

    def _read(self, step: Step) -> list[Token]:
        """The tokens of a step, and what it cost."""
        results = step.result[0].tolist()
        top = [part.tolist() for part in step.result[1:]]
        now = time.perf_counter()
        seconds = now - self._clock
        self._clock = now
        active = [(i, row) for i, row in enumerate(step.rows) if row is not None and not row.done]
        right = [results[i][0] for i, _ in active]
        self.engine.learn(step.k, seconds, right, len(step.rows))
        nbytes = self.engine.step_bytes([row.length for _, row in active], step.k)
        self.stats.add_step(seconds, nbytes, step.k, right)
        tokens = []
        for i, row in active:
            row_right, new, *drawn = results[i]
            row.stats.add_step(seconds, nbytes, step.k, [row_right])
            for j in range(new):
                tokens.append(self._put(row, drawn[j], top, i, j))
                if row.done:
                    break
        return tokens

    def _put(self, row: Row, token_id: int, top: list[list], top_row: int, i: int) -> Token:
        """Hands a token to the row's request, and frees the row if it was the last."""
        if row.last is not None:  # it has been run, or this one would not be there
            self.engine.places[row.at].tokens.append(row.last)
        row.last = token_id
        token = row.put(token_id, *logprobs_of(top, top_row, i))
        self.stats.new_tokens += token_id >= 0
        if row.done:
            row.stats.peak_memory = self.stats.peak_memory = peak_memory(self.engine.device)
            self._free(row)
        return token

    def _free(self, row: Row) -> None:
        row.done = True
        self.rows[row.at] = None
        if row is self._prefilling:
            self._prefilling = None
        if row.matcher is not None:
            self.engine.sampler.set_mask(row.at, None)
        self.engine.sampler.park(row.at)
        self.engine.places.touch(row.at)


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
