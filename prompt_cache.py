"""A row's keys and values in a file: the next run that begins with the same text has read it already.

    check_path(path)                                     # UserError where something else would be replaced
    load_row(engine, 0, path, checksums)                 # what the next prompts are compared with
    save_row(engine, engine.places.latest, path, checksums)

The file is safetensors: `tokens` int64 [n], and of each layer `model.I.k` and `model.I.v` (of a draft `draft.I.k` ...),
[kv_heads, positions, head_dim], the last positions of n: all of them, but for layers with a window. Of an int8 cache
`model.I.k_scale` and `model.I.v_scale`, [kv_heads, positions], come with them. The metadata say which checkpoints and
which adapter it belongs to, since another model's keys are of no use, and its dtype.
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attention import PARTS, KVCache
from config import ModelConfig
from engine import Engine
from errors import UserError
from files import check_disk
from prefix import Place
from weights import StoredTensor, read_header
from writer import write_safetensors

FORMAT, VERSION = "gpt-brisk prompt cache", "1"


def check_path(path: Path) -> None:
    """UserError where `path` cannot be written, or is a file of another kind, which nobody wants to lose."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--prompt_cache {path} cannot be written; name a file in a folder that can")
    if path.exists():
        read(path)


def read(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of a prompt cache. UserError where it is none."""
    try:
        stored, metadata = read_header(path)
    except (UserError, OSError):
        stored, metadata = {}, {}
    if metadata.get("format") != FORMAT:
        raise UserError(f"--prompt_cache {path} is no prompt cache, or a damaged one; name another file or delete it")
    if metadata.get("version") != VERSION:
        raise UserError(f"--prompt_cache {path} is of another version of this program; name another file or delete it")
    return stored, metadata


def identity(engine: Engine, checksums: list[str]) -> dict[str, str]:
    """What must be equal for keys and values to be of use."""
    dtype = str(engine.model.tok_embeddings.weight.dtype).removeprefix("torch.")
    if engine.model.cache_dtype is not None:
        dtype += f" with a cache in {str(engine.model.cache_dtype).removeprefix('torch.')}"
    return {"checkpoints": " ".join(checksums), "dtype": dtype}


def caches(engine: Engine) -> dict[str, KVCache]:
    return {
        f"{name}.{i}": layer.attention.kv_cache
        for name, model in zip(("model", "draft"), engine.models, strict=False)
        for i, layer in enumerate(model.layers)
    }


@torch.no_grad()
def save_row(engine: Engine, row: int, path: Path, checksums: list[str]) -> None:
    """Writes what a row holds; nothing where that is nothing. UserError as of check_path."""
    place, found = engine.places[row], caches(engine)
    count = len(place.tokens)
    if count == 0:
        return
    check_path(path)
    # A ring still holds what nothing was written over.
    first = {name: max(place.written - cache.slot_count, 0) if cache.is_ring else 0 for name, cache in found.items()}
    tensors = {"tokens": (torch.int64, (count,))}
    for name, cache in found.items():
        for part, buffer in zip(PARTS, cache.parts, strict=False):
            tensors[f"{name}.{part}"] = buffer.dtype, (buffer.shape[1], count - first[name], *buffer.shape[3:])
    check_disk(sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in tensors.values()), path)

    def chunks(name: str) -> list[Tensor]:
        if name == "tokens":
            return [torch.tensor(place.tokens)]
        layer, _, part = name.rpartition(".")
        positions = torch.arange(first[layer], count, device=engine.device)
        cache = found[layer]
        return [getattr(cache, part)[row][:, cache.slots(positions)].cpu().contiguous()]

    metadata = {"format": FORMAT, "version": VERSION, "prompt_length": str(place.prompt_length)}
    metadata["adapter"] = place.adapter
    write_safetensors(path, tensors, chunks, metadata | identity(engine, checksums))


@torch.no_grad()
def load_row(engine: Engine, row: int, path: Path, checksums: list[str], adapters: Collection[str] = ("",)) -> int:
    """Reads into a row what fits of a file -> how many tokens. UserError where it belongs to another checkpoint, or to
    an adapter whose identity is not among `adapters`, or is damaged."""
    stored, metadata = read(path)
    for name, value in identity(engine, checksums).items():
        if metadata.get(name) != value:
            raise UserError(
                f"--prompt_cache {path} has another {name.removesuffix('s')} ({metadata.get(name)}, here {value}); "
                "name another file or delete it"
            )
    adapter = metadata.get("adapter", "")
    if adapter not in adapters:
        theirs, ours = adapter or "none", " or ".join(sorted(name or "none" for name in adapters))
        problem = f"another adapter ({theirs}, here {ours})"
        raise UserError(f"--prompt_cache {path} has {problem}; name another file or delete it")
    place, limit = engine.places[row], engine.model.max_seq_length
    place.tokens, place.written = [], 0
    try:
        tokens = stored["tokens"].read().tolist()
        prompt_length = int(metadata["prompt_length"])
        check_tokens(tokens, stored["tokens"], engine.model.config)
        held = Place(tokens[:limit], written=len(tokens[:limit]), prompt_length=prompt_length)
        for name, cache in caches(engine).items():
            parts = [stored[f"{name}.{part}"] for part in PARTS[: len(cache.parts)]]
            first = load_layer(cache, row, parts, len(tokens), len(held.tokens))
            if first >= len(held.tokens) or (first and not cache.is_ring):
                return 0  # the file is of a longer cache, whose windows went on
            held.written = max(held.written, first + cache.slot_count if first else 0)
    except (KeyError, ValueError) as error:
        raise UserError(f"--prompt_cache {path} is damaged ({error}); delete it") from error
    place.tokens, place.written, place.prompt_length = held.tokens, held.written, held.prompt_length
    place.adapter = adapter
    engine.places.touch(row)
    return len(place.tokens)


def check_tokens(tokens: list[int], stored: StoredTensor, config: ModelConfig) -> None:
    if stored.dtype != torch.int64 or len(stored.shape) != 1 or not tokens:
        raise ValueError(f"tokens are {stored.dtype} {list(stored.shape)}")
    if (min(tokens) < 0 and config.vision is None) or max(tokens) >= config.vocab_size:  # below 0 are images
        raise ValueError(f"there is no token {min(tokens) if min(tokens) < 0 else max(tokens)}")


def load_layer(cache: KVCache, row: int, parts: Sequence[StoredTensor], count: int, wanted: int) -> int:
    """Puts the last of `count` positions, as far as they are among the first `wanted`, into a row -> the first of them
    that it has. ValueError where the tensors are not those of such a cache."""
    kept = parts[0].shape[1] if len(parts[0].shape) == 3 else 0
    for tensor, buffer in zip(parts, cache.parts, strict=True):
        heads, rest = buffer.shape[1], buffer.shape[3:]
        if tensor.shape != (heads, kept, *rest) or tensor.dtype != buffer.dtype or not 0 < kept <= count:
            expected = f"{buffer.dtype} {[heads, count, *rest]}"
            raise ValueError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected {expected}")
    stored_from = count - kept
    first = max(stored_from, wanted - cache.slot_count)
    if first < wanted:
        slots = cache.slots(torch.arange(first, wanted, device=cache.k.device))
        for tensor, buffer in zip(parts, cache.parts, strict=True):
            values = tensor.read()[:, first - stored_from : wanted - stored_from]
            buffer[row, :, slots] = values.to(buffer.device)
    return first
