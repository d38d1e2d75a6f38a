"""From logits to the next token: temperature, top-k, top-p, min-p, greedy.

    params = sampling_tensors([SamplingParams(temperature=0.8, top_p=0.95, seed=1)], device)
    token = sample(logits, params, position)               # [B, V], [B] -> [B]

Everything runs inside the compiled decode step. The parameters are tensors, one value per row, so a batch may mix them
and changing one never recompiles. The random number of a row is a hash of its seed and its position: the same seed
gives the same text, whatever else is in the batch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How one row is sampled. The filters apply in the order of transformers: temperature, top-k, top-p, min-p."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this likely relative to the most likely one
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature} is out of range; it must be 0 (greedy) or more")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k {self.top_k} is out of range; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is out of range; it must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p} is out of range; it must be between 0 (off) and 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} is out of range; it must be between 0 and 2^63 - 1")


class SamplingTensors(NamedTuple):
    """The same for a batch on a device: one value per row, [B]."""

    temperature: Tensor  # float32
    top_k: Tensor  # int64
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    seed: Tensor  # int64


def sampling_tensors(rows: list[SamplingParams], device: torch.device | str) -> SamplingTensors:
    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype, device=device)

    return SamplingTensors(
        temperature=column("temperature", torch.float32),
        top_k=column("top_k", torch.int64),
        top_p=column("top_p", torch.float32),
        min_p=column("min_p", torch.float32),
        seed=column("seed", torch.int64),
    )


def sample(logits: Tensor, params: SamplingTensors, position: Tensor) -> Tensor:
    """Logits [B, V] of the tokens at `position` [B] -> those tokens, int64 [B]. Rows of temperature 0 are greedy."""
    cumulative = probabilities(logits, params).cumsum(-1)
    # The first token whose cumulative probability is above a uniform draw; scaling by the last entry instead of 1
    # keeps the draw below it under rounding, so a token of probability zero is never the one.
    draw = uniform(params.seed, position)[:, None] * cumulative[:, -1:]
    sampled = (cumulative <= draw).sum(-1)
    return torch.where(params.temperature > 0, sampled, logits.argmax(-1))


def probabilities(logits: Tensor, params: SamplingTensors) -> Tensor:
    """The distribution that `sample` draws from, float32 [B, V]."""
    temperature = torch.where(params.temperature > 0, params.temperature, 1.0)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]  # a tiny temperature must not overflow
    ranked = logits.sort(dim=-1, descending=True).values
    # Each filter keeps the logits at or above some value, so all of them together keep those at or above the largest.
    last = torch.where(params.top_k > 0, params.top_k, logits.shape[-1]).clamp(max=logits.shape[-1]) - 1
    kth = ranked.gather(-1, last[:, None])
    likely = ranked.masked_fill(ranked < kth, -math.inf).softmax(-1)
    before = likely.cumsum(-1) - likely  # the probability of all tokens ranked higher
    nucleus = ((before < params.top_p[:, None]) & (likely > 0)).sum(-1, keepdim=True).clamp(min=1)
    cut = ranked.gather(-1, nucleus - 1)
    cut = torch.maximum(cut, ranked[:, :1] + params.min_p[:, None].log())
    return logits.masked_fill(logits < cut, -math.inf).softmax(-1)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """A float32 in [0, 1) with 24 random bits for each row of seeds [B] and positions [B]."""
    bits = _mix(_mix(_mix(seed & 0xFFFFFFFF) ^ (seed >> 32)) ^ position)
    return (bits >> 8).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every input bit reaches every output bit."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x1B873593)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
