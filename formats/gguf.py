"""GGUF, the format of llama.cpp: the metadata of a file, or of all shards of a model, and its tensors, read by rows.

    file = open_gguf(Path("model-Q4_K_M.gguf"))              # reads no more than the header
    file.metadata["general.architecture"]                    # "gemma3"
    weight = file.tensors["blk.0.attn_q.weight"]             # shape [out, in], as in PyTorch
    rows = weight.read(0, 100)                               # of a quantized one float32
    if weight.form is not None:                              # our int4, int8 or mxfp4 holds the very same values
        for rows in weight.read_part("scales"): ...

Q4_0, Q4_1, Q4_K, Q5_0, Q8_0 and MXFP4 have a scale for each 32 weights, as our layouts have: gguf_blocks.py. Others
have more bits, groups of 16 or tables of values, and are dequantized by the gguf package.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, dequantize
from torch import Tensor

from errors import UserError
from files import gb, refuse_lfs_pointer
from formats.gguf_blocks import UNPACKINGS
from formats.packed import Packed
from layout import Form
from weights import CHUNK_BYTES, check_finite

MAX_HEADER_BYTES = 2**26  # the largest known have 16 MB, most of it the vocabulary
MAX_COUNT = 2**16  # keys or tensors of one file
MAX_TENSORS = 2**18  # of a model, each expert one
MAX_ALIGNMENT = 2**16
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
STACKED = {"weight": 3, "bias": 2}  # dimensions of what all experts of a layer have in one tensor, NAME_exps.weight

SCALARS = {  # struct's letters
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip
DTYPES = {  # of tensors that are not quantized
    GGMLQuantizationType.F64: torch.float64, GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.I64: torch.int64, GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I16: torch.int16, GGMLQuantizationType.I8: torch.int8,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file that is not quantized, not yet read."""

    path: Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # in the file, in bytes

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.type]

    @property
    def nbytes(self) -> int:
        """In the file."""
        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of the first dimension."""
        if not self.shape:
            return self.read_bytes(0, self.nbytes).view(self.dtype)[0]
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        row_bytes = self.nbytes // self.shape[0]
        rows = self.read_bytes(start * row_bytes, max(stop, start) * row_bytes)
        return rows.view(self.dtype).view(-1, *self.shape[1:])

    def read_bytes(self, start: int, stop: int) -> Tensor:
        """uint8 [stop - start], from the beginning of the tensor. UserError when the file has become shorter."""
        data = torch.empty(stop - start, dtype=torch.uint8)
        with open(self.path, "rb") as file:
            file.seek(self.offset + start)
            if file.readinto(data.numpy()) != len(data):
                raise UserError(f"{self.path} was changed while it was read; start again")
        return data


@dataclass(frozen=True, slots=True)
class QuantizedGgufTensor(Packed, GgufTensor):
    """A quantized one, as formats/packed.py describes. Only of matrices there is a form."""

    @property
    def kind(self) -> str:
        return self.type.name

    @property
    def form(self) -> Form | None:
        return UNPACKINGS[self.type].form if self.type in UNPACKINGS and len(self.shape) == 2 else None

    @property
    def scale_dtype(self) -> torch.dtype:
        return UNPACKINGS[self.type].scale_dtype if self.form else torch.float32

    @property
    def zero_dtype(self) -> torch.dtype:
        return UNPACKINGS[self.type].zero_dtype if self.form else torch.uint8

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of the first dimension, dequantized. UserError when one of them is not finite."""
        if len(self.shape) == 1:  # one row, of which a part need not begin with a block
            return replace(self, shape=(1, *self.shape)).read()[0, start:stop]
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        rows = torch.empty((max(stop - start, 0), *self.shape[1:]))
        at = 0
        for blocks in self.read_blocks(start, stop):
            for numbers in UNPACKINGS[self.type].grid(blocks) if self.type in UNPACKINGS else ():
                check_finite(numbers, self.name[:80], self.path)
            with np.errstate(all="ignore"):
                values = torch.from_numpy(dequantize(blocks.flatten(1).numpy(), self.type))
            check_finite(values, self.name[:80], self.path)
            rows[at : at + len(values)] = values.view(-1, *self.shape[1:])
            at += len(values)
        return rows

    def read_part(self, part: str) -> Iterator[Tensor]:
        """`weight` uint8 [out, in / 2] or int8 [out, in], `scales` and, of int4, `zeros` [out, in / 32], in runs of
        rows. UserError when a scale is not finite."""
        if self.form is None or part not in self.form.parts:
            raise ValueError(f"{self.kind} {list(self.shape)} has no part {part!r}")
        unpacking = UNPACKINGS[self.type]
        for blocks in self.read_blocks(0, self.shape[0]):
            if part == "weight":
                yield unpacking.codes(blocks)
                continue
            grid = unpacking.grid(blocks)
            for numbers in grid:
                check_finite(numbers, self.name[:80], self.path)
            yield grid[self.form.parts.index(part) - 1]

    def read_blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """uint8 [rows, blocks, bytes] in runs of which the float32 weights have CHUNK_BYTES."""
        row_bytes = self.nbytes // self.shape[0]
        step = max(CHUNK_BYTES // (4 * math.prod(self.shape[1:])), 1)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            data = self.read_bytes(first * row_bytes, last * row_bytes)
            yield data.view(last - first, -1, GGML_QUANT_SIZES[self.type][1])


# ---------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class GgufFile:
    """A model: one file, or all its shards."""

    path: Path
    metadata: dict[str, Any]  # of the first shard: str, int, float, bool, or a list of one of them
    tensors: dict[str, GgufTensor]


def open_gguf(path: Path) -> GgufFile:
    """Reads the header of a file; of a shard NAME-00001-of-00003.gguf the headers of all of them.

    Of experts that are stacked each is a tensor: blk.0.ffn_up_exps.3.weight. UserError when a file is missing, damaged,
    of another version or byte order, or holds a tensor that cannot be read.
    """
    shard = SHARD.fullmatch(path.name)
    count = int(shard[3]) if shard else 1
    if shard and not 1 <= int(shard[2]) <= count:
        raise UserError(f"{path} is by its name part {int(shard[2])} of {count}; give it its right name")
    paths = [path]
    if shard:
        paths = [path.with_name(f"{shard[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for part in paths:
        if not part.is_file():
            whole = f"; {path.name} is one of {count} parts, get all of them" if count > 1 else "; name a GGUF file"
            raise UserError(f"{part} is missing{whole}")

    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    stored = 0
    for i, part in enumerate(paths):
        header = _read_header(part)
        number, total = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1)
        if (total or 1) != count or (count > 1 and number != i):  # 0: the parts were merged
            meant = f"part {i + 1} of {count}" if shard else "a whole model"
            raise UserError(
                f"{part} is by its name {meant}, but has split.no {str(number)[:20]} (counted from 0) and"
                f" split.count {str(total)[:20]}; get it again, and keep the names of the parts"
            )
        if i == 0:
            metadata = header.metadata
        for name, tensor in header.found.items():
            if name in tensors:
                other = tensors[name].path.name
                raise UserError(f"{part} and {other} both hold tensor {name[:80]!r}; get the files again")
            if len(tensors) == MAX_TENSORS:
                raise UserError(f"{part} has more than {MAX_TENSORS:,} tensors, which is not supported")
            tensors[name] = tensor
        stored += header.stored
    expected = metadata.get("split.tensors.count")
    if count > 1 and expected != stored:
        raise UserError(f"{path}: its parts hold {stored} tensors, not {expected}; get the files again")
    return GgufFile(path, metadata, tensors)


def _invalid(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a valid GGUF file: {reason}; get the file again")


def _read_header(path: Path) -> "_Header":
    refuse_lfs_pointer(path)
    with open(path, "rb") as file:
        start = file.read(24)
    if start[:4] != b"GGUF":
        raise _invalid(path, f"it begins with {start[:4]!r}")
    if len(start) < 24:
        raise _invalid(path, "its header is truncated")
    version, tensors, keys = struct.unpack_from("<IQQ", start, 4)
    if version & 0xFFFF == 0 and version:
        raise UserError(f"{path} is a big-endian GGUF file, which is not supported; get the little-endian one")
    if version not in (2, 3):
        raise UserError(f"{path} has version {version} of GGUF, only 2 and 3 are supported; get a file of one of them")
    for count, what in ((tensors, "tensors"), (keys, "keys")):
        if count > MAX_COUNT:
            raise _invalid(path, f"it says that it has {count:,} {what}")
    return _Header(path)


class _Header(GGUFReader):
    """The package's reader with its inner loops replaced: those make numpy views of each element of an array, which
    are 700 MB for a vocabulary of 262,144, and believe the sizes in the file."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.found: dict[str, GgufTensor] = {}
        self.stored = 0  # tensors, stacked experts being one
        super().__init__(path)

    def _take(self, layout: str, offs: int) -> tuple[tuple[Any, ...], int]:
        """Unpacks a struct at an offset; returns it and the offset behind it."""
        end = self._check_end(offs + struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, offs), end

    def _check_end(self, end: int) -> int:
        """The offset at which a part of the header ends. Zeros are valid empty texts: in a large file there would be
        millions, so the header has a limit."""
        if end > len(self.data):
            raise _invalid(self.path, "its header is truncated")
        if end > MAX_HEADER_BYTES:
            raise _invalid(self.path, f"its header has more than {gb(MAX_HEADER_BYTES)}")
        return end

    def _texts(self, count: int, offs: int, what: str) -> tuple[list[str], int]:
        self._check_end(offs + 8 * count)
        data, texts = memoryview(self.data), []
        try:
            for _ in range(count):
                start = offs + 8
                offs = self._check_end(start + int.from_bytes(data[offs:start], "little"))
                texts.append(str(data[start:offs], "utf-8"))
        except UnicodeDecodeError as error:
            raise _invalid(self.path, f"{what} is not UTF-8") from error
        return texts, offs

    def _text(self, offs: int, what: str) -> tuple[str, int]:
        texts, offs = self._texts(1, offs, what)
        return texts[0], offs

    def _build_fields(self, offs: int, count: int) -> int:
        for i in range(count):
            key, offs = self._text(offs, f"key {i + 1}")
            if key in self.metadata:
                raise _invalid(self.path, f"it has the key {key[:80]!r} twice")
            (kind,), offs = self._take("<I", offs)
            self.metadata[key], offs = self._value(kind, offs, f"the value of {key[:80]!r}")
        alignment = self.metadata.get("general.alignment", self.alignment)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & alignment - 1:
            raise _invalid(self.path, f"its alignment is {str(alignment)[:80]!r}")
        self.alignment = alignment
        return offs

    def _value(self, kind: int, offs: int, what: str) -> tuple[Any, int]:
        if kind == GGUFValueType.STRING:
            return self._text(offs, what)
        if kind in SCALARS:
            (value,), offs = self._take("<" + SCALARS[kind], offs)
            return value, offs
        if kind != GGUFValueType.ARRAY:
            raise _invalid(self.path, f"{what} has the unknown type {kind}")
        (kind, count), offs = self._take("<IQ", offs)
        if kind == GGUFValueType.STRING:
            return self._texts(count, offs, what)
        if kind not in SCALARS:
            raise _invalid(self.path, f"{what} is an array of the type {kind}, which is not supported")
        dtype = np.dtype("<" + SCALARS[kind])
        end = self._check_end(offs + count * dtype.itemsize)
        return self.data[offs:end].view(dtype).tolist(), end

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[GgufTensor]]:
        """The tensors, with offsets from the first."""
        tensors = []
        for i in range(count):
            name, offs = self._text(offs, f"the name of tensor {i + 1}")
            what = f"tensor {name[:80]!r}"
            (dims,), offs = self._take("<I", offs)
            if dims > 4:
                raise _invalid(self.path, f"{what} has {dims} dimensions")
            shape, offs = self._take(f"<{dims}Q", offs)
            (number, offset), offs = self._take("<IQ", offs)
            tensors.append(self._tensor(name, what, shape[::-1], number, offset))
        return offs, tensors

    def _tensor(self, name: str, what: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        """UserError when there is no such tensor."""
        if number not in GGML_QUANT_SIZES:
            raise UserError(f"{self.path}: {what} has the unknown type {number}; get another quantization of the model")
        kind = GGMLQuantizationType(number)
        if kind not in DTYPES and not _is_dequantizable(kind):
            raise UserError(
                f"{self.path}: {what} is {kind.name}, which is not supported; get another quantization of the model"
            )
        block = GGML_QUANT_SIZES[kind][0]
        if 0 in shape or (shape[-1] if shape else 1) % block:
            blocks = f", and {kind.name} has blocks of {block}" if block > 1 else ""
            raise _invalid(self.path, f"{what} has the shape {list(shape)}{blocks}")
        return (GgufTensor if kind in DTYPES else QuantizedGgufTensor)(self.path, name, kind, shape, offset)

    def _build_tensors(self, start_offs: int, tensors: list[GgufTensor]) -> None:
        for tensor in tensors:
            what, end = f"tensor {tensor.name[:80]!r}", start_offs + tensor.offset + tensor.nbytes
            if tensor.offset % self.alignment:
                raise _invalid(self.path, f"{what} begins at byte {tensor.offset}, not aligned to {self.alignment}")
            if end > len(self.data):
                raise _invalid(self.path, f"{what} ends at byte {end} of {len(self.data)}, it is truncated")
        end, before = 0, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise _invalid(self.path, f"tensor {tensor.name[:80]!r} overlaps {before[:80]!r}")
            end, before = tensor.offset + tensor.nbytes, tensor.name
        self.stored = len(tensors)
        for tensor in tensors:
            for one in _experts(replace(tensor, offset=start_offs + tensor.offset)):
                if one.name in self.found:
                    raise _invalid(self.path, f"it holds tensor {one.name[:80]!r} twice")
                if len(self.found) == MAX_TENSORS:
                    raise _invalid(self.path, f"it holds more than {MAX_TENSORS:,} tensors")
                self.found[one.name] = one


@functools.cache
def _is_dequantizable(kind: GGMLQuantizationType) -> bool:
    """Whether the package can do it: it knows the sizes of more types."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _experts(tensor: GgufTensor) -> Iterator[GgufTensor]:
    """The tensor itself, or each expert's if all are stacked in it."""
    layer, _, kind = tensor.name.rpartition(".")
    if not layer.endswith("_exps") or STACKED.get(kind) != len(tensor.shape):
        yield tensor
        return
    count, *shape = tensor.shape
    for i in range(count):
        offset = tensor.offset + i * (tensor.nbytes // count)
        yield replace(tensor, name=f"{layer}.{i}.{kind}", shape=tuple(shape), offset=offset)
