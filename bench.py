"""How fast: prefill and decode in tokens a second, the share of what the memory allows, and other programs beside it.

    python bench.py                                                   # the 1b shape, random weights, bf16
    python bench.py --mode bf16 int8 int4 --against llama.cpp ik_llama.cpp transformers
    python bench.py --shape 8b --device cuda --mode int8 int4
    python bench.py --shape moe --mode int4 --against llama.cpp       # a mixture of experts, 8 of 64 for each token
    python bench.py --checkpoint_path checkpoints/org/name/model_int8.safetensors
    torchrun --standalone --nproc_per_node 2 bench.py --mode int4     # tensor parallelism; GB/s are those of a rank
    python bench.py --mode int4 --batch_size 8 --positions 0 1000 4000 8000 --startup --long_cache   # more, see below

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
- llama.cpp and its fork ik_llama.cpp read the same weights from a GGUF file, through their C API and without their
  sampler: as BF16 for bf16, all matrices as Q8_0 for int8 and as Q4_0 for int4 (their own quantizer would make the
  output projection a larger Q6_K), but for routers, which choose among experts and are floats in all programs.
  ik_llama.cpp repacks the tensors as it loads them and uses flash attention. llama.cpp runs with it and without, since
  on CPUs it makes prefill faster and decoding at long positions slower; ratios are against the better of the two.
- All use --threads threads. A GPU's work is timed by its events, up to a synchronisation.

A decode step reads every weight once (of an embedding that is not also the output, one row; of experts, those that are
chosen) and the cache up to its position. These bytes over its time are its GB/s; over the read bandwidth, its share of
the roofline. The read bandwidth is that of summing a buffer far larger than the caches; on CPUs hand-written loads were
no faster.

--batch_size and --positions decode over caches that are filled with random values. They take turns like the above, each
of them with one row, or with position 100, to be compared with.
"""

import errors  # first, so that Ctrl-C is quiet while torch is imported

# isort: split
import argparse
import json
import os
import platform
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from arguments import add_cache_dtype, add_threads, dtype_named
from benchmarks.contenders import PEERS, make_peers, measure_contenders
from benchmarks.decoding import measure_ragged, measure_sampling, measure_speculation
from benchmarks.models import MODES, SHAPES, format_of, mode_of, quantize_model, random_model
from benchmarks.peers import LLAMA_CPPS, versions
from benchmarks.report import markdown, plot
from benchmarks.serving import measure_serving, soak
from benchmarks.startup import measure_startup, write_checkpoint
from benchmarks.turns import (
    BASE_POSITION,
    BUFFER_BYTES,
    Ours,
    measure_batches,
    measure_long_cache,
    measure_positions,
    random_prompt,
)
from checkpoint import DEMO, checksum, load_config, load_model, weights_path
from compiled import check_compiler
from config import ModelConfig
from engine import cache_bytes, resident_bytes, weight_bytes
from errors import ArgumentParser, UserError, log, world_size
from files import check_memory, read_json, write_atomically
from kernels.build import processor_info
from kernels.packing import GROUPSIZES
from model import Transformer
from prompts import check_draft
from tokenizer import load_tokenizer
from tp import BACKENDS, Group, join


def describe_machine(device: torch.device) -> dict[str, Any]:
    cpu = processor_info("model name").strip() or platform.processor() or platform.machine()
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
    add("--groupsize", type=int, choices=GROUPSIZES, default=32, help="of int4; default: %(default)s")
    add("--against", nargs="+", choices=PEERS, default=[], help="run these as well, where they are installed")
    add(
        "--out",
        type=Path,
        default=Path("bench_out"),
        help="for results, and weights that others read; default: %(default)s",
    )
    add("--prompt_length", type=int, default=512, help="tokens of a prefill; default: %(default)s")
    add("--new_tokens", type=int, default=32, help="decode steps a round; default: %(default)s")
    add("--rounds", type=int, default=5, help="default: %(default)s, after the warm-up")
    add("--max_seq_length", type=int, help="of our KV cache; default: as generate.py would choose")
    add_cache_dtype(parser)
    add("--compile_prefill", action="store_true", help="compile our prefill as well")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: a GPU if there is one",
    )
    add("--backend", choices=BACKENDS, default="auto", help="of the ranks of a torchrun; default: what the device has")
    add_threads(parser)
    add("--batch_size", type=int, nargs="+", default=[], help="measure decoding so many rows at once as well")
    add("--positions", type=int, nargs="+", default=[], help="measure decoding at these positions as well")
    add("--speculate", type=Path, metavar="DRAFT", help="measure a draft model and prompt lookup on the demo's texts")
    add("--ragged", type=int, metavar="ROWS", help="measure a batch whose rows are refilled, against one by one")
    add("--sampling", action="store_true", help="measure what filters, penalties and log-probabilities cost")
    add("--startup", action="store_true", help="measure the time to the first token and the memory of generate.py")
    add("--serve", action="store_true", help="measure serve.py under load: clients, turns of a chat, gaps, restarts")
    add("--soak", type=float, metavar="MINUTES", help="64 clients of serve.py for so long, a third of which hang up")
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
    stored.cache_dtype = dtype_named(args.cache_dtype)
    models = {}
    for mode in dict.fromkeys(args.mode or [mode_of(stored)]):
        if mode == mode_of(stored):
            models[mode] = stored
        elif mode_of(stored) in ("int8", "int4"):
            raise UserError(f"{path} is {mode_of(stored)}; leave out --mode, or name the unquantized checkpoint")
        else:
            check_memory(resident_bytes(stored) // 2, f"the model in {mode}", device)
            models[mode] = quantize_model(stored, mode, args.groupsize)
        log(f"{mode}: {weight_bytes(models[mode]) / 1e9:.2f} GB a step")
    log(f"ready in {time.perf_counter() - begun:.1f} s")
    return stored, models


def main() -> None:
    args = parse_args()
    device = "cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device
    with join(device, args.backend, args.threads) as group:
        if group.size > 1 and (args.against or args.startup or args.serve or args.soak):
            alone = "--against, --startup, --serve and --soak"
            raise UserError(f"{alone} are for one process; leave them out, or torchrun")
        group.check_flags(args)
        benchmark(args, group)


def benchmark(args: argparse.Namespace, group: Group) -> None:
    """What every rank of a torchrun does, or this process alone."""
    device = group.device
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
    copies = sum(resident_bytes(model) for model in models.values()) * len(LLAMA_CPPS.keys() & set(args.against))
    caches = cache_bytes(stored, len(models), length + sum(args.batch_size) * needed + len(args.against) * 2 * needed)
    check_memory(copies + caches + BUFFER_BYTES[device.type], "the benchmark beside the model", device)
    args.out.mkdir(parents=True, exist_ok=True)

    # For files of these weights that other programs and processes read, kept for the next run.
    folder = args.out / "weights" / (f"{name}-{device.type}" if path is None else checksum(path))
    ours = {mode: Ours(model, length, args.compile_prefill) for mode, model in models.items()}
    peers, skipped = make_peers(args.against, hf_config, stored, models, needed, folder)
    more = (args.new_tokens, args.rounds, device)
    kept = ("prompt_length", "new_tokens", "rounds", "compile_prefill", "cache_dtype")
    report = {
        "machine": describe_machine(device),
        "settings": {"name": name, "max_seq_length": length, **{key: getattr(args, key) for key in kept}},
        **measure_contenders(ours, models, peers, random_prompt(args.prompt_length, config), *more),
        "skipped": skipped,
    }
    if args.positions:
        report["positions"] = measure_positions(ours, args.positions, *more)
    ours.clear()
    peers.clear()
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
    for mode, model in models.items() if args.startup or args.serve or args.soak else ():
        as_it_is = path is not None and not args.mode
        stored_at = path.parent if as_it_is else write_checkpoint(folder / format_of(model), hf_config, model)
        if args.startup:
            report.setdefault("startup", {})[mode] = measure_startup(
                path if as_it_is else stored_at, args.rounds, device
            )
        if args.serve:
            report.setdefault("serving", {})[mode] = measure_serving(stored_at, args.rounds, device)
        if args.soak:
            report.setdefault("soak", {})[mode] = {"minutes": args.soak, **soak(stored_at, args.soak, device)}
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
