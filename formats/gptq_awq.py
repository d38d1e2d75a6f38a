"""Checkpoints that others quantized to 4 bits, GPTQ and AWQ, tensor by tensor in our int4 layout.

    form = read_format(config, folder)                      # what config.json or quantize_config.json says, or None
    layer = quantized_linear(form, "model.layers.0.mlp.up_proj", tensors, (out, in))
    layer.groupsize, layer.order                            # 128 and, where the inputs are to be sorted, int32 [in]
    for rows in layer.read("weight"): ...                   # uint8 [rows, in / 2]; "scales" and "zeros" [out, groups]

Both formats have w[k, n] = (q[k, n] - zero[g, n]) * scale[g, n] for input k in group g and output n, in the tensors

- `qweight`: GPTQ int32 [in / 8, out], 8 inputs in a word; AWQ int32 [in, out / 8], 8 outputs in a word;
- `qzeros` int32 [groups, out / 8], 8 outputs in a word;
- `scales` [groups, out], and `bias` [out], which is an ordinary one;
- `g_idx` int32 [in], GPTQ only: the group of each input. With activation order (desc_act) groups are scattered.

The first of 8 is in the lowest 4 bits of a word, but AWQ has the outputs of a word in the order 0 2 4 6 1 3 5 7. GPTQ's
version 1 ("gptq") stores each word of zeros less 0x11111111, a 1 for each zero, version 2 ("gptq_v2") as it is.
https://github.com/AutoGPTQ/AutoGPTQ, https://github.com/ModelCloud/GPTQModel, https://github.com/casper-hansen/AutoAWQ

Our layout has groups of 32, 64 or 128 inputs that lie together. Larger ones are cut, which repeats their scales.
Scattered ones are sorted, and then the layer has an `order`: its input x becomes x[..., order].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from errors import UserError
from files import read_json
from weights import CHUNK_BYTES, FLOATS

CONFIG_FILES = ("quantize_config.json", "quant_config.json")  # of older GPTQ and AWQ, where config.json is silent
GROUPSIZES = (128, 64, 32)  # of our layout, the best first
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word of AWQ the 8 outputs are


# ---------------------------------------------------------------------------------------------------------------------
# What the config says


@dataclass(frozen=True)
class Format:
    """How a checkpoint is quantized."""

    method: str  # "gptq" or "awq"
    groupsize: int  # inputs that share a scale, -1 for all
    less_one: bool = False  # GPTQ's version 1: zeros are stored less 1
    symmetric: bool = False  # all zeros are 8
    act_order: bool = False  # only g_idx tells the groups


def read_format(config: Mapping[str, Any], folder: Path) -> Format | None:
    """Reads `quantization_config` of a parsed config.json, or the separate file in `folder` that older tools wrote.

    None where there is neither. UserError names what is not supported.
    """
    where, fields = "config.json: quantization_config", config.get("quantization_config")
    for name in CONFIG_FILES:
        if not fields and (folder / name).is_file():
            where, fields = name, read_json(folder / name)
    if not fields:
        return None

    def refused(what: str) -> UserError:
        return UserError(f"{where}: {what} is not supported, only 4-bit GPTQ and AWQ are; convert the original model")

    if not isinstance(fields, dict):
        raise refused(repr(fields))
    method = str(fields.get("quant_method") or ("awq" if "w_bit" in fields else "gptq")).lower()
    if method not in ("gptq", "awq"):
        raise refused(f"quant_method {method!r}")
    bits = fields.get("bits", fields.get("w_bit"))
    groupsize = fields.get("group_size", fields.get("q_group_size"))
    if bits != 4:
        raise refused(f"bits {bits!r}")
    if type(groupsize) is not int or groupsize < -1 or groupsize == 0:
        raise refused(f"group_size {groupsize!r}")
    layout = fields.get("checkpoint_format") or fields.get("format") or (method == "awq" and fields.get("version"))
    layout = "marlin" if fields.get("is_marlin_format") else str(layout or {"gptq": "gptq", "awq": "gemm"}[method])
    if layout.lower() not in {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}[method]:
        raise refused(f"the {method.upper()} format {layout!r}")
    for name in ("rotation", "adapter"):
        if fields.get(name):
            raise refused(f"{name} {fields[name]!r}")
    # GPTQModel's rules for single layers: {"-:pattern": {}} leaves them as floats, which the tensors tell as well.
    rules = fields.get("dynamic") or {}
    for pattern, changes in rules.items() if isinstance(rules, dict) else [(rules, None)]:
        plain = {"bits": bits, "group_size": groupsize}
        if not isinstance(changes, dict) or any(changes.get(key, value) != value for key, value in plain.items()):
            raise refused(f"dynamic {pattern!r}: {changes!r}")
    return Format(
        method=method,
        groupsize=groupsize,
        less_one=layout.lower() == "gptq",
        symmetric=fields.get("sym") is True,
        act_order=method == "gptq" and fields.get("desc_act") is True,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Unpacking


def nibbles(words: Tensor) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, 8 n], the lowest 4 bits of a word first."""
    pairs = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)


def awq_nibbles(words: Tensor) -> Tensor:
    """int32 [rows, out / 8] -> uint8 [rows, out], in AWQ's order."""
    return nibbles(words).unflatten(1, (-1, 8))[:, :, AWQ_PLACES].flatten(1)


def unpack_weight(qweight: Tensor, method: str) -> Tensor:
    """Levels uint8 [out, in]."""
    return nibbles(qweight.t()) if method == "gptq" else awq_nibbles(qweight).t().contiguous()


def unpack_zeros(qzeros: Tensor, form: Format) -> Tensor:
    """Zeros uint8 [out, groups]."""
    if form.method == "awq":
        return awq_nibbles(qzeros).t()
    # Some writers call version 2 version 1. A symmetric zero is 8, which is stored as 7 in version 1.
    if form.less_one and not (form.symmetric and bool((qzeros == -0x77777778).all())):
        # On whole words, modulo 2^32, which is how writers subtract: a zero of 0 borrows from the next.
        qzeros = qzeros + 0x11111111
    return nibbles(qzeros).t()


def pack(levels: Tensor) -> Tensor:
    """uint8 [out, in] -> uint8 [out, in / 2], even inputs in the low halves of the bytes."""
    return levels[:, 0::2] | levels[:, 1::2] << 4


def sorted_inputs(g_idx: Tensor, groupsize: int) -> Tensor | None:
    """The inputs, int32 [in], ordered by their group [in]; None where they are already.

    ValueError where a group does not have `groupsize` inputs, or, the last one, what is left.
    """
    expected = torch.arange(len(g_idx)) // groupsize
    last = int(expected[-1])
    for group in (int(g_idx.min()), int(g_idx.max())):
        if not 0 <= group <= last:
            raise ValueError(f"holds {group}, which is no group from 0 to {last}")
    counts, sizes = torch.bincount(g_idx, minlength=last + 1), torch.bincount(expected)
    if not torch.equal(counts, sizes):
        group = int((counts != sizes).nonzero()[0])
        raise ValueError(f"gives group {group} {int(counts[group])} inputs, not {int(sizes[group])}")
    order = g_idx.argsort(stable=True).to(torch.int32)
    return None if torch.equal(order, torch.arange(len(order), dtype=torch.int32)) else order


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class Stored(Protocol):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class QuantizedLinear:
    """A layer of a quantized checkpoint, not yet read: what it is in our layout, see quantized_shapes."""

    name: str
    form: Format
    tensors: Mapping[str, Stored]  # qweight, qzeros, scales and maybe g_idx
    shape: tuple[int, int]  # [out, in]
    groupsize: int
    order: Tensor | None

    def read(self, part: str) -> Iterator[Tensor]:
        """`weight` uint8 [out, in / 2] in runs of rows; `zeros` uint8 [out, groups]; `scales`, like them, as stored."""
        if part == "weight":
            for levels in self.levels(self.tensors["qweight"].read()):
                yield pack(levels)
        else:
            yield self.grid(part).contiguous()

    def levels(self, qweight: Tensor) -> Iterator[Tensor]:
        """uint8 [out, in] in runs of rows, the inputs sorted."""
        rows = max(CHUNK_BYTES // self.shape[1] // 8, 1) * 8
        words = qweight.split(rows if self.form.method == "gptq" else rows // 8, dim=1)
        for levels in (unpack_weight(part, self.form.method) for part in words):
            yield levels if self.order is None else levels.index_select(1, self.order)

    def grid(self, part: str) -> Tensor:
        """`scales` or `zeros`, [out, in / groupsize]. UserError when a scale is not finite."""
        if part == "zeros":
            values = unpack_zeros(self.tensors["qzeros"].read(), self.form)
        else:
            values = self.tensors["scales"].read().t()
            if not bool(values.isfinite().all()):
                raise UserError(f"tensor '{self.name}.scales' holds NaN or infinity; get the weights again")
        inputs = self.shape[1]
        return values[:, torch.arange(0, inputs, self.groupsize) // full_groupsize(self.form, inputs)]


def full_groupsize(form: Format, inputs: int) -> int:
    return inputs if form.groupsize == -1 else form.groupsize


@dataclass(frozen=True)
class Dequantized:
    """The float32 weight [out, in] of a quantized layer; reads like a tensor in a file."""

    linear: QuantizedLinear
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.shape

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        linear, first = self.linear, start // 8 * 8
        stop = self.shape[0] if stop is None else stop
        words = slice(first, stop) if linear.form.method == "gptq" else slice(first // 8, -(-stop // 8))
        levels = torch.cat(list(linear.levels(linear.tensors["qweight"].read()[:, words])))
        levels = levels[start - first : stop - first]
        zeros, scales = (
            linear.grid(part)[start:stop].float().repeat_interleave(linear.groupsize, 1) for part in ("zeros", "scales")
        )
        weight = (levels.float() - zeros) * scales
        if linear.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, linear.order.long(), weight)
        return weight


def is_quantized(name: str, tensors: Mapping[str, Stored]) -> bool:
    return any(f"{name}.{part}" in tensors for part in ("qweight", "qzeros", "scales"))


def quantized_linear(
    form: Format | None, name: str, tensors: Mapping[str, Stored], shape: tuple[int, int]
) -> QuantizedLinear:
    """The layer `name`, of `shape` [out, in], of a checkpoint. UserError names what is missing or does not fit."""
    if form is None:
        raise UserError(
            f"layer {name!r} is quantized, and config.json does not say how;"
            " put the quantize_config.json of these weights beside it"
        )
    out, inputs = shape
    size = full_groupsize(form, inputs)
    groupsize = next((fits for fits in GROUPSIZES if size % fits == inputs % fits == 0), None)
    if groupsize is None or out % 8:
        raise UserError(
            f"layer {name!r} has {inputs} inputs in groups of {size} and {out} outputs; only inputs and groups"
            " that 32 divides, and outputs that 8 divides, are supported, convert the original model"
        )
    groups = -(-inputs // size)
    packed = (inputs // 8, out) if form.method == "gptq" else (inputs, out // 8)
    shapes = {"qweight": packed, "qzeros": (groups, out // 8), "scales": (groups, out), "g_idx": (inputs,)}
    found = {}
    for part, expected in shapes.items():
        full = f"{name}.{part}"
        if part == "g_idx" and (form.method == "awq" or (full not in tensors and not form.act_order)):
            continue
        if full not in tensors:
            raise UserError(f"tensor {full!r} is missing from the weights; get the complete checkpoint")
        tensor = found[part] = tensors[full]
        if tensor.shape != expected:
            raise UserError(
                f"tensor {full!r} has the shape {list(tensor.shape)}, a {form.method.upper()} layer of this config"
                f" {list(expected)}; get the config of these weights"
            )
        dtypes = FLOATS if part == "scales" else (torch.int32,)
        if tensor.dtype not in dtypes:
            meant = "a float" if part == "scales" else "torch.int32"
            raise UserError(f"tensor {full!r} is {tensor.dtype}, not {meant}; get the weights again")
    order = None
    if "g_idx" in found:
        try:
            order = sorted_inputs(found["g_idx"].read(), size)
        except ValueError as error:
            raise UserError(f"tensor '{name}.g_idx' {error}; get the weights again") from error
    return QuantizedLinear(name, form, found, shape, groupsize, order)
