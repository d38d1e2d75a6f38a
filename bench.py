"""How fast: prefill and decode in tokens a second, the share of what the memory allows, and other programs beside it.

    python bench.py                                                   # the 1b shape, random weights, bf16
    python bench.py --mode bf16 int8 int4 --against llama.cpp transformers
    python bench.py --shape 8b --device cuda --mode int8 int4
    python bench.py --checkpoint_path checkpoints/org/name/model_int8.safetensors
    torchrun --standalone --nproc_per_node 2 bench.py --mode int4     # tensor parallelism; GB/s are those of a rank
    python bench.py --mode int4 --batch_size 8 --positions 0 1000 4000 8000 --startup --long_cache   # more, see there

A table goes to stdout, and into --out with every single measurement as JSON and a chart as PNG. --mode quantizes
unquantized weights in memory, in groups of --groupsize for int4; by default they are run as they are stored.

What is timed. Machines drift, so all take turns in one process: a round measures, for each contender, one prefill, the
read bandwidth and one decode; warm-up rounds, which compile, come before and are left out. All figures are medians over
the rounds (of the bandwidth, over all measurements), and ratios are ratios of medians.
- Prefill: `prompt_length` random tokens into an empty cache, up to the token that follows them. All contenders compute
  logits for the last token only.
- Decode: `new_tokens` greedy steps at batch 1 from there on, at positions `prompt_length` and up. Every step ends in
  the next token; no sampling, no text.
- Ours is what `generate.py --compile` runs: a compiled decode step and an eager prefill, or a compiled one with
  --compile_prefill. The KV cache has `max_seq_length` positions.
- transformers runs its forward on views of the same unquantized tensors: once eager with its default, growing cache,
  once compiled (prefill and decode apart, each for its exact shape) with a static cache that is as short as the run
  allows. Ratios are against the better of the two, for prefill and for decode.
- llama.cpp reads the same weights from a GGUF file, through its C API and without its sampler: as BF16 for bf16, all
  matrices as Q8_0 for int8 and as Q4_0 for int4 (its own quantizer would make the output projection a larger Q6_K).
- All use --threads threads. A GPU's work is timed by its events, up to a synchronisation.

A decode step reads every weight once (of an embedding that is not also the output, one row) and the cache up to its
position. These bytes over its time are its GB/s; over the read bandwidth, its share of the roofline. The read bandwidth
is that of summing a buffer far larger than the caches; on CPUs hand-written loads were no faster.

--batch_size and --positions decode over caches that are filled with random values. They take turns like the above, each
of them with one row, or with position 100, to be compared with.
"""

import errors  # first, so that Ctrl-C is quiet while torch is imported

# isort: split
import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoding import GREEDY, measure_ragged, measure_sampling, measure_speculation
from benchmarks.models import MODES, SHAPES, format_of, mode_of, quantize_model, random_model, rebuild
from benchmarks.peers import Unavailable, gguf_bytes, llama_cpp_peer, transformers_peers, versions
from benchmarks.report import markdown, plot, summarize
from benchmarks.startup import measure_startup, write_checkpoint
from checkpoint import DEMO, load_config, load_model, weights_path
from compiled import check_compiler
from config import ModelConfig
from engine import Engine, Request, cache_bytes, peak_memory, weight_bytes
from errors import ArgumentParser, UserError, log, world_size
from files import check_memory, read_json, write_atomically
from kernels.packing import GROUPSIZES, allocate
from model import Transformer
from prompts import check_draft
from tokenizer import load_tokenizer
from tp import BACKENDS, Group, join

PEERS = ("transformers", "llama.cpp")
BUFFER_BYTES = {"cpu": 2**30, "cuda": 2**32}  # read to measure the bandwidth
BASE_POSITION = 100  # what --positions are compared with
DIFFERENT = {"int8": 0.2, "int4": 0.8}  # errors of a peer's logits from which it does not compute the same


# ---------------------------------------------------------------------------------------------------------------------
# What is timed


class Ours:
    """The engine of generate.py as a contender (see benchmarks/peers.py): caches of its own, the layers of `model`."""

    def __init__(self, model: Transformer, max_seq_length: int, compile_prefill: bool = False, rows: int = 1):
        self.engine = Engine(rebuild(model), compile=True, compile_prefill=compile_prefill)
        self.engine.setup(rows, max_seq_length, plain=True)

    def prefill(self, prompt: list[int]) -> int:
        self.engine.forget()
        return int(self.engine.start(0, Request(prompt, GREEDY, 1))[0][0, -1])

    def decode(self, token: int, position: int, steps: int) -> list[int]:
        """The tokens of the first row."""
        self.engine.sampler.position.fill_(position)
        self.engine.sampler.history[:, position] = token
        results = [self.engine.step(0, position + step + 1)[0] for step in range(steps)]
        return torch.stack(results)[:, 0, -1].tolist()

    def fill_cache(self) -> None:
        """With random values, as if all positions had been there. (What was never written takes no memory to read.)"""
        for layer in self.engine.model.layers:
            layer.attention.kv_cache.k.uniform_(-1, 1)
            layer.attention.kv_cache.v.uniform_(-1, 1)


@dataclass
class Contender:
    """Something that takes turns, and what the report needs to know of it."""

    runner: Any
    program: str
    mode: str
    weight_bytes: int


def timed(device: torch.device, function: Callable, *args) -> tuple[float, Any]:
    """(seconds, what the function returned)."""
    if device.type != "cuda":
        begun = time.perf_counter()
        result = function(*args)
        return time.perf_counter() - begun, result
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    result = function(*args)
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3, result


def read_bandwidth(buffer: torch.Tensor) -> float:
    """GB/s of summing a buffer, the median of five times."""
    return buffer.nbytes / statistics.median(timed(buffer.device, buffer.sum)[0] for _ in range(5)) / 1e9


def take_turns(
    turns: Mapping[str, tuple[Any, int]],
    new_tokens: int,
    rounds: int,
    device: torch.device,
    prompt: list[int] | None = None,
) -> dict[str, dict[str, list]]:
    """Runs the rounds -> prefill_s, decode_s and the read_gb_s between them of each turn, a value a round.

    A turn is a contender and the position at which it decodes, which is the end of the prompt if there is one; without
    one there is no prefill. `tokens` are those of the warm-up.
    """
    times: dict[str, dict[str, list]] = {name: {} for name in turns}
    buffer = allocate((BUFFER_BYTES[device.type] // 4,), torch.float32, device).fill_(1)
    warm_up = 3 if device.type == "cuda" else 1  # CUDA graphs: warm up, record, replay
    for number in range(-warm_up, rounds):
        for name, (contender, position) in turns.items():
            measured, first = {}, 0
            if prompt:
                measured["prefill_s"], first = timed(device, contender.prefill, prompt)
            measured["read_gb_s"] = read_bandwidth(buffer)
            measured["decode_s"], tokens = timed(device, contender.decode, first, position, new_tokens)
            if number < 0:
                times[name] = {"tokens": [first, *tokens], **{key: [] for key in measured}}
            else:
                for key, value in measured.items():
                    times[name][key].append(value)
            prefill = f"prefill {measured['prefill_s']:.2f} s, " if prompt else ""
            log(
                f"{'warm-up' if number < 0 else f'round {number + 1} of {rounds}'}: {name}: {prefill}decode "
                f"{measured['decode_s'] / new_tokens * 1e3:.1f} ms a token; read {measured['read_gb_s']:.1f} GB/s"
            )
    return times


# ---------------------------------------------------------------------------------------------------------------------
# More measurements


def logits_error(peer, model: Transformer, prompt: list[int]) -> float:
    """How far a peer's logits after the prompt are from ours: |theirs - ours| / |ours|, Euclidean."""
    model = rebuild(model)
    device = model.tok_embeddings.weight.device
    model.setup_caches(1, len(prompt))
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor([prompt], device=device), torch.arange(len(prompt), device=device)[None])
        ours = model.logits(hidden[0, -1]).float().cpu()
    peer.prefill(prompt)
    return float((peer.last_logits.cpu() - ours).norm() / ours.norm())


def measure_long_cache(model: Transformer, new_tokens: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """What a long cache costs while it is empty: decoding at position 100 with 256 positions and with 8192."""
    lengths, new_tokens = (256, min(8192, model.config.context_length)), min(new_tokens, 100)
    turns = {f"a cache of {length}": (Ours(model, length), BASE_POSITION) for length in lengths}
    times = take_turns(turns, new_tokens, rounds, device, random_prompt(BASE_POSITION, model.config))
    short, long = (statistics.median(t["decode_s"]) / new_tokens * 1e3 for t in times.values())
    decode_s = {length: t["decode_s"] for length, t in zip(lengths, times.values(), strict=True)}
    return {"decode_s": decode_s, "short_ms": short, "long_ms": long, "ratio": long / short, "max_seq_length": lengths}


def measure_positions(
    ours: Mapping[str, Ours], positions: list[int], new_tokens: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """What a step costs that much further on, each mode: extra time, and what reading the cache of so many takes."""
    turns = {}
    for mode, runner in ours.items():
        runner.fill_cache()
        turns |= {f"{mode} at {at}": (runner, at) for at in sorted({BASE_POSITION, *positions})}
    times = take_turns(turns, new_tokens, rounds, device)
    bandwidth = statistics.median(value for t in times.values() for value in t["read_gb_s"])
    found = []
    for mode, runner in ours.items():
        base = statistics.median(times[f"{mode} at {BASE_POSITION}"]["decode_s"]) / new_tokens
        for position in sorted({BASE_POSITION, *positions}):
            t = times[f"{mode} at {position}"]
            step_s = statistics.median(t["decode_s"]) / new_tokens
            extra = cache_bytes(runner.engine.model, 1, position - BASE_POSITION)
            found.append({
                "mode": mode,
                "position": position,
                "decode_s": t["decode_s"],
                "read_gb_s": t["read_gb_s"],
                "decode_ms": step_s * 1e3,
                "extra_ms": (step_s - base) * 1e3,
                "cache_read_ms": extra / bandwidth / 1e6,
            })  # fmt: skip
    return found


def measure_batches(
    models: Mapping[str, Transformer],
    sizes: list[int],
    position: int,
    new_tokens: int,
    rounds: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Tokens a second of so many rows together, each mode, and how many times that of one row it is."""
    turns, sizes = {}, sorted({1, *sizes})
    for mode, model in models.items():
        for rows in sizes:
            runner = Ours(model, -(-(position + new_tokens) // 128) * 128, rows=rows)
            runner.fill_cache()
            turns[f"{mode} x {rows}"] = (runner, position)
    times = take_turns(turns, new_tokens, rounds, device)
    found = []
    for mode in models:
        single = statistics.median(times[f"{mode} x 1"]["decode_s"])
        for rows in sizes:
            t = times[f"{mode} x {rows}"]
            step_s = statistics.median(t["decode_s"])
            found.append({
                "mode": mode,
                "batch_size": rows,
                "decode_s": t["decode_s"],
                "read_gb_s": t["read_gb_s"],
                "decode_ms": step_s / new_tokens * 1e3,
                "decode_tok_s": rows * new_tokens / step_s,
                "times_one_row": rows * single / step_s,
            })  # fmt: skip
    return found


def describe_machine(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "ranks": world_size(),
        "cores": os.cpu_count(),
        "load": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": versions(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Time prefill and decode, against the memory bandwidth and other programs.")
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shape", choices=(*SHAPES, "demo"), help="random weights, or the demo; default: 1b")
    source.add_argument("--checkpoint_path", type=Path, help="a converted folder or a weight file in one")
    add("--mode", nargs="+", choices=MODES, help="one or several; default: as the weights are stored")
    add("--groupsize", type=int, choices=GROUPSIZES, default=32, help="of int4")
    add("--against", nargs="+", choices=PEERS, default=[], help="run these as well, where they are installed")
    add("--out", type=Path, default=Path("bench_out"), help="where results go, and weights that other programs read")
    add("--prompt_length", type=int, default=512, help="tokens of a prefill")
    add("--new_tokens", type=int, default=32, help="decode steps a round")
    add("--rounds", type=int, default=5)
    add("--max_seq_length", type=int, help="of our KV cache; default: as generate.py would choose")
    add("--compile_prefill", action="store_true", help="compile our prefill as well")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--backend", choices=BACKENDS, default="auto", help="how the ranks of a torchrun talk to each other")
    add("--threads", type=int, help="default: one a core")
    add("--batch_size", type=int, nargs="+", default=[], help="measure decoding so many rows at once as well")
    add("--positions", type=int, nargs="+", default=[], help="measure decoding at these positions as well")
    add("--speculate", type=Path, metavar="DRAFT", help="measure a draft model and prompt lookup on the demo's texts")
    add("--ragged", type=int, metavar="PLACES", help="measure a batch whose places are refilled, against one by one")
    add("--sampling", action="store_true", help="measure what filters, penalties and log-probabilities cost")
    add("--startup", action="store_true", help="measure the time to the first token and the memory of generate.py")
    add("--long_cache", action="store_true", help="measure decoding at position 100 in caches of 256 and 8192")
    args = parser.parse_args()
    for name in (
        "prompt_length",
        "new_tokens",
        "rounds",
        "max_seq_length",
        "threads",
        "ragged",
        "batch_size",
        "positions",
    ):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            least = {"positions": 0, "ragged": 2}.get(name, 1)
            if value is not None and not least <= value < 2**31:
                raise UserError(f"--{name} {value} is out of range; it must be {least} or more")
    if args.speculate and args.new_tokens < 2:
        raise UserError("--speculate needs --new_tokens 2 or more; the first token is the prefill's")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; name a folder")
    return args


def cache_length(args: argparse.Namespace, context: int) -> int:
    """The positions of our KV cache: --max_seq_length, or what is needed in the steps that generate.py takes."""
    start = max([args.prompt_length, *args.positions, BASE_POSITION if args.positions else 0])
    needed = start + args.new_tokens
    limit = min(args.max_seq_length or context, context)
    if args.max_seq_length and args.max_seq_length > context:
        raise UserError(f"--max_seq_length {args.max_seq_length} is more than the model's context of {context} tokens")
    if needed > limit:
        raise UserError(
            f"{start} tokens and {args.new_tokens} new ones exceed the limit of {limit}; "
            "lower --prompt_length, --positions or --new_tokens"
        )
    return args.max_seq_length or min(context, max(1024, 1 << (needed - 1).bit_length()))


def random_prompt(length: int, config: ModelConfig) -> list[int]:
    return [random.Random(i).randrange(config.vocab_size) for i in range(length)]


def make_models(
    args: argparse.Namespace, path: Path | None, config: ModelConfig, group: Group
) -> tuple[Transformer, dict[str, Transformer]]:
    """The model as it is stored, and a model for each mode to measure."""
    begun = time.perf_counter()
    dtype = torch.bfloat16 if args.mode else None
    device = group.device
    if path is None:
        group.check(config, {})
        stored = random_model(config, device, group=group)
    else:
        stored = load_model(path, device, dtype, group)
    models = {}
    for mode in dict.fromkeys(args.mode or [mode_of(stored)]):
        if mode == mode_of(stored):
            models[mode] = stored
        elif mode_of(stored) in ("int8", "int4"):
            raise UserError(f"{path} is {mode_of(stored)}; leave out --mode, or name the unquantized checkpoint")
        else:
            check_memory(weight_bytes(stored) // 2, f"the model in {mode}", device)
            models[mode] = quantize_model(stored, mode, args.groupsize)
        log(f"{mode}: {weight_bytes(models[mode]) / 1e9:.2f} GB a step")
    log(f"ready in {time.perf_counter() - begun:.1f} s")
    return stored, models


def make_peers(
    args: argparse.Namespace, hf_config: dict[str, Any], stored: Transformer, modes: list[str], max_length: int
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that --against names, and why some are left out."""
    contenders, skipped = {}, {}
    size, unquantized = weight_bytes(stored), mode_of(stored)
    for program in dict.fromkeys(args.against):
        try:
            if unquantized in ("int8", "int4"):
                raise Unavailable("it needs the unquantized weights; name them and, with --mode, what to make of them")
            if program == "llama.cpp":
                for mode in modes:
                    peer, path, kind = llama_cpp_peer(
                        stored, mode, args.out / "weights", max_length, torch.get_num_threads()
                    )
                    contenders[f"llama.cpp {kind}"] = Contender(peer, program, mode, gguf_bytes(path))
            elif unquantized in modes:
                for name, peer in transformers_peers(hf_config, stored, max_length).items():
                    contenders[name] = Contender(peer, program, unquantized, size)
            else:
                raise Unavailable(f"it runs unquantized weights only; add {unquantized} to --mode")
        except Unavailable as reason:
            skipped[program] = str(reason)
            log(f"skipped: {program}: {reason}")
    return contenders, skipped


def measure_contenders(
    args: argparse.Namespace,
    hf_config: dict[str, Any],
    stored: Transformer,
    models: dict[str, Transformer],
    ours: dict[str, Ours],
) -> dict[str, Any]:
    """Prefill and decode of ours and the peers, those of one mode one after the other."""
    device, prompt = stored.tok_embeddings.weight.device, random_prompt(args.prompt_length, stored.config)
    contenders = {
        f"gpt-brisk {format_of(models[mode])}": Contender(runner, "gpt-brisk", mode, weight_bytes(models[mode]))
        for mode, runner in ours.items()
    }
    peers, skipped = make_peers(args, hf_config, stored, list(models), args.prompt_length + args.new_tokens)
    differences = {name: logits_error(peer.runner, models[peer.mode], prompt) for name, peer in peers.items()}
    for name, difference in differences.items():
        if difference > DIFFERENT.get(peers[name].mode, 0.1):
            log(f"warning: the logits of {name} are {difference:.0%} off ours: it does not compute the same")
    order = list(models)
    contenders = dict(sorted((contenders | peers).items(), key=lambda item: order.index(item[1].mode)))

    turns = {name: (contender.runner, len(prompt)) for name, contender in contenders.items()}
    times = take_turns(turns, args.new_tokens, args.rounds, device, prompt)
    cached = cache_bytes(stored, 1, args.prompt_length + args.new_tokens // 2)
    about = {
        name: {"program": c.program, "mode": c.mode, "bytes_per_step": c.weight_bytes + cached}
        for name, c in contenders.items()
    }
    return {
        **summarize(about, times, args.prompt_length, args.new_tokens),
        "skipped": skipped,
        "logits_error": differences,
        "cache_bytes_per_step": cached,
        "peak_gpu_memory_gb": peak_memory(device) / 1e9 if device.type == "cuda" else None,
    }


def main() -> None:
    args = parse_args()
    device = "cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device
    with join(device, args.backend) as group:
        if group.size > 1 and (args.against or args.startup):
            raise UserError("--against and --startup are for one process; leave them out, or torchrun")
        group.check_flags(args)
        benchmark(args, group)


def benchmark(args: argparse.Namespace, group: Group) -> None:
    """What every rank of a torchrun does, or this process alone."""
    device = group.device
    if args.threads:
        torch.set_num_threads(args.threads)
    made_up = not args.checkpoint_path and args.shape != "demo"
    path = None if made_up else weights_path(args.checkpoint_path or DEMO)
    name = path.parent.absolute().name if args.checkpoint_path else args.shape or "1b"
    hf_config = SHAPES[name] if path is None else read_json(path.parent / "config.json")
    config = ModelConfig.from_hf(hf_config) if path is None else load_config(path.parent)
    length, needed = cache_length(args, config.context_length), args.prompt_length + args.new_tokens
    if args.long_cache and config.context_length <= 256:
        raise UserError(f"--long_cache needs a context above 256, and {name} has {config.context_length}; leave it out")

    if args.speculate:
        if path is None:
            raise UserError("--speculate needs a target of the demo's family; name one by --checkpoint_path")
        check_draft(load_tokenizer(path.parent), load_tokenizer(weights_path(args.speculate).parent))
        draft = load_model(weights_path(args.speculate), device, group=group)
    check_compiler()
    torch._dynamo.config.recompile_limit = 1000  # each mode, cache and batch is one of the same function
    stored, models = make_models(args, path, config, group)
    copies = sum(weight_bytes(model) for model in models.values()) if "llama.cpp" in args.against else 0
    caches = cache_bytes(stored, len(models), length + sum(args.batch_size) * needed + len(args.against) * 2 * needed)
    check_memory(copies + caches + BUFFER_BYTES[device.type], "the benchmark beside the model", device)
    args.out.mkdir(parents=True, exist_ok=True)

    ours = {mode: Ours(model, length, args.compile_prefill) for mode, model in models.items()}
    kept = ("prompt_length", "new_tokens", "rounds", "compile_prefill")
    report = {
        "machine": describe_machine(device),
        "settings": {"name": name, "max_seq_length": length, **{key: getattr(args, key) for key in kept}},
        **measure_contenders(args, hf_config, stored, models, ours),
    }
    more = (args.new_tokens, args.rounds, device)
    if args.positions:
        report["positions"] = measure_positions(ours, args.positions, *more)
    ours.clear()
    if args.batch_size:
        report["batches"] = measure_batches(models, args.batch_size, args.prompt_length, *more)
    if args.long_cache:
        report["long_cache"] = {mode: measure_long_cache(model, *more) for mode, model in models.items()}
    if args.speculate:
        report["speculation"] = measure_speculation(models, draft, load_tokenizer(path.parent), *more[:2])
    if args.ragged:
        report["ragged"] = measure_ragged(models, load_tokenizer(DEMO), args.ragged, args.rounds)
    if args.sampling:
        report["sampling"] = measure_sampling(models, *more[:2])
    if args.startup:
        report["startup"] = {}
        for mode, model in models.items():
            as_it_is = path is not None and not args.mode
            folder = path if as_it_is else write_checkpoint(args.out / "weights", hf_config, model)
            report["startup"][mode] = measure_startup(folder, args.rounds, device)
    if group.rank == 0:
        write_report(report, args.out, f"bench-{name}-{'-'.join(models)}" + f"-{group.size}-ranks" * (group.size > 1))


def write_report(report: dict[str, Any], folder: Path, stem: str) -> None:
    table = markdown(report)
    for suffix, text in (("json", json.dumps(report, indent=1)), ("md", table)):
        with write_atomically(folder / f"{stem}.{suffix}") as file:
            file.write(text.encode())
    plot(report, folder / f"{stem}.png")
    print(table, end="")


if __name__ == "__main__":
    errors.run(main)
