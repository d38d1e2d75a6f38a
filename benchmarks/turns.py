"""Taking turns: contenders are measured one after the other in each of several rounds, because machines drift.

ours = Ours(model, max_seq_length=1024)
times = take_turns({"ours": (ours, 512)}, new_tokens=32, rounds=5, device=device, prompt=prompt)
measure_positions({"int4": ours}, [1000, 4000], 32, 5, device)      # and measure_batches, measure_long_cache
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.decoding import GREEDY
from benchmarks.models import rebuild
from config import ModelConfig
from engine import Engine, Request, cache_bytes
from errors import log
from kernels.packing import allocate
from model import Transformer

BUFFER_BYTES = {"cpu": 2**30, "cuda": 2**32}  # read to measure the bandwidth
BASE_POSITION = 100  # what other positions are compared with


def random_prompt(length: int, config: ModelConfig) -> list[int]:
    return [random.Random(i).randrange(config.vocab_size) for i in range(length)]


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
        """With random values, as if all positions had been decoded. (Memory never written to takes no time to read.)"""
        for layer in self.engine.model.layers:
            k, v, *scales = layer.attention.kv_cache.parts
            for part in (k, v):
                part.random_(-127, 128) if part.dtype == torch.int8 else part.uniform_(-1, 1)
            for scale in scales:
                scale.fill_(1 / 127)


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
            model = runner.engine.model
            extra = cache_bytes(model, 1, position) - cache_bytes(model, 1, BASE_POSITION)
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
