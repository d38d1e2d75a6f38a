"""What the readers of quantized checkpoints give: a weight that reads as floats, and as the parts of our own form.

    rows = tensors["X.weight"].read(0, 100)         # float32
    if tensors["X.weight"].form is not None:        # int4 or int8 in groups, which hold the very same values
        for rows in tensors["X.weight"].read_part("scales"): ...

What a weight consists of in the file, and under which names, only its reader knows.
"""

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from errors import UserError
from layout import Form


class Stored(Protocol):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor: ...


@runtime_checkable
class Packed(Protocol):
    """A quantized weight, not yet read."""

    dtype: torch.dtype  # float32, of what `read` gives
    shape: tuple[int, ...]  # [out, in], or that of stacked experts
    kind: str  # what people call it: "Q6_K", "nf4"
    form: Form | None  # ours that has the same values; None: none has
    order: Tensor | None  # the parts are for the inputs x[..., order], int32 [in]
    scale_dtype: torch.dtype  # of the part "scales"
    zero_dtype: torch.dtype  # of the part "zeros": uint8, or a float

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop, dequantized. UserError when a scale is not finite."""

    def read_part(self, part: str) -> Iterator[Tensor]:
        """`weight`, `scales`, `zeros` or `order` as layout.quantized_shapes has them, in runs of rows."""


def check_finite(values: Tensor, name: str) -> Tensor:
    """The values. UserError, by the name of their tensor, when one is NaN or infinite."""
    # NaN is both extremes; isfinite() takes ten times as long.
    if values.numel() and not all(math.isfinite(extreme) for extreme in values.aminmax()):
        raise UserError(f"tensor {name!r} holds NaN or infinity; get the weights again")
    return values
