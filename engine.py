"""From token ids to token ids: prefill in chunks, then compiled steps that move every row of a batch on.

    engine = Engine(load_model(path), compile=True)
    engine.setup(batch_size=1, max_seq_length=1024)
    engine.warm_up()  # compiles; with speculation also times its steps
    request = Request(tokenizer.encode("Hello"), SamplingParams(temperature=0.8), max_new_tokens=100)
    for token in generate(engine, tokenizer, [request]):
        print(token.text, end="", flush=True)

A step is the model's logits of the last tokens, sampled inside the same compiled function: decode_step, speculate.py.
Where a text has ended the row takes the next request. On CUDA the host reads a step's tokens while the device works on
the next step.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compiled import CompiledFunction, fresh, kernels_together, prepare_compiler, without_collection
from errors import UserError
from kernels import Int4Linear, Int8Linear
from model import Transformer
from sampling import Sampler, SamplingParams, logprobs
from speculate import AUTO, CAUGHT_UP, Pace, catch_up, decode_step, scored
from stopping import StopStrings
from tokenizer import StreamingDetokenizer, Tokenizer
from tp import ALONE

PREFILL_LENGTHS = (32, 128, 512)  # tokens a chunk; a compiled prefill pads to one of them, so it compiles these shapes


@dataclass(frozen=True)
class Request:
    """A prompt, and what is wanted of its continuation."""

    prompt: list[int]
    params: SamplingParams
    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()  # the text ends at any of these tokens,
    stop: tuple[str, ...] = ()  # and before the first of these strings
    context: tuple[int, ...] = ()  # what the cache holds already (of a batch of one): the prompt goes on from there
    echo: bool = False  # yields the prompt's tokens too, with their log-probabilities

    @property
    def start(self) -> int:
        return len(self.context)


@dataclass
class Stats:
    """How fast one request, or all of a run, went. Seconds and bytes."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    requests: int = 0
    time_to_first_token: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    bytes_read: int = 0  # weights and cache that the steps read
    steps: int = 0  # of a row
    proposed: int = 0  # tokens, and how many of them were right, where steps speculate
    accepted: int = 0
    peak_memory: int = 0

    def report(self) -> dict[str, float]:
        """What is worth telling: counts, seconds, rates per second."""
        decoding = max(self.decode_seconds, 1e-9)
        figures = {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "time_to_first_token": self.time_to_first_token,
            "prefill_rate": self.prompt_tokens / max(self.prefill_seconds, 1e-9),
            "decode_rate": (self.new_tokens - self.requests) / decoding,
            "gigabytes_read_rate": self.bytes_read / decoding / 1e9,
            "peak_memory_gb": self.peak_memory / 1e9,
        }
        if self.proposed:
            figures["acceptance_rate"] = self.accepted / self.proposed
            figures["mean_accepted_length"] = self.accepted / self.steps
        return figures

    def __str__(self) -> str:
        figures = self.report()
        return (
            "prefill {prompt_tokens} tokens, {prefill_rate:.1f} tok/s · decode {new_tokens} tokens, {decode_rate:.1f} "
            "tok/s, {gigabytes_read_rate:.1f} GB/s · first token after {time_to_first_token:.2f} s · peak memory "
            "{peak_memory_gb:.2f} GB"
            + (" · accepted {acceptance_rate:.0%}, {mean_accepted_length:.2f} a step" if self.proposed else "")
        ).format(**figures)


# ---------------------------------------------------------------------------------------------------------------------
# The engine: models, their caches, compiled functions


def fixed_length(length: int) -> int:
    """What a chunk of so many tokens is padded to for a compiled prefill."""
    return min(fixed for fixed in PREFILL_LENGTHS if fixed >= length)


class Engine:
    """Prefill and decode of one model, and of its draft. Compiled code belongs to the engine."""

    def __init__(
        self,
        model: Transformer,
        compile: bool = False,
        compile_prefill: bool = False,
        draft: Transformer | None = None,
        speculate_k: int | None = None,
        prompt_lookup: bool = False,
    ):
        """`speculate_k` tokens are proposed a step, by default as many as turn out well."""
        self.model, self.draft, self.lookup = model, draft, prompt_lookup
        # Of a model in parts all ranks have an engine, and do the same with it.
        self.group = ALONE if model.vocabulary is None else model.vocabulary.group
        self.device = model.tok_embeddings.weight.device
        self.compiles_steps, self.fixed_lengths = compile, compile_prefill
        choices: tuple[int, ...] = (0,)
        if draft is not None or prompt_lookup:
            choices = AUTO["lookup" if draft is None else "draft"] if speculate_k is None else (speculate_k,)
        self.pace = Pace(choices)
        if choices != (0,) and model.config.rope.type == "dynamic":
            raise UserError(
                "proposed tokens would change the rotation of dynamic RoPE scaling, and with it the text; "
                "leave out --draft_checkpoint_path and --prompt_lookup"
            )
        if compile_prefill and self.device.type == "cpu":
            prepare_compiler()
        self._hidden = {model: model.hidden for model in self.models}
        self.stats = Stats()

    @property
    def models(self) -> list[Transformer]:
        return [self.model] if self.draft is None else [self.model, self.draft]

    def compile(self, function: Callable) -> Callable:
        """The function, compiled if that is what was asked for, until the next `setup`."""
        if not self.compiles_steps:
            return function
        if function not in self._compiled:
            if self.device.type == "cpu":
                self._compiled[function] = CompiledFunction(function)
            else:
                # CUDA graphs: the launches of a decode step cost more than its work on small models.
                graphs = self.device.type == "cuda" and self.group.backend != "gloo"
                options = {"size_asserts": False, "triton.cudagraphs": graphs}
                compiled = torch.compile(fresh(function), options=options, fullgraph=True, dynamic=False)
                self._compiled[function] = compiled
        return self._compiled[function]

    def setup(
        self,
        batch_size: int,
        max_seq_length: int,
        plain: bool = False,
        logprobs: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        bad_words: tuple[int, int] = (0, 0),
    ) -> None:
        """Caches and the sampler for so many rows. With `plain` every request must be (see SamplingParams.plain);
        with `logprobs` tokens come with their log-probability and those of so many most likely ones; `eos_ids` is what
        min_new_tokens keeps back, `bad_words` the room for them (how many, of how many ids)."""
        self._compiled: dict[Callable, Callable] = {}  # those before hold the caches before
        self._step, self._catch_up = self.compile(decode_step), self.compile(catch_up)
        for model in self.models:
            model.setup_caches(batch_size, max_seq_length)
            if self.fixed_lengths:
                self._hidden[model] = torch.compile(fresh(model.hidden), fullgraph=True, dynamic=False)
        vocab_size = self.model.config.vocab_size
        self.sampler = Sampler(batch_size, vocab_size, max_seq_length, eos_ids, self.device, plain, bad_words)
        self.logprobs = logprobs
        self._weight_bytes = [weight_bytes(model) for model in self.models]
        self.forget()

    def forget(self) -> None:
        """The next prompt is prefilled, even if it is the last one's."""
        self._prefilled: tuple[list[int], int, Tensor] | None = None  # a prompt, its row, its hidden states
        self._unseen = 0  # tokens that the draft has not seen

    def key_positions(self, model: Transformer, length: int) -> Tensor:
        """The part of the cache that steps up to position `length` read: in coarse steps, so that shapes are few."""
        rounded = -(-length // 128) * 128
        key_pos = model.key_pos[: min(rounded, model.max_seq_length)]
        if self.fixed_lengths or (self.compiles_steps and self.device.type == "mps"):
            # The length varies without a new compilation.
            torch._dynamo.maybe_mark_dynamic(key_pos, 0)
        return key_pos

    @torch.no_grad()
    def prefill(self, row: int, request: Request) -> Tensor:
        """Runs the prompt into that row of the caches -> hidden [1, dim] of its last token; [S, dim] of all to echo.

        A prompt that is the same as that of the last request is copied from there.
        """
        if not request.context and self._prefilled is not None and self._prefilled[0] == request.prompt:
            _, source, hidden = self._prefilled
            if len(hidden) == (len(request.prompt) if request.echo else 1):
                if row != source:
                    self.copy_row(source, row, 0, len(request.prompt))
                return hidden
        hidden = self._run(self.model, row, request.prompt, request.start, request.echo)
        if self.draft is not None:
            seen = max(request.start - CAUGHT_UP, 0)  # the context's end it may not have been asked about
            self._run(self.draft, row, [*request.context[seen:], *request.prompt], seen, every=False)
        self._prefilled = None if request.context else (request.prompt, row, hidden)
        return hidden

    def _run(self, model: Transformer, row: int, tokens: list[int], start: int, every: bool) -> Tensor:
        """Tokens from position `start` into a row -> hidden [1, dim] of the last one, or [S, dim]."""
        # Dynamic NTK depends on the length reached, so there a prompt can't be taken in parts.
        chunk = len(tokens) if model.config.rope.type == "dynamic" else PREFILL_LENGTHS[-1]
        rows = None if model.max_batch_size == 1 else torch.tensor([row], device=self.device)
        hidden = []
        for begin in range(0, len(tokens), chunk):
            part = tokens[begin : begin + chunk]
            padding = 0
            if self.fixed_lengths and chunk == PREFILL_LENGTHS[-1] and not every:
                padding = fixed_length(len(part)) - len(part)
            first = start + begin
            positions = [*range(first, first + len(part)), *[model.max_seq_length] * padding]  # padding: the spare slot
            inputs = [torch.tensor([ids], device=self.device) for ids in (part + [0] * padding, positions)]
            key_pos = self.key_positions(model, first + len(part))
            if self.fixed_lengths and chunk != PREFILL_LENGTHS[-1]:  # one compilation for all lengths
                for tensor in inputs:
                    torch._dynamo.maybe_mark_dynamic(tensor, 1)
            if every:
                hidden.append(model.hidden(*inputs, key_pos, None, rows)[0])
            else:
                only = torch.tensor([len(part) - 1], device=self.device)
                hidden = [self._hidden[model](*inputs, key_pos, only, rows)[0]]
        return torch.cat(hidden)

    @torch.no_grad()
    def start(self, row: int, request: Request) -> tuple[Tensor, ...]:
        """Gives a row to a request -> its first token as from `step`, int64 [1, 3]; last, what `prefill` returned."""
        hidden = self.prefill(row, request)
        text = [*request.context, *request.prompt]
        self.sampler.set_row(row, request.params, text)
        rows, last, at = (torch.tensor(value, device=self.device) for value in ([row], [[text[-1]]], [[len(text) - 1]]))
        logits = self.model.logits(hidden[None, -1:])
        drawn = self.sampler(logits, last, at, rows)
        self.sampler.begin(row, drawn, len(text))
        top = () if self.logprobs is None else logprobs(logits, drawn.clamp(min=0), self.logprobs)
        return torch.cat((torch.zeros_like(drawn), torch.ones_like(drawn), drawn), 1), *top, hidden

    def begin_step(self, length: int) -> Tensor:
        """To be called before each compiled step -> the key_pos of one in which no row goes further than `length`."""
        if self.device.type == "cuda" and self.compiles_steps:
            torch.compiler.cudagraph_mark_step_begin()
        # The kernels for a few queries find their keys by themselves; others read what key_pos spans.
        return self.key_positions(self.model, length) if self.device.type == "mps" else self.model.key_pos

    @torch.no_grad()
    def step(self, k: int, length: int) -> tuple[Tensor, ...]:
        """Moves all rows on, none of them further than `length`: what decode_step says."""
        key_pos = self.begin_step(length)
        if self.draft is not None:
            if (k and self._unseen) or self._unseen == CAUGHT_UP - 2:
                self._catch_up(self.draft, self.sampler)
                self._unseen = 0
            self._unseen += k == 0
        result = self._step(self.model, self.draft, self.sampler, key_pos, k, self.lookup, self.logprobs)
        # The graph's next replay overwrites its output, and the host reads it one step late.
        return tuple(part.clone() for part in result) if self.device.type == "cuda" else result

    def learn(self, k: int, seconds: float, right: list[int]) -> None:
        """Tells the pace that a step with k proposals took so long, and how many of each row were right."""
        # All ranks have to choose alike, and to ask rank 0 costs more than a step: its first time is kept.
        if self.group.size > 1 and len(self.pace.choices) > 1:
            known = self.pace.seconds.get(k)
            seconds = self.group.from_rank_0(lambda: seconds) if known is None else known
        self.pace.saw(k, seconds, right, scored(k, self.draft, self.lookup))

    def step_bytes(self, length: int, k: int) -> int:
        """What all ranks read in a step with k proposals when its rows have so many positions together."""
        caches = (cache_bytes(model, 1, length) for model in self.models)
        target, *draft = map(sum, zip(self._weight_bytes, caches, strict=True))
        return self.group.size * (target + k * sum(draft))

    @torch.no_grad()
    def copy_row(self, source: int, row: int, begin: int, end: int) -> None:
        """Copies the positions from `begin` up to `end` of one row of the caches to another."""
        for model in self.models:
            for layer in model.layers:
                for cache in (layer.attention.kv_cache.k, layer.attention.kv_cache.v):
                    cache[row, :, begin:end] = cache[source, :, begin:end]

    @without_collection()
    def warm_up(self, prompt_length: int | None = None) -> float:
        """Compiles what prompts of this length (by default: any) will call -> seconds. What it leaves is never seen."""
        begun = time.perf_counter()
        lengths: tuple[int, ...] = (1,)
        if self.fixed_lengths or self.device.type == "cuda":  # where Triton compiles as well
            chunk = PREFILL_LENGTHS[-1]
            lengths = PREFILL_LENGTHS
            if prompt_length is not None:  # one whole chunk is like another
                lengths = (min(prompt_length, chunk + prompt_length % chunk),)
        params = SamplingParams(temperature=0 if self.sampler.plain else 1)
        with kernels_together() if self.fixed_lengths and self.device.type == "cpu" else contextlib.nullcontext():
            for length in lengths:
                self.start(0, Request([0] * min(length, self.model.max_seq_length), params, 1))
        for k in self.pace.choices:
            for _ in range(3 if self.device.type == "cuda" else 1):  # CUDA graphs: warm up, record, replay
                self.step(k, self.model.max_seq_length)[0].tolist()
            if len(self.pace.choices) > 1:
                if self.draft is not None:
                    self._catch_up(self.draft, self.sampler)
                times = [time.perf_counter()]
                for _ in range(3):
                    self.step(k, self.model.max_seq_length)[0].tolist()
                    times.append(time.perf_counter())
                fastest = min(b - a for a, b in itertools.pairwise(times))
                self.pace.seconds[k] = self.group.from_rank_0(lambda seconds=fastest: seconds)
        self.forget()
        return time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@dataclass(frozen=True)
class Token:
    """One generated token. `text` is what it made certain: whole characters only, sometimes none."""

    request: int  # its number
    id: int
    text: str
    finish_reason: str | None = None  # on a request's last token: "stop" (an end token, a stop string) or "length"
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their log-probabilities
    of_prompt: bool = False
    stats: Stats | None = None  # on a request's last token


@dataclass
class Row:
    """A request that is under way."""

    number: int
    request: Request
    detokenizer: StreamingDetokenizer
    stops: StopStrings
    stats: Stats = field(default_factory=lambda: Stats(requests=1))
    done: bool = False

    @property
    def length(self) -> int:
        return self.request.start + len(self.request.prompt) + self.stats.new_tokens

    def put(self, token_id: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()) -> Token:
        """Takes the next token of the request."""
        if token_id < 0:
            raise UserError(
                f"prompt {self.number + 1}: after {self.stats.new_tokens} new tokens no token is possible: the model's "
                "logits are NaN or all -inf (is the checkpoint broken?), or everything is banned"
            )
        self.stats.new_tokens += 1
        ended = token_id in self.request.eos_ids
        final = ended or self.stats.new_tokens == self.request.max_new_tokens
        text = "" if ended else self.detokenizer.put(token_id)
        text = self.stops.put(text + self.detokenizer.finish() if final else text)
        if final and not self.stops.found:
            text += self.stops.finish()
        reason = "stop" if ended or self.stops.found else "length" if final else None
        self.done = reason is not None
        return Token(self.number, token_id, text, reason, logprob, top, stats=self.stats if self.done else None)


@torch.no_grad()
def generate(engine: Engine, tokenizer: Tokenizer, requests: Iterable[Request]) -> Iterator[Token]:
    """Continues the requests, as many at a time as the engine has rows; yields their tokens as they come.

    What a request yields does not depend on the others. `engine.stats` tells how fast it goes. Raises ValueError for a
    request that does not fit the cache, and UserError when the model has no next token.
    """
    waiting = iter(enumerate(requests))
    rows: list[Row | None] = [None] * engine.model.max_batch_size
    overlaps = engine.device.type == "cuda"
    engine.stats = total = Stats()
    unread = None  # on CUDA: a step's result, its length and rows, while the device works on the next
    clock = time.perf_counter()
    while True:
        for at in range(len(rows)):
            while rows[at] is None and (following := next(waiting, None)) is not None:
                row = Row(*following, StreamingDetokenizer(tokenizer), StopStrings(following[1].stop))
                yield from begin(engine, tokenizer, at, row)
                rows[at] = None if row.done else row
                clock = time.perf_counter()
        if not any(rows):
            break
        k = engine.pace.choose()
        longest = max(row.length for row in rows if row)
        dispatched = engine.step(k, longest + k + 1), k, list(rows)
        unread, dispatched = dispatched if overlaps else None, unread if overlaps else dispatched
        if dispatched is None:
            continue
        result, k, stepped = dispatched
        right, new, *drawn = zip(*result[0].tolist(), strict=True)
        top = [part.tolist() for part in result[1:]]
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        active = [at for at, row in enumerate(stepped) if row is not None and not row.done]
        engine.learn(k, seconds, [right[at] for at in active])
        nbytes = engine.step_bytes(sum(stepped[at].length for at in active), k)
        total.decode_seconds += seconds
        total.bytes_read += nbytes
        for at in active:
            row = stepped[at]
            row.stats.decode_seconds += seconds
            row.stats.bytes_read += nbytes
            for stats in (row.stats, total):
                stats.steps += 1
                stats.proposed += k
                stats.accepted += min(right[at], k)
            for i in range(new[at]):
                chances = logprobs_of(top, at, i)
                total.new_tokens += 1
                token = row.put(drawn[i][at], *chances)
                if row.done:
                    row.stats.peak_memory = total.peak_memory = peak_memory(engine.device)
                yield token
                if row.done:
                    rows[at] = None
                    engine.sampler.park(at, row.request.start + len(row.request.prompt))
                    break


def begin(engine: Engine, tokenizer: Tokenizer, at: int, row: Row) -> Iterator[Token]:
    """Prefills a request into row `at`; yields its first token, and before it those of the prompt to echo."""
    request, total, begun = row.request, engine.stats, time.perf_counter()
    if (
        not request.prompt
        or request.max_new_tokens < 1
        or row.length + request.max_new_tokens > engine.model.max_seq_length
    ):
        raise ValueError(
            f"a prompt of {len(request.prompt)} tokens at {request.start} and {request.max_new_tokens} new ones "
            f"do not fit a cache of {engine.model.max_seq_length}"
        )
    first, *top, hidden = engine.start(at, request)
    ((_, _, token_id),) = first.tolist()
    seconds = time.perf_counter() - begun
    for stats in (row.stats, total):
        stats.prompt_tokens += len(request.prompt)
        stats.prefill_seconds += seconds
        stats.peak_memory = peak_memory(engine.device)
    row.stats.time_to_first_token = seconds
    total.time_to_first_token = total.time_to_first_token or seconds
    total.requests += 1
    total.new_tokens += 1
    if request.echo:
        yield from echo(engine, tokenizer, row, hidden)
    yield row.put(token_id, *logprobs_of([part.tolist() for part in top], 0, 0))


def echo(engine: Engine, tokenizer: Tokenizer, row: Row, hidden: Tensor) -> Iterator[Token]:
    """The prompt's tokens; from the second on with their log-probabilities."""
    prompt, detokenizer = row.request.prompt, StreamingDetokenizer(tokenizer)
    yield Token(row.number, prompt[0], detokenizer.put(prompt[0]), of_prompt=True)
    for first in range(1, len(prompt), 64):  # all logits at once may be gigabytes
        ids = prompt[first : first + 64]
        logits = engine.model.logits(hidden[None, first - 1 : first - 1 + len(ids)])
        top = []
        if engine.logprobs is not None:
            chosen = torch.tensor([ids], device=engine.device)
            top = [part.tolist() for part in logprobs(logits, chosen, engine.logprobs)]
        for i, token_id in enumerate(ids):
            last = first + i == len(prompt) - 1
            text = detokenizer.put(token_id) + (detokenizer.finish() if last else "")
            yield Token(row.number, token_id, text, None, *logprobs_of(top, 0, i), of_prompt=True)


def logprobs_of(top: list[list], row: int, i: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Of token i of a row, from what sampling.logprobs returned: its log-probability, and those of the most likely."""
    if not top:
        return None, ()
    chosen, values, ids = (part[row][i] for part in top)
    return chosen, tuple(zip(ids, values, strict=True))


def weight_bytes(model: Transformer) -> int:
    """Bytes of weights that one decode step reads: all but the embedding, of which it reads a row a token."""
    unread = 0 if model.output is None else model.tok_embeddings.weight.nbytes
    quantized = sum(layer.weight_bytes for layer in model.modules() if isinstance(layer, (Int8Linear, Int4Linear)))
    return sum(tensor.nbytes for tensor in model.parameters()) + quantized - unread


def cache_bytes(model: Transformer, batch_size: int, length: int) -> int:
    """Bytes of the keys and values of so many rows and positions."""
    config = model.config
    heads = config.n_layers * batch_size * config.n_kv_heads * length
    return 2 * heads * config.head_dim * model.tok_embeddings.weight.element_size()


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held, on the GPU if it uses one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
