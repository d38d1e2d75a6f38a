"""Prefill and decode of a model, and of its draft: KV caches, the sampler and the compiled steps.

    engine = Engine(load_model(path), compile=True)
    engine.setup(batch_size=1, max_seq_length=1024)
    engine.warm_up()  # compiles; with speculation also times its steps
    request = Request(tokenizer.encode("Hello"), SamplingParams(temperature=0.8), max_new_tokens=100)
    first, *_ = engine.start(0, request)  # prefill; the first token of row 0 is first[0, 2]
    (result,) = engine.step(k=0, length=1024)  # decode; the next token of each row is result[:, 2]

A step is the model's logits of the last tokens, sampled inside the same compiled function: decode_step in speculate.py.
The engine does as it is told; scheduler.py decides which request is in which row, and makes text of the tokens.

A step costs what the rows in it cost. It is compiled for 1, 2, 4, 8 ... rows and told which they are by a tensor of
their indices, which the attention kernels, the caches and the sampler follow. (Keeping the busy rows in front would
spare that tensor, but move a row's keys and values, megabytes, whenever another one's text ends, to where a text lies
that may be asked for again.) Parked rows fill up the number: they write to the spare slots, and look at one key.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compiled import CompiledFunction, fresh, kernels_together, prepare_compiler, without_collection
from errors import UserError
from kernels import Int4Linear, Int8Linear
from kernels.experts import Int4Experts, Int8Experts
from lora_layers import Adapters, LowRank
from model import Experts, Transformer, cache_slots
from prefix import Places, compared
from sampling import Sampler, SamplingParams, logprobs
from speculate import AUTO, CATCH_UP, DRAFT_LAG, Pace, catch_up, decode_step, in_vocabulary, scored
from tp import ALONE
from vision import Sight

if TYPE_CHECKING:
    from grammar import Constraint
    from images import ImageInput

QUANTIZED = (Int8Linear, Int4Linear, Int8Experts, Int4Experts)
PREFILL_LENGTHS = (32, 128, 512)  # tokens a chunk; a compiled prefill pads to one of them, so it compiles these shapes


@dataclass(frozen=True)
class Request:
    """A prompt, and how to continue it."""

    prompt: list[int]
    params: SamplingParams
    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()  # the text ends at any of these tokens,
    stop: tuple[str, ...] = ()  # and before the first of these strings
    shown_ids: frozenset[int] = frozenset()  # special tokens that are part of the text, by their names
    echo: bool = False  # yields the prompt's tokens too, with their log-probabilities
    grammar: "Constraint | None" = None  # what the text has to match, from grammar.Grammars
    adapter: str | None = None  # the name of one of the engine's adapters
    images: "tuple[ImageInput, ...]" = ()  # in the order of their places in the prompt


@dataclass
class Stats:
    """How fast one request, or a whole run, went. Seconds and bytes."""

    speculates: bool = False  # whether steps may propose tokens
    prompt_tokens: int = 0
    cached_tokens: int = 0  # those of them that were not run, as the cache held them
    new_tokens: int = 0
    requests: int = 0
    time_to_first_token: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    bytes_read: int = 0  # weights and cache that the steps read; of experts those of one row
    steps: int = 0  # of a row
    speculated: int = 0  # those of them that proposed tokens
    proposed: int = 0  # tokens, and how many of them were accepted
    accepted: int = 0
    peak_memory: int = 0

    def add_prompt(self, tokens: int, cached: int, seconds: float) -> None:
        """A prompt, and the time from the beginning of its prefill to the first new token."""
        self.requests += 1
        self.prompt_tokens += tokens
        self.cached_tokens += cached
        self.time_to_first_token = self.time_to_first_token or seconds

    def add_step(self, seconds: float, nbytes: int, k: int, right: list[int]) -> None:
        """A step with k proposals a row, of which the first right[i] were accepted in row i."""
        self.decode_seconds += seconds
        self.bytes_read += nbytes
        self.steps += len(right)
        if k:
            self.speculated += len(right)
            self.proposed += k * len(right)
            self.accepted += sum(right)

    def report(self) -> dict[str, float]:
        """The figures to show: counts, seconds, rates per second."""
        decoding = max(self.decode_seconds, 1e-9)
        figures = {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.new_tokens,
            "time_to_first_token": self.time_to_first_token,
            "prefill_rate": (self.prompt_tokens - self.cached_tokens) / max(self.prefill_seconds, 1e-9),
            "decode_rate": (self.new_tokens - self.requests) / decoding,
            "gigabytes_read_rate": self.bytes_read / decoding / 1e9,
            "peak_memory_gb": self.peak_memory / 1e9,
        }
        if self.speculates and self.steps:
            figures["speculated_share"] = self.speculated / self.steps  # of the steps; in the others it was off
        if self.proposed:
            figures["acceptance_rate"] = self.accepted / self.proposed
            figures["mean_accepted_length"] = self.accepted / self.steps
        return figures

    def __str__(self) -> str:
        cached = " ({cached_tokens} of them cached)" if self.cached_tokens else ""
        line = (
            "prefill {prompt_tokens} tokens" + cached + ", {prefill_rate:.1f} tok/s · decode {new_tokens} tokens, "
            "{decode_rate:.1f} tok/s, {gigabytes_read_rate:.1f} GB/s · first token after {time_to_first_token:.2f} s · "
            "peak memory {peak_memory_gb:.2f} GB"
        )
        return line.format(**self.report()) + self._speculation()

    def _speculation(self) -> str:
        off = self.steps - self.speculated
        if not self.speculates or not self.steps:
            return ""
        if off == 0:
            return f" · accepted {self.accepted / self.proposed:.0%}, {self.accepted / self.steps:.2f} a step"
        rest = f", accepted {self.accepted / self.proposed:.0%} in the others" if self.accepted else ""
        return f" · speculation switched itself off, as it did not pay, in {off} of {self.steps} steps{rest}"


# ---------------------------------------------------------------------------------------------------------------------
# The engine: models, their caches, compiled functions


def fixed_length(length: int) -> int:
    """The length that a compiled prefill pads a chunk of `length` tokens to."""
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
        adapters: Adapters | None = None,
    ):
        """`speculate_k` tokens are proposed a step; None chooses by what was accepted and how long steps take.
        `adapters`: those that were put into the model."""
        self.model, self.draft, self.lookup = model, draft, prompt_lookup
        self.adapters = Adapters(model, model.config, {}) if adapters is None else adapters
        # Under tensor parallelism every rank has an engine, and all do the same with it.
        self.group = ALONE if model.vocabulary is None else model.vocabulary.group
        self.device = model.tok_embeddings.weight.device
        self.compiles_steps, self.fixed_lengths = compile, compile_prefill
        choices: tuple[int, ...] = (0,)
        if draft is not None or prompt_lookup:
            choices = AUTO["lookup" if draft is None else "draft"] if speculate_k is None else (speculate_k,)
        self.pace = Pace(choices)
        self._check_speculation(0)
        if compile_prefill and self.device.type == "cpu":
            prepare_compiler()
        self._hidden = {model: model.hidden for model in self.models}
        self._sights = {model: Sight(model) for model in self.models}
        self.stats = Stats()

    def _check_speculation(self, length: int) -> None:
        if self.speculates and self.model.config.by_length(length):
            fewer = ""
            if self.model.config.rope.type == "longrope":
                fewer = f", or have a context of {self.model.config.rope.original_length} by --max_seq_length"
            raise UserError(
                f"proposed tokens would change the rotation of {self.model.config.rope.type} RoPE scaling, and with it"
                f" the text; leave out --draft_checkpoint_path and --prompt_lookup{fewer}"
            )

    @property
    def models(self) -> list[Transformer]:
        return [self.model] if self.draft is None else [self.model, self.draft]

    @property
    def speculates(self) -> bool:
        """Whether steps may propose tokens."""
        return self.pace.choices != (0,)

    def compile(self, function: Callable, rows: int = 0) -> Callable:
        """The function, compiled if that is what was asked for, until the next `setup`; for each number of rows apart,
        as Dynamo compiles a function only a few times."""
        if not self.compiles_steps:
            return function
        key = function, rows
        if key not in self._compiled:
            if self.device.type == "cpu":
                self._compiled[key] = CompiledFunction(function)
            else:
                # CUDA graphs: the launches of a decode step cost more than its work on small models.
                graphs = self.device.type == "cuda" and self.group.backend != "gloo"
                options = {"size_asserts": False, "triton.cudagraphs": graphs}
                compiled = torch.compile(fresh(function), options=options, fullgraph=True, dynamic=False)
                self._compiled[key] = compiled
        return self._compiled[key]

    def setup(
        self,
        batch_size: int,
        max_seq_length: int,
        plain: bool = False,
        logprobs: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        bad_words: tuple[int, int] = (0, 0),
    ) -> None:
        """Allocates caches and the sampler for `batch_size` rows.

        `plain`: every request is (see SamplingParams.plain). `logprobs`: tokens come with their log-probability and
        those of so many most likely tokens. `eos_ids`: the ids that min_new_tokens bans. `bad_words`: the room for them
        (how many a row, of how many ids each).
        """
        self._check_speculation(max_seq_length)
        self._compiled: dict[tuple[Callable, int], Callable] = {}  # earlier ones hold the earlier caches
        for model in self.models:
            model.setup_caches(batch_size, max_seq_length)
            if self.fixed_lengths:
                self._hidden[model] = torch.compile(fresh(model.hidden), fullgraph=True, dynamic=False)
        vocab_size = self.model.config.vocab_size
        self.sampler = Sampler(batch_size, vocab_size, max_seq_length, eos_ids, self.device, plain, bad_words)
        self.adapters.setup(batch_size)
        self.park(slice(None))
        self.row_counts = [1 << i for i in range((batch_size - 1).bit_length())] + [batch_size]  # of a compiled step
        self._rows: tuple[list[int], Tensor | None] | None = None  # of the last step
        self.logprobs = logprobs
        self._weight_bytes = [weight_bytes(model) for model in self.models]
        self.forget()

    def forget(self) -> None:
        """Prompts are prefilled from their first token on, whatever the caches hold."""
        self.places = Places(self.models, self.model.max_batch_size)
        self._unseen = 0  # steps since the draft last ran, each a token that it has not seen

    def key_positions(self, model: Transformer, length: int) -> Tensor:
        """The prefix of model.key_pos that a step up to position `length` reads: rounded up, so that shapes are few."""
        rounded = -(-length // 128) * 128
        key_pos = model.key_pos[: min(rounded, model.max_seq_length)]
        if self.fixed_lengths or (self.compiles_steps and self.device.type == "mps"):
            # The length varies without a new compilation.
            torch._dynamo.maybe_mark_dynamic(key_pos, 0)
        return key_pos

    @torch.no_grad()
    def take(self, request: Request, free: Sequence[int]) -> int:
        """Gives one of the free rows to a request -> the row. What any row holds of the prompt is in it then: the first
        tokens, those of `places[row]`. To echo, all have to be run."""
        adapter = self.adapters.identity(request.adapter)
        row, source, shared = self.places.choose([] if request.echo else compared(request), free, adapter)
        place = self.places[row]
        if shared == 0:
            place.written = 0
        elif row != source:
            place.tokens = []  # Ctrl-C may end this in the middle
            self.copy_row(source, row, 0, shared)
            place.written = self.places[source].written
        place.tokens, place.drafted = compared(request)[:shared], max(shared - CATCH_UP, 0)
        place.prompt_length, place.adapter = len(request.prompt), adapter
        self.adapters.give(row, request.adapter)
        self.places.touch(row)
        return row

    def park(self, row: int | slice) -> None:
        """Steps change nothing of a row from now on."""
        self.sampler.park(row)
        self.adapters.park(row)

    @torch.no_grad()
    def prefill(self, row: int, request: Request, most: int | None = None) -> Tensor:
        """Runs the prompt, from what the row holds of it on, at `most` so many tokens -> hidden [1, dim] of the last
        one that it ran; [S, dim] of all of them to echo. It is done when `places[row]` has all tokens."""
        place, prompt = self.places[row], request.prompt
        begin = min(len(place.tokens), len(prompt) - 1)  # the last one is run again after a Ctrl-C
        end = len(prompt) if most is None else min(begin + most, len(prompt))
        place.written = max(place.written, end)
        self.adapters.use([row])
        hidden = self._run(self.model, row, request, begin, end, request.echo)
        if self.draft is not None:
            self._run(self.draft, row, request, min(place.drafted, end - 1), end, every=False)
            place.drafted = end
        place.tokens = compared(request)[:end]
        return hidden

    def _run(self, model: Transformer, row: int, request: Request, begin: int, end: int, every: bool) -> Tensor:
        """Runs tokens begin:end of a prompt in a row -> hidden [1, dim] of the last one, or [S, dim] of every one."""
        prompt, sight = request.prompt, self._sights[model]
        chunk = PREFILL_LENGTHS[-1]
        reached = torch.tensor([len(prompt)], device=self.device) if model.config.by_length(len(prompt)) else None
        pads = self.fixed_lengths and not every
        rows = None if model.max_batch_size == 1 else torch.tensor([row], device=self.device)
        hidden = []
        for first in range(begin, end, chunk):
            ids = prompt[first : min(first + chunk, end)]
            count = len(ids)
            padding = fixed_length(count) - count if pads else 0
            seen = sight.look(row, request, first, first + count, padding)
            positions = [*range(first, first + count), *[model.max_seq_length] * padding]  # padding: the spare slot
            input_ids = torch.tensor([ids + [0] * padding], device=self.device)
            if model is self.draft:
                input_ids = in_vocabulary(model, input_ids)
            input_pos = torch.tensor([positions], device=self.device)
            key_pos = self.key_positions(model, first + count)
            if self.fixed_lengths and not pads:  # one compilation for all lengths
                for tensor in (input_ids, input_pos):
                    torch._dynamo.maybe_mark_dynamic(tensor, 1)
            if every:
                hidden.append(model.hidden(input_ids, input_pos, key_pos, None, rows, reached, seen)[0])
            else:
                only = torch.tensor([count - 1], device=self.device)
                hidden = [self._hidden[model](input_ids, input_pos, key_pos, only, rows, reached, seen)[0]]
        sight.leave(row, request, end)
        return torch.cat(hidden)

    @torch.no_grad()
    def draw_first(self, row: int, request: Request, hidden: Tensor) -> tuple[Tensor, ...]:
        """Draws what follows the prompt, by the hidden state of its last token, [1, dim] -> that token as from `step`,
        int64 [1, 3]. From now on steps may move the row on."""
        prompt = request.prompt
        self.sampler.set_row(row, request.params, prompt)
        rows = torch.tensor([row], device=self.device)
        token = torch.tensor([prompt[-1:]], device=self.device)
        input_pos = torch.tensor([[len(prompt) - 1]], device=self.device)
        self.adapters.use([row])
        logits = self.model.logits(hidden[None])
        drawn = self.sampler(logits, token, input_pos, rows)
        self.sampler.begin(row, drawn, len(prompt))
        top = () if self.logprobs is None else logprobs(logits, drawn.clamp(min=0), self.logprobs)
        return torch.cat((torch.zeros_like(drawn), torch.ones_like(drawn), drawn), 1), *top

    def start(self, row: int, request: Request) -> tuple[Tensor, ...]:
        """Gives a row to a request and runs its prompt -> what `draw_first` returns."""
        self.take(request, [row])
        return self.draw_first(row, request, self.prefill(row, request)[-1:])

    def begin_step(self, length: int) -> Tensor:
        """To be called before each compiled step -> the key_pos of one in which no row goes further than `length`."""
        if self.device.type == "cuda" and self.compiles_steps:
            torch.compiler.cudagraph_mark_step_begin()
        # The kernels for a few queries find their keys by themselves; others read what key_pos spans.
        return self.key_positions(self.model, length) if self.device.type == "mps" else self.model.key_pos

    def fill_up(self, busy: list[int]) -> list[int]:
        """Rows for a step that moves the busy ones on: these, and as many parked ones as make up a number of rows that
        steps are compiled for."""
        count = min(count for count in self.row_counts if count >= len(busy))
        if count == self.model.max_batch_size:
            return list(range(count))
        parked = (row for row in range(self.model.max_batch_size) if row not in busy)
        return busy + list(itertools.islice(parked, count - len(busy)))

    @torch.no_grad()
    def step(self, k: int, length: int, rows: list[int] | None = None) -> tuple[Tensor, ...]:
        """Moves rows, as many as `fill_up` makes of them, by default all, on with k proposed tokens, none of them
        further than `length` -> what decode_step returns."""
        every = list(range(self.model.max_batch_size))
        rows = every if rows is None else rows
        if self._rows is None or self._rows[0] != rows:
            self._rows = rows, None if rows == every else torch.tensor(rows, device=self.device)
        index, key_pos = self._rows[1], self.begin_step(length)
        self.adapters.use(rows)
        if self.draft is not None:
            # It has to see the tokens of steps that did not ask it: before it proposes again, and before they are more
            # than one catch_up runs.
            if self._unseen and (k or self._unseen + DRAFT_LAG == CATCH_UP):
                self.compile(catch_up, len(rows))(self.draft, self.sampler, index)
                self._unseen = 0
            if k == 0:
                self._unseen += 1
        step = self.compile(decode_step, len(rows))
        result = step(self.model, self.draft, self.sampler, key_pos, k, self.lookup, self.logprobs, index)
        # The graph's next replay overwrites its output, and the host reads it one step late.
        return tuple(part.clone() for part in result) if self.device.type == "cuda" else result

    def learn(self, k: int, seconds: float, right: list[int], rows: int) -> None:
        """Tells the pace how long a step of so many rows with k proposals took, and how many proposals were right in
        each row that counts."""
        # All ranks have to choose alike, and asking rank 0 costs more than a step: its first time is kept.
        if self.group.size > 1 and len(self.pace.choices) > 1:
            known = self.pace.seconds.get((rows, k))
            seconds = self.group.from_rank_0(lambda: seconds) if known is None else known
        self.pace.saw(k, seconds, right, scored(k, self.draft, self.lookup), rows)

    def step_bytes(self, lengths: list[int], k: int) -> int:
        """Bytes that all ranks read in a step with k proposals, of rows that hold so many positions."""
        target, *draft = [
            weights + sum(cache_bytes(model, 1, length) for length in lengths)
            for model, weights in zip(self.models, self._weight_bytes, strict=True)
        ]
        return self.group.size * (target + k * sum(draft))

    @torch.no_grad()
    def copy_row(self, source: int, row: int, begin: int, end: int) -> None:
        """Copies positions begin:end of one row of the caches to another."""
        for model in self.models:
            for layer in model.layers:
                layer.attention.kv_cache.copy_row(source, row, begin, end)
            if model.rope_offset is not None:
                model.rope_offset[row] = model.rope_offset[source]

    @without_collection()
    def warm_up(self, prompt_length: int | None = None, constrained: bool = False) -> float:
        """Compiles what prompts of this length (by default: of any) will call -> seconds. What it leaves in the caches
        is never seen. `constrained`: some texts may be held to a grammar, and steps with them propose nothing."""
        begun = time.perf_counter()
        lengths: tuple[int, ...] = (1,)
        if self.fixed_lengths or self.device.type == "cuda":  # where Triton compiles as well
            chunk = PREFILL_LENGTHS[-1]
            lengths = PREFILL_LENGTHS
            if prompt_length is not None:  # all whole chunks are alike
                lengths = (min(prompt_length, chunk + prompt_length % chunk),)
        params = SamplingParams(temperature=0 if self.sampler.plain else 1)
        with kernels_together() if self.fixed_lengths and self.device.type == "cpu" else contextlib.nullcontext():
            for length, images in itertools.product(lengths, self._sights[self.model].samples()):
                self.forget()
                prompt = [0] * min(length, self.model.max_seq_length)
                self.start(0, Request(prompt, params, 1, images=images))
        choices = sorted({*self.pace.choices, *([0] if constrained else [])})
        for count, k in itertools.product(self.row_counts, choices):
            rows = list(range(count))
            for _ in range(3 if self.device.type == "cuda" else 1):  # CUDA graphs: warm up, record, replay
                self.step(k, self.model.max_seq_length, rows)[0].tolist()
            if len(self.pace.choices) > 1:
                self._unseen = 1  # so that a draft catches up, which compiles that
                times = [time.perf_counter()]
                for _ in range(4):
                    self.step(k, self.model.max_seq_length, rows)[0].tolist()
                    times.append(time.perf_counter())
                fastest = min(end - begin for begin, end in itertools.pairwise(times))
                self.pace.seconds[count, k] = self.group.from_rank_0(lambda seconds=fastest: seconds)
        self.park(slice(None))
        self.forget()
        return time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------------------------------
# What a step reads, and what the process holds


def weight_bytes(model: Transformer) -> int:
    """Bytes of weights that a decode step of one row reads: of experts the chosen ones, of adapters one, and not an
    embedding of which it reads a row a token."""
    tied = model.output is None or any(weight is model.tok_embeddings.weight for weight in model.output.parameters())
    unread = 0 if tied else model.tok_embeddings.weight.nbytes
    for layer in model.modules():
        if isinstance(layer, LowRank):
            unread += layer.weight_bytes - layer.weight_bytes // layer.count
    unread += sum(resident_bytes(part) for part in (model.pos_embeddings, model.vision) if part is not None)
    experts = model.config.experts
    if experts is not None:
        stacked = sum(resident_bytes(module) for module in model.modules() if isinstance(module, Experts))
        unread += stacked - stacked * experts.chosen // experts.count
    return resident_bytes(model) - unread


def resident_bytes(module: nn.Module) -> int:
    """Bytes of all weights."""
    others = sum(layer.weight_bytes for layer in module.modules() if isinstance(layer, (*QUANTIZED, LowRank)))
    return sum(tensor.nbytes for tensor in module.parameters()) + others


def cache_bytes(model: Transformer, batch_size: int, length: int) -> int:
    """Bytes of the keys and values of `batch_size` rows of `length` positions."""
    config = model.config
    windows = sum(config.window_layers)
    positions = (config.n_layers - windows) * length
    if windows:
        positions += windows * cache_slots(config.sliding_window, length)
    dtype = model.cache_dtype or model.tok_embeddings.weight.dtype
    head = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)  # with a scale
    return 2 * positions * batch_size * config.n_kv_heads * head


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held, on the GPU if it uses one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
