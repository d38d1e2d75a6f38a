"""From token ids to token ids: prefill in chunks, then a one-token decode loop, compiled or not.

    engine = Engine(load_model(path), compile=True)
    engine.model.setup_caches(max_batch_size=1, max_seq_length=1024)
    for token in generate(engine, tokenizer, [tokenizer.encode("Hello")], [SamplingParams(temperature=0.8)], 100):
        print(token.text, end="", flush=True)

A step: the model's logits of the last token, sampled inside the same compiled function. On CUDA the host reads a token
while the device works on the next.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError
from kernels import Int4Linear, Int8Linear, cpu_library
from model import Transformer
from sampling import SamplingParams, SamplingTensors, sample, sampling_tensors
from tokenizer import StreamingDetokenizer, Tokenizer

PREFILL_LENGTHS = (32, 128, 512)  # tokens a chunk; a compiled prefill pads to one of them, so it compiles these shapes

# ---------------------------------------------------------------------------------------------------------------------
# The engine: a model and its compiled functions


def decode_one_token(
    model: Transformer, token: Tensor, input_pos: Tensor, key_pos: Tensor, params: SamplingTensors, greedy: bool
) -> Tensor:
    """Tokens [B, 1] at positions [B, 1] -> the tokens after them, [B, 1]."""
    logits = model(token, input_pos, key_pos)[:, -1]
    return (logits.argmax(-1) if greedy else sample(logits, params, input_pos[:, 0] + 1))[:, None]


def fixed_length(length: int) -> int:
    """What a chunk of so many tokens is padded to for a compiled prefill."""
    return min(fixed for fixed in PREFILL_LENGTHS if fixed >= length)


class Engine:
    """Prefill and decode of one model. Compiled code belongs to the engine and is made at its first use."""

    def __init__(self, model: Transformer, compile: bool = False, compile_prefill: bool = False):
        self.model = model
        self.device = model.tok_embeddings.weight.device
        self.compiled = compile or compile_prefill
        self.fixed_lengths = compile_prefill
        self._decode: Callable = decode_one_token
        self._hidden: Callable = model.hidden
        if self.compiled and self.device.type == "cpu" and cpu_library() is not None:
            # A compiler that has built our kernels knows the instruction sets. Inductor would try out each at every
            # start, which takes a second; at the first one five.
            torch._inductor.config.cpp.vec_isa_ok = True
        if compile:
            # CUDA graphs: the launches of a decode step cost more than its work on small models. Sizes are not checked
            # at every call of every kernel: that took 10 us a layer.
            options = {"triton.cudagraphs": self.device.type == "cuda", "size_asserts": False}
            self._decode = torch.compile(decode_one_token, options=options, fullgraph=True, dynamic=False)
        if compile_prefill:
            self._hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False)

    def key_positions(self, length: int) -> Tensor:
        """The part of the cache that steps up to position `length` read: in coarse steps, so that shapes are few."""
        rounded = -(-length // 128) * 128
        key_pos = self.model.key_pos[: min(rounded, self.model.max_seq_length)]
        if self.compiled:  # the length varies without a new compilation
            torch._dynamo.maybe_mark_dynamic(key_pos, 0)
        return key_pos

    @torch.no_grad()
    def prefill(self, rows: list[list[int]], starts: list[int], params: list[SamplingParams]) -> Tensor:
        """Runs each row's tokens from its start position into the cache -> the token after them, [B, 1]."""
        lengths = torch.tensor([[len(row)] for row in rows])
        start = torch.tensor(starts)[:, None]
        longest = int(lengths.max())
        # Dynamic NTK depends on the length reached, so there a prompt can't be taken in parts.
        chunk = longest if self.model.config.rope.type == "dynamic" else PREFILL_LENGTHS[-1]
        last = self.model.norm.weight.new_empty(len(rows), self.model.config.dim)
        for begin in range(0, longest, chunk):
            width = min(chunk, longest - begin)
            if self.fixed_lengths and chunk == PREFILL_LENGTHS[-1]:
                width = fixed_length(width)
            padded = [row[begin : begin + width] + [0] * (width - len(row[begin : begin + width])) for row in rows]
            at = begin + torch.arange(width)
            input_pos = torch.where(at < lengths, start + at, self.model.max_seq_length)  # padding: the spare slot
            key_pos = self.key_positions(int((start + lengths.clamp(max=begin + width)).max()))
            only = (lengths[:, 0] - 1 - begin).clamp(0, width - 1)  # each row's last token, if it is in this chunk
            inputs = (torch.tensor(padded), input_pos, only)
            tokens, input_pos, only = (tensor.to(self.device) for tensor in inputs)
            hidden = self._hidden(tokens, input_pos, key_pos, only)
            ends = ((begin < lengths) & (lengths <= begin + width)).to(self.device)
            last = torch.where(ends, hidden[:, 0], last)
        position = (start + lengths)[:, 0].to(self.device)
        return sample(self.model.logits(last), sampling_tensors(params, self.device), position)[:, None]

    @torch.no_grad()
    def decode(self, token: Tensor, input_pos: Tensor, length: int, params: SamplingTensors, greedy: bool) -> Tensor:
        """One step: tokens [B, 1] at positions [B, 1], all below `length` -> the next tokens, [B, 1]."""
        # The kernels for a few queries find their keys by themselves; others read what key_pos spans.
        key_pos = self.key_positions(length) if self.device.type == "mps" else self.model.key_pos
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
            # The graph's next replay overwrites its output, and the host reads it one step late.
            return self._decode(self.model, token, input_pos, key_pos, params, greedy).clone()
        return self._decode(self.model, token, input_pos, key_pos, params, greedy)

    def warm_up(self, params: list[SamplingParams], prompt_length: int | None = None) -> float:
        """Compiles what prompts of this length (by default: any) will call -> seconds. What it leaves is never seen."""
        begun = time.perf_counter()
        gc.disable()  # a compilation makes millions of objects, and hardly any garbage
        if self.fixed_lengths:
            chunk, widths = PREFILL_LENGTHS[-1], set(PREFILL_LENGTHS)
            if prompt_length is not None:
                widths = {fixed_length(min(chunk, prompt_length - at)) for at in range(0, prompt_length, chunk)}
            for width in sorted(widths):
                width = min(width, self.model.max_seq_length)
                self.prefill([[0] * width] * len(params), [0] * len(params), params)
        # Two tensors: compiled code would remember if both were one.
        token, input_pos = (torch.zeros(len(params), 1, dtype=torch.long, device=self.device) for _ in range(2))
        greedy = all(row.temperature == 0 for row in params)
        for _ in range(3 if self.device.type == "cuda" else 1):  # CUDA graphs: warm up, record, replay
            self.decode(token, input_pos, 1, sampling_tensors(params, self.device), greedy).tolist()
        gc.freeze()  # what a compilation leaves behind stays, and would be searched at every collection and at the end
        gc.enable()
        return time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@dataclass(frozen=True)
class Token:
    """One generated token. `text` is what it made certain: whole characters only, sometimes none."""

    row: int
    id: int
    text: str
    finish_reason: str | None = None  # on a row's last token: "stop" (an end token) or "length"


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    params: list[SamplingParams],
    max_new_tokens: int,
    eos_ids: frozenset[int] | set[int] = frozenset(),
    starts: list[int] | None = None,
) -> Iterator[Token]:
    """Continues the rows of one batch together; yields each row's tokens until an end token or `max_new_tokens`.

    `starts` are the positions at which the prompts begin, 0 by default; what the cache holds before them is context.
    Raises ValueError for an empty prompt, or one that with the new tokens does not fit the cache.
    """
    starts = starts or [0] * len(prompts)
    longest = max(start + len(prompt) for start, prompt in zip(starts, prompts, strict=True))
    if not all(prompts) or max_new_tokens < 1 or longest + max_new_tokens > engine.model.max_seq_length:
        raise ValueError(
            f"prompts of {[len(p) for p in prompts]} tokens at {starts} and {max_new_tokens} new ones "
            f"do not fit a cache of {engine.model.max_seq_length}"
        )
    on_cuda = engine.device.type == "cuda"
    tensors, greedy = sampling_tensors(params, engine.device), all(row.temperature == 0 for row in params)
    streams = [StreamingDetokenizer(tokenizer) for _ in prompts]
    running = set(range(len(prompts)))
    token = engine.prefill(prompts, starts, params)
    input_pos = torch.tensor([[start + len(prompt)] for start, prompt in zip(starts, prompts, strict=True)])
    input_pos = input_pos.to(engine.device)
    for step in range(max_new_tokens):
        final = step == max_new_tokens - 1
        following = None
        if on_cuda and not final:  # the device works on the next step while the host reads this one
            following = engine.decode(token, input_pos, longest + step + 1, tensors, greedy)
        for row, (token_id,) in enumerate(token.tolist()):
            if row not in running:
                continue
            stopped = token_id in eos_ids
            text = "" if stopped else streams[row].put(token_id)
            if stopped or final:
                running.discard(row)
                yield Token(row, token_id, text + streams[row].finish(), "stop" if stopped else "length")
            else:
                yield Token(row, token_id, text)
        if final or not running:
            return
        if following is None:
            following = engine.decode(token, input_pos, longest + step + 1, tensors, greedy)
        token, input_pos = following, input_pos + 1


def check_compiler() -> None:
    """Imports what torch.compile would at its first call. UserError where it would not find a C++ compiler."""
    import torch._inductor.compile_fx  # noqa: F401
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UserError("--compile needs a C++ compiler; install g++ (apt install g++) or leave it out") from error


@dataclass
class Stats:
    """How fast a batch went. Times are in seconds, rates per second."""

    prompt_tokens: int
    new_tokens: int
    time_to_first_token: float
    prefill_rate: float
    decode_rate: float
    gigabytes_read_rate: float  # weights and cache that the decode steps read
    peak_memory_gb: float

    @classmethod
    def measure(cls, engine: Engine, prompts: list[list[int]], rows: list[list[Token]], times: list[float]) -> "Stats":
        """From each row's prompt and tokens, and the times of the start, the first token and the last."""
        started, first, last = times
        steps = max(map(len, rows))
        prompt_tokens, new_tokens = sum(map(len, prompts)), sum(map(len, rows))
        cached = len(rows) * (max(map(len, prompts)) + steps // 2)  # keys and values that a step reads, on average
        step_bytes = weight_bytes(engine.model) + cache_bytes(engine.model, 1, cached)
        decoding = max(last - first, 1e-9)
        return cls(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            time_to_first_token=first - started,
            prefill_rate=prompt_tokens / (first - started),
            decode_rate=(new_tokens - len(rows)) / decoding,
            gigabytes_read_rate=(steps - 1) * step_bytes / decoding / 1e9,
            peak_memory_gb=peak_memory(engine.device) / 1e9,
        )

    def __str__(self) -> str:
        return (
            f"prefill {self.prompt_tokens} tokens, {self.prefill_rate:.1f} tok/s · "
            f"decode {self.new_tokens} tokens, {self.decode_rate:.1f} tok/s, {self.gigabytes_read_rate:.1f} GB/s · "
            f"first token after {self.time_to_first_token:.2f} s · peak memory {self.peak_memory_gb:.2f} GB"
        )


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
