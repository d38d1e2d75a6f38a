"""Text from a checkpoint: the command line.

    python generate.py --compile --prompt "def read_lines(path):"              # the embedded demo model
    python generate.py --compile --checkpoint_path checkpoints/meta-llama/Llama-3.2-1B-Instruct --interactive
    torchrun --standalone --nproc_per_node 4 generate.py --compile --checkpoint_path ...          # a part on each GPU

The text goes to stdout, everything else to stderr. The way of a prompt: prompts.py makes requests of what is asked for,
scheduler.generate (or beam.beam_search) continues them, here the text is written as it becomes certain. chat.py is
--interactive.
"""

import errors  # first, so that Ctrl-C is quiet while torch is imported

# isort: split
import argparse
import contextlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from arguments import add_adapters, add_device, add_model, add_speed, dtype_named, model_path, named_adapters
from attention import DECODE_QUERIES
from beam import BeamParams, beam_search
from chat import converse, write
from checkpoint import checksum, load_config, load_generation_config, load_model, weights_path
from compiled import check_compiler, programs_folder
from config import ModelConfig
from engine import Engine, cache_bytes, resident_bytes
from errors import ArgumentParser, UserError, count, log
from files import check_memory
from kernels.build import cpu_library
from lora_layers import Adapters, read_adapters
from model import Transformer
from prompt_cache import check_path, load_row, save_row
from prompts import (
    NO_BEAMS,
    SETTINGS,
    Job,
    Target,
    check_draft,
    check_settings,
    default_settings,
    draw_seed,
    image_options,
    make_request,
    read_jobs,
    read_text,
)
from scheduler import Token, generate
from tokenizer import Tokenizer, load_tokenizer
from tp import ALONE, Group, join

CHAT_LENGTH = 4096  # what a conversation has room for by default
CHAT_WORDS = (64, 16)  # so many bad words, of so many tokens, may be set in a chat
SPECULATION, OUTPUT = ("draft_checkpoint_path", "prompt_lookup"), ("num_samples", "batch_size", "logprobs", "echo")
WITHOUT = {  # what does not go together
    "interactive": ("json", "num_beams", "chat", "image", *OUTPUT),
    "image": ("prompt_file", "prompt_text_file"),
    "num_beams": (*NO_BEAMS, *SPECULATION, *OUTPUT, "prompt_cache"),
}
NEEDS = {  # what has a meaning only beside one of these
    "system": ("chat", "interactive", "image"),
    "template_vars": ("chat", "interactive", "prompt_file", "image"),
    "adapter_scale": ("adapters",),
    "length_penalty": ("num_beams",),
    "early_stopping": ("num_beams",),
    "num_return_sequences": ("num_beams",),
    "logprobs": ("json",),
    "skip_bad_lines": ("prompt_file",),
    "image": ("prompt",),
    "speculate_k": SPECULATION,
    "draft_tp": ("draft_checkpoint_path",),
}
FILES = ("prompt_file", "prompt_text_file", "image", "profile")
# What may differ between ranks, which may be on different machines.
ELSEWHERE = ("checkpoint_path", "draft_checkpoint_path", "adapters", *FILES)
RANGES = {"num_beams": (1, 64), "logprobs": (0, 20), "speculate_k": (0, DECODE_QUERIES - 1)}


def token_bias(text: str) -> tuple[str, float]:
    token_id, _, value = text.partition("=")
    try:
        return str(int(token_id)), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not ID=VALUE, such as 13=-100") from None


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text[:40]!r} is not a JSON object, such as {{"enable_thinking": false}}')
    return value


def schema_file(name: str) -> dict[str, Any]:
    try:
        value = json.loads(read_text("json_schema", name))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--json_schema {name} is not JSON ({error}); correct it") from error
    if not isinstance(value, dict):
        raise UserError(f"--json_schema {name} is not a JSON object; correct it")
    return value


def grammar_file(name: str) -> str:
    return read_text("grammar", name)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Generate text from a checkpoint.")
    add = parser.add_argument
    add_model(parser)
    chosen = "JSON lines choose by a field `adapter`, a chat by /set adapter; one without a name is for all others"
    add_adapters(parser, "--adapter", "[NAME=]PATH", chosen)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        help="the text to continue, or a number: so many random tokens, to measure with; default: a line of Python, "
        "for the demo",
    )
    source.add_argument(
        "--prompt_file",
        help='a UTF-8 file with a prompt on each line, or JSON objects with "prompt" or "messages" and settings of '
        "their own (temperature, stop, ...; id is handed on); - is stdin",
    )
    source.add_argument("--prompt_text_file", metavar="FILE", help="a UTF-8 file that is one prompt; - is stdin")
    source.add_argument(
        "--interactive", action="store_true", help="a chat (through the chat template, if there is one)"
    )
    add("--chat", action="store_true", help="render each prompt by the chat template, as a user's message")
    add(
        "--image",
        action="append",
        metavar="FILE",
        help="an image that the prompt is about, once for each: before its text, or where <image> stands in it; it is "
        "then rendered as by --chat",
    )
    add("--system", metavar="TEXT", help="the system message of --chat and --interactive")
    add(
        "--template_vars",
        type=json_object,
        metavar="JSON",
        help="variables of the chat template: '{\"enable_thinking\": false}'; in a JSON line a field of that name",
    )
    add("--skip_bad_lines", action="store_true", help="warn of the lines of --prompt_file that cannot be run, go on")
    add("--max_new_tokens", type=count, help="default: 200, or what the context has room for")
    add("--min_new_tokens", type=int, help="no end token before so many others; default: 0")
    add("--ignore_eos", action="store_true", help="end tokens don't end a text")
    add("--stop", nargs="+", metavar="TEXT", help=r"a text ends before any of these (a line break: $'\n' in the shell)")
    add("--num_samples", type=count, default=1, help="of each prompt; on stdout a line --- I of N begins each")
    add("--batch_size", type=count, default=1, help="rows that are decoded together")
    add("--temperature", type=float, help="0 is greedy; default: generation_config.json, else greedy")
    advised = "default: generation_config.json, else off"
    add("--top_k", type=int, help=f"sample from the k most likely tokens; {advised}")
    add("--top_p", type=float, help=f"sample from the most likely tokens that reach this probability; {advised}")
    add("--min_p", type=float, help=f"drop tokens less likely than this share of the most likely one; {advised}")
    add("--seed", type=int, help="the same seed gives the same text; default: a new one for each prompt")
    add("--repetition_penalty", type=float, help=f"above 1: tokens of prompt and text get less likely; {advised}")
    add("--presence_penalty", type=float, help="above 0: tokens of the text get less likely; default: 0")
    add("--frequency_penalty", type=float, help="above 0: each time they occur; default: 0")
    add("--logit_bias", type=token_bias, nargs="+", metavar="ID=VALUE", help="added to the logits of token ids")
    add("--bad_words", nargs="+", metavar="TEXT", help="what must not be written, as a word or part of one")
    add("--json_schema", type=schema_file, metavar="FILE", help="a JSON schema: the text is JSON that it describes")
    add("--regex", metavar="R", help="a regular expression (Rust's, no look-around) that matches all of the text")
    add("--grammar", type=grammar_file, metavar="FILE", help="a grammar in Lark's syntax that the text follows")
    add("--num_beams", type=int, default=1, help="beam search with so many")
    add("--length_penalty", type=float, default=1.0, help="of beams; above 0 prefers long texts")
    add(
        "--early_stopping", choices=("true", "false", "never"), default="false", help="of beams; as transformers has it"
    )
    add("--num_return_sequences", type=count, default=1, help="the best so many beams")
    add_speed(parser)
    add("--draft_tp", type=int, choices=(1,), help="under torchrun: the draft whole on every rank, not in parts")
    add("--logprobs", type=int, metavar="K", help="in JSON: log-probabilities of the tokens and the K most likely ones")
    add("--echo", action="store_true", help="the prompt too; in JSON as prompt_logprobs")
    add_device(parser)
    add("--max_seq_length", type=count, help="of the KV cache; default: what is needed, rounded up")
    add(
        "--prompt_cache",
        type=Path,
        metavar="FILE",
        help="keep the KV cache of the last text there: a later prompt that begins in the same way is run from where "
        "it differs",
    )
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the generation")
    add(
        "--json",
        action="store_true",
        help="one JSON object a sample: text, tokens, prompt_tokens, finish_reason, stats",
    )
    args = parser.parse_args()
    args.logit_bias = args.logit_bias and dict(args.logit_bias)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    args.adapters, args.adapter = named_adapters(args.adapters)
    check_args(args, given)
    return args


def check_args(args: argparse.Namespace, given: set[str]) -> None:
    """UserError for flags that are out of range or contradict each other."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {value} is out of range; it must be between {low} and {high}")
    for name in [name for name in WITHOUT if name in given]:
        if clash := [other for other in WITHOUT[name] if other in given]:
            raise UserError(f"--{name} does not go with --{clash[0]}; leave one out")
    for name in [name for name in NEEDS if name in given]:
        if given.isdisjoint(NEEDS[name]):
            needed = " or ".join("--" + other.replace("adapters", "adapter") for other in NEEDS[name])
            raise UserError(f"--{name} needs {needed}; add it")
    if args.adapters and args.adapter is None and args.prompt_file is None and not args.interactive:
        name = next(iter(args.adapters))
        raise UserError(f"no prompt asks for the adapter {name!r}; leave out its name: --adapter {args.adapters[name]}")
    check_settings({name: getattr(args, name) for name in SETTINGS if name in given})
    if args.profile:
        folder = args.profile.absolute().parent
        taken = args.profile.exists() and not args.profile.is_file()
        if taken or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"--profile {args.profile} cannot be written; name a file in a folder that can")
    if args.prompt_cache:
        check_path(args.prompt_cache)


def cache_length(length: int, context: int) -> int:
    """The length of a cache for so many tokens: one of few, because compiled code is kept by shape."""
    return min(context, max(1024, 1 << (length - 1).bit_length()))


def main() -> None:
    args = parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # the tokenizer says what is not UTF-8
    with join(args.device, args.backend, args.threads) as group:
        run(args, group)


def run(args: argparse.Namespace, group: Group) -> None:
    """What every rank does, or this process alone."""
    device = group.device
    paths, config, tokenizer, context = find_models(args)
    path = paths[0]
    if args.interactive and not tokenizer.has_chat_template and (args.system is not None or args.template_vars):
        raise UserError("this model has no chat template for --system or --template_vars; leave them out")
    beams = None
    if args.num_beams > 1:
        early = {"true": True, "false": False, "never": "never"}[args.early_stopping]
        beams = BeamParams(args.num_beams, args.length_penalty, early, args.num_return_sequences)

    if args.prompt_cache and group.size > 1:
        raise UserError("--prompt_cache is for one process, and each of several ranks holds a part; leave it out")
    group.check_flags(args, ELSEWHERE, lambda: list(map(checksum, paths)))
    adapters = read_adapters(args.adapters, path.parent)
    recommended = load_generation_config(path.parent)
    eos_ids = frozenset([*recommended["eos_token_ids"], *tokenizer.eos_ids])
    settings = default_settings(args, recommended)
    limit = args.max_seq_length or context
    if args.interactive and not args.max_seq_length:
        limit = cache_length(max(CHAT_LENGTH, 2 * (args.max_new_tokens or 0)), context)
    limited_by, images = "context" if limit == context else "cache", image_options(path.parent, config)
    target = Target(tokenizer, config.vocab_size, eos_ids, limit, limited_by, tuple(adapters), images)
    if args.interactive and settings["seed"] is None:
        settings["seed"] = group.from_rank_0(draw_seed)
    jobs = [] if args.interactive else group.from_rank_0(lambda: read_jobs(args, target, settings))
    jobs = [job.bound(target) for job in jobs]
    requests = [job.request for job in jobs] or [make_request(target, [0], settings)]
    longest = max(len(request.prompt) for request in requests)
    needed = max(len(request.prompt) + request.max_new_tokens for request in requests)
    max_seq_length = limit if args.max_seq_length or args.interactive else cache_length(needed, context)
    batch_size = args.num_beams if beams else min(args.batch_size, len(requests))

    begun = time.perf_counter()
    models = load_models(args, paths, [group, ALONE if args.draft_tp else group])
    inserted = Adapters(models[0], config, adapters, args.adapter_scale, group)
    del adapters  # whose matrices are float32
    check_memory(
        group.sharing * sum(cache_bytes(model, batch_size, max_seq_length) for model in models),
        f"the KV cache for {batch_size} x {max_seq_length} tokens",
        device,
    )
    draft = models[1] if args.draft_checkpoint_path else None
    speculation = draft, args.speculate_k, args.prompt_lookup
    engine = Engine(models[0], args.compile, args.compile_prefill, *speculation, inserted)
    words = [request.params.bad_words for request in requests]
    room = max(map(len, words)), max((len(word) for of_request in words for word in of_request), default=0)
    if args.interactive:
        room = max(room[0], CHAT_WORDS[0]), max(room[1], CHAT_WORDS[1])
    engine.setup(
        batch_size,
        max_seq_length,
        plain=not args.interactive and all(request.params.plain and request.grammar is None for request in requests),
        logprobs=0 if args.logprobs is None and args.echo and args.json else args.logprobs,
        eos_ids=eos_ids,
        bad_words=room,
    )
    log(f"loaded {path.parent} ({described(models, group)}) in {time.perf_counter() - begun:.1f} s")
    if (args.compile or args.compile_prefill) and not beams:  # beam search has a step of its own
        log("warming up ... (the first time, this compiles)")
        constrained = any(request.grammar is not None for request in requests)
        seconds = engine.warm_up(None if args.interactive else longest, constrained)
        log(f"warmed up in {seconds:.1f} s")
    checksums = list(map(checksum, paths)) if args.prompt_cache else []
    if args.prompt_cache and args.prompt_cache.exists():
        named = {request.adapter for request in requests} | ({None, *inserted.names} if args.interactive else set())
        wanted = {engine.adapters.identity(name) for name in named}
        held = load_row(engine, 0, args.prompt_cache, checksums, wanted)
        log(f"loaded {held} tokens from {args.prompt_cache}")
    with profiler(args.profile if group.rank == 0 else None):
        if args.interactive:
            converse(engine, target, settings, args.system, args.template_vars or {})
        elif beams:
            search_beams(engine, tokenizer, jobs, beams, args.json)
        else:
            continue_prompts(engine, tokenizer, jobs, args)
    if args.prompt_cache:
        save_row(engine, engine.places.latest, args.prompt_cache, checksums)


def find_models(args: argparse.Namespace) -> tuple[list[Path], ModelConfig, Tokenizer, int]:
    """The file of the model, and of its draft if there is one; the model's config and tokenizer, and the context of
    both, in tokens. UserError where they do not go together, or --max_seq_length is more."""
    path = weights_path(model_path(args))
    config = load_config(path.parent)
    tokenizer = load_tokenizer(path.parent, config.vocab_size)
    paths, context = [path], config.context_length
    if args.draft_checkpoint_path:
        paths.append(weights_path(args.draft_checkpoint_path))
        check_draft(tokenizer, load_tokenizer(paths[1].parent))
        context = min(context, load_config(paths[1].parent).context_length)
    if args.max_seq_length and args.max_seq_length > context:
        raise UserError(f"--max_seq_length {args.max_seq_length} is more than the model's context of {context} tokens")
    return paths, config, tokenizer, context


def load_models(args: argparse.Namespace, paths: list[Path], groups: list[Group]) -> list[Transformer]:
    """What the paths hold, each model for its group; meanwhile the compiler is tried and the kernels are built."""
    device = groups[0].device
    with ThreadPoolExecutor() as pool:  # each of these takes a second or two, building the kernels more, but once
        # Compiled steps may be on the disk already: then nobody has to wait for the compiler.
        there = device.type == "cpu" and os.path.exists(programs_folder())
        compiles = args.compile_prefill or (args.compile and not there)
        compiler = pool.submit(check_compiler) if compiles else None
        kernels = pool.submit(cpu_library) if device.type == "cpu" else None
        dtype, cache = map(dtype_named, (args.dtype, args.cache_dtype))
        models = [load_model(path, device, dtype, group, cache) for path, group in zip(paths, groups, strict=False)]
        for job in filter(None, (compiler, kernels)):
            job.result()
    return models


def described(models: list[Transformer], group: Group) -> str:
    """How large loaded models are, and where."""
    size = f"{sum(map(resident_bytes, models)) / 1e9:.2f} GB"
    kind = group.device.type
    return f"{group.size} x {kind} by {group.backend}, here {size}" if group.size > 1 else f"{size}, {group.device}"


def profiler(path: Path | None):
    """A context that writes a Chrome trace to `path`, for chrome://tracing or https://ui.perfetto.dev."""
    if path is None:
        return contextlib.nullcontext()

    def save(trace: torch.profiler.profile) -> None:
        trace.export_chrome_trace(str(path))
        if not path.is_file():  # the exporter does not say so
            raise UserError(f"--profile {path} could not be written; name a file in a folder that can")

    return torch.profiler.profile(on_trace_ready=save)


# ---------------------------------------------------------------------------------------------------------------------
# Output


class Output:
    """Writes texts or JSON objects to stdout, and a progress bar to stderr. A line before each of several texts says
    which it is."""

    def __init__(self, total: int, as_json: bool):
        self.total, self.as_json, self.done = total, as_json, 0
        # A terminal that shows the texts needs no bar.
        hidden = total == 1 or not sys.stderr.isatty() or sys.stdout.isatty()
        self.bar = tqdm(total=total, unit="text", leave=False, disable=hidden)

    def begin(self, text: str = "") -> None:
        if self.total > 1 and not self.as_json:
            write(f"--- {self.done + 1} of {self.total}\n")
        write(text)

    def end(self, text: str = "") -> None:
        write(text + "\n")
        self.done += 1
        self.bar.update()


def continue_prompts(engine: Engine, tokenizer: Tokenizer, jobs: list[Job], args: argparse.Namespace) -> None:
    """Writes the jobs' results in their order, each as soon as it is there; in a batch of one token by token."""
    streaming = engine.model.max_batch_size == 1 and not args.json
    output = Output(len(jobs), args.json)
    gathered: list[list[Token]] = [[] for _ in jobs]
    scored = args.echo and args.json
    for token in generate(engine, tokenizer, (replace(job.request, echo=scored) for job in jobs)):
        gathered[token.request].append(token)
        if streaming:
            if len(gathered[token.request]) == 1:
                output.begin(echoed(tokenizer, jobs[token.request], token) if args.echo else "")
            write(token.text)
        while output.done < len(jobs) and (tokens := gathered[output.done]) and tokens[-1].finish_reason:
            job, gathered[output.done] = jobs[output.done], []
            if args.json:
                fields = result(job, tokens, args, tokenizer)
                output.end(json.dumps(fields, ensure_ascii=False, allow_nan=False))
            elif streaming:
                output.end()
            else:
                output.begin(echoed(tokenizer, job, tokens[0]) if args.echo else "")
                output.end("".join(token.text for token in tokens))
    output.bar.close()
    log(str(engine.stats))


def echoed(tokenizer: Tokenizer, job: Job, first: Token) -> str:
    """The prompt as it was given, and the space that sentencepiece takes away where a text begins."""
    prompt = job.request.prompt
    spaces = (
        len(tokenizer.decode([*prompt, first.id])) - len(tokenizer.decode(prompt)) - len(tokenizer.decode([first.id]))
    )
    return job.text + " " * spaces


def result(job: Job, tokens: list[Token], args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """What --json says of a request."""
    new = [token for token in tokens if not token.of_prompt]
    fields = job.labels | {
        "text": "".join(token.text for token in new),
        "tokens": [token.id for token in new],
        "prompt_tokens": len(job.request.prompt),
        "finish_reason": new[-1].finish_reason,
        "stats": new[-1].stats.report(),
    }
    if args.logprobs is not None:
        fields["logprobs"] = [logprobs_of(token, tokenizer) for token in new]
    if args.echo:
        fields["prompt_logprobs"] = [logprobs_of(token, tokenizer) for token in tokens if token.of_prompt]
    return fields


def logprobs_of(token: Token, tokenizer: Tokenizer) -> dict[str, Any]:
    """{"token": id, "text", "logprob", "top": [the same of the most likely tokens]}. A text is what the token is by
    itself: where a character takes several tokens, U+FFFD."""

    def named(token_id: int, logprob: float | None) -> dict[str, Any]:
        text, twice = (tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        if twice == f"{text} {text}":  # the space that sentencepiece takes away where a text begins
            text = " " + text
        return {"token": token_id, "text": text, "logprob": logprob}

    return named(token.id, token.logprob) | {"top": [named(*likely) for likely in token.top]}


def search_beams(engine: Engine, tokenizer: Tokenizer, jobs: list[Job], beams: BeamParams, as_json: bool) -> None:
    """Writes the best beams of each job."""
    output = Output(len(jobs) * beams.num_return_sequences, as_json)
    started = time.perf_counter()
    for job in jobs:
        begun = time.perf_counter()
        found = beam_search(engine, job.request, beams)
        seconds = time.perf_counter() - begun
        for sequence in found:
            ended = sequence.finish_reason == "stop"
            text = tokenizer.decode(sequence.tokens[:-1] if ended else sequence.tokens)
            if as_json:
                fields = job.labels | {
                    "text": text,
                    "tokens": sequence.tokens,
                    "prompt_tokens": len(job.request.prompt),
                    "finish_reason": sequence.finish_reason,
                    "score": sequence.score,
                    "stats": {"new_tokens": len(sequence.tokens), "seconds": seconds},
                }
                text = json.dumps(fields, ensure_ascii=False)
            output.begin()
            output.end(text)
    output.bar.close()
    log(f"beam search: {output.done} texts in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    errors.run(main)
