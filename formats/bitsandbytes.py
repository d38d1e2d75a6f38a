"""Checkpoints that bitsandbytes quantized: to 8 bits by rows, to 4-bit codes (nf4, fp4) by blocks.

    tensors = collapse(config["quantization_config"], tensors)   # a weight instead of the tensors it consists of
    tensors["model.layers.0.mlp.up_proj.weight"].read(0, 100)    # float32 [100, in]

8 bits (LLM.int8, https://arxiv.org/abs/2208.07339): `X.weight` int8 [out, in], `X.SCB` float32 [out], the largest
magnitude of each row, w = q * SCB / 127, which is our int8; `X.weight_format` is 0 where rows are stored one after the
other.

4 bits (QLoRA, https://arxiv.org/abs/2305.14314): the rows lie one after the other and are cut into blocks, which may
begin and end within a row, w = quant_map[code] * absmax[block].

- `X.weight` two codes to a byte, the first in the high half; uint8 [bytes, 1] or these bytes seen as another dtype;
- `X.weight.quant_state.bitsandbytes__nf4` or `__fp4`, JSON in uint8: shape [out, in], blocksize, quant_type, dtype;
- `X.weight.quant_map` float32 [16], the values of the codes, and `X.weight.absmax` float32 [blocks].

With double quantization absmax is uint8 [blocks] and quantized itself, in blocks of nested_blocksize:
nested_quant_map[absmax] * nested_absmax[block] + nested_offset, with `X.weight.nested_quant_map` float32 [256],
`X.weight.nested_absmax` float32, and in the JSON also nested_offset and nested_dtype.

No layout of ours holds these values: nf4 is no grid, and fp4, though its codes are floats, has scales that are no
powers of two. They become floats.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from formats.packed import Packed, Stored, find, slices
from layout import Form
from weights import FLOATS, check_finite

CODES = ("nf4", "fp4")
STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
PART = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map)")
NESTED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_STATE_BYTES = 10_000  # about 200 are usual
AGAIN = "get the weights again"


@dataclass(frozen=True)
class RowWeight(Packed):
    """A weight of 8 bits, not yet read."""

    name: str
    levels: Stored  # int8 [out, in]
    absmax: Stored  # float32 [out]
    absmax_name: str

    form = Form(8)
    kind = "LLM.int8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.levels.shape

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop, float32 [rows, in]. UserError when a scale is not finite."""
        return self.levels.read(start, stop).float().mul_(self.scales(start, stop)[:, None])

    def read_part(self, part: str) -> Iterator[Tensor]:
        """`weight` int8 [rows, in], in runs of rows; `scales` float32 [out]. UserError when a scale is not finite."""
        return iter([self.scales()]) if part == "scales" else slices(self.levels)

    def scales(self, start: int = 0, stop: int | None = None) -> Tensor:
        return check_finite(self.absmax.read(start, stop).float(), self.absmax_name) / 127


@dataclass(frozen=True)
class Nested:
    """How the scales of a weight of 4 bits are quantized themselves."""

    blocksize: int
    dtype: torch.dtype  # in which they were before they were quantized
    offset: float


@dataclass(frozen=True)
class BlockWeight(Packed):
    """A weight of 4 bits, not yet read."""

    name: str
    parts: Mapping[str, Stored]  # "weight", "absmax", "quant_map" and maybe nested ones
    shape: tuple[int, int]  # [out, in]
    kind: str  # one of CODES
    blocksize: int
    nested: Nested | None

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop, float32 [rows, in]. UserError when a scale is not finite."""
        out, inputs = self.shape
        start, stop, _ = slice(start, stop).indices(out)
        first, last = start * inputs, max(stop, start) * inputs
        first_block, last_block = first // self.blocksize, -(-last // self.blocksize)
        offset = first_block * self.blocksize
        values = self.values(offset, min(last_block * self.blocksize, out * inputs))
        scales = self.scales(first_block, last_block)
        whole = len(values) // self.blocksize  # the last block of all may be shorter
        values[: whole * self.blocksize].view(-1, self.blocksize).mul_(scales[:whole, None])
        values[whole * self.blocksize :].mul_(scales[whole:])
        return values[first - offset : last - offset].view(-1, inputs)

    def values(self, first: int, last: int) -> Tensor:
        """The elements first:last of the flat weight without their scales, float32; `first` is even."""
        start, stop = first // 2, -(-last // 2)
        size = self.parts["weight"].dtype.itemsize
        raw = self.parts["weight"].read(start // size, -(-stop // size)).flatten().view(torch.uint8)
        codes = raw[start % size :][: stop - start]
        values = self.floats("quant_map")
        pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), 1)  # of each byte
        return pairs.index_select(0, codes.int()).flatten()[: last - first]

    def scales(self, first: int, last: int) -> Tensor:
        """The scales of the blocks first:last, float32."""
        if self.nested is None:
            return self.floats("absmax", first, last)
        size, outer = self.nested.blocksize, first // self.nested.blocksize
        levels = self.parts["absmax"].read(first, last).int()
        absmax = self.floats("nested_absmax", outer, -(-last // size))
        block = torch.arange(first, last) // size - outer
        scales = self.floats("nested_quant_map").index_select(0, levels) * absmax[block]
        return check_finite((scales.to(self.nested.dtype) + self.nested.offset).float(), f"{self.name}.absmax")

    def floats(self, part: str, start: int = 0, stop: int | None = None) -> Tensor:
        return check_finite(self.parts[part].read(start, stop).float(), f"{self.name}.{part}")


# ---------------------------------------------------------------------------------------------------------------------
# From tensors to weights


def collapse(fields: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Stored | RowWeight | BlockWeight]:
    """The tensors of a checkpoint, in place of those that a quantized weight consists of the weight, under its name.

    `fields` is quantization_config. UserError names what is not supported, missing or does not fit.
    """
    code = fields.get("bnb_4bit_quant_type", "fp4")
    if fields.get("load_in_4bit") and code not in CODES:
        raise UserError(
            f"config.json: quantization_config: bnb_4bit_quant_type {code!r} is not supported, only nf4 and fp4 are;"
            " convert the original model"
        )
    states = {match[1]: match[2] for match in map(STATE.fullmatch, tensors) if match}
    weights: dict[str, RowWeight | BlockWeight] = {}
    used = set()
    for name, kind in states.items():
        weights[name] = weight = block_weight(name, kind, tensors)
        used |= {f"{name}.{part}" for part in (*weight.parts, f"quant_state.bitsandbytes__{kind}")}
    for name, tensor in tensors.items():
        match = PART.fullmatch(name)
        if match and match[1] not in states:
            find(f"{match[1]}.quant_state.bitsandbytes__{code}", tensors)
        if name.endswith(".SCB") or (name.endswith(".weight") and tensor.dtype == torch.int8 and name not in states):
            stem = name.rpartition(".")[0]
            weights[f"{stem}.weight"] = row_weight(stem, tensors)
            used |= {f"{stem}.SCB", f"{stem}.weight_format"}
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    return rest | weights


def row_weight(stem: str, tensors: Mapping[str, Stored]) -> RowWeight:
    """The weight of the layer `stem`, of 8 bits."""
    name, absmax_name, format_name = (f"{stem}.{part}" for part in ("weight", "SCB", "weight_format"))
    levels, absmax = (find(full, tensors) for full in (name, absmax_name))
    if len(levels.shape) != 2:
        raise UserError(f"tensor {name!r} is quantized and has the shape {list(levels.shape)}, not [out, in]; {AGAIN}")
    check(name, levels, levels.shape, (torch.int8,))
    check(absmax_name, absmax, levels.shape[:1], FLOATS)
    if format_name in tensors:
        layout = tensors[format_name].read().flatten().tolist()
        if layout != [0]:
            raise UserError(
                f"tensor {format_name!r} is {layout}, only 0 (row by row) is supported;"
                " save the model again with a newer bitsandbytes"
            )
    return RowWeight(name, levels, absmax, absmax_name)


def block_weight(name: str, code: str, tensors: Mapping[str, Stored]) -> BlockWeight:
    """The weight `name`, of 4 bits."""
    state_name = f"{name}.quant_state.bitsandbytes__{code}"
    if code not in CODES:
        raise UserError(f"tensor {state_name!r}: only nf4 and fp4 are supported; convert the original model")
    state = read_state(state_name, tensors[state_name])

    def integer(key: str, value: Any) -> int:
        if type(value) is not int or not 0 < value < 2**31:
            raise UserError(f"tensor {state_name!r} gives {key} {value!r}; {AGAIN}")
        return value

    shape, blocksize = state.get("shape"), integer("blocksize", state.get("blocksize"))
    if not isinstance(shape, list) or len(shape) != 2:
        raise UserError(
            f"tensor {name!r} is quantized and has the shape {shape}, only [out, in] is supported;"
            " convert the original model"
        )
    out, inputs = (integer("shape", size) for size in shape)
    if blocksize % 2:
        raise UserError(f"tensor {state_name!r} gives blocksize {blocksize}, which is odd; {AGAIN}")
    if state.get("quant_type", code) != code:
        raise UserError(f"tensor {state_name!r} gives quant_type {state['quant_type']!r}; {AGAIN}")
    blocks = -(-out * inputs // blocksize)
    nested = None
    shapes = {"quant_map": (16,), "absmax": (blocks,)}
    if "nested_blocksize" in state or f"{name}.nested_absmax" in tensors:
        offset, dtype = state.get("nested_offset"), str(state.get("nested_dtype", "float32"))
        if type(offset) is not float or not math.isfinite(offset) or dtype not in NESTED_DTYPES:
            raise UserError(f"tensor {state_name!r} gives nested_offset {offset!r} and nested_dtype {dtype!r}; {AGAIN}")
        nested = Nested(integer("nested_blocksize", state.get("nested_blocksize")), NESTED_DTYPES[dtype], offset)
        shapes |= {"nested_quant_map": (256,), "nested_absmax": (-(-blocks // nested.blocksize),)}
    parts = {part: find(f"{name}.{part}", tensors) for part in shapes}
    for part, tensor in parts.items():
        quantized = nested is not None and part == "absmax"
        check(f"{name}.{part}", tensor, shapes[part], (torch.uint8,) if quantized else FLOATS)
    weight = find(name, tensors)
    size = weight.dtype.itemsize
    if weight.shape != (-(-out * inputs // 2) / size, 1):
        raise UserError(
            f"tensor {name!r} holds {list(weight.shape)} of {size} bytes, {out * inputs} values of 4 bits"
            f" are {-(-out * inputs // 2)} bytes; {AGAIN}"
        )
    return BlockWeight(name, {"weight": weight} | parts, (out, inputs), code, blocksize, nested)


def read_state(name: str, tensor: Stored) -> dict[str, Any]:
    """A dict as JSON in uint8 [bytes]. UserError when it is none."""
    state = None
    if tensor.dtype == torch.uint8 and len(tensor.shape) == 1 and tensor.shape[0] <= MAX_STATE_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            state = json.loads(bytes(tensor.read().tolist()))
    if not isinstance(state, dict):
        raise UserError(f"tensor {name!r} does not hold how the weight is quantized; {AGAIN}")
    return state


def check(name: str, tensor: Stored, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """UserError when it has another shape or dtype."""
    if tensor.shape != shape:
        raise UserError(f"tensor {name!r} has the shape {list(tensor.shape)}, not {list(shape)}; {AGAIN}")
    if tensor.dtype not in dtypes:
        meant = "a float" if dtypes is FLOATS else dtypes[0]
        raise UserError(f"tensor {name!r} is {tensor.dtype}, not {meant}; {AGAIN}")
