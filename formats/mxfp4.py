"""The experts of gpt-oss: 4-bit floats in groups of 32 that share a power of two, which is our form `mxfp4`.

    tensor = MxTensor.of("model.layers.0.mlp.experts.down_proj", tensors, shape, by_turns=False)
    for expert in tensor.read("weight"): ...  # uint8 [1, out, in / 2]; "scales" bfloat16 [1, out, in / 32]

Stored are `NAME_blocks` uint8 [experts, out, in / 32, 16], two codes in a byte, the even input in the low half, and
`NAME_scales` uint8 [experts, out, in / 32], exponents plus 127: https://www.opencompute.org/documents/
ocp-microscaling-formats-mx-v1-0-spec-final-pdf. kernels/packing.py has the values of the codes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError
from formats.gptq_awq import Stored
from layout import MXFP4, Form

BLOCKS, SCALES = "_blocks", "_scales"
BIAS = 127
NAN = 255


@dataclass(frozen=True)
class MxTensor:
    """Stacked experts, not yet read."""

    name: str
    tensors: Mapping[str, Stored]  # blocks and scales
    shape: tuple[int, int, int]  # [experts, out, in]
    by_turns: bool  # the rows of gate and up lie in turn; ours are all of the gate, then all of up
    stored: Form = MXFP4
    order: None = None
    scale_dtype: torch.dtype = torch.bfloat16  # which has every power of two that there may be

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Stored], shape: tuple[int, int, int], by_turns: bool) -> "MxTensor":
        """UserError names what is missing or does not fit."""
        experts, out, inputs = shape
        expected = {BLOCKS: (experts, out, inputs // 32, 16), SCALES: (experts, out, inputs // 32)}
        for part, expected_shape in expected.items():
            if name + part not in tensors:
                raise UserError(f"tensor {name + part!r} is missing from the weights; get the complete checkpoint")
            found = tensors[name + part]
            if found.shape != expected_shape or inputs % 32:
                raise UserError(
                    f"tensor {name + part!r} has the shape {list(found.shape)} where config.json means"
                    f" {list(expected_shape)}; get the config.json of these weights"
                )
            if found.dtype != torch.uint8:
                raise UserError(f"tensor {name + part!r} is {found.dtype}, not torch.uint8; get the weights again")
        return cls(name, {part: tensors[name + part] for part in expected}, shape, by_turns)

    def read(self, kind: str) -> Iterator[Tensor]:
        """One expert after the other. UserError when a scale is not a number."""
        for i in range(self.shape[0]):
            rows = self.tensors[BLOCKS if kind == "weight" else SCALES].read(i, i + 1)[0].flatten(1)
            if self.by_turns:
                rows = torch.cat((rows[0::2], rows[1::2]))
            if kind == "scales":
                if bool((rows == NAN).any()):
                    raise UserError(f"tensor {self.name + SCALES!r} holds NaN; get the weights again")
                rows = torch.exp2(rows.double() - BIAS).to(self.scale_dtype)
            yield rows[None]
