"""Checkpoints of compressed-tensors, which llm-compressor writes: integers of 2 to 8 bits, FP8, NVFP4, MXFP4.

    tensors = collapse(config["quantization_config"], tensors)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]   # Compressed, instead of weight_packed, weight_scale, ...
    weight.form                                             # Form(4, 128), or None: none of ours holds these values
    for rows in weight.read_part("weight"): ...             # uint8 [rows, in / 2]
    weight.read(0, 64)                                      # float32 [64, in]

A quantized weight is w = (q - zero) * scale, where a scale (and a zero) serves a block of the weight: a group of the
inputs of one output, all of its inputs, a rectangle, or the whole weight. In the file a layer has

- `weight_packed` int32 [out, in * bits / 32], integers plus 2^(bits - 1), packed without gaps, the first in the lowest
  bits; or uint8 [out, in * bits / 8], codes of 4-bit floats e2m1, or of 6-bit floats e2m3;
  or `weight` [out, in] int8 or float8;
- `weight_scale`, floats, one for each block; of MX formats uint8, exponents plus 127;
- `weight_global_scale` [1], by which the scales of NVFP4 are divided;
- `weight_zero_point`, unless all are 0: integers, one for each block, with a packed weight mostly packed along `out`;
- `weight_shape` [2], if it is packed as int32, where some words may not be full;
- `weight_g_idx` int32 [in], the group of each input, where groups are scattered (activation order).

config.json says in `config_groups` how the layers are quantized that match `targets`. What it says of activations and
of the KV cache does not matter here: they stay floats.
https://github.com/vllm-project/compressed-tensors
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from formats.compressed_config import Scheme, find_scheme, outer, read_schemes, tell
from formats.gptq_awq import sorted_inputs
from formats.packed import FLOAT8, POWERS, Packed, Stored
from kernels.packing import FP4_VALUES, GROUPSIZES, pack_nibbles, unpack_nibbles
from layout import MXFP4, Form
from weights import CHUNK_BYTES, FLOATS, check_finite

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")
ACTIVATIONS = re.compile(r"(input|output|q|k|v)_(scale|zero_point|global_scale)")
# e2m3: a sign, two bits of exponent, three of mantissa. (OCP Microscaling Formats, version 1.0)
FP6_VALUES = [sign * (m + 8 * (e > 0)) / 8 * 2 ** max(e - 1, 0) for sign in (1, -1) for e in range(4) for m in range(8)]


# ---------------------------------------------------------------------------------------------------------------------
# Unpacking


def unpack(words: Tensor, bits: int, count: int, gaps: bool = False) -> Tensor:
    """int32 or uint8 [rows, n] -> the first `count` of each row, uint8 [rows, count], the lowest bits first.

    They are packed without gaps, and then may lie in two words, or with `gaps`, as many in an int32 as fit whole.
    """
    values = words.contiguous().view(torch.uint8)
    if bits == 8:
        return values[:, :count]
    if bits == 4:
        return unpack_nibbles(values, count)
    place = torch.arange(count, dtype=torch.int32)
    place = place // (32 // bits) * 32 + place % (32 // bits) * bits if gaps else place * bits
    values = torch.nn.functional.pad(values, (0, 1)).int()
    pairs = values[:, :-1] | values[:, 1:] << 8
    return (pairs.index_select(1, place // 8) >> (place % 8) & (2**bits - 1)).to(torch.uint8)


def packed_size(count: int, bits: int, gaps: bool = False) -> int:
    """The int32 words that hold so many."""
    return -(-count // (32 // bits)) if gaps else -(-count * bits // 32)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@dataclass(frozen=True)
class Compressed(Packed):
    """The weight of a quantized layer, not yet read."""

    name: str  # of the layer
    scheme: Scheme
    tensors: Mapping[str, Stored]  # by their part: weight or weight_packed, weight_scale, ...
    shape: tuple[int, int]  # [out, in]
    gaps: bool = False  # between what is packed, see unpack
    form: Form | None = None
    order: Tensor | None = None

    @property
    def kind(self) -> str:
        scale = self.tensors["weight_scale"].dtype
        if not self.scheme.floats:
            return f"int{self.scheme.bits}"
        prefix = "mx" if scale in (torch.uint8, POWERS) else "nv" if "weight_global_scale" in self.tensors else ""
        return f"{prefix}fp{self.scheme.bits}"

    @property
    def scale_dtype(self) -> torch.dtype:
        stored = self.tensors["weight_scale"].dtype
        if stored in (torch.uint8, POWERS):
            return torch.bfloat16  # which has every power of two that there may be
        return stored if stored in FLOATS and "weight_global_scale" not in self.tensors else torch.float32

    @property
    def block(self) -> tuple[int, int]:
        """Outputs and inputs that share a scale."""
        return tuple(size or whole for size, whole in zip(self.scheme.block, self.shape, strict=True))

    @property
    def groups(self) -> int:
        """Scales of an output."""
        return -(-self.shape[1] // self.block[1])

    @property
    def stored(self) -> str:
        """Which tensor holds the levels."""
        return "weight_packed" if "weight_packed" in self.tensors else "weight"

    def damaged(self, part: str, what: str) -> UserError:
        return UserError(f"tensor '{self.name}.{part}' {what}; get the weights again")

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Float32 rows start:stop. UserError when they, or their scales, are damaged."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        levels, scales = self.levels(start, stop), self.scales(start, stop).float()
        groups = torch.arange(self.shape[1]) // self.block[1]
        if self.order is not None:
            groups = torch.empty_like(groups).index_copy_(0, self.order.long(), groups)

        def spread(grid: Tensor) -> Tensor:
            return grid if grid.shape[1] == 1 else grid.index_select(1, groups)

        if self.scheme.floats and self.scheme.bits < 8:
            table = torch.tensor(FP4_VALUES if self.scheme.bits == 4 else FP6_VALUES)
            values = table.index_select(0, levels.flatten().int()).view(levels.shape)
        else:
            values = levels.float()
        if not self.scheme.floats:
            values -= (
                spread(self.zeros(start, stop).float()) if "weight_zero_point" in self.tensors else self.scheme.middle
            )
        elif self.scheme.bits == 8:
            check_finite(values, f"{self.name}.{self.stored}")
        return values.mul_(spread(scales))

    def read_part(self, part: str) -> Iterator[Tensor]:
        """Of our form: `weight` uint8 [out, in / 2] or int8 [out, in], `scales` [out] or [out, groups], `zeros` uint8
        [out, groups], in runs of rows; `order` int32 [in]."""
        if self.form is None:
            raise ValueError(f"{self.name} has no form of ours")
        if part == "order":
            yield self.order
            return
        out, inputs = self.shape
        step = max(CHUNK_BYTES // (4 * inputs), 1)
        for start in range(0, out, step):
            stop = min(start + step, out)
            if part == "weight":
                yield self.weight(start, stop)
                continue
            grid = self.scales(start, stop) if part == "scales" else self.zeros(start, stop)
            size = self.form.groupsize
            yield grid[:, torch.arange(0, inputs, size) // self.block[1]] if size else grid[:, 0].contiguous()

    def weight(self, start: int, stop: int) -> Tensor:
        """Rows in our form."""
        if self.form == MXFP4:
            return self.tensors["weight_packed"].read(start, stop)
        if self.form.bits == 4 == self.scheme.bits and self.stored == "weight_packed" and self.order is None:
            packed = self.tensors["weight_packed"].read(start, stop).contiguous()  # the very same bytes
            return packed.view(torch.uint8)[:, : self.shape[1] // 2].contiguous()
        levels = self.levels(start, stop)
        if self.order is not None:
            levels = levels.index_select(1, self.order)
        return pack_nibbles(levels) if self.form.bits == 4 else (levels - self.scheme.middle).view(torch.int8)

    def levels(self, start: int, stop: int) -> Tensor:
        """Integers plus `middle`, or codes of floats, uint8 [rows, in]; or floats of 8 bits."""
        scheme, inputs = self.scheme, self.shape[1]
        rows = self.tensors[self.stored].read(start, stop)
        if self.stored == "weight_packed":
            return unpack(rows, scheme.bits, inputs, self.gaps)
        if scheme.floats:
            return rows
        levels = rows.contiguous().view(torch.uint8) + scheme.middle
        if scheme.bits < 8 and bool((levels >= 2**scheme.bits).any()):
            raise self.damaged("weight", f"holds numbers beyond {scheme.bits} bits")
        return levels

    def scales(self, start: int, stop: int) -> Tensor:
        """Of rows start:stop, [rows, groups]."""
        values = self.grid("weight_scale", start, stop)
        values = (values.view(POWERS) if values.dtype == torch.uint8 else values).to(self.scale_dtype)
        check_finite(values, f"{self.name}.weight_scale")
        if "weight_global_scale" in self.tensors:
            whole = self.tensors["weight_global_scale"].read().float().reshape(())
            if not bool(whole.isfinite()) or not whole:
                raise self.damaged("weight_global_scale", f"is {float(whole)}")
            values = values / whole
        return values

    def zeros(self, start: int, stop: int) -> Tensor:
        """Of rows start:stop, plus `middle` as levels are, uint8 [rows, groups]."""
        part, scheme, out = "weight_zero_point", self.scheme, self.shape[0]
        if part not in self.tensors:
            return torch.full((stop - start, self.groups), scheme.middle, dtype=torch.uint8)
        if self.zeros_are_packed():
            return unpack(self.tensors[part].read().t(), scheme.bits, out, self.gaps)[:, start:stop].t()
        zeros = self.grid(part, start, stop).long() + scheme.middle
        if bool(((zeros < 0) | (zeros >= 2**scheme.bits)).any()):
            raise self.damaged(part, f"holds numbers beyond {scheme.bits} bits")
        return zeros.to(torch.uint8)

    def zeros_are_packed(self) -> bool:
        """Or a number for each block, as older versions have them."""
        zeros = self.tensors["weight_zero_point"]
        packed = self.stored == "weight_packed" and self.block[0] == 1 and zeros.dtype == torch.int32
        return packed and zeros.shape == (packed_size(self.shape[0], self.scheme.bits, self.gaps), self.groups)

    def grid(self, part: str, start: int, stop: int) -> Tensor:
        """What a tensor with a number for each block holds for rows start:stop, [rows, groups]."""
        tensor, rows = self.tensors[part], self.block[0]
        first, last = start // rows, -(-stop // rows)
        values = tensor.read(first, last) if tensor.shape else tensor.read()[None][first:last]
        return values.reshape(last - first, self.groups).index_select(0, torch.arange(start, stop) // rows - first)

    def check(self) -> None:
        """UserError names the tensor that is missing or does not fit."""
        out, inputs = self.shape
        grid = -(-out // self.block[0]), self.groups
        shapes = {grid} | ({grid[:1]} if grid[1] == 1 else set()) | ({()} if grid == (1, 1) else set())
        floats = self.scheme.floats
        powers = (torch.uint8, POWERS) if floats else ()
        expected = {"weight_scale": (shapes, (*FLOATS, *FLOAT8, *powers))}
        if "weight_zero_point" in self.tensors and not self.zeros_are_packed():
            integers = (torch.int8, torch.int16, torch.int32, torch.int64)
            expected["weight_zero_point"] = shapes, (*integers, *FLOATS, *FLOAT8) if floats else integers
        if "weight_global_scale" in self.tensors:
            expected["weight_global_scale"] = {(), (1,), (1, 1)}, FLOATS
        if "weight_g_idx" in self.tensors:
            expected["weight_g_idx"] = {(inputs,)}, (torch.int32, torch.int64)
        for part, (fitting, dtypes) in expected.items():
            tensor = self.tensors[part]
            if tensor.shape not in fitting:
                raise UserError(
                    f"tensor '{self.name}.{part}' has the shape {list(tensor.shape)}, a layer of {out} outputs and"
                    f" {inputs} inputs of this config {list(max(fitting, key=len))}; get the config.json of these"
                    " weights"
                )
            if tensor.dtype not in dtypes:
                names = " or ".join(str(dtype) for dtype in dtypes)
                raise UserError(f"tensor '{self.name}.{part}' is {tensor.dtype}, not {names}; get the weights again")


def find_parts(name: str, scheme: Scheme, tensors: Mapping[str, Stored]) -> Compressed:
    """The layer of these tensors. UserError names what is missing or does not fit."""
    part = "weight_packed" if "weight_packed" in tensors else "weight"
    packed, integers = part == "weight_packed", not scheme.floats
    weight, bits = tensors.get(part), scheme.bits
    needed = {
        part: True,
        "weight_scale": True,
        "weight_shape": packed and integers and 32 % bits,
        "weight_zero_point": not scheme.symmetric,
        "weight_g_idx": scheme.scattered,
    }
    for missing in (other for other, is_needed in needed.items() if is_needed and other not in tensors):
        raise UserError(f"tensor '{name}.{missing}' is missing from the weights; get the complete checkpoint")
    if packed:
        dtypes = (torch.int32,) if integers else (torch.uint8,) if bits < 8 else ()
    else:
        dtypes = (torch.int8,) if integers else FLOAT8 if bits == 8 else ()
    if weight.dtype not in dtypes:
        raise UserError(
            f"tensor '{name}.{part}' is {weight.dtype}, where config.json means {'integers' if integers else 'floats'}"
            f" of {bits} bits; get the config.json of these weights"
        )
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise UserError(
            f"tensor '{name}.{part}' has the shape {list(weight.shape)}; only [outputs, inputs] is supported,"
            " convert the original model"
        )
    out, width = weight.shape
    if not packed:
        return Compressed(name, scheme, tensors, (out, width))
    if scheme.floats or "weight_shape" not in tensors:
        return Compressed(name, scheme, tensors, (out, width * weight.dtype.itemsize * 8 // bits))
    stored = tensors["weight_shape"]
    shape = stored.read().tolist() if stored.shape == (2,) and not stored.dtype.is_floating_point else []
    inputs = shape[1] if shape and shape[0] == out else 0
    ways = [gaps for gaps in (False, True) if inputs > 0 and packed_size(inputs, bits, gaps) == width]
    if 32 % bits == 0 or inputs <= 32 // bits:
        ways = ways[:1]  # the two are one
    if len(ways) != 1:
        fault = "may be packed in it in two ways; convert the original model"
        raise UserError(
            f"tensor '{name}.weight_packed' has the shape {list(weight.shape)}, and {bits}-bit integers of the shape"
            f" {shape or list(stored.shape)} in '{name}.weight_shape'"
            f" {fault if ways else 'do not fit in it; get the weights again'}"
        )
    return Compressed(name, scheme, tensors, (out, inputs), ways[0])


def compressed(name: str, scheme: Scheme, tensors: Mapping[str, Stored]) -> Compressed:
    """The layer of these tensors, in the form that holds it. UserError names what is missing or does not fit."""
    layer = find_parts(name, scheme, tensors)
    layer.check()
    out, inputs = layer.shape
    if "weight_zero_point" in tensors and (scheme.floats or scheme.bits > 4):
        # Older versions store those of symmetric layers as well.
        zeros = layer.grid("weight_zero_point", 0, out).float() if scheme.floats else layer.zeros(0, out).int()
        if bool((zeros == (0 if scheme.floats else scheme.middle)).all()):
            tensors = {part: tensor for part, tensor in tensors.items() if part != "weight_zero_point"}
        elif scheme.floats:
            raise UserError(f"layer {name!r} has floats with zeros, not supported; convert the original model")
    size, order = layer.block[1], None
    if "weight_g_idx" in tensors and size < inputs:
        groups = tensors["weight_g_idx"].read()
        try:
            order = None if bool((groups == -1).all()) else sorted_inputs(groups, size)
        except ValueError as error:
            raise layer.damaged("weight_g_idx", str(error)) from error
    groupsize = max((fits for fits in GROUPSIZES if size % fits == inputs % fits == 0), default=None)
    if scheme.floats:
        form = MXFP4 if layer.kind == "mxfp4" and size == groupsize == 32 else None
    elif scheme.bits <= 4:
        form = Form(4, groupsize) if groupsize else None
    elif "weight_zero_point" in tensors:
        form = None
    else:
        form = Form(8) if size == inputs else Form(8, groupsize) if groupsize else None
    return dataclasses.replace(layer, tensors=tensors, form=form, order=order)


def collapse(fields: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Stored | Compressed]:
    """Puts a Compressed under "X.weight" for each quantized layer X, instead of the tensors that it consists of.

    `fields` is `quantization_config` of config.json. Scales of activations are left out, all other tensors are passed
    on. UserError names what is not supported, missing, misshapen or of a wrong dtype.
    """
    fields = outer(fields)
    schemes = read_schemes(fields)
    if tensors:
        tell(fields)
    layers: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in PARTS or (part == "weight" and tensor.dtype in (torch.int8, *FLOAT8)):
            layers.setdefault(layer, {})[part] = tensor
    result: dict[str, Stored | Compressed] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in layers and (part in PARTS or part == "weight"):
            if f"{layer}.weight" not in result:
                result[f"{layer}.weight"] = collapsed(layer, schemes, layers[layer], tensors, fields)
        elif not ACTIVATIONS.fullmatch(part):
            result[name] = tensor
    return result


def collapsed(
    layer: str, schemes: Mapping[str, Scheme], parts: Mapping[str, Stored], tensors: Mapping, fields: Mapping
) -> Stored | Compressed:
    """The weight of a layer that has scales."""
    weight = tensors.get(f"{layer}.weight")
    if weight is not None and "weight" not in parts and "weight_packed" not in parts:
        # Floats beside scales: with these they would be rounded as the model runs, unless that has been done.
        if fields.get("quantization_status") == "decompressed":
            return weight
        raise UserError(
            f"tensor '{layer}.weight' is {weight.dtype} beside scales, so it is not compressed, which is not supported;"
            " save the model compressed"
        )
    if not schemes:
        raise UserError(
            f"layer {layer!r} is quantized, and config_groups in config.json does not say how;"
            " get the config.json of these weights"
        )
    return compressed(layer, find_scheme(schemes, layer), parts)
