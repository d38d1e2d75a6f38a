"""The experts of gpt-oss: 4-bit floats in groups of 32 that share a power of two, which is our form `mxfp4`.

    tensors = collapse(fields, tensors)                     # NAME is a Packed for NAME_blocks and NAME_scales
    for expert in tensors[NAME].read_part("weight"): ...    # uint8 [1, out, in / 2]; "scales" [1, out, in / 32]

Stored are `NAME_blocks` uint8 [experts, out, in / 32, 16], two codes in a byte, the even input in the low half, and
`NAME_scales` uint8 [experts, out, in / 32], exponents plus 127: https://www.opencompute.org/documents/
ocp-microscaling-formats-mx-v1-0-spec-final-pdf. kernels/packing.py has the values of the codes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from formats.packed import POWERS, Packed, Stored, find
from kernels.packing import dequantize, unpack_nibbles
from layout import MXFP4
from weights import check_finite

BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class MxTensor(Packed):
    """Stacked experts, not yet read. As floats they are spelled [experts, in, out], the parts [experts, out, ...]."""

    name: str
    tensors: Mapping[str, Stored]  # blocks and scales
    shape: tuple[int, int, int]

    kind = "MXFP4"
    form = MXFP4
    scale_dtype = torch.bfloat16  # which has every power of two that there may be

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Experts start:stop, float32 [experts, in, out]."""
        experts = []
        for i in range(self.shape[0])[start:stop]:
            codes = unpack_nibbles(self.blocks(i), self.shape[1])
            experts.append(dequantize(codes, self.scales(i).float(), None, 32).t())
        return torch.stack(experts)

    def read_part(self, part: str) -> Iterator[Tensor]:
        """One expert after the other. UserError when a scale is not a number."""
        for i in range(self.shape[0]):
            yield (self.blocks(i) if part == "weight" else self.scales(i))[None]

    def blocks(self, expert: int) -> Tensor:
        return self.tensors[BLOCKS].read(expert, expert + 1)[0].flatten(1)

    def scales(self, expert: int) -> Tensor:
        exponents = self.tensors[SCALES].read(expert, expert + 1)[0]
        return check_finite(exponents.view(POWERS).to(self.scale_dtype), self.name + SCALES)


def collapse(fields: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Stored | Packed]:
    """The tensors, with one Packed for each pair of blocks and scales. UserError names what is missing or does not
    fit."""
    collapsed = dict(tensors)
    for blocks in [name for name in tensors if name.endswith(BLOCKS)]:
        name = blocks.removesuffix(BLOCKS)
        collapsed[name] = mx_tensor(name, tensors)
        del collapsed[blocks], collapsed[name + SCALES]
    return collapsed


def mx_tensor(name: str, tensors: Mapping[str, Stored]) -> MxTensor:
    found = {part: find(name + part, tensors) for part in (BLOCKS, SCALES)}
    shape = found[BLOCKS].shape
    if len(shape) != 4 or shape[3] != 16 or found[SCALES].shape != shape[:3]:
        shapes = f"{list(shape)} and {list(found[SCALES].shape)}"
        raise UserError(f"the blocks and scales of {name!r} have the shapes {shapes}; get the weights again")
    for part, tensor in found.items():
        if tensor.dtype != torch.uint8:
            raise UserError(f"tensor {name + part!r} is {tensor.dtype}, not torch.uint8; get the weights again")
    experts, out, groups, _ = shape
    return MxTensor(name, found, (experts, groups * 32, out))
