"""Text from a checkpoint: the command line.

    python generate.py --compile --prompt "def read_lines(path):"              # the embedded demo model
    python generate.py --compile --checkpoint_path checkpoints/meta-llama/Llama-3.2-1B-Instruct --interactive

The text goes to stdout, everything else to stderr. The way of a prompt: text -> tokenizer.encode -> engine.generate ->
pieces of text as they become certain.
"""

import errors  # first, so that Ctrl-C is quiet while torch is imported

# isort: split
import argparse
import contextlib
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch

from checkpoint import DEMO, check_memory, load_config, load_generation_config, load_model, weights_path
from engine import Engine, Stats, Token, cache_bytes, check_compiler, generate, weight_bytes
from errors import ArgumentParser, UserError
from kernels import cpu_library
from model import ModelConfig
from sampling import SamplingParams
from tokenizer import Tokenizer, load_tokenizer

DEMO_PROMPT = "def read_lines(path):"


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def write_token(token: Token) -> None:
    write(token.text)


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
    prompts = [tokenizer.encode(text) for text in texts]
    if not all(prompts):
        raise UserError(f"the tokenizer has no tokens for the prompt {texts[prompts.index([])]!r}; give it another")
    return prompts


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
    samples = max(1, len(prompts) * args.num_samples)
    batch_size = min(args.batch_size, samples)
    jobs = (
        (prompt, replace(params, seed=(params.seed + sample) % 2**63))
        for prompt in prompts
        for sample in range(args.num_samples)
    )

    begun = time.perf_counter()
    with ThreadPoolExecutor() as pool:  # each of these takes a second or two, building the kernels more, but once
        compiler = pool.submit(check_compiler) if args.compile or args.compile_prefill else None
        kernels = pool.submit(cpu_library) if device.type == "cpu" else None
        model = load_model(path, device, getattr(torch, args.dtype) if args.dtype else None)
        for job in filter(None, (compiler, kernels)):
            job.result()
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
        seconds = engine.warm_up([params] * batch_size, max(map(len, prompts), default=None))
        log(f"compiled in {seconds:.1f} s")
    with profiler(args.profile):
        if args.interactive:
            converse(engine, tokenizer, params, max_new_tokens, eos_ids)
        else:
            continue_prompts(engine, tokenizer, jobs, samples, batch_size, max_new_tokens, eos_ids, args.json)


def profiler(path: Path | None):
    """A context that writes a Chrome trace to `path`, for chrome://tracing or https://ui.perfetto.dev."""
    if path is None:
        return contextlib.nullcontext()

    def save(trace: torch.profiler.profile) -> None:
        trace.export_chrome_trace(str(path))
        if not path.is_file():  # the exporter does not say so
            raise UserError(f"--profile {path} could not be written; name a file in a folder that can")

    return torch.profiler.profile(on_trace_ready=save)


def run_batch(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    params: list[SamplingParams],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    show: Callable[[Token], None] | None = None,
    starts: list[int] | None = None,
) -> tuple[list[list[Token]], Stats]:
    """`generate` with a clock: each row's tokens, which `show` sees as they come, and how fast it went.

    A batch of fewer rows than the cache has is filled up, because compiled code has its shape.
    """
    rows: list[list[Token]] = [[] for _ in prompts]
    filling = engine.model.max_batch_size - len(prompts)
    times = [time.perf_counter()]
    tokens = generate(
        engine,
        tokenizer,
        prompts + prompts[-1:] * filling,
        params + params[-1:] * filling,
        max_new_tokens,
        eos_ids,
        starts,
    )
    for token in tokens:
        times[1:] = [times[1] if len(times) > 1 else time.perf_counter(), time.perf_counter()]
        if token.row < len(rows):
            rows[token.row].append(token)
            if show:
                show(token)
    return rows, Stats.measure(engine, prompts, rows, times)


def continue_prompts(
    engine: Engine,
    tokenizer: Tokenizer,
    jobs: Iterator[tuple[list[int], SamplingParams]],
    samples: int,
    batch_size: int,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    as_json: bool,
) -> None:
    """Runs `samples` jobs, each a prompt and how it is sampled, in batches; a batch of one is streamed."""
    streaming = batch_size == 1 and not as_json
    show = write_token if streaming else None
    number = itertools.count(1)
    while group := list(itertools.islice(jobs, batch_size)):
        prompts, params = [prompt for prompt, _ in group], [params for _, params in group]
        if streaming and samples > 1:
            log(f"--- sample {next(number)} of {samples}")
        rows, stats = run_batch(engine, tokenizer, prompts, params, max_new_tokens, eos_ids, show)
        for prompt, tokens in zip(prompts, rows, strict=True):
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
                if samples > 1:
                    log(f"--- sample {next(number)} of {samples}")
                write(text + "\n")
        log(str(stats))


def converse(
    engine: Engine, tokenizer: Tokenizer, params: SamplingParams, max_new_tokens: int, eos_ids: frozenset[int]
) -> None:
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
            if not ids:
                raise UserError("the tokenizer has no tokens for this; write something else")
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
            engine, tokenizer, [ids[cached:]], [params], limit, eos_ids, show=write_token, starts=[cached]
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
    errors.run(main)
