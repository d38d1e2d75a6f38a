"""The blocks of GGUF's quantized tensors that hold what our layouts hold: a scale for each 32 weights, 4 or 8 bits.

    unpacking = UNPACKINGS[GGMLQuantizationType.Q4_K]
    blocks                                                   # uint8 [rows, blocks, bytes], as they are in a file
    weight = unpacking.codes(blocks)                         # uint8 [rows, in / 2], int8 [rows, in] if form.bits is 8
    scales, zeros = unpacking.grid(blocks)                   # [rows, in / 32]; no zeros unless the form has them

A block of Q4_0, Q4_1, Q5_0, Q8_0 and MXFP4 holds 32 weights, one of Q4_K 256. Of 4-bit ones, the first half of 32 (of
Q4_K, 64) are in the low halves of the bytes, the second in the high ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from formats.packed import POWERS
from layout import MXFP4, Form


def numbers(blocks: Tensor, start: int) -> Tensor:
    """The float16 from byte `start` on, as float32 [rows, blocks]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1).float()


def interleave(codes: Tensor) -> Tensor:
    """uint8 [..., 2 n], the first 2 n weights of a run in the low halves and the next in the high ones -> the same
    shape, neighbors in a byte, the even weight in the low half."""
    even, odd = codes[..., 0::2], codes[..., 1::2]
    return torch.cat((even & 15 | odd << 4, even >> 4 | odd & 240), -1)


def affine(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """w = scale * q + minimum as scales and zeros of w = (q - zero) * scale.

    Where the scale is 0, all weights are the minimum: (0 - 1) * -minimum, and `flattened` makes the codes 0.
    """
    flat = scale == 0
    return torch.where(flat, -minimum, scale), torch.where(flat, 1.0, -minimum / scale)


def flattened(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [..., groups, bytes] with 0 in the groups of which scale [..., groups] is 0."""
    return torch.where((scale == 0)[..., None], 0, codes)


def q4_0_codes(blocks: Tensor) -> Tensor:
    return interleave(blocks[..., 2:]).flatten(1)


def q4_0_grid(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale = numbers(blocks, 0).half()
    return scale, torch.full_like(scale, 8, dtype=torch.uint8)


def q4_1_codes(blocks: Tensor) -> Tensor:
    return flattened(interleave(blocks[..., 4:]), numbers(blocks, 0)).flatten(1)


def q4_1_grid(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return affine(numbers(blocks, 0), numbers(blocks, 2))


def q4_k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the 8 groups of each block, [rows, blocks * 8].

    They have 6 bits. Those of the first four groups are the lower bits of bytes 4 to 7 (scales) and 8 to 11 (minimums).
    The others have their lower 4 bits in bytes 12 to 15, the scales in the low halves, and their upper 2 bits in those
    of bytes 4 to 11.
    """
    first, second, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), -1)
    minimums = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1)
    scale, minimum = numbers(blocks, 0)[..., None], numbers(blocks, 2)[..., None]
    return (scale * scales).flatten(1), -(minimum * minimums).flatten(1)


def q4_k_codes(blocks: Tensor) -> Tensor:
    codes = interleave(blocks[..., 16:].unflatten(-1, (4, 32)))  # two groups in 32 bytes
    return flattened(codes.reshape(len(blocks), -1, 16), q4_k_scales(blocks)[0]).flatten(1)


def q4_k_grid(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return affine(*q4_k_scales(blocks))


def q5_0_codes(blocks: Tensor) -> Tensor:
    high, low = blocks[..., 2:6], blocks[..., 6:]
    fifth = (high[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)  # a bit for each weight in turn
    levels = torch.cat((low & 15, low >> 4), -1) | fifth << 4
    return (levels.view(torch.int8) - 16).flatten(1)


def q8_0_codes(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].flatten(1).view(torch.int8)


def symmetric_grid(blocks: Tensor) -> tuple[Tensor]:
    return (numbers(blocks, 0).half(),)


def mxfp4_codes(blocks: Tensor) -> Tensor:
    return interleave(blocks[..., 1:]).flatten(1)


def mxfp4_grid(blocks: Tensor) -> tuple[Tensor]:
    """Powers of two, stored as their exponent plus 127. 255 is NaN, and with 253 or 254 the code for 6 is infinite."""
    exponents = blocks[..., 0]
    return (exponents.view(POWERS).to(torch.bfloat16).masked_fill(exponents > 252, math.nan),)


@dataclass(frozen=True)
class Unpacking:
    """How a type of blocks becomes a form of ours."""

    form: Form
    scale_dtype: torch.dtype
    zero_dtype: torch.dtype
    codes: Callable[[Tensor], Tensor]
    grid: Callable[[Tensor], tuple[Tensor, ...]]  # scales, and zeros if the form has them


UNPACKINGS = {
    GGMLQuantizationType.Q4_0: Unpacking(Form(4, 32), torch.float16, torch.uint8, q4_0_codes, q4_0_grid),
    GGMLQuantizationType.Q4_1: Unpacking(Form(4, 32), torch.float32, torch.float32, q4_1_codes, q4_1_grid),
    GGMLQuantizationType.Q4_K: Unpacking(Form(4, 32), torch.float32, torch.float32, q4_k_codes, q4_k_grid),
    GGMLQuantizationType.Q5_0: Unpacking(Form(8, 32), torch.float16, torch.uint8, q5_0_codes, symmetric_grid),
    GGMLQuantizationType.Q8_0: Unpacking(Form(8, 32), torch.float16, torch.uint8, q8_0_codes, symmetric_grid),
    GGMLQuantizationType.MXFP4: Unpacking(MXFP4, torch.bfloat16, torch.uint8, mxfp4_codes, mxfp4_grid),
}
