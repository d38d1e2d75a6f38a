"""From the layout on disk to the order in which the kernels of CPUs read weights, and memory in huge pages.

    packed = pack_int8(weight)                                           # int8 [N, K]
    packed, zero = pack_int4(q, scales, zeros, K, groupsize)             # q: two weights in a byte [N, ceil(K / 2)]
    q = pack_nibbles(levels)                                             # which is the layout on disk
    weight = dequantize(levels, scales, zeros, groupsize)

CUDA has an order of its own, in cuda.py.
"""

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# The value of each code of the 4-bit floats e2m1: a sign, two bits of exponent, one of mantissa. MXFP4 is these in
# groups of 32 weights that share a power of two, w = FP4_VALUES[code] * scale. (OCP Microscaling Formats, version 1.0)
# They lie on no grid of 16 levels, but are packed as int4 weights are, without zeros, in groups of 32 with bfloat16
# scales: these hold every power of two that MXFP4 has.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
CACHE_LINE = 64  # bytes
HUGE_PAGE, SMALL, SHARED_MAP = 2**21, 2**16, 2**26  # bytes
PANEL = 32  # rows of a packed weight that are interleaved
GROUPSIZES = (32, 64, 128)  # inputs that may share a scale
ZERO_BYTES, ZERO_FLOATS = -1, -2  # how int4 zeros are packed, if they are not all the same integer
FP4 = -3  # no zeros: 4-bit floats, e2m1: a sign, and 0, 0.5, 1, 1.5, 2, 3, 4 or 6


def pack_int8(weight: Tensor) -> Tensor:
    """int8 [N, K] -> uint8 [N / 32, K / 4, 32, 4], both rounded up: for each 4 k, the bytes of 32 rows, plus 128."""
    N, K = weight.shape
    padded = weight if N % PANEL == K % 16 == 0 else F.pad(weight, (0, -K % 16, 0, -N % PANEL))
    words = padded.contiguous().view(torch.int32).unflatten(0, (-1, PANEL))  # [panels, 32, K / 4]
    words = words.transpose(1, 2)
    packed = allocate(words.shape, torch.int32, weight.device).copy_(words)
    return packed.bitwise_xor_(-0x7F7F7F80).view(torch.uint8).unflatten(-1, (PANEL, 4))


def unpack_int8(packed: Tensor, N: int, K: int) -> Tensor:
    """What pack_int8 packed."""
    return (packed.transpose(1, 2).reshape(-1, packed.shape[1] * 4)[:N, :K] ^ 128).view(torch.int8)


def pack_scales(scales: Tensor) -> Tensor:
    """[N, groups] of int8 in groups -> [N / 32, groups, 32], N rounded up: the order of reading."""
    by_panel = _by_panel(scales)
    return allocate(by_panel.shape, scales.dtype, scales.device).copy_(by_panel)


def unpack_scales(packed: Tensor, N: int) -> Tensor:
    """What pack_scales packed."""
    return packed.transpose(1, 2).flatten(0, 1)[:N]


def pack_nibbles(levels: Tensor) -> Tensor:
    """uint8 [N, K] below 16, K even -> two in a byte [N, K / 2], the even k in the low half."""
    return levels[:, 0::2] | levels[:, 1::2] << 4


def unpack_nibbles(q: Tensor, K: int) -> Tensor:
    """What pack_nibbles packed: uint8 [N, ceil(K / 2)] -> [N, K]."""
    return torch.stack((q & 15, q >> 4), -1).flatten(1)[:, :K]


def pack_int4(
    q: Tensor, scales: Tensor, zeros: Tensor | None, K: int, groupsize: int, zero: int | None = None
) -> tuple[Tensor, int]:
    """uint8 [N, ceil(K / 2)] (the low nibble is the even k), scales and zeros [N, groups] -> (packed, zero). Without
    zeros, q are codes of 4-bit floats.

    `packed` is uint8 [N / 32, groups, bytes]: for each 8 k, 4 bytes of each of 32 rows as they are; then the 32 scales
    in their dtype; then the zeros as 32 bytes if `zero` is ZERO_BYTES, as 32 floats if it is ZERO_FLOATS; otherwise
    `zero` is the zero of all groups. It is kind_of_zeros(zeros), unless the caller knows that of more weights. Groups
    begin at cache lines: with every other load across two, it took twice as long.
    """
    N, groups = scales.shape
    missing = (0, groups * groupsize // 2 - q.shape[1], 0, -N % PANEL)
    padded = F.pad(q, missing) if any(missing) else q.contiguous()
    words = padded.view(torch.int32).view(-1, PANEL, groups, groupsize // 8)
    parts = [words.permute(0, 2, 3, 1), _by_panel(scales)]
    zero = kind_of_zeros(zeros) if zero is None else zero
    if zero in (ZERO_BYTES, ZERO_FLOATS):
        parts.append(_by_panel(zeros.to(torch.uint8 if zero == ZERO_BYTES else torch.float32)))
    widths = [part[0, 0].numel() * part.element_size() for part in parts]
    group_bytes = sum(widths) + -sum(widths) % CACHE_LINE
    packed = allocate((words.shape[0], groups, group_bytes), torch.uint8, q.device)
    for part, slot in zip(parts, packed[..., : sum(widths)].split(widths, -1), strict=True):
        slot.view(part.dtype).view(part.shape).copy_(part)
    return packed, zero


def kind_of_zeros(zeros: Tensor | None) -> int:
    """The zero of all groups, if that is the same whole number from 0 to 16; ZERO_BYTES if there are several such;
    ZERO_FLOATS for others; FP4 if there are none. Of zeros above 16, sums would not fit the 16 bits that AVX2 has for
    them."""
    if zeros is None:
        return FP4
    low, high = zeros.aminmax()
    if low < 0 or high > 16 or bool((zeros != zeros.round()).any()):
        return ZERO_FLOATS
    return int(low) if low == high else ZERO_BYTES


def _by_panel(x: Tensor) -> Tensor:
    """[N, groups] -> [panels, groups, 32]."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2)


def unpack_int4(
    packed: Tensor, N: int, K: int, groupsize: int, scale_dtype: torch.dtype, zero: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What pack_int4 packed: q uint8 [N, ceil(K / 2)], scales and zeros [N, groups], or None for FP4."""
    zero_dtype = {ZERO_BYTES: torch.uint8, ZERO_FLOATS: torch.float32}.get(zero)
    widths = [PANEL * groupsize // 2, PANEL * scale_dtype.itemsize, PANEL * zero_dtype.itemsize if zero_dtype else 0]
    words, scales, zeros = (part.contiguous() for part in packed[..., : sum(widths)].split(widths, -1))
    q = words.view(torch.int32).unflatten(-1, (-1, PANEL)).permute(0, 3, 1, 2).contiguous()  # [panels, 32, groups, ...]
    q = q.view(torch.uint8).flatten(0, 1).flatten(1)[:N, : (K + 1) // 2]
    scales = scales.view(scale_dtype).transpose(1, 2).flatten(0, 1)[:N]
    if zero == FP4:
        return q, scales, None
    if zero_dtype is None:
        return q, scales, torch.full_like(scales, zero, dtype=torch.float32)
    return q, scales, zeros.view(zero_dtype).transpose(1, 2).flatten(0, 1)[:N].float()


def dequantize(levels: Tensor, scales: Tensor, zeros: Tensor | int | None, groupsize: int) -> Tensor:
    """w = (level - zero) * scale, [N, K], of levels [N, K] and scales [N, groups]; zeros are like them, or all one.
    With None for them, FP4_VALUES[level] * scale."""

    def spread(grid: Tensor) -> Tensor:
        return grid.repeat_interleave(groupsize, 1)[:, : levels.shape[1]]

    if zeros is None:
        return scales.new_tensor(FP4_VALUES)[levels.long()] * spread(scales)
    return (levels - (zeros if isinstance(zeros, int) else spread(zeros))) * spread(scales)


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on Linux those of a CPU are in huge pages, and read 15 to 35 % faster than in pages of 4 KiB."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    # A huge page has 2 MiB, and the matrices of small models and of experts less: they share a map.
    memory = _map(nbytes) if nbytes > SHARED_MAP else _arena.take(nbytes)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _map(nbytes: int) -> memoryview:
    """Memory of its own, from the beginning of a huge page on."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    return memoryview(memory)[start : start + nbytes]


class _Arena:
    """Gives out the pages of a map one after the other. A map is freed with the last tensor that is in it."""

    def __init__(self) -> None:
        self.rest = memoryview(b"")

    def take(self, nbytes: int) -> memoryview:
        if nbytes > len(self.rest):
            self.rest = _map(SHARED_MAP)
        taken, self.rest = self.rest[:nbytes], self.rest[nbytes + -nbytes % mmap.PAGESIZE :]
        return taken


_arena = _Arena()
