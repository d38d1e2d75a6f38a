"""Weight files: safetensors, one or in shards with an index, read tensor by tensor, in runs of rows.

    header, metadata = read_header(path)                     # name -> StoredTensor: its dtype and shape
    header, metadata = read_safetensors(path)                # also of an index
    rows = header["norm.weight"].read(0, 100)

The library reads; here its errors become the user's, and what was read does not stay in memory longer than it is used.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import UserError
from files import MAX_JSON_BYTES, read_json

CHUNK_BYTES = 32 * 2**20  # read and written at a time

DTYPES = {  # what a safetensors header calls them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what a model can be run in


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, not yet read."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of the first dimension, mapped from the file: read from disk when they are first used.

        Each call maps the file anew. The pages of a map stay in memory until the last tensor of it is gone, so a
        tensor that is kept would keep those of all others; and a compiled region takes no two weights that share a
        storage. The map is private: writing to the tensor does not change the file.
        """
        try:
            file = _open(self.path, "mmap")
        except RuntimeError:  # Linux refuses a private map of a file larger than the memory
            file = _open(self.path, "pread")  # reads the whole tensor for a few rows
        try:
            rows = file.get_slice(self.name)[start:stop] if self.shape else file.get_tensor(self.name)
        except SafetensorError as error:
            raise UserError(f"{self.path} was changed while it was read; start again") from error
        # Some writers do not align the tensors, but the kernels rely on it.
        return rows if rows.data_ptr() % self.dtype.itemsize == 0 else rows.clone()


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file, in the order in which they are stored, and its metadata.

    UserError names the file, and the tensor that does not fit the file or cannot be used.
    """
    file = _open(path, "pread")
    tensors = {}
    for name in file.offset_keys():
        tensor = file.get_slice(name)
        dtype, shape = DTYPES.get(tensor.get_dtype()), tuple(tensor.get_shape())
        if dtype is None:
            raise _invalid(path, f"tensor {name!r} has the dtype {tensor.get_dtype()!r}, which is not supported")
        if len(shape) > 8 or max(shape, default=0) >= 2**63:
            raise _invalid(path, f"tensor {name!r} has the shape {list(shape)}, which is not supported")
        tensors[name] = StoredTensor(path, dtype, shape, name)
    return tensors, file.metadata() or {}


def _open(path: Path, backend: str) -> safe_open:
    if not path.is_file():
        raise UserError(f"{path} is missing; get the complete checkpoint folder")
    try:
        return safe_open(path, framework="pt", backend=backend)
    except SafetensorError as error:
        reason = " ".join(str(error).removeprefix("Error while deserializing header: ").split())
        raise _invalid(path, f"{_find_fault(path)}{reason}") from error


def _invalid(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a valid safetensors file: {reason}; get the file again")


def _find_fault(path: Path) -> str:
    """What is wrong with a file that the library refused: it seldom names the tensor. "" where it is not a tensor."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size - 8 - length
        if size < 0:
            return "it is truncated: "
        raw = file.read(length) if length <= MAX_JSON_BYTES else b""
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        try:
            start, end = entry["data_offsets"]
            nbytes = end - start
            shape = entry["shape"][:8]  # a longer one would be a number of megabytes
            fits = all(type(size) is int and size >= 0 for size in shape)
            fits = fits and nbytes == math.prod(shape) * DTYPES[entry["dtype"]].itemsize
        except (KeyError, TypeError, ValueError):
            end, fits = 0, name == "__metadata__"
        if end > size:
            return f"tensor {name!r} ends at byte {end} of {size}, the file is truncated: "
        if not fits:
            return f"tensor {name!r}: "
    return ""


def read_index(path: Path) -> list[Path]:
    """The weight files that an index (`*.index.json`) names. UserError when one would be outside the folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map; get the file again")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"{path} names the file {name!r}, which is no plain file name; get the file again")
    return [path.parent / name for name in dict.fromkeys(weight_map.values())]


def check_index(path: Path, tensors: Mapping[str, Any]) -> None:
    """UserError when the index names a tensor that its files do not hold."""
    for name in read_json(path)["weight_map"]:
        if name not in tensors:
            raise UserError(f"{path} names tensor {name!r}, which no file holds; get the complete checkpoint folder")


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one safetensors file, or of all files of a `.safetensors.index.json`, and their metadata."""
    indexed = path.name.endswith(".index.json")
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in read_index(path) if indexed else [path]:
        found, metadata = read_header(file)
        for name in found:
            if name in tensors:
                raise UserError(f"{file} and {tensors[name].path.name} both hold tensor {name!r}; get the files again")
        tensors.update(found)
    if indexed:
        check_index(path, tensors)
    return tensors, metadata


def check_finite(values: Tensor, name: str, path: Path | None = None) -> Tensor:
    """The values. UserError, by the name of their tensor and its file, when one is NaN or infinite."""
    # NaN is both extremes; isfinite() takes ten times as long.
    if values.numel() and not all(math.isfinite(extreme) for extreme in values.aminmax()):
        where = f"{path}: " if path else ""
        raise UserError(f"{where}tensor {name!r} holds NaN or infinity; get the weights again")
    return values
