"""Writes safetensors files from chunks, so that no tensor has to be in memory as a whole.

    write_safetensors(path, {"a": (torch.float16, (4, 8))}, chunks, {"format": FORMAT})

The library writes what is in memory; this writes what is being made. The format: https://huggingface.co/docs/safetensors
(8 bytes length, a JSON header, the tensors without gaps).
"""

import ctypes
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from files import write_atomically
from weights import DTYPE_NAMES


def write_safetensors(
    path: Path | str,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    chunks: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file atomically, one chunk in memory at a time.

    `tensors` gives dtype and shape of each; `chunks(name)` yields its data in order, in contiguous pieces of any shape.
    ValueError when the pieces do not add up to the tensor.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % 64)  # so that the mapped tensors lie on cache lines
    with write_atomically(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, (dtype, shape) in tensors.items():
            left = math.prod(shape) * dtype.itemsize
            for chunk in chunks(name):
                if chunk.dtype != dtype or not chunk.is_contiguous() or chunk.nbytes > left:
                    raise ValueError(f"tensor {name!r}: a chunk {list(chunk.shape)} {chunk.dtype} does not fit")
                if chunk.nbytes:
                    file.write((ctypes.c_char * chunk.nbytes).from_address(chunk.data_ptr()))
                left -= chunk.nbytes
            if left:
                raise ValueError(f"tensor {name!r}: {left} bytes are missing")
