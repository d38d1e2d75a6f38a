"""The op that adds low-rank parts to the output of a linear layer, and the order in which it reads them.

    y = torch.ops.brisk.lora(y, x, a, b, scales, slots, columns)         # on CPUs, packed by pack_a and pack_b
    y = add_low_rank(y, x, a, b, scales, slots, parts)                   # in plain PyTorch, as they are

Several adapters lie in slots, and each row of the batch names the slot of its own, or -1. Of one adapter a layer may
have several parts, each for some columns of y: q, k and v, gate and up are one matrix here, but have an A and a B each.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import _library, _op

RANKS, PANEL, LANES = 8, 64, 16  # as the kernels in cpu_lora.cpp take them: rows of A, rows of B, inputs

_library.define("lora(Tensor y, Tensor x, Tensor a, Tensor b, Tensor scales, Tensor slots, Tensor columns) -> Tensor")


@_op(lambda y, *args: torch.empty_like(y, memory_format=torch.contiguous_format))
def lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, slots: Tensor, columns: Tensor) -> Tensor:
    """add_low_rank of what is packed: a [slots, parts, r / 8, K / 16, 8, 16] and b [slots, panels, r, 64], of any float
    dtype; `columns` int64 [parts, 2] are the parts. Accumulates in float32.

    Raises RuntimeError where shapes do not fit, from the C++ version.
    """
    parts = [tuple(part) for part in columns.tolist()]
    plain = unpack_a(a, x.shape[-1]).float(), unpack_b(b, parts).float()
    return add_low_rank(y.float(), x.float(), *plain, scales, slots, parts).to(y.dtype)


def add_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, slots: Tensor, parts: Sequence[tuple[int, int]]
) -> Tensor:
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


def pack_a(a: Tensor) -> Tensor:
    """[..., r, K] -> [..., r / 8, K / 16, 8, 16], both rounded up: the order of reading."""
    padded = F.pad(a, (0, -a.shape[-1] % LANES, 0, -a.shape[-2] % RANKS))
    return padded.unflatten(-1, (-1, LANES)).unflatten(-3, (-1, RANKS)).transpose(-3, -2).contiguous()


def unpack_a(packed: Tensor, inputs: int) -> Tensor:
    """What pack_a packed, its ranks rounded up: [..., r, inputs]."""
    return packed.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :inputs]


def pack_b(b: Tensor, parts: Sequence[tuple[int, int]]) -> Tensor:
    """[..., columns of all parts, r] -> [..., panels, r, 64]: the columns of each part in whole panels of its own."""
    split = b.split([end - begin for begin, end in parts], -2)
    padded = torch.cat([F.pad(part, (0, 0, 0, -part.shape[-2] % PANEL)) for part in split], -2)
    return padded.unflatten(-2, (-1, PANEL)).transpose(-2, -1).contiguous()


def unpack_b(packed: Tensor, parts: Sequence[tuple[int, int]]) -> Tensor:
    """What pack_b packed."""
    columns, pieces, first = packed.transpose(-2, -1).flatten(-3, -2), [], 0
    for begin, end in parts:
        pieces.append(columns[..., first : first + end - begin, :])
        first += -(-(end - begin) // PANEL) * PANEL
    return torch.cat(pieces, -2)
