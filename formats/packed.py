"""What the readers of quantized checkpoints give: a weight that reads as floats, and as the parts of our own form.

    rows = tensors["X.weight"].read(0, 100)         # float32
    if tensors["X.weight"].form is not None:        # int4 or int8 in groups, which hold the very same values
        for rows in tensors["X.weight"].read_part("scales"): ...

What a weight consists of in the file, and under which names, only its reader knows. What several readers need is here.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from errors import UserError
from layout import Form
from weights import CHUNK_BYTES

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
POWERS = torch.float8_e8m0fnu  # of two: what scales of 8 bits, which some files call uint8, mean


class Stored(Protocol):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor: ...


@runtime_checkable
class Packed(Protocol):
    """A quantized weight, not yet read. A reader's own class derives from it, and says what is not so."""

    shape: tuple[int, ...]  # [out, in], or that of stacked experts
    kind: str  # what people call it: "Q6_K", "nf4"
    dtype: torch.dtype = torch.float32  # of what `read` gives
    form: Form | None = None  # ours that has the same values; None: none has
    order: Tensor | None = None  # the parts are for the inputs x[..., order], int32 [in]
    scale_dtype: torch.dtype = torch.float32  # of the part "scales"
    zero_dtype: torch.dtype = torch.uint8  # of the part "zeros"; or a float

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop, dequantized. UserError when a scale is not finite."""

    def read_part(self, part: str) -> Iterator[Tensor]:
        """`weight`, `scales`, `zeros` or `order` as layout.quantized_shapes has them, in runs of rows. ValueError where
        there is no form."""
        raise ValueError(f"a {self.kind} weight {list(self.shape)} has no form of ours, and so no {part}")


def find(name: str, tensors: Mapping[str, Stored]) -> Stored:
    """The tensor. UserError when it is missing."""
    if name not in tensors:
        raise UserError(f"tensor {name!r} is missing from the weights; get the complete checkpoint")
    return tensors[name]


def slices(tensor: Stored, group: int = 1) -> Iterator[Tensor]:
    """The tensor in runs of rows of at most CHUNK_BYTES, or of one group of rows: none is cut."""
    rows = tensor.shape[0]
    fitting = CHUNK_BYTES * rows // (torch.Size(tensor.shape).numel() * tensor.dtype.itemsize)
    step = max(fitting // group, 1) * group
    for start in range(0, rows, step):
        yield tensor.read(start, min(start + step, rows))
