"""Weights in PyTorch's own format, `.bin` and `.pth`, read tensor by tensor as those of read_header are.

    tensors = PickledFiles([Path("pytorch_model.bin")]).tensors       # name -> PickledTensor: dtype, shape
    rows = tensors["model.norm.weight"].read(0, 100)

No code in them is run: what holds more than tensors is refused.
"""

import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError
from files import check_memory

REMAP_BYTES = 64 * 2**20  # how much of a mapped file may become resident


class PickledFiles:
    """The `.bin` or `.pth` files of a checkpoint, one of them mapped at a time.

    What is read of a map stays resident, so it is mapped anew before that is much. UserError when a file is damaged or
    holds more than tensors.
    """

    def __init__(self, files: list[Path]):
        self.tensors: dict[str, PickledTensor] = {}
        for path in files:
            self.load(path)
            for name, tensor in self.state.items():
                self.tensors[name] = PickledTensor(self, path, name, tensor.dtype, tuple(tensor.shape))

    def load(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path} is missing; get the complete checkpoint folder")
        self.path, self.state, self.resident = path, {}, 0
        self.mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 can only be loaded as a whole
        if not self.mapped:
            check_memory(path.stat().st_size, str(path))
        try:
            with warnings.catch_warnings(action="ignore"):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped)
        except Exception as error:  # a damaged pickle can raise anything
            if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
                raise UserError(
                    f"{path} holds more than tensors ({found[1]}), which could run code; get it as safetensors"
                ) from error
            raise UserError(f"{path} is not a readable PyTorch file ({reason(error)}); get the file again") from error
        if not isinstance(state, dict):
            raise UserError(f"{path} holds {type(state).__name__}, not a table of tensors; save a state_dict")
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
                raise UserError(f"{path} holds more than tensors ({name!r} is not one); save a plain state_dict")
        self.state = state


def reason(error: Exception) -> str:
    """What torch.load says is wrong, without its advice to run the code in the file."""
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    if "TorchScript" in text:
        return "it is a TorchScript program"
    unsafe = re.compile("weights_only|safe_globals|trusted source|documentation")
    sentences = [part for part in re.split(r"(?<=[.?!]) |(?= Check )", text) if not unsafe.search(part)]
    return " ".join(sentences)[:200].strip() or type(error).__name__


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a pickled file; reads like a StoredTensor."""

    files: PickledFiles
    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        files = self.files
        if files.path != self.path or (files.mapped and files.resident > REMAP_BYTES):
            files.load(self.path)
        rows = files.state[self.name].detach()
        rows = (rows[start:stop] if self.shape else rows).clone(memory_format=torch.contiguous_format)
        files.resident += rows.nbytes
        return rows
