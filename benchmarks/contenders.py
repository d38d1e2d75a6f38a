"""Prefill and decode of ours beside those of other programs, all taking turns: the main table of bench.py."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import format_of, mode_of, rebuild
from benchmarks.peers import LLAMA_CPPS, Unavailable, gguf_bytes, llama_cpp_peers, transformers_peers
from benchmarks.report import summarize
from benchmarks.turns import Ours, take_turns
from engine import cache_bytes, peak_memory, weight_bytes
from errors import log
from model import Transformer

PEERS = ("transformers", "llama.cpp", "ik_llama.cpp")
# Errors of a peer's logits from which it does not compute the same. Where a choice among experts is on the verge,
# rounding decides: bfloat16 alone changes a token's logits by a tenth, or by three.
DIFFERENT = {"int8": 0.2, "int4": 0.8}
DIFFERENT_EXPERTS = {"bf16": 0.4, "fp16": 0.4, "int8": 0.4, "int4": 0.8}


@dataclass
class Contender:
    """Something that takes turns, and what the report needs to know of it."""

    runner: Any
    program: str
    mode: str
    weight_bytes: int


def logits_error(peer: Any, model: Transformer, prompt: list[int]) -> float:
    """How far a peer's logits after the prompt are from ours: |theirs - ours| / |ours|, Euclidean."""
    model = rebuild(model)
    device = model.tok_embeddings.weight.device
    model.setup_caches(1, len(prompt))
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor([prompt], device=device), torch.arange(len(prompt), device=device)[None])
        ours = model.logits(hidden[0, -1]).float().cpu()
    peer.prefill(prompt)
    return float((peer.last_logits.cpu() - ours).norm() / ours.norm())


def make_peers(
    programs: Iterable[str],
    hf_config: dict[str, Any],
    stored: Transformer,
    modes: Iterable[str],
    max_length: int,
    folder: Path,
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders of these programs, and why some programs are left out; `folder` keeps files of these weights."""
    contenders, skipped = {}, {}
    unquantized, threads = mode_of(stored), torch.get_num_threads()
    for program in dict.fromkeys(programs):
        try:
            if unquantized in ("int8", "int4"):
                raise Unavailable("it needs the unquantized weights; name them and, with --mode, what to make of them")
            if program in LLAMA_CPPS:
                for mode in modes:
                    found, path = llama_cpp_peers(program, stored, mode, folder, max_length, threads)
                    size = gguf_bytes(path, stored.config)
                    contenders |= {name: Contender(peer, program, mode, size) for name, peer in found.items()}
            elif unquantized in modes:
                found, size = transformers_peers(hf_config, stored, max_length), weight_bytes(stored)
                contenders |= {name: Contender(peer, program, unquantized, size) for name, peer in found.items()}
            else:
                raise Unavailable(f"it runs unquantized weights only; add {unquantized} to --mode")
        except Unavailable as reason:
            skipped[program] = str(reason)
            log(f"skipped: {program}: {reason}")
    return contenders, skipped


def measure_contenders(
    ours: Mapping[str, Ours],
    models: Mapping[str, Transformer],
    peers: Mapping[str, Contender],
    prompt: list[int],
    new_tokens: int,
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    """Prefill and decode of ours and of the peers, for one mode after the other."""
    contenders = {
        f"gpt-brisk {format_of(models[mode])}": Contender(runner, "gpt-brisk", mode, weight_bytes(models[mode]))
        for mode, runner in ours.items()
    }
    differences = {name: logits_error(peer.runner, models[peer.mode], prompt) for name, peer in peers.items()}
    limits = DIFFERENT if next(iter(models.values())).config.experts is None else DIFFERENT_EXPERTS
    for name, difference in differences.items():
        if difference > limits.get(peers[name].mode, 0.1):
            log(f"warning: the logits of {name} are {difference:.0%} off ours: it does not compute the same")
    contenders |= peers
    contenders = {name: c for mode in models for name, c in contenders.items() if c.mode == mode}

    turns = {name: (contender.runner, len(prompt)) for name, contender in contenders.items()}
    times = take_turns(turns, new_tokens, rounds, device, prompt)
    cached = cache_bytes(next(iter(models.values())), 1, len(prompt) + new_tokens // 2)
    about = {
        name: {"program": c.program, "mode": c.mode, "bytes_per_step": c.weight_bytes + cached}
        for name, c in contenders.items()
    }
    return {
        **summarize(about, times, len(prompt), new_tokens),
        "logits_error": differences,
        "cache_bytes_per_step": cached,
        "peak_gpu_memory_gb": peak_memory(device) / 1e9 if device.type == "cuda" else None,
    }
