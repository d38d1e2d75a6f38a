"""Weight files: safetensors, one or in shards with an index, read tensor by tensor, in runs of rows.

    header, metadata = read_header(path)                     # name -> StoredTensor: dtype, shape, where it lies
    header, metadata = read_safetensors(path)                # also of an index
    rows = header["norm.weight"].read(0, 100)

The format: https://huggingface.co/docs/safetensors (8 bytes length, a JSON header, the tensors without gaps).
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from files import MAX_JSON_BYTES, gb, read_json

CHUNK_BYTES = 32 * 2**20  # read and written at a time

DTYPES = {  # what a safetensors header calls them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what a model can be run in


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, not yet read. `offset` counts bytes from the start of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of the first dimension, read from the file (a map's pages would stay resident)."""
        if not self.shape:
            rows, stop = (), 1
        else:
            stop = self.shape[0] if stop is None else stop
            rows = (stop - start, *self.shape[1:])
        stride = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = bytearray((stop - start) * stride)
        if not data:
            return torch.empty(rows, dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * stride)
            view = memoryview(data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise UserError(f"{self.path} ends too early; it was changed while it was read, get it again")
                view = view[count:]
        return torch.frombuffer(data, dtype=self.dtype).view(rows)


def mapped(tensor: StoredTensor) -> Tensor:
    """The tensor in a map of its own of the file, private: writing to it would not change the file.

    Of its own, because a compiled region takes no two weights that share a storage.
    """
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.offset % tensor.dtype.itemsize:
        return tensor.read()
    first = tensor.offset - tensor.offset % mmap.ALLOCATIONGRANULARITY
    with open(tensor.path, "rb") as file:
        pages = mmap.mmap(file.fileno(), tensor.offset + tensor.nbytes - first, access=mmap.ACCESS_COPY, offset=first)
    count = math.prod(tensor.shape)
    return torch.frombuffer(pages, dtype=tensor.dtype, count=count, offset=tensor.offset - first).view(tensor.shape)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, believed only where the file bears them out.

    UserError names the file, and the tensor, whose dtype, shape and place do not fit each other or the file's size.
    """

    def broken(what: str) -> UserError:
        return UserError(f"{path} is not a valid safetensors file: {what}; get the file again")

    if not path.is_file():
        raise UserError(f"{path} is missing; get the complete checkpoint folder")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise broken(f"it has {size} bytes, its header alone should have {length + 8}, so it is truncated")
        if length > MAX_JSON_BYTES:
            raise broken(f"its header claims {gb(length)}, more than {gb(MAX_JSON_BYTES)}")
        raw = file.read(length)
    try:
        entries = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise broken("its header is not JSON") from error
    if not isinstance(entries, dict):
        raise broken("its header is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken("its __metadata__ is not a table of strings")

    tensors, spans = {}, []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise broken(f"tensor {name!r} is not described by dtype, shape and data_offsets")
        dtype_name, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
        if dtype is None:
            raise broken(f"tensor {name!r} has the dtype {dtype_name!r}, which is not supported")
        if not _are_sizes(shape) or len(shape) > 8:
            raise broken(f"tensor {name!r} has the shape {shape!r}")
        if not _are_sizes(span) or len(span) != 2 or not span[0] <= span[1] <= size - 8 - length:
            raise broken(f"tensor {name!r} lies at {span!r} of {size - 8 - length} bytes, so it is truncated")
        if math.prod(shape) * dtype.itemsize != span[1] - span[0]:
            raise broken(f"tensor {name!r} of shape {shape} {dtype_name} cannot have {span[1] - span[0]} bytes")
        tensors[name] = StoredTensor(path, dtype, tuple(shape), 8 + length + span[0])
        spans.append((span[0], span[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise broken(f"tensor {name!r} starts at byte {start} where the one before it ends at {end}")
        end = stop
    if end != size - 8 - length:
        raise broken(f"its tensors end at byte {end} of {size - 8 - length}")
    return tensors, metadata


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


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
