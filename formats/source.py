"""What is converted: a folder of a Hugging Face checkpoint, or a weight file in it, or a GGUF file.

    with open_source(path, file=None) as source:
        source.config, source.names, source.tensors      # config.json's fields, and the weights, not yet read
        source.folder                                    # where its JSON and tokenizer files are

A GGUF file has all of that in its metadata; its folder is made for as long as it is read.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ModelConfig
from config_fields import text_fields, unknown_fields
from errors import UserError, log
from families import FAMILIES, Names
from files import refuse_lfs_pointer
from formats import minimind
from formats.hub import Weights, choose_gguf, choose_weights, refuse_other_kinds
from formats.names import Source as Tensors
from formats.names import text_names
from formats.pickled import PickledFiles
from formats.quantized import collapse, read_quantization
from weights import check_index, read_index, read_safetensors


@dataclass(frozen=True)
class Source:
    """A model to convert."""

    path: Path  # what people call it
    folder: Path  # with its JSON and tokenizer files
    config: dict[str, Any]  # config.json, in the spelling of the hub
    names: Names
    tensors: Mapping[str, Tensors]
    method: str | None  # by which it is quantized
    temporary: bool = False  # whether the folder was made for as long as this is read

    def told(self, message: object) -> str:
        """The message with the path in the place of a folder that was made for it."""
        return str(message).replace(str(self.folder), str(self.path)) if self.temporary else str(message)


@contextmanager
def open_source(path: Path, file: str | None = None) -> Iterator[Source]:
    """Opens a folder, or a weight file; `file` names a GGUF file in the folder. UserError when it is incomplete,
    damaged or not supported."""
    gguf = find_gguf(path, file)
    if gguf is None:
        yield open_folder(path)
        return
    try:  # here, as its package takes 0.3 s
        from formats.gguf import open_gguf
        from formats.gguf_config import config_of
        from formats.gguf_tokenizer import tokenizer_files
    except ModuleNotFoundError as error:
        raise UserError(f"{gguf}: GGUF files need {error.name!r}; run `pip install -r requirements.txt`") from error

    opened = open_gguf(gguf)
    config, names = config_of(opened)
    with tempfile.TemporaryDirectory() as folder:
        files = tokenizer_files(opened.metadata) | {"config.json": json.dumps(config, indent=2).encode()}
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        source = Source(gguf, Path(folder), config, names, opened.tensors, "gguf", temporary=True)
        del opened, files, data  # 50 MB of a large vocabulary
        try:
            yield source
        except UserError as error:
            raise UserError(source.told(error)) from error


def find_gguf(path: Path, file: str | None) -> Path | None:
    """The GGUF file that is meant: the path itself, or one in a folder that has no other weights, or is named. None
    where it is no GGUF file. UserError where a file is named beside another."""
    if path.is_file():
        if file is not None:
            raise UserError(f"--file {file} is for a folder, and {path} is a file; leave one of the two out")
        with open(path, "rb") as opened:  # ollama's have no suffix
            return path if path.suffix == ".gguf" or opened.read(4) == b"GGUF" else None
    if not path.is_dir():
        return None
    names = {entry.name for entry in path.iterdir()} | {str(entry.relative_to(path)) for entry in path.rglob("*.gguf")}
    chosen = choose_gguf(names, path, file)
    return path / chosen[0] if chosen else None


def open_folder(path: Path) -> Source:
    """A Hugging Face checkpoint, or MiniMind's."""
    folder, weights = find_weights(path)
    tensors = open_weights(folder, weights)
    if "layers.0.attention.wqkv.weight" in tensors:
        raise UserError(f"{folder} is already converted; name it as --checkpoint_path to generate.py")
    if weights.warning:
        log(weights.warning)
    if (folder / "adapter_config.json").is_file():
        log(f"warning: the LoRA adapter in {folder} is not applied; name it as --adapter to have it merged")
    config = minimind.read_config(folder / "config.json", tensors)
    ModelConfig.from_hf(config)
    for name in unknown_fields(config):
        log(f"warning: config.json: {name}: this field is unknown and is ignored; check that it does not matter")
    fields = read_quantization(config, folder)
    tensors = collapse(fields, tensors)
    family = FAMILIES[text_fields(config)["model_type"]]
    names = minimind.V1 if minimind.is_v1(tensors) else family.names
    tensors = text_names(tensors, names, family.sees)
    return Source(path, folder, config, names, tensors, fields["quant_method"] if fields else None)


def find_weights(source: Path) -> tuple[Path, Weights]:
    """The folder of a source, which may be a weight file in it, and the weight files to read."""
    if source.is_file():
        refuse_other_kinds([source.name], source)
        indexed = source.name.endswith(".index.json")
        files = [path.name for path in read_index(source)] if indexed else [source.name]
        return source.parent, Weights(files, source.name if indexed else None)
    if not source.is_dir():
        raise UserError(f"{source} is not there; name the folder of a Hugging Face checkpoint, or a GGUF file")
    names = [entry.name for entry in source.iterdir()]
    return source, choose_weights(names, source, lambda index: read_index(source / index), partial=True)


def open_weights(folder: Path, weights: Weights) -> dict[str, Tensors]:
    """The tensors of weight files, by the names that they have there."""
    files = [folder / name for name in weights.files]
    for file in files:
        if file.is_file():
            refuse_lfs_pointer(file)
    if weights.files[0].endswith(".safetensors"):
        tensors: dict[str, Tensors] = {}
        for file in files:
            found, _ = read_safetensors(file)
            if twice := found.keys() & tensors.keys():
                other, name = tensors[min(twice)].path.name, min(twice)
                raise UserError(f"{file} and {other} both hold tensor {name!r}; get the files again")
            tensors |= found
    else:
        tensors = dict(PickledFiles(files).tensors)
    if weights.index:
        try:
            check_index(folder / weights.index, tensors)
        except UserError as error:
            if not weights.missing:
                raise
            what = f"{folder} has no {weights.missing}, though its {weights.index} names it"
            raise UserError(f"{what}; get the complete model") from error
    # What torch.compile and DistributedDataParallel put before the names of a model they wrap.
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
