"""Checkpoints in 8-bit floats, as DeepSeek-V3, Qwen3-FP8, AutoFP8 and FBGEMM write them.

    tensors = collapse(config["quantization_config"], tensors)   # a weight instead of the tensors it consists of
    tensors["model.layers.0.mlp.up_proj.weight"].read(0, 100)    # float32 [100, in]

`X.weight` is float8_e4m3fn or float8_e5m2 [out, in]. w = q * scale, and the scales, called `X.weight_scale_inv` or
`X.weight_scale`, are

- one for each block of weight_block_size [128, 128]: [out / 128, in / 128], rounded up;
- one for each row: [out, 1] or [out];
- or one: [1], or without a dimension.

They are floats, or powers of two of 8 bits (scale_fmt ue8m0: exponents plus 127, which some writers call uint8). Inputs
are not quantized here, nor are the caches, so their scales are left out. No layout of ours holds these values: they
become floats. https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from formats.packed import FLOAT8, POWERS, Packed, Stored, find
from weights import FLOATS, check_finite

SCALES = ("weight_scale_inv", "weight_scale")
# Scales of what is a float here: inputs, outputs, keys and values.
LEFT_OUT = ("input_scale", "activation_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale", "kv_scale")


@dataclass(frozen=True)
class Fp8Weight(Packed):
    """A weight of 8-bit floats, not yet read."""

    name: str
    levels: Stored  # [out, in]
    scales: Stored
    scales_name: str
    block: tuple[int, int]  # rows and columns that share a scale

    kind = "fp8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.levels.shape

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop, float32 [rows, in]. UserError when they or their scales are not finite."""
        rows, columns = self.block
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        first = start // rows
        scales = self.read_scales(first, -(-stop // rows)).repeat_interleave(rows, 0)[start - first * rows :]
        weight = check_finite(self.levels.read(start, stop).float(), self.name)
        for i, part in enumerate(weight.split(columns, 1)):
            part.mul_(scales[: len(weight), i : i + 1])
        return weight

    def read_scales(self, first: int, last: int) -> Tensor:
        """Those of the blocks' rows first:last, float32 [last - first, blocks of columns]."""
        scales = self.scales.read(first, last) if self.scales.shape else self.scales.read()
        if scales.dtype == torch.uint8:
            scales = scales.view(POWERS)
        scales = check_finite(scales.float(), self.scales_name)
        return scales.reshape(-1, -(-self.shape[1] // self.block[1]))


def collapse(fields: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Stored | Fp8Weight]:
    """The tensors of a checkpoint, in place of those that a quantized weight consists of the weight, under its name.

    `fields` is quantization_config. UserError names what is not supported, missing or does not fit.
    """
    block = read_block(fields)
    exponents = fields.get("scale_fmt") == "ue8m0"
    scale_dtypes = (*FLOATS, POWERS, torch.uint8) if exponents else (*FLOATS, POWERS)
    weights, used = {}, set()
    for name, tensor in tensors.items():
        if tensor.dtype in FLOAT8:
            weights[name] = weight = fp8_weight(name, tensors, block, scale_dtypes)
            used.add(weight.scales_name)
        elif name.rpartition(".")[2] in LEFT_OUT:
            used.add(name)
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    return rest | weights


def read_block(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the config has no blocks."""
    known = {
        "activation_scheme": (None, "dynamic", "static"),
        "scale_fmt": (None, "float", "ue8m0"),
        "expert_dtype": (None, "fp8"),
        "fmt": (None, "e4m3", "e5m2"),
    }
    for name, values in known.items():
        if fields.get(name) not in values:
            raise UserError(
                f"config.json: quantization_config: {name} {fields[name]!r} is not supported;"
                " convert the original model"
            )
    block = fields.get("weight_block_size", [128, 128])  # as in transformers
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise UserError(
            f"config.json: quantization_config: weight_block_size is {block!r}, not two numbers from 1 on;"
            " get the config.json of these weights"
        )
    return tuple(block)


def fp8_weight(
    name: str, tensors: Mapping[str, Stored], block: tuple[int, int] | None, scale_dtypes: tuple[torch.dtype, ...]
) -> Fp8Weight:
    """The weight `name`. UserError names what is missing or does not fit."""
    levels = tensors[name]
    if len(levels.shape) != 2 or not name.endswith(".weight"):
        raise UserError(
            f"tensor {name!r} is {levels.dtype} of the shape {list(levels.shape)}, only weights [out, in] are"
            " supported; convert the original model"
        )
    out, inputs = levels.shape
    names = [f"{name.removesuffix('weight')}{kind}" for kind in SCALES]
    scales_name = next((name for name in names if name in tensors), names[0])
    scales = find(scales_name, tensors)
    if scales.dtype not in scale_dtypes:
        raise UserError(f"tensor {scales_name!r} is {scales.dtype}, not a float; convert the original model")
    if block and scales.shape == (-(-out // block[0]), -(-inputs // block[1])):
        shared = min(block[0], out), min(block[1], inputs)
    elif math.prod(scales.shape) == 1:
        shared = out, inputs
    elif scales.shape in ((out, 1), (out,)):
        shared = 1, inputs
    else:
        raise UserError(
            f"tensor {scales_name!r} has the shape {list(scales.shape)}, which does not fit a weight {[out, inputs]}"
            f" in blocks of {list(block) if block else 'any size'}; get the config.json of these weights"
        )
    return Fp8Weight(name, levels, scales, scales_name, shared)
