"""Checkpoints that others quantized, GPTQ to 4 or 8 bits and AWQ to 4, tensor by tensor in our int4 and int8 layouts.

    tensors = collapse(fields, tensors)                     # what config.json or quantize_config.json says; the tensors
    layer = tensors["model.layers.0.mlp.up_proj.weight"]    # a Packed, see packed.py
    layer.form, layer.order                                 # Form(4, 128) and, if inputs are to be sorted, int32 [in]

Both formats have w[k, n] = (q[k, n] - zero[g, n]) * scale[g, n] for input k in group g and output n, in the tensors

- `qweight`: GPTQ int32 [in / 8, out], 8 inputs in a word; AWQ int32 [in, out / 8], 8 outputs in a word;
- `qzeros` int32 [groups, out / 8], 8 outputs in a word;
- `scales` [groups, out], and `bias` [out], which is an ordinary one;
- `g_idx` int32 [in], GPTQ only: the group of each input. With activation order (desc_act) groups are scattered.

The first of 8 is in the lowest 4 bits of a word, but AWQ has the outputs of a word in the order 0 2 4 6 1 3 5 7. Of 8
bits there are 4 in a word. GPTQ's version 1 ("gptq") stores each word of zeros less 0x11111111 (of 8 bits, 0x01010101),
a 1 for each zero, version 2 ("gptq_v2") as it is.
https://github.com/AutoGPTQ/AutoGPTQ, https://github.com/ModelCloud/GPTQModel, https://github.com/casper-hansen/AutoAWQ

Our layouts have groups of 32, 64 or 128 inputs that lie together. Larger ones are cut, which repeats their scales.
Scattered ones are sorted, and then the layer has an `order`: its input x becomes x[..., order]. Our int8 is symmetric:
its levels are q - 128, and none of our forms holds a layer with other zeros than 128.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from formats.packed import Packed, Stored, find
from kernels.packing import GROUPSIZES, dequantize, pack_nibbles, unpack_nibbles
from layout import Form
from weights import CHUNK_BYTES, FLOATS, check_finite

AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word of AWQ the 8 outputs are


# ---------------------------------------------------------------------------------------------------------------------
# What the config says


@dataclass(frozen=True)
class Format:
    """How a checkpoint is quantized."""

    method: str  # "gptq" or "awq"
    groupsize: int  # inputs that share a scale, -1 for all
    bits: int = 4  # or 8
    less_one: bool = False  # GPTQ's version 1: zeros are stored less 1
    symmetric: bool = False  # all zeros are the middle, 8 or 128
    act_order: bool = False  # only g_idx tells the groups

    @property
    def middle(self) -> int:
        """The zero of symmetric levels."""
        return 2 ** (self.bits - 1)


def read_format(fields: Mapping[str, Any]) -> Format:
    """Reads `quantization_config` of a config.json, or the separate file that older tools wrote. UserError names what
    is not supported."""

    def refused(what: str) -> UserError:
        known = "only GPTQ of 4 or 8 bits and AWQ of 4 are"
        return UserError(
            f"config.json: quantization_config: {what} is not supported, {known}; convert the original model"
        )

    method = method_of(fields)
    bits = fields.get("bits", fields.get("w_bit"))
    groupsize = fields.get("group_size", fields.get("q_group_size"))
    if type(bits) is not int or bits not in ((4, 8) if method == "gptq" else (4,)):
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
        bits=bits,
        less_one=layout.lower() == "gptq",
        symmetric=fields.get("sym") is True,
        act_order=method == "gptq" and fields.get("desc_act") is True,
    )


def method_of(fields: Mapping[str, Any]) -> str:
    """ "gptq" or "awq", also where an older file does not name it."""
    return str(fields.get("quant_method") or ("awq" if "w_bit" in fields else "gptq")).lower()


# ---------------------------------------------------------------------------------------------------------------------
# Unpacking


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, 32 / bits * n], the lowest bits of a word first."""
    values = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return values if bits == 8 else unpack_nibbles(values, 2 * values.shape[1])


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [rows, out / 8] -> uint8 [rows, out], in AWQ's order."""
    return unpack_words(words, 4).unflatten(1, (-1, 8))[:, :, AWQ_PLACES].flatten(1)


def unpack_weight(qweight: Tensor, form: Format) -> Tensor:
    """Levels uint8 [out, in]."""
    return unpack_words(qweight.t(), form.bits) if form.method == "gptq" else unpack_awq(qweight).t().contiguous()


def unpack_zeros(qzeros: Tensor, form: Format) -> Tensor:
    """Zeros uint8 [out, groups]."""
    if form.method == "awq":
        return unpack_awq(qzeros).t()
    # Some writers call version 2 version 1. A symmetric zero is 8 (or 128), which is stored as 7 (127) in version 1.
    if form.less_one and not (form.symmetric and bool((unpack_words(qzeros, form.bits) == form.middle).all())):
        # On whole words, modulo 2^32, which is how writers subtract: a zero of 0 borrows from the next.
        qzeros = qzeros + (0x11111111 if form.bits == 4 else 0x01010101)
    return unpack_words(qzeros, form.bits).t()


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


@dataclass(frozen=True)
class QuantizedLinear(Packed):
    """A layer of a quantized checkpoint, not yet read."""

    name: str
    format: Format
    tensors: Mapping[str, Stored]  # qweight, qzeros, scales and maybe g_idx
    shape: tuple[int, int]  # [out, in]
    groupsize: int  # in our layout
    order: Tensor | None

    @property
    def kind(self) -> str:
        return f"{self.format.method.upper()}, {self.format.bits} bits"

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.tensors["scales"].dtype

    @functools.cached_property
    def form(self) -> Form | None:
        """Our int8 holds symmetric layers only."""
        if self.format.bits == 8 and not bool((unpack_zeros(self.tensors["qzeros"].read(), self.format) == 128).all()):
            return None
        return Form(self.format.bits, self.groupsize)

    def read_part(self, part: str) -> Iterator[Tensor]:
        """`weight` uint8 [out, in / 2] or int8 [out, in], in runs of rows; `zeros` uint8 [out, groups], of int4;
        `scales` [out, groups] as they are; `order` int32 [in]."""
        if part == "order":
            yield self.order
        elif part == "weight":
            for levels in self.levels(self.tensors["qweight"].read()):
                yield pack_nibbles(levels) if self.format.bits == 4 else (levels ^ 128).view(torch.int8)
        else:
            yield self.grid(part).contiguous()

    def levels(self, qweight: Tensor) -> Iterator[Tensor]:
        """uint8 [out, in] in runs of rows, the inputs sorted."""
        rows = max(CHUNK_BYTES // self.shape[1] // 8, 1) * 8
        words = qweight.split(rows if self.format.method == "gptq" else rows // 8, dim=1)
        for levels in (unpack_weight(part, self.format) for part in words):
            yield levels if self.order is None else levels.index_select(1, self.order)

    def grid(self, part: str) -> Tensor:
        """`scales` or `zeros`, [out, in / groupsize]. UserError when a scale is not finite."""
        if part == "zeros":
            values = unpack_zeros(self.tensors["qzeros"].read(), self.format)
        else:
            values = check_finite(self.tensors["scales"].read().t(), f"{self.name}.scales")
        inputs = self.shape[1]
        return values[:, torch.arange(0, inputs, self.groupsize) // full_groupsize(self.format, inputs)]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of the weight, float32."""
        first, stop = start // 8 * 8, self.shape[0] if stop is None else stop
        words = slice(first, stop) if self.format.method == "gptq" else slice(first // 8, -(-stop // 8))
        levels = torch.cat(list(self.levels(self.tensors["qweight"].read()[:, words])))
        levels = levels[start - first : stop - first]
        scales, zeros = (self.grid(part)[start:stop].float() for part in ("scales", "zeros"))
        weight = dequantize(levels.float(), scales, zeros, self.groupsize)
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.order.long(), weight)
        return weight


def full_groupsize(form: Format, inputs: int) -> int:
    return inputs if form.groupsize == -1 else form.groupsize


def collapse(fields: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Stored | Packed]:
    """The tensors, with one Packed `X.weight` for those that a quantized layer consists of. UserError names what is not
    supported, missing or does not fit."""
    form = read_format(fields)
    stems = {name.rpartition(".")[0] for name in tensors if name.endswith((".qweight", ".qzeros"))}
    layers = {stem: quantized_linear(form, stem, tensors) for stem in sorted(stems)}
    parts = {f"{stem}.{part}" for stem in layers for part in ("qweight", "qzeros", "scales", "g_idx")}
    collapsed = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for stem, layer in layers.items():
        if f"{stem}.weight" in tensors:
            raise UserError(f"tensor '{stem}.weight' is unexpected beside '{stem}.qweight'; get the weights again")
        collapsed[f"{stem}.weight"] = layer
    return collapsed


def quantized_linear(form: Format, name: str, tensors: Mapping[str, Stored]) -> QuantizedLinear:
    """The layer `name` of a checkpoint. UserError names what is missing or does not fit."""
    qweight = tensors.get(f"{name}.qweight")
    if qweight is None or len(qweight.shape) != 2:
        raise UserError(
            f"tensor '{name}.qweight' is missing from the weights or no matrix; get the complete checkpoint"
        )
    per_word = 32 // form.bits
    rows, columns = qweight.shape
    out, inputs = (columns, rows * per_word) if form.method == "gptq" else (columns * per_word, rows)
    size = full_groupsize(form, inputs)
    groupsize = max((fits for fits in GROUPSIZES if size % fits == inputs % fits == 0), default=None)
    if groupsize is None or out % 8:
        raise UserError(
            f"layer {name!r} has {inputs} inputs in groups of {size} and {out} outputs; only inputs and groups"
            " that 32 divides, and outputs that 8 divides, are supported, convert the original model"
        )
    groups = -(-inputs // size)
    shapes = {
        "qweight": (rows, columns),
        "qzeros": (groups, out // per_word),
        "scales": (groups, out),
        "g_idx": (inputs,),
    }
    found = {}
    for part, expected in shapes.items():
        full = f"{name}.{part}"
        if part == "g_idx" and (form.method == "awq" or (full not in tensors and not form.act_order)):
            continue
        tensor = found[part] = find(full, tensors)
        if tensor.shape != expected:
            raise UserError(
                f"tensor {full!r} has the shape {list(tensor.shape)} where its qweight and the config mean"
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
    return QuantizedLinear(name, form, found, (out, inputs), groupsize, order)
