"""The static KV cache of attention, and the rotation of its queries and keys.

    cos, sin = rope_angles(rope, rope_frequencies(rope, rotary_dim), input_pos)
    cache = KVCache((rows, kv_heads, slots, head_dim), dtype, device)

Attention masks by position, so whatever lies in the cache beyond a row's position is never seen. The cache of a layer
with a window is a ring: it holds the last positions only. Of dtype int8 it holds a scale for each key and value.
"""

import math

import torch
from torch import Tensor, nn

from config import RopeConfig
from kernels import quantize_activations
from kernels.packing import allocate

# Of a row: up to so many attention takes kernels.decode_attention, and no decode step has more; else prefill_attention.
DECODE_QUERIES = 16
# What a ring keeps beyond its window: the proposals of a step, those of one that the device is ahead by, and as many
# positions as a row may go back by.
LOOKBACK = 3 * DECODE_QUERIES
PARTS = "k", "v", "k_scale", "v_scale"  # of a cache, the last two of one in int8

# ---------------------------------------------------------------------------------------------------------------------
# Rotary position embedding


def rope_frequencies(rope: RopeConfig, rotary_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each rotated pair, float32 [rotary_dim / 2]; of longrope [2, rotary_dim / 2], for short
    and for long texts. What `dynamic` adds is in rope_angles."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    freqs = 1.0 / rope.theta**exponent
    if rope.type == "linear":
        return freqs / rope.factor
    if rope.type == "llama3":
        # Long wavelengths are stretched, short ones kept, those between blended.
        wavelength = 2 * math.pi / freqs
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = ((rope.original_length / wavelength - rope.low_freq_factor) / span).clamp(0, 1)
        return (1 - keep) * freqs / rope.factor + keep * freqs
    if rope.type == "yarn":
        # Pairs that turn more than beta_fast times over the trained length are kept, fewer than beta_slow stretched.
        low, high = (
            rotary_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        high += 0.001 if low == high else 0
        stretch = ((torch.arange(rotary_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
        return stretch * freqs / rope.factor + (1 - stretch) * freqs
    if rope.type == "longrope":
        return freqs / torch.tensor([rope.short_factors, rope.long_factors], dtype=torch.float32, device=device)
    return freqs


def rope_angles(
    rope: RopeConfig, freqs: Tensor, input_pos: Tensor, padding: int = -1, reached: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [B, S, 1, rotary_dim / 2], of positions [B, S]; `padding` is the padding position.

    Positions may be [3, B, S]: in time, down and across an image, see RopeConfig.sections.
    `dynamic` and `longrope` depend on the length `reached` [B] by each row, by default with these positions; keys in
    the cache stay as they are.
    """
    if rope.type in ("dynamic", "longrope"):
        if reached is None:
            reached = input_pos.masked_fill(input_pos == padding, 0).amax(dim=1) + 1
        reached = reached[:, None, None]
        if rope.type == "dynamic":
            # NTK scaling: past the trained length the base grows.
            half = freqs.shape[0]
            reached = reached.clamp(min=rope.original_length).float()
            growth = rope.factor * reached / rope.original_length - (rope.factor - 1)
            exponent = torch.arange(half, dtype=torch.float32, device=freqs.device) / max(half - 1, 1)
            freqs = freqs * growth**-exponent
        else:
            freqs = torch.where(reached > rope.original_length, freqs[1], freqs[0])
    if input_pos.ndim == 3:
        turns = torch.tensor(rope.sections, device=freqs.device)
        of_pair = (torch.arange(len(turns), device=freqs.device) % 3).repeat_interleave(turns)
        angles = input_pos[of_pair].permute(1, 2, 0).float() * freqs
    else:
        angles = input_pos[:, :, None].float() * freqs
    return (angles.cos() * rope.attention_factor)[:, :, None], (angles.sin() * rope.attention_factor)[:, :, None]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first elements of [B, S, heads, head_dim], two for each cos; element i pairs with element
    i + rotary_dim / 2, as in HF's checkpoints."""
    rotary_dim = 2 * cos.shape[-1]
    a, b = x[..., :rotary_dim].float().chunk(2, dim=-1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The cache


class KVCache(nn.Module):
    """Keys and values of one layer, [B, kv_heads, T, head_dim], preallocated.

    Position p is in slot p; in a ring, which only a layer with a window has, in slot p % (T - 1). The last slot, which
    no query ever looks at, is for padding. In int8, a key or a value is what its slot holds times a scale of its own,
    of those in `k_scale` and `v_scale`, float32 [B, kv_heads, T].
    """

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, padding: int | None = None
    ):
        """`padding`: the padding position of a ring."""
        super().__init__()
        self.padding = padding
        for name in ("k", "v"):
            self.register_buffer(name, allocate(shape, dtype, device), persistent=False)
        for name in ("k_scale", "v_scale"):
            scale = allocate(shape[:3], torch.float32, device) if dtype == torch.int8 else None
            self.register_buffer(name, scale, persistent=False)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """k and v, and their scales if it is in int8."""
        return (self.k, self.v) if self.k_scale is None else (self.k, self.v, self.k_scale, self.v_scale)

    @property
    def is_ring(self) -> bool:
        return self.padding is not None

    @property
    def slot_count(self) -> int:
        """How many positions it holds."""
        return self.k.shape[2] - 1

    def slots(self, positions: Tensor) -> Tensor:
        """Where positions [...] are."""
        size = self.slot_count
        return (positions % size).masked_fill(positions == self.padding, size) if self.is_ring else positions

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        """Writes k and v [B, S, kv_heads, head_dim] at positions [B, S] of these rows, by default the first B -> what
        was written to each of the parts, [B, S, kv_heads, ...]."""
        slots, size = self.slots(input_pos), self.slot_count
        if self.is_ring and input_pos.shape[1] > LOOKBACK:  # only the last ones are kept
            last = input_pos.masked_fill(input_pos == self.padding, -1).amax(1, keepdim=True)
            slots = slots.masked_fill(input_pos <= last - size, size)
        rows = first_rows(input_pos) if rows is None else rows
        # All padding goes to one row: the others take no memory before they are used.
        rows = rows[:, None].masked_fill(slots == size, 0)
        if self.k_scale is None:
            new: tuple[Tensor, ...] = k, v
        else:
            (k, k_scale), (v, v_scale) = quantize_heads(k), quantize_heads(v)
            new = k, v, k_scale, v_scale
        for part, values in zip(self.parts, new, strict=True):
            part[rows, :, slots] = values
        return new

    def before(self, input_pos: Tensor, count: int, rows: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """What a ring holds of the `count` positions before the first of each row: of each of its parts [B, count,
        kv_heads, ...], and the first of these positions [B]; anything at those below 0."""
        positions = input_pos[:, :1] + torch.arange(-count, 0, device=input_pos.device)
        rows = first_rows(input_pos) if rows is None else rows
        slots = self.slots(positions)
        return [part[rows[:, None], :, slots] for part in self.parts], input_pos[:, 0] - count

    def copy_row(self, source: int, row: int, begin: int, end: int) -> None:
        """Copies positions begin:end of one row to another."""
        positions = slice(begin, end)
        if self.is_ring:
            begin = max(begin, end - self.slot_count)
            positions = self.slots(torch.arange(begin, end, device=self.k.device))
        for part in self.parts:
            part[row, :, positions] = part[source, :, positions]


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., head_dim] -> int8 of this shape and float32 scales [...], of which a number is a multiple to half a scale.
    Where all numbers are below 1e-36, both are 0."""
    q, scale = quantize_activations(x.float(), x.shape[-1])
    return q[..., 0, :].to(torch.int8), scale[..., 0, 0]


def first_rows(x: Tensor) -> Tensor:
    """The indices of the rows of x, int64 [len(x)]."""
    return torch.arange(len(x), device=x.device)


def of_rows(buffer: Tensor, rows: Tensor | None) -> Tensor:
    """Rows int64 [R] of a buffer, by default all."""
    return buffer if rows is None else buffer[rows]
