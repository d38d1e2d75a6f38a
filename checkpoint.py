"""What is on disk: a checkpoint is a folder with config.json, tokenizer files and model.safetensors in our names.

    config = load_config("checkpoints/org/name")                  # ModelConfig
    model = load_model("checkpoints/org/name", device="cpu")      # Transformer, weights mapped rather than copied
    load_generation_config("checkpoints/org/name")                # {"eos_token_ids": [2], "temperature": 0.6, ...}

    header, metadata = read_header(path)                          # name -> StoredTensor: dtype, shape, where it lies
    write_safetensors(path, {"a": (torch.float16, (4, 8))}, chunks, {"format": FORMAT})

Weights are read and written tensor by tensor, so neither side ever holds a second copy of a model. Files are written to
a temporary name in the same folder, synced and renamed: after a kill there is the old file or the new one.

The format: https://huggingface.co/docs/safetensors (8 bytes length, a JSON header, the tensors without gaps).
"""

import ctypes
import fcntl
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

import kernels
from capacity import check_memory, gb
from config import ModelConfig
from errors import UserError
from model import Transformer, expected_shapes
from tp import ALONE, Group

DEMO = Path(__file__).parent / "demo" / "target"  # the small trained model that is used when none is named

FORMAT = "gpt-brisk"  # `format` in the metadata of weights in our names
VERSION = "1"
QUANTIZED = {"int8": 0, "int4-g32": 32, "int4-g64": 64, "int4-g128": 128}  # what the metadata calls it: its group size
MAX_JSON_BYTES = 100_000_000  # the limit of the safetensors library for a header
CHUNK_BYTES = 32 * 2**20  # read and written at a time

DTYPES = {  # what a safetensors header calls them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what a model can be run in


# ---------------------------------------------------------------------------------------------------------------------
# JSON files


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. UserError when it is missing, not JSON or not an object."""
    if not path.is_file():
        raise UserError(f"{path} is missing; get the complete checkpoint folder")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} has {gb(path.stat().st_size)}, far too much for JSON; get the file again")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); get the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a JSON object; get the file again")
    return value


def read_text(path: Path) -> str:
    """A UTF-8 text file, as it is. UserError when it can't be read."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a readable text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); re-encode it") from error


def load_config(folder: Path | str) -> ModelConfig:
    """Reads `folder`/config.json. UserError names the file and the field that is missing, absurd or unsupported."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    try:
        return ModelConfig.from_hf(config)
    except UserError as error:
        raise UserError(str(error).replace("config.json", str(path), 1)) from error


def load_generation_config(folder: Path | str) -> dict[str, Any]:
    """How the model's authors want it sampled, and where it stops.

    Returns `eos_token_ids` (a list, maybe empty; generation_config.json may name several, config.json is the fallback)
    and, where generation_config.json has them, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p` and
    `repetition_penalty`. UserError names a field of the wrong type.
    """
    path = Path(folder) / "generation_config.json"
    stored = read_json(path) if path.exists() else {}
    settings: dict[str, Any] = {}
    for name in ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        value = stored.get(name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9
        if not (isinstance(value, bool) if name == "do_sample" else is_number):
            raise UserError(f"{path}: {name}: {value!r} is not a valid value; correct it or remove the field")
        settings[name] = value
    source, ids = path, stored.get("eos_token_id")
    config_path = Path(folder) / "config.json"
    if ids is None and config_path.exists():
        source, ids = config_path, read_json(config_path).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise UserError(f"{source}: eos_token_id: {ids!r} is not a list of token ids; correct it")
    return {"eos_token_ids": ids, **settings}


# ---------------------------------------------------------------------------------------------------------------------
# Reading weights


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


def weights_path(path: Path | str) -> Path:
    """The weight file, or index, that a `--checkpoint_path` means: a folder stands for its model.safetensors."""
    path = Path(path)
    if path.is_file():
        if not path.name.endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(f"{path} is no safetensors file; name the folder of a converted checkpoint")
        return path
    convert = "run `python convert_hf_checkpoint.py --repo ORG/NAME` (or `--checkpoint_dir DIR`) first"
    if not path.is_dir():
        raise UserError(f"{path} is not there; {convert}")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (path / name).is_file():
            return path / name
    if any(path.glob("*.bin")) or any(path.glob("*.pth")):
        raise UserError(f"{path} is not converted; run `python convert_hf_checkpoint.py --checkpoint_dir {path}` first")
    raise UserError(f"{path} holds no model.safetensors; {convert}")


# ---------------------------------------------------------------------------------------------------------------------
# Loading a model


def load_model(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, group: Group = ALONE
) -> Transformer:
    """Loads a checkpoint, a folder or one weight file in it, for inference (eval mode, no gradients); of the ranks of
    a group each its slices.

    `dtype` None keeps what is stored. On a CPU an embedding of which only rows are read stays mapped from the file; the
    other weights are copied into huge pages, where a decode step reads them faster. Quantized layers are packed for
    the device; `dtype` is then that of all the rest. UserError when a file or tensor is missing, unexpected or
    misshapen, or when the memory does not suffice.
    """
    path, device = weights_path(path), torch.device(device)
    config = load_config(path.parent)
    stored, metadata = read_safetensors(path)
    quantized = quantized_layers(path, metadata)
    check_tensors(config, stored, path, quantized)
    group.check(config, quantized)

    dtype = dtype or stored["tok_embeddings.weight"].dtype
    parts = {layer: [f"{layer}.{part}" for part in ("weight", "scales", "zeros")[: 3 if groupsize else 2]]
             for layer, groupsize in quantized.items()}  # fmt: skip
    orders = {layer: f"{layer}.order" for layer in quantized if f"{layer}.order" in stored}
    packed = {name for names in parts.values() for name in names} | set(orders.values())
    sizes = (t.nbytes if name in packed else math.prod(t.shape) * dtype.itemsize for name, t in stored.items())
    check_memory(sum(sizes) // group.size * group.sharing, f"the weights of {path.parent}", device)

    def part(name: str) -> Tensor:
        return group.part(config, name, _mapped(stored[name]))

    state = {}
    for name in stored:
        if name in packed:
            continue
        source = part(name)
        if device.type != "cpu":
            state[name] = source.to(device, dtype)
        elif name == "tok_embeddings.weight" and source.dtype == dtype and ("output" in quantized or not config.tied):
            state[name] = source
        else:
            state[name] = kernels.allocate(source.shape, dtype, device).copy_(source)
    with torch.device("meta"):
        model = Transformer(group.local(config))
    model.load_state_dict(state, assign=True, strict=False)  # check_tensors was strict; what lacks here comes next
    for layer, groupsize in quantized.items():
        weight, *grid = (part(name).to(device) for name in parts[layer])  # packing copies them
        bias = state.get(f"{layer}.bias")
        if groupsize:
            order = None
            if layer in orders:
                check_order(stored[orders[layer]], orders[layer])
                order = part(orders[layer]).to(device)
            linear = kernels.Int4Linear.from_canonical(weight, *grid, 2 * weight.shape[1], groupsize, bias, order)
        else:
            linear = kernels.Int8Linear.from_canonical(weight, *grid, bias)
        parent, _, child = layer.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return group.parallelize(model, config).eval().requires_grad_(False)


def checksum(path: Path | str) -> str:
    """A short hash of a checkpoint: of its JSON files, and of the header and the beginning of each tensor."""
    path = weights_path(path)
    stored, metadata = read_safetensors(path)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for file in sorted(path.parent.glob("*.json")):
        digest.update(file.read_bytes())
    for name, tensor in stored.items():
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(_mapped(tensor).flatten()[:256].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def check_order(tensor: StoredTensor, name: str) -> None:
    """UserError when it is no permutation."""
    order = tensor.read()
    if not torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype)):
        raise UserError(f"{tensor.path}: tensor {name!r} does not hold each input once; convert the model again")


def _mapped(tensor: StoredTensor) -> Tensor:
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


def quantized_layers(path: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    """The layers of a weight file that are quantized: name -> group size of int4, 0 for int8.

    `quantized` in the metadata says so, in JSON: {"layers.0.attention.wqkv": "int4-g32", ..., "output": "int8"}.
    UserError when it is malformed, or from a newer version of this program.
    """
    if metadata.get("format") == FORMAT and metadata.get("version") != VERSION:
        raise UserError(
            f"{path} has version {metadata.get('version')!r}, this program knows {VERSION!r}; "
            "update the program, or convert again"
        )
    try:
        return {layer: QUANTIZED[form] for layer, form in json.loads(metadata.get("quantized", "{}")).items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: `quantized` in its metadata is malformed; quantize the model again") from error


def quantized_shapes(
    config: ModelConfig, quantized: Mapping[str, int], ordered: Container[str] = ()
) -> dict[str, tuple[int, ...]]:
    """`expected_shapes` where these layers (name -> group size, 0 for int8) are quantized. ValueError if they can't be.

    int8: `.weight` [out, in], `.scales` [out], w = q * scale. int4: `.weight` uint8 [out, in / 2], even inputs in the
    low halves of the bytes, `.scales` and `.zeros` [out, in / group], w = (q - zero) * scale. An int4 layer that is
    among the `ordered` has `.order` int32 [in] as well: its weight is for the inputs x[..., order].
    """
    plain = expected_shapes(config)
    if "output" in quantized and config.tied:  # it gets a weight of its own; the embedding stays as it is
        plain["output.weight"] = plain["tok_embeddings.weight"]
    for layer, group in quantized.items():
        shape = plain.get(f"{layer}.weight", ())
        if layer == "tok_embeddings" or len(shape) != 2 or (group and shape[1] % group):
            raise ValueError(f"{layer!r} is no layer that can be quantized in groups of {group}")
    shapes = {}
    for name, shape in plain.items():
        layer, _, kind = name.rpartition(".")
        group = quantized.get(layer) if kind == "weight" else None
        shapes[name] = (shape[0], shape[1] // 2) if group else shape
        if group is not None:
            shapes[f"{layer}.scales"] = (shape[0], shape[1] // group) if group else shape[:1]
        if group:
            shapes[f"{layer}.zeros"] = shapes[f"{layer}.scales"]
            if layer in ordered:
                shapes[f"{layer}.order"] = shape[1:]
    return shapes


def check_tensors(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    path: Path,
    quantized: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """UserError names the first tensor that is missing, misshapen, of a dtype that cannot be run, or unexpected."""
    if "model.embed_tokens.weight" in stored or "model.layers.0.input_layernorm.weight" in stored:
        raise UserError(
            f"{path} has the tensor names of Hugging Face; "
            f"run `python convert_hf_checkpoint.py --checkpoint_dir {path.parent}` first"
        )
    try:
        ordered = {layer for layer in quantized if f"{layer}.order" in stored}
        shapes = quantized_shapes(config, quantized, ordered)
    except ValueError as error:
        raise UserError(f"{path}: by its metadata {error}; quantize the model again") from error
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        dtypes = FLOATS
        if kind == "weight" and layer in quantized:
            dtypes = (torch.uint8,) if quantized[layer] else (torch.int8,)
        elif kind == "zeros":
            dtypes = (torch.uint8, *FLOATS)
        elif kind == "order":
            dtypes = (torch.int32,)
        if name not in stored:
            raise UserError(f"{path}: tensor {name!r} is missing; convert the model again")
        if stored[name].shape != shape:
            found, meant = list(stored[name].shape), list(shape)
            raise UserError(f"{path}: tensor {name!r} has the shape {found}, config.json means {meant}; convert again")
        if stored[name].dtype not in dtypes:
            found, meant = stored[name].dtype, "a float" if dtypes is FLOATS else dtypes[0]
            raise UserError(f"{path}: tensor {name!r} is {found}, not {meant}; convert the model again")
    for name in stored:
        if name not in shapes:
            raise UserError(
                f"{path}: tensor {name!r} is unexpected; it does not belong to this config.json; convert again"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def lock_temporary(path: Path, is_folder: bool = False) -> int:
    """Opens the temporary file or folder `path`, creating it, and locks it; returns the descriptor that holds the lock.

    What a killed run left there is found unlocked and taken over. UserError when another run is at work on it.
    """
    while True:
        if is_folder:
            path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(f"another run is writing {path}; wait for it to end") from error
        except OSError:
            pass  # a file system without locks
        try:
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the run that had it has just renamed it


def sync_folder(folder: Path) -> None:
    """Makes the renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_atomically(path: Path | str) -> Iterator[BinaryIO]:
    """`with write_atomically(path) as file: file.write(...)`: the file appears, or replaces the old one, as a whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = lock_temporary(temporary)
    with os.fdopen(descriptor, "wb") as file:
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


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
