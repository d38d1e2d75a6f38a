"""How fast: prefill and decode in tokens a second, the share of what the memory allows, and other programs beside it.

    python bench.py                                                   # the 1b shape, random weights
    python bench.py --shape 8b --device cuda
    python bench.py --checkpoint_path checkpoints/org/name --against transformers llama.cpp
    python bench.py --startup --long_cache                            # two more measurements, see there

A table goes to stdout and, with every single measurement beside it as JSON, into --out.

What is timed. Machines drift, so all take turns in one process: a round measures the read bandwidth once and then one
prefill and one decode of each contender; warm-up rounds, which compile, come before and are left out. All figures are
medians over the rounds, and ratios are ratios of medians.
- Prefill: `prompt_length` random tokens into an empty cache, up to the token that follows them. All contenders compute
  logits for the last token only.
- Decode: `new_tokens` greedy steps at batch 1 from there on, at positions `prompt_length` and up. Every step ends in
  the next token; no sampling, no text.
- Ours is what `generate.py --compile` runs: a compiled decode step and an eager prefill, or a compiled one with
  --compile_prefill. The KV cache has `max_seq_length` positions.
- transformers runs its forward on views of the same tensors: once eager with its default, growing cache, once compiled
  (prefill and decode apart, each for its exact shape) with a static cache that is as short as the run allows. Ratios
  are against the better of the two, for prefill and for decode.
- llama.cpp reads the same weights, in the same dtype, from a GGUF file, through its C API and without its sampler.
- All use --threads threads. A GPU's work is timed by its events, up to a synchronisation.

A decode step reads every weight once (of an embedding that is not also the output, one row) and the cache up to its
position. These bytes over its time are its GB/s; over the read bandwidth, its share of the roofline. The read bandwidth
is that of summing a buffer far larger than the caches.
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
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench_peers import Unavailable, llama_cpp_peers, transformers_peers, versions
from bench_startup import measure_startup, write_checkpoint
from checkpoint import DEMO, check_memory, load_config, load_model, read_json, weights_path, write_atomically
from engine import Engine, cache_bytes, check_compiler, peak_memory, weight_bytes
from errors import ArgumentParser, UserError
from generate import log, pick_device
from model import ModelConfig, Transformer, expected_shapes
from sampling import SamplingParams, sampling_tensors

LLAMA: dict[str, Any] = dict(
    model_type="llama", num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, tie_word_embeddings=False
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {  # as config.json; "demo" is the embedded checkpoint
    "1b": LLAMA | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, vocab_size=32000, max_position_embeddings=8192,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0),
    ),
    "8b": LLAMA | dict(  # Llama 3.1
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256,
        max_position_embeddings=131072, rope_parameters=dict(
            rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
}  # fmt: skip
MODES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PEERS = ("transformers", "llama.cpp")
BUFFER_BYTES = {"cpu": 2**30, "cuda": 2**32}  # read to measure the bandwidth
GREEDY = SamplingParams(temperature=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# What is timed


class Ours:
    """The engine of generate.py as a contender (see bench_peers.py): a cache of its own, the weights of `model`."""

    def __init__(self, model: Transformer, max_seq_length: int, compile_prefill: bool):
        with torch.device("meta"):
            twin = Transformer(model.config)
        twin.load_state_dict(model.state_dict(), assign=True)
        twin.eval().requires_grad_(False).setup_caches(1, max_seq_length)
        self.engine = Engine(twin, compile=True, compile_prefill=compile_prefill)
        self.params = sampling_tensors([GREEDY], self.engine.device)

    def prefill(self, prompt: list[int]) -> int:
        return self.engine.prefill([prompt], [0], [GREEDY]).item()

    def decode(self, token: int, position: int, steps: int) -> list[int]:
        tokens = [torch.tensor([[token]], device=self.engine.device)]
        input_pos = torch.tensor([[position]], device=self.engine.device)
        for step in range(steps):
            tokens.append(self.engine.decode(tokens[-1], input_pos, position + step + 1, self.params, greedy=True))
            input_pos = input_pos + 1
        return torch.cat(tokens[1:], 1)[0].tolist()


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
    contenders: dict[str, Any], prompt: list[int], new_tokens: int, rounds: int, device: torch.device
) -> tuple[list[float], dict[str, dict[str, list]]]:
    """Runs the rounds -> the bandwidths in GB/s, and each contender's prefill_s and decode_s, a value a round.

    `tokens` are those of the warm-up: the first after the prompt, and the decoded ones.
    """
    bandwidths: list[float] = []
    times: dict[str, dict[str, list]] = {name: {"prefill_s": [], "decode_s": []} for name in contenders}
    buffer = torch.ones(BUFFER_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    warm_up = 3 if device.type == "cuda" else 1  # CUDA graphs: warm up, record, replay
    for number in range(-warm_up, rounds):
        bandwidth = read_bandwidth(buffer)
        for name, contender in contenders.items():
            prefill_s, first = timed(device, contender.prefill, prompt)
            decode_s, tokens = timed(device, contender.decode, first, len(prompt), new_tokens)
            if number < 0:
                times[name]["tokens"] = [first, *tokens]
                log(f"warm-up: {name} took {prefill_s + decode_s:.1f} s")
            else:
                times[name]["prefill_s"].append(prefill_s)
                times[name]["decode_s"].append(decode_s)
        if number >= 0:
            bandwidths.append(bandwidth)
            log(f"round {number + 1} of {rounds}: {bandwidth:.1f} GB/s; " + "; ".join(
                f"{name}: prefill {t['prefill_s'][-1]:.2f} s, decode {new_tokens / t['decode_s'][-1]:.1f} tok/s"
                for name, t in times.items()
            ))  # fmt: skip
    return bandwidths, times


# ---------------------------------------------------------------------------------------------------------------------
# What is run


@torch.no_grad()
def random_model(config: ModelConfig, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """The same model each time: norms of 1, no biases, the rest uniform so that activations keep their size."""
    needed = sum(torch.Size(shape).numel() for shape in expected_shapes(config).values()) * dtype.itemsize
    check_memory(needed, "a model of this shape", device)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1)
        else:
            bound = (3 / weight.shape[1]) ** 0.5
            weight.uniform_(-bound, bound, generator=generator)
    return model.eval().requires_grad_(False)


def logits_error(contender, model: Transformer, prompt: list[int]) -> float:
    """How far a peer's logits after the prompt are from ours: |theirs - ours| / |ours|, Euclidean."""
    device = model.tok_embeddings.weight.device
    model.setup_caches(1, len(prompt))
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor([prompt], device=device), torch.arange(len(prompt), device=device)[None])
        ours = model.logits(hidden[0, -1]).float().cpu()
    contender.prefill(prompt)
    return float((contender.last_logits.cpu() - ours).norm() / ours.norm())


# ---------------------------------------------------------------------------------------------------------------------
# One more measurement


def measure_long_cache(model: Transformer, new_tokens: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """What a long cache costs while it is empty: decoding at position 100 with 256 positions and with 8192."""
    lengths, new_tokens = (256, min(8192, model.config.context_length)), min(new_tokens, 100)
    contenders = {f"a cache of {length}": Ours(model, length, compile_prefill=False) for length in lengths}
    _, times = take_turns(contenders, random_prompt(100, model.config), new_tokens, rounds, device)
    short, long = (statistics.median(t["decode_s"]) / new_tokens * 1e3 for t in times.values())
    decode_s = {length: t["decode_s"] for length, t in zip(lengths, times.values(), strict=True)}
    return {"decode_s": decode_s, "short_ms": short, "long_ms": long, "ratio": long / short, "max_seq_length": lengths}


# ---------------------------------------------------------------------------------------------------------------------
# The report


def summarize(
    bandwidths: list[float], times: dict[str, dict], prompt_length: int, new_tokens: int, step_bytes: int
) -> dict[str, Any]:
    """Medians of what `take_turns` measured, and ratios of ours to each peer (above 1: ours is faster)."""
    bandwidth = statistics.median(bandwidths)
    contenders = {}
    for name, t in times.items():
        prefill_s, step_s = statistics.median(t["prefill_s"]), statistics.median(t["decode_s"]) / new_tokens
        rate = step_bytes / step_s / 1e9
        contenders[name] = {
            **t,
            "prefill_tok_s": prompt_length / prefill_s,
            "decode_tok_s": 1 / step_s,
            "decode_ms": step_s * 1e3,
            "gb_s": rate,
            "roofline_share": rate / bandwidth,
        }
    ours, ratios = contenders["gpt-brisk"], {}
    for peer in PEERS:
        variants = [values for name, values in contenders.items() if name.startswith(peer)]
        if variants:
            ratios[peer] = {
                key: ours[f"{key}_tok_s"] / max(variant[f"{key}_tok_s"] for variant in variants)
                for key in ("decode", "prefill")
            }
    return {
        "read_bandwidth": {"rounds_gb_s": bandwidths, "gb_s": bandwidth, "decode_tok_s": bandwidth * 1e9 / step_bytes},
        "contenders": contenders,
        "ratios": ratios,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table and a few lines."""
    machine, settings, bandwidth = report["machine"], report["settings"], report["read_bandwidth"]
    compiled = "compiled" if settings["compile_prefill"] else "eager"
    lines = [
        f"**{settings['name']}, {settings['mode']}** on {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['versions']['torch']}, {machine['date'][:10]}; medians of {settings['rounds']} rounds",
        "",
        f"| | prefill {settings['prompt_length']}, tok/s | decode, tok/s | ms a token | GB/s | of the roofline |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in report["contenders"].items():
        version = machine["versions"].get("llama-cpp-python" if name == "llama.cpp" else name.split(",")[0])
        label = f"gpt-brisk, {compiled} prefill" if name == "gpt-brisk" else f"{name} ({version})"
        lines.append(
            f"| {label} | {row['prefill_tok_s']:.1f} | {row['decode_tok_s']:.1f} | {row['decode_ms']:.1f} "
            f"| {row['gb_s']:.1f} | {row['roofline_share']:.0%} |"
        )
    lines.append(f"| *read bandwidth* | | {bandwidth['decode_tok_s']:.1f} | | {bandwidth['gb_s']:.1f} | 100% |")
    lines.append("")
    for peer, ratio in report["ratios"].items():
        better = " (the better of its two, each)" if peer == "transformers" else ""
        lines.append(f"- ours / {peer}{better}: decode {ratio['decode']:.2f}x, prefill {ratio['prefill']:.2f}x")
    lines += [f"- skipped: {peer}: {reason}" for peer, reason in report["skipped"].items()]
    if startup := report.get("startup"):
        lines.append(
            f"- process start to first tokens: {startup['cold_median_s']:.1f} s compiled from scratch, "
            f"{startup['warm_median_s']:.1f} s with a warm cache; resident memory over weights: "
            f"{startup['loaded_to_weights']:.2f} after loading, {startup['used_to_weights']:.2f} after a forward pass"
        )
    if cache := report.get("long_cache"):
        lines.append(
            f"- decode at position 100: {cache['short_ms']:.1f} ms a token with --max_seq_length "
            f"{cache['max_seq_length'][0]}, {cache['long_ms']:.1f} with {cache['max_seq_length'][1]}: "
            f"{cache['ratio']:.3f} to 1"
        )
    if report["peak_gpu_memory_gb"]:
        lines.append(f"- peak GPU memory, all contenders: {report['peak_gpu_memory_gb']:.2f} GB")
    return "\n".join(lines) + "\n"


def describe_machine(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
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
    add("--against", nargs="+", choices=PEERS, default=[], help="run these as well, where they are installed")
    add("--out", type=Path, default=Path("bench_out"), help="where results go, and weights that other programs read")
    add("--prompt_length", type=int, default=512, help="tokens of a prefill")
    add("--new_tokens", type=int, default=32, help="decode steps a round")
    add("--rounds", type=int, default=5)
    add("--max_seq_length", type=int, help="of our KV cache; default: as generate.py would choose")
    add("--compile_prefill", action="store_true", help="compile our prefill as well")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=int, help="default: one a core")
    add("--startup", action="store_true", help="measure the time to the first token and the memory of generate.py")
    add("--long_cache", action="store_true", help="measure decoding at position 100 in caches of 256 and 8192")
    args = parser.parse_args()
    for name in ("prompt_length", "new_tokens", "rounds", "max_seq_length", "threads"):
        value = getattr(args, name)
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name} {value} is out of range; it must be 1 or more")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; name a folder")
    return args


def cache_length(args: argparse.Namespace, context: int) -> int:
    """The positions of our KV cache: --max_seq_length, or what is needed in the steps that generate.py takes."""
    needed = args.prompt_length + args.new_tokens
    limit = min(args.max_seq_length or context, context)
    if args.max_seq_length and args.max_seq_length > context:
        raise UserError(f"--max_seq_length {args.max_seq_length} is more than the model's context of {context} tokens")
    if needed > limit:
        raise UserError(
            f"a prompt of {args.prompt_length} tokens and {args.new_tokens} new ones exceed the limit of {limit}; "
            "lower --prompt_length or --new_tokens"
        )
    return args.max_seq_length or min(context, max(1024, 1 << (needed - 1).bit_length()))


def random_prompt(length: int, config: ModelConfig) -> list[int]:
    return [random.Random(i).randrange(config.vocab_size) for i in range(length)]


def main() -> None:
    args = parse_args()
    device = pick_device("cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.checkpoint_path.absolute().name if args.checkpoint_path else args.shape or "1b"
    made_up = name in SHAPES and not args.checkpoint_path
    path = None if made_up else weights_path(args.checkpoint_path or DEMO)
    hf_config = SHAPES[name] if path is None else read_json(path.parent / "config.json")
    config = ModelConfig.from_hf(hf_config) if path is None else load_config(path.parent)
    length, needed = cache_length(args, config.context_length), args.prompt_length + args.new_tokens
    prompt = random_prompt(args.prompt_length, config)
    if args.long_cache and config.context_length <= 256:
        raise UserError(f"--long_cache needs a context above 256, and {name} has {config.context_length}; leave it out")

    check_compiler()
    begun = time.perf_counter()
    model = random_model(config, device) if path is None else load_model(path, device)
    copies = sum(tensor.nbytes for tensor in model.parameters()) if "llama.cpp" in args.against else 0
    caches = cache_bytes(model, 1, length + len(args.against) * 2 * needed)
    check_memory(copies + caches + BUFFER_BYTES[device.type], "the benchmark beside the model", device)
    log(f"{name}: {weight_bytes(model) / 1e9:.2f} GB a step, ready in {time.perf_counter() - begun:.1f} s")
    args.out.mkdir(parents=True, exist_ok=True)

    contenders, skipped = {"gpt-brisk": Ours(model, length, args.compile_prefill)}, {}
    for peer in dict.fromkeys(args.against):
        try:
            if peer == "transformers":
                contenders |= transformers_peers(hf_config, model, needed)
            else:
                contenders |= llama_cpp_peers(model, args.out / "weights", needed, torch.get_num_threads())
        except Unavailable as reason:
            skipped[peer] = str(reason)
            log(f"skipped: {peer}: {reason}")
    differences = {peer: logits_error(contenders[peer], model, prompt) for peer in list(contenders)[1:]}
    for peer, difference in differences.items():
        if difference > 0.1:
            log(f"warning: the logits of {peer} are {difference:.0%} off ours: it does not compute the same")

    bandwidths, times = take_turns(contenders, prompt, args.new_tokens, args.rounds, device)
    step_bytes = weight_bytes(model) + cache_bytes(model, 1, args.prompt_length + args.new_tokens // 2)
    mode = MODES[model.tok_embeddings.weight.dtype]
    report = {
        "machine": describe_machine(device),
        "settings": {
            "name": name,
            "mode": mode,
            **{key: getattr(args, key) for key in ("prompt_length", "new_tokens", "rounds", "compile_prefill")},
            "max_seq_length": length,
            "weight_bytes_per_step": weight_bytes(model),
            "bytes_per_step": step_bytes,
        },
        **summarize(bandwidths, times, args.prompt_length, args.new_tokens, step_bytes),
        "skipped": skipped,
        "logits_error": differences,
        "peak_gpu_memory_gb": peak_memory(device) / 1e9 if device.type == "cuda" else None,
    }
    contenders.clear()
    if args.long_cache:
        report["long_cache"] = measure_long_cache(model, args.new_tokens, args.rounds, device)
    if args.startup:
        folder = path or write_checkpoint(args.out / "weights", hf_config, model)
        report["startup"] = measure_startup(folder, args.rounds, device)
    table = markdown(report)
    for suffix, text in (("json", json.dumps(report, indent=1)), ("md", table)):
        with write_atomically(args.out / f"bench-{name}-{mode}.{suffix}") as file:
            file.write(text.encode())
    print(table, end="")


if __name__ == "__main__":
    errors.run(main)
