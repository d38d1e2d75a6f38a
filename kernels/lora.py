"""The op that adds low-rank parts to the output of a linear layer, and the order in which it reads them.

    packed = empty_slots(slots, inputs, rank, parts, dtype)              # then filled, by `views` of it
    y = torch.ops.brisk.linear_int4_lora(x, ..., packed, slots)          # with the layer, on CPUs; bf16, int8 as well
    y = torch.ops.brisk.lora(y, x, packed, slots)                        # after any other layer
    y = add_low_rank(y, x, a, b, scales, slots, parts)                   # in plain PyTorch

Several adapters lie in slots, and each row of the batch names the slot of its own, or -1. Of one adapter a layer may
have several parts, each for some columns of y: q, k and v, gate and up are one matrix here, but have an A and a B each.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import _library, _op
from kernels.packing import allocate

RANKS, PANEL, LANES = 8, 64, 16  # as the kernels in cpu_lora.cpp take them: rows of A, rows of B, inputs
TYPES = (torch.float32, torch.float16, torch.bfloat16)  # as cpu.h numbers them
HEADER = 6  # numbers of int64: slots, parts, ranks, inputs (rounded up both), panels of B, type; then come the parts
Parts = Sequence[tuple[int, int]]

# Of each op that a layer may be, what it takes before the adapters.
LAYERS = {
    "linear_bf16": "Tensor x, Tensor weight, Tensor? bias",
    "linear_int8": "Tensor x, Tensor packed, Tensor scales, Tensor? bias",
    "linear_int8_grouped": "Tensor x, Tensor packed, Tensor scales, int out_features, int groupsize, Tensor? bias",
    "linear_int4": "Tensor x, Tensor packed, int out_features, int groupsize, ScalarType scale_dtype, int zero, "
    "Tensor? bias",
}

_library.define("lora(Tensor y, Tensor x, Tensor packed, Tensor slots) -> Tensor")


@_op(lambda y, *args: torch.empty_like(y, memory_format=torch.contiguous_format))
def lora(y: Tensor, x: Tensor, packed: Tensor, slots: Tensor) -> Tensor:
    """add_low_rank of what is packed, which may have another float dtype. Accumulates in float32.

    Raises RuntimeError where shapes do not fit, from the C++ version.
    """
    a, b, scales, parts = views(packed)
    plain = unpack_a(a, x.shape[-1]).float(), unpack_b(b, parts).float()
    return add_low_rank(y.float(), x.float(), *plain, scales, slots, parts).to(y.dtype)


def _with_layer(name: str, operands: str) -> None:
    """Defines an op for a layer and `lora` after it. So an adapter of rank 16 costs 6 % of an int4 step (1.1 B);
    by an op of its own 9 %, most of it for fetching what has left the caches since the last one."""
    linear = getattr(torch.ops.brisk, name).default

    def with_adapters(x: Tensor, *args) -> Tensor:
        return lora(linear(x, *args[:-2]), x, *args[-2:])

    with_adapters.__name__ = f"{name}_lora"
    _library.define(f"{name}_lora({operands}, Tensor adapters, Tensor slots) -> Tensor")
    _op(lambda *args: linear(*args[:-2]))(with_adapters)


for _name, _operands in LAYERS.items():
    _with_layer(_name, _operands)


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, slots: Tensor, parts: Parts) -> Tensor:
    """y [B, ..., N] of a layer with the input x [B, ..., K], plus scale B A x of the adapter that each row has.

    a [slots, parts, r, K]; b [slots, columns of all parts, r]; scales float32 [slots, parts]; slots int64 [at least B],
    the adapter of each row, -1 for none; parts: the columns (first, end) of y that each adds to.
    """
    slots = slots[: len(x)]
    chosen = slots.clamp(min=0)
    u = x.reshape(len(x), -1, x.shape[-1]) @ a[chosen].flatten(1, 2).transpose(1, 2)  # [B, S, parts r]
    weight = torch.where(slots[:, None] < 0, 0.0, scales[chosen])
    u = (u.unflatten(-1, a.shape[1:3]) * weight[:, None, :, None]).to(x.dtype)
    b, pieces, done, first = b[chosen].transpose(1, 2), [], 0, 0
    rows = y.reshape(len(x), -1, y.shape[-1])
    for i, (begin, end) in enumerate(parts):
        width = end - begin
        pieces += [rows[..., done:begin], rows[..., begin:end] + u[:, :, i] @ b[..., first : first + width]]
        done, first = end, first + width
    return torch.cat([*pieces, rows[..., done:]], -1).view(y.shape)


class Views(NamedTuple):
    """Of what is packed: A as of pack_a [slots, parts, ...], B as of pack_b [slots, ...], scales float32
    [slots, parts], and the columns (first, end) of y that each part adds to."""

    a: Tensor
    b: Tensor
    scales: Tensor
    parts: Parts


def empty_slots(slots: int, inputs: int, rank: int, parts: Parts, dtype: torch.dtype) -> Tensor:
    """Zeros for so many adapters, all in one tensor uint8, as each that a step takes has to be fetched."""
    ranks, depth = -(-rank // RANKS) * RANKS, -(-inputs // LANES) * LANES
    panels = sum(-(-(end - begin) // PANEL) for begin, end in parts)
    header = torch.tensor([slots, len(parts), ranks, depth, panels, TYPES.index(dtype), *chain(*parts)])
    first = -(-(header.nbytes + 4 * slots * len(parts)) // 64) * 64
    nbytes = first + slots * ranks * (len(parts) * depth + panels * PANEL) * dtype.itemsize
    packed = allocate((nbytes,), torch.uint8, torch.device("cpu"))
    packed[: header.nbytes] = header.view(torch.uint8)
    return packed


def views(packed: Tensor) -> Views:
    """What lies in a tensor that `empty_slots` made."""
    slots, count, ranks, depth, panels, kind = packed[: 8 * HEADER].view(torch.int64).tolist()
    scales = 8 * HEADER + 16 * count
    first = -(-(scales + 4 * slots * count) // 64) * 64
    second = first + slots * count * ranks * depth * TYPES[kind].itemsize
    return Views(
        packed[first:second].view(TYPES[kind]).view(slots, count, ranks // RANKS, depth // LANES, RANKS, LANES),
        packed[second:].view(TYPES[kind]).view(slots, panels, ranks, PANEL),
        packed[scales : scales + 4 * slots * count].view(torch.float32).view(slots, count),
        [tuple(part) for part in packed[8 * HEADER : scales].view(torch.int64).view(-1, 2).tolist()],
    )


def pack_a(a: Tensor) -> Tensor:
    """[..., r, K] -> [..., r / 8, K / 16, 8, 16], both rounded up: the order of reading."""
    padded = F.pad(a, (0, -a.shape[-1] % LANES, 0, -a.shape[-2] % RANKS))
    return padded.unflatten(-1, (-1, LANES)).unflatten(-3, (-1, RANKS)).transpose(-3, -2).contiguous()


def unpack_a(packed: Tensor, inputs: int) -> Tensor:
    """What pack_a packed, its ranks rounded up: [..., r, inputs]."""
    return packed.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :inputs]


def pack_b(b: Tensor, parts: Parts) -> Tensor:
    """[..., columns of all parts, r] -> [..., panels, r, 64]: the columns of each part in whole panels of its own."""
    split = b.split([end - begin for begin, end in parts], -2)
    padded = torch.cat([F.pad(part, (0, 0, 0, -part.shape[-2] % PANEL)) for part in split], -2)
    return padded.unflatten(-2, (-1, PANEL)).transpose(-2, -1).contiguous()


def unpack_b(packed: Tensor, parts: Parts) -> Tensor:
    """What pack_b packed."""
    columns, pieces, first = packed.transpose(-2, -1).flatten(-3, -2), [], 0
    for begin, end in parts:
        pieces.append(columns[..., first : first + end - begin, :])
        first += -(-(end - begin) // PANEL) * PANEL
    return torch.cat(pieces, -2)
