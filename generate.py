"""Text from a checkpoint: prefill, then a compiled one-token decode loop.

    python generate.py --compile --prompt "def read_lines(path):"              # the embedded demo model
    python generate.py --compile --checkpoint_path checkpoints/meta-llama/Llama-3.2-1B-Instruct --interactive

The text goes to stdout, everything else to stderr. From Python:

    engine = Engine(load_model(path), compile=True)
    engine.model.setup_caches(max_batch_size=1, max_seq_length=1024)
    for token in generate(engine, tokenizer, [tokenizer.encode("Hello")], [SamplingParams(temperature=0.8)], 100):
        print(token.text, end="", flush=True)
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import DEMO, check_memory, load_config, load_generation_config, load_model, weights_path
from errors import ArgumentParser, UserError, run
from model import ModelConfig, Transformer
from sampling import SamplingParams, SamplingTensors, sample, sampling_tensors
from tokenizer import StreamingDetokenizer, Tokenizer, load_tokenizer

PREFILL_LENGTHS = (32, 128, 512)  # tokens a chunk; a compiled prefill pads to one of them, so it compiles these shapes
DEMO_PROMPT = "def read_lines(path):"

# ---------------------------------------------------------------------------------------------------------------------
# The engine: a model and its compiled functions


def decode_one_token(
    model: Transformer, token: Tensor, input_pos: Tensor, key_pos: Tensor, params: SamplingTensors, greedy: bool
) -> Tensor:
    """Tokens [B, 1] at positions [B, 1] -> the tokens after them, [B, 1]."""
    logits = model(token, input_pos, key_pos)[:, -1]
    return (logits.argmax(-1) if greedy else sample(logits, params, input_pos[:, 0] + 1))[:, None]


class Engine:
    """Prefill and decode of one model. Compiled code belongs to the engine and is made at its first use."""

    def __init__(self, model: Transformer, compile: bool = False, compile_prefill: bool = False):
        self.model = model
        self.device = model.tok_embeddings.weight.device
        self.compiled = compile or compile_prefill
        self.fixed_lengths = compile_prefill
        self._decode: Callable = decode_one_token
        self._hidden: Callable = model.hidden
        if compile:
            # CUDA graphs: the launches of a decode step cost more than its work on small models.
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self._decode = torch.compile(decode_one_token, mode=mode, fullgraph=True, dynamic=False)
        if compile_prefill:
            self._hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False)

    def key_positions(self, length: int) -> Tensor:
        """The part of the cache that steps up to position `length` read: in coarse steps, so that shapes are few."""
        # A CUDA graph is recorded for each length, so there they double.
        on_cuda = self.device.type == "cuda"
        rounded = max(256, 1 << (length - 1).bit_length()) if on_cuda else -(-length // 128) * 128
        key_pos = self.model.key_pos[: min(rounded, self.model.max_seq_length)]
        if self.compiled:  # the length varies without a new compilation
            torch._dynamo.maybe_mark_dynamic(key_pos, 0)
        return key_pos

    @torch.inference_mode()
    def prefill(self, rows: list[list[int]], starts: list[int], params: list[SamplingParams]) -> Tensor:
        """Runs each row's tokens from its start position into the cache -> the token after them, [B, 1]."""
        lengths = torch.tensor([len(row) for row in rows])
        start = torch.tensor(starts)[:, None]
        longest = int(lengths.max())
        # Dynamic NTK depends on the length reached, so there a prompt can't be taken in parts.
        chunk = longest if self.model.config.rope.type == "dynamic" else PREFILL_LENGTHS[-1]
        last = self.model.norm.weight.new_empty(len(rows), self.model.config.dim)
        for begin in range(0, longest, chunk):
            width = min(chunk, longest - begin)
            if self.fixed_lengths and chunk != longest:
                width = min(length for length in PREFILL_LENGTHS if length >= width)
            padded = [row[begin : begin + width] + [0] * (width - len(row[begin : begin + width])) for row in rows]
            # Padding lands beyond the row's own positions, where nothing looks before it is overwritten, and what would
            # fall off the end in the cache's spare slot.
            input_pos = (start + begin + torch.arange(width)).clamp(max=self.model.max_seq_length)
            key_pos = self.key_positions(int(input_pos.max()) + 1)
            hidden = self._hidden(torch.tensor(padded).to(self.device), input_pos.to(self.device), key_pos)
            ends = lengths - 1 - begin
            for row in ((ends >= 0) & (ends < width)).nonzero()[:, 0].tolist():
                last[row] = hidden[row, ends[row]]
        position = (start[:, 0] + lengths).to(self.device)
        return sample(self.model.logits(last), sampling_tensors(params, self.device), position)[:, None]

    @torch.inference_mode()
    def decode(self, token: Tensor, input_pos: Tensor, length: int, params: SamplingTensors, greedy: bool) -> Tensor:
        """One step: tokens [B, 1] at positions [B, 1], all below `length` -> the next tokens, [B, 1]."""
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
            # The graph's next replay overwrites its output, and the host reads it one step late.
            return self._decode(self.model, token, input_pos, self.key_positions(length), params, greedy).clone()
        return self._decode(self.model, token, input_pos, self.key_positions(length), params, greedy)

    def warm_up(self, params: list[SamplingParams], prompt_length: int = 0) -> float:
        """Compiles what a run of `generate` will call -> seconds. What it leaves in the cache is never looked at."""
        begun = time.perf_counter()
        if self.fixed_lengths and prompt_length:
            for width in {min(prompt_length, PREFILL_LENGTHS[-1]), prompt_length % PREFILL_LENGTHS[-1] or 1}:
                self.prefill([[0] * width] * len(params), [0] * len(params), params)
        zeros = torch.zeros(len(params), 1, dtype=torch.long, device=self.device)
        greedy = all(row.temperature == 0 for row in params)
        for _ in range(3 if self.device.type == "cuda" else 1):  # CUDA graphs: warm up, record, replay
            self.decode(zeros, zeros, 1, sampling_tensors(params, self.device), greedy).tolist()
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
    return sum(tensor.nbytes for tensor in model.parameters()) - unread


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


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Generate text from a checkpoint.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="a converted folder or a weight file in one; default: the embedded demo")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue, or a number: a synthetic prompt of so many tokens")
    source.add_argument("--prompt_file", help="a UTF-8 file with a prompt on each line; - is stdin")
    source.add_argument(
        "--interactive", action="store_true", help="a chat (through the chat template, if there is one)"
    )
    add("--max_new_tokens", type=int, help="default: 200, or what the context has room for")
    add("--num_samples", type=int, default=1, help="of each prompt")
    add("--batch_size", type=int, default=1, help="rows that are decoded together")
    add("--temperature", type=float, help="0 is greedy; default: generation_config.json, else greedy")
    add("--top_k", type=int, help="sample from the k most likely tokens")
    add("--top_p", type=float, help="sample from the most likely tokens that reach this probability")
    add("--min_p", type=float, help="drop tokens less likely than this share of the most likely one")
    add("--seed", type=int, help="the same seed gives the same text; default: a new one each time")
    add("--compile", action="store_true", help="compile the decode step")
    add("--compile_prefill", action="store_true", help="compile the prefill as well")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as stored")
    add("--max_seq_length", type=int, help="of the KV cache; default: what is needed, rounded up")
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the generation")
    add(
        "--json",
        action="store_true",
        help="one JSON object a sample: text, tokens, prompt_tokens, finish_reason, stats",
    )
    args = parser.parse_args()
    for name in ("max_new_tokens", "num_samples", "batch_size", "max_seq_length"):
        value = getattr(args, name)
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name} {value} is out of range; it must be 1 or more")
    if args.interactive and (args.json or args.num_samples > 1 or args.batch_size > 1):
        raise UserError("--interactive goes without --json, --num_samples and --batch_size; leave them out")
    if args.profile:
        folder = args.profile.absolute().parent
        taken = args.profile.exists() and not args.profile.is_file()
        if taken or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"--profile {args.profile} cannot be written; name a file in a folder that can")
    return args


def synthetic_length(args) -> int | None:
    """The number of tokens where --prompt is a number."""
    if args.prompt is None or not (args.prompt.isascii() and args.prompt.isdigit()):
        return None
    if not 1 <= len(args.prompt.lstrip("0")) <= 9:
        raise UserError(f"--prompt {args.prompt[:12]}: a synthetic prompt of so many tokens is not possible")
    return int(args.prompt)


def pick_device(name: str) -> torch.device:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise UserError(f"--device {name} is not available here; use one of {[d for d in available if available[d]]}")
    return torch.device(name)


def read_prompts(args, tokenizer: Tokenizer, config: ModelConfig) -> list[list[int]]:
    """The token ids of every prompt that the command line gives."""
    length = synthetic_length(args)
    if length is not None:
        if length > config.context_length:
            raise UserError(f"--prompt {length} exceeds the context of {config.context_length} tokens; give less")
        draw = random.Random(0)
        return [[draw.randrange(config.vocab_size) for _ in range(length)]]
    if args.prompt_file is not None:
        try:
            data = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
        except OSError as error:
            raise UserError(f"--prompt_file {args.prompt_file}: {error.strerror}; name a readable file") from error
        try:
            lines = data.decode("utf-8-sig").split("\n")  # not at form feeds, as splitlines would
            texts = [line.removesuffix("\r") for line in lines if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(
                f"--prompt_file {args.prompt_file} is not UTF-8 (byte {error.start}); re-encode it"
            ) from error
        if not texts:
            raise UserError(f"--prompt_file {args.prompt_file} has no prompt; write one on each line")
    elif args.prompt is None and args.checkpoint_path is not None:
        raise UserError('nothing to continue; give --prompt "...", --prompt_file or --interactive')
    else:
        texts = [DEMO_PROMPT if args.prompt is None else args.prompt]
        if not texts[0]:
            raise UserError('the prompt is empty; give --prompt "some text"')
    return [tokenizer.encode(text) for text in texts]


def plan_lengths(args, prompts: list[list[int]], context: int) -> tuple[int, int]:
    """(new tokens, length of the cache): refuses what has no room before any work is done."""
    if args.max_seq_length and args.max_seq_length > context:
        raise UserError(f"--max_seq_length {args.max_seq_length} is more than the model's context of {context} tokens")
    limit = args.max_seq_length or context
    longest = max(map(len, prompts), default=1)
    new = args.max_new_tokens or max(1, min(200, limit - longest))
    if longest + new > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {new} new ones exceed the "
            f"{'cache' if args.max_seq_length else 'context'} of {limit}; shorten the prompt or lower --max_new_tokens"
        )
    if args.max_seq_length:
        return new, args.max_seq_length
    # Few different lengths, because compiled code is cached by shape; and a conversation wants room.
    needed = 4096 if args.interactive else longest + new
    return new, min(context, max(1024, 1 << (needed - 1).bit_length()))


def sampling_params(args, settings: dict) -> SamplingParams:
    """Flags first, then what generation_config.json recommends if it says do_sample, else greedy."""
    recommended = settings if settings.get("do_sample") else {}
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    chosen = {name: recommended.get(name) if value is None else value for name, value in given.items()}
    if chosen["temperature"] is None:
        filters = any(given[name] is not None for name in ("top_k", "top_p", "min_p"))
        chosen["temperature"] = 1.0 if recommended or filters else 0.0
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    return SamplingParams(**{name: value for name, value in chosen.items() if value is not None}, seed=seed)


def main() -> None:
    args = parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # the tokenizer says what is not UTF-8
    device = pick_device(args.device)
    path = weights_path(args.checkpoint_path or DEMO)
    config, tokenizer = load_config(path.parent), load_tokenizer(path.parent)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer in {path.parent} has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; "
            "get the tokenizer that belongs to it"
        )
    settings = load_generation_config(path.parent)
    params = sampling_params(args, settings)
    eos_ids = frozenset(settings["eos_token_ids"] or tokenizer.eos_ids)
    prompts = [] if args.interactive else read_prompts(args, tokenizer, config)
    max_new_tokens, max_seq_length = plan_lengths(args, prompts, config.context_length)
    if synthetic_length(args):
        eos_ids = frozenset()  # a synthetic prompt is for timing: all the tokens asked for
    jobs = [
        (prompt, SamplingParams(**{**asdict(params), "seed": (params.seed + sample) % 2**63}))
        for prompt in prompts
        for sample in range(args.num_samples)
    ]
    batch_size = max(1, min(args.batch_size, len(jobs)))

    begun = time.perf_counter()
    model = load_model(path, device, getattr(torch, args.dtype) if args.dtype else None)
    check_memory(
        cache_bytes(model, batch_size, max_seq_length),
        f"the KV cache for {batch_size} x {max_seq_length} tokens",
        device,
    )
    model.setup_caches(batch_size, max_seq_length)
    log(f"loaded {path.parent} ({weight_bytes(model) / 1e9:.2f} GB, {device}) in {time.perf_counter() - begun:.1f} s")
    engine = Engine(model, args.compile, args.compile_prefill)
    if args.compile or args.compile_prefill:
        log("compiling ... (later runs find it in the cache)")
        seconds = engine.warm_up([params] * batch_size, max(map(len, prompts), default=0))
        log(f"compiled in {seconds:.1f} s")
    with profiler(args.profile):
        if args.interactive:
            converse(engine, tokenizer, params, max_new_tokens, eos_ids)
        else:
            continue_prompts(engine, tokenizer, jobs, batch_size, max_new_tokens, eos_ids, args.json)


def profiler(path: Path | None):
    """A context that writes a Chrome trace to `path`, for chrome://tracing or https://ui.perfetto.dev."""
    if path is None:
        return contextlib.nullcontext()
    return torch.profiler.profile(on_trace_ready=lambda trace: trace.export_chrome_trace(str(path)))


def run_batch(
    engine: Engine, prompts: list[list[int]], show: Callable[[Token], None], *args, **kwargs
) -> tuple[list[list[Token]], Stats]:
    """`generate` with a clock: each row's tokens, which `show` saw as they came, and how fast it went."""
    rows: list[list[Token]] = [[] for _ in prompts]
    times = [time.perf_counter()]
    for token in generate(engine, args[0], prompts, *args[1:], **kwargs):
        times[1:] = [times[1] if len(times) > 1 else time.perf_counter(), time.perf_counter()]
        rows[token.row].append(token)
        show(token)
    return rows, Stats.measure(engine, prompts, rows, times)


def continue_prompts(engine, tokenizer, jobs, batch_size: int, max_new_tokens: int, eos_ids, as_json: bool) -> None:
    """Runs (prompt, params) jobs in batches; a batch of one is streamed."""
    streaming = batch_size == 1 and not as_json
    for first in range(0, len(jobs), batch_size):
        group = jobs[first : first + batch_size]
        padded = group + [group[-1]] * (batch_size - len(group))  # a last, smaller batch keeps the compiled shape
        if streaming and len(jobs) > 1:
            log(f"--- sample {first + 1} of {len(jobs)}")
        rows, stats = run_batch(
            engine,
            [prompt for prompt, _ in padded],
            (lambda token: write(token.text)) if streaming else (lambda token: None),
            tokenizer,
            [params for _, params in padded],
            max_new_tokens,
            eos_ids,
        )
        for i, ((prompt, _), tokens) in enumerate(zip(group, rows, strict=False)):
            text = "".join(token.text for token in tokens)
            if as_json:
                result = {
                    "text": text,
                    "tokens": [token.id for token in tokens],
                    "prompt_tokens": len(prompt),
                    "finish_reason": tokens[-1].finish_reason,
                    "stats": asdict(stats),
                }
                write(json.dumps(result, ensure_ascii=False) + "\n")
            elif streaming:
                write("\n")
            else:
                if len(jobs) > 1:
                    log(f"--- sample {first + i + 1} of {len(jobs)}")
                write(text + "\n")
        log(str(stats))


def converse(engine: Engine, tokenizer: Tokenizer, params: SamplingParams, max_new_tokens: int, eos_ids) -> None:
    """Answers each line of stdin. The KV cache is kept, so a turn prefills only what is new since the last one.

    With a chat template the lines are a user's messages; without one the model continues the text so far.
    """
    chatting = tokenizer.has_chat_template
    log("a chat" if chatting else "this model has no chat template: it continues what you write")
    log("/clear starts anew, /exit or Ctrl-D ends")
    messages: list[dict[str, str]] = []
    history: list[int] = []  # all of the conversation; the cache holds it but for the last token
    while (line := ask()) is not None and line.strip() not in ("/exit", "/quit"):
        if line.strip() == "/clear":
            messages, history = [], []
            continue
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            if chatting:
                ids = tokenizer.encode(tokenizer.apply_chat_template(asked), add_special_tokens=False)
            else:
                ids = history + tokenizer.encode("\n" + line if history else line, add_special_tokens=not history)
        except UserError as error:  # no reason to lose the conversation
            log(f"error: {error}")
            continue
        room = engine.model.max_seq_length - len(ids)
        if room < 1:
            log(f"the conversation has no room left in {engine.model.max_seq_length} tokens; /clear starts a new one")
            continue
        same = (a == b for a, b in zip(ids[:-1], history[:-1], strict=False))
        cached = sum(itertools.takewhile(bool, same))
        limit = min(max_new_tokens, room)
        (reply,), stats = run_batch(
            engine,
            [ids[cached:]],
            lambda token: write(token.text),
            tokenizer,
            [params],
            limit,
            eos_ids,
            starts=[cached],
        )
        write("\n")
        log(str(stats))
        messages = [*asked, {"role": "assistant", "content": "".join(token.text for token in reply)}]
        history = ids + [token.id for token in reply if token.finish_reason != "stop"]


def ask() -> str | None:
    """The user's next line, or None at the end of the input."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401  gives input() its line editing and history

        try:
            return input("> ")
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


if __name__ == "__main__":
    run(main)
