"""LoRA adapters merged into the weights of a checkpoint on its way through the converter.

    with adapted(source, ["saves/lora/sft"]) as source: ...          # its tokenizer files go before the base's
    config, plan = merge(config, plan, [(adapter, 1.0)])             # what is read of the plan is merged

In float32, W + weight * scale * B @ A in PEFT's order of operations, and rounded once to the dtype that is stored: what
PEFT's merge_and_unload makes of a base in float32, cast after it. Of a base in bfloat16 it makes the same, but that it
rounds what it adds to an embedding or to stacked experts, and rounds after each adapter, where there are several. A sum
is made in another order than there, and may differ in the last bits of float32: DoRA's norms of an embedding's columns.
"""

import argparse
import itertools
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from config import ModelConfig
from errors import UserError, log
from formats.hub import CONFIG_FILES, TOKENIZER_FILES
from formats.names import Piece, swaps
from formats.source import Source
from lora import EMBEDDING, OUTPUT, Adapter, Delta
from model import expected_shapes

Plan = dict[str, list[Piece]]
Weighted = Sequence[tuple[Adapter, float]]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def weighted_path(text: str) -> tuple[str, float]:
    """An argument's type: PATH or PATH=WEIGHT, of which the weight is 1 where there is none."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?", weight) or not path:
        raise argparse.ArgumentTypeError(f"{weight!r} is not a number; give PATH or PATH=WEIGHT, as in {path}=0.5")
    return path, float(weight)


def merged_name(base: str, adapters: Sequence[tuple[str, float]]) -> str:
    """What to call a base with these adapters: "Llama-3.2-1B+sft", or "Llama-3.2-1B+sft-checkpoint-500"."""
    parts = [Path(base).name]
    for path, weight in adapters:
        folder = Path(path).resolve()
        name = f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
        parts.append(name if weight == 1 else f"{name}={weight:g}")
    return "+".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def adapted(source: Source, folders: Sequence[Path]) -> Iterator[Source]:
    """The source with the tokenizer files of adapters in the place of its own, those of the last where several have
    some. A whole tokenizer replaces the base's as a whole, and its chat template."""
    with tempfile.TemporaryDirectory() as temporary:
        files = {name: source.folder / name for name in (*CONFIG_FILES, *TOKENIZER_FILES)}
        for folder in folders:
            own = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
            if own.keys() & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
                files = {name: path for name, path in files.items() if name in CONFIG_FILES}
            files |= own
        for name, path in files.items():
            if path.is_file():
                shutil.copyfile(path, Path(temporary, name))
        yield replace(source, folder=Path(temporary), temporary=True)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@dataclass(frozen=True)
class Merged(Piece):
    """A piece with adapters, whose rows read as float32."""

    first: int = 0  # its first row in our tensor, where experts lie one after the other
    # What is added, in order: its first row there; the delta, with its final scale; of an embedding with DoRA the norms
    # of all columns [dim].
    deltas: tuple[tuple[int, Delta, Tensor | None], ...] = ()
    token_rows: tuple[tuple[Tensor, Tensor], ...] = ()

    def read(self, kind: str) -> Iterator[Tensor]:
        first = self.first
        for rows in super().read(kind):
            flat = rows.float().reshape(-1, rows.shape[-1])
            yield self.merged(flat if rows.dtype != torch.float32 else flat.clone(), first).view(rows.shape)
            first += len(flat)

    def merged(self, rows: Tensor, first: int) -> Tensor:
        """Rows first: of our tensor, [n, in], which are overwritten."""
        dora = any(delta.magnitude is not None for _, delta, _ in self.deltas)
        base = rows.clone() if dora and len(self.deltas) > 1 else rows
        for start, delta, norms in self.deltas:
            low, high = max(first, start), min(first + len(rows), start + len(delta.b))
            if low >= high:
                continue
            part = slice(low - first, high - first)
            update = (delta.b[low - start : high - start] @ delta.a) * delta.scale
            if delta.magnitude is None:
                rows[part] += update
            elif norms is not None:
                rows[part] = (delta.magnitude / norms) * (rows[part] + update)
            else:
                total = base[part] + update  # of the base as it was, whatever is merged before
                if swaps(self.transform):  # the order of a sum follows the memory, in which the inputs lie apart there
                    total = total.t().contiguous().t()
                norm = torch.linalg.norm(total, dim=1)
                factor = delta.magnitude[low - start : high - start] / norm
                rows[part] = factor[:, None] * (rows[part] + update)
        for ids, values in self.token_rows:
            here = (ids >= first) & (ids < first + len(rows))
            rows[ids[here] - first] = values[here]
        return rows


def merge(config: ModelConfig, plan: Plan, adapters: Weighted) -> tuple[ModelConfig, Plan]:
    """The plan of formats/names.py with adapters, each with its weight, and the config of what it then is: with the
    vocabulary of the adapters, and untied where they change the output projection or the embedding alone.

    UserError where two adapters replace the same weights.
    """
    check_pairs(adapters)
    sizes = {adapter.vocab_size for adapter, _ in adapters} - {config.vocab_size}
    if len(sizes) > 1:
        raise UserError(f"the adapters have vocabularies of {' and '.join(map(str, sizes))} tokens; merge one of them")
    merged = replace(
        config,
        vocab_size=sizes.pop() if sizes else config.vocab_size,
        tied=config.tied and all(adapter.tied for adapter, _ in adapters),
    )
    result: Plan = {}
    for ours, shape in expected_shapes(merged).items():
        pieces = plan[ours if ours in plan else f"{EMBEDDING}.weight"]  # an output that had no matrix of its own
        for adapter in replacing(adapters, ours, config, merged.vocab_size):
            pieces = replace_pieces(pieces, adapter.saved[name_in(adapter, ours, config)], ours, shape)
        result[ours] = add_deltas(pieces, ours, shape, adapters, config)
    return merged, result


def name_in(adapter: Adapter, ours: str, base: ModelConfig) -> str:
    """By which name an adapter has what is for one of our tensors: where it keeps a tied base tied, the embedding."""
    follows = ours == f"{OUTPUT}.weight" and base.tied and adapter.tied
    return f"{EMBEDDING}.weight" if follows else ours


def replacing(adapters: Weighted, ours: str, base: ModelConfig, vocab_size: int) -> list[Adapter]:
    """The adapters that have rows of a tensor whole: first those that only have the base's, in this vocabulary."""
    trained, frozen = [], []
    for adapter, _ in adapters:
        name = name_in(adapter, ours, base)
        if name in adapter.frozen and adapter.vocab_size == vocab_size:
            frozen.append(adapter)
        elif name in adapter.saved.keys() - adapter.frozen:
            trained.append(adapter)
    return frozen + trained


def replace_pieces(pieces: list[Piece], saved: Mapping[int, Piece], ours: str, shape: tuple[int, ...]) -> list[Piece]:
    """The pieces of a tensor of this shape with those that an adapter has whole, by their first rows."""
    if not saved:
        return pieces
    if sum(rows_of(piece, shape) for piece in saved.values()) == rows_in(shape):
        return list(saved.values())
    firsts = dict(zip(first_rows(pieces, shape), pieces, strict=True))
    for first, piece in saved.items():
        if first not in firsts or rows_of(firsts[first], shape) != rows_of(piece, shape):
            raise UserError(f"the adapter replaces a part of {ours!r} that the base has no tensor of its own for")
    return list((firsts | saved).values())


def add_deltas(
    pieces: list[Piece], ours: str, shape: tuple[int, ...], adapters: Weighted, base: ModelConfig
) -> list[Piece]:
    """The pieces of a tensor of this shape, so that what adapters add to their rows is added when they are read."""
    deltas, token_rows, of_columns = [], [], set()
    for adapter, weight in adapters:
        name = name_in(adapter, ours, base)
        layer, _, kind = name.rpartition(".")
        for delta in adapter.deltas.get(layer, []) if kind == "weight" else []:
            start = delta.start + (delta.expert or 0) * shape[1] if len(shape) == 3 else delta.start
            if delta.magnitude is not None and layer.endswith("_embeddings"):
                of_columns.add(len(deltas))
            deltas.append((start, replace(delta, scale=delta.scale * weight)))
        if name in adapter.token_rows:
            token_rows.append(adapter.token_rows[name])
    if not deltas and not token_rows:
        return pieces
    norms = {place: column_norms(pieces, shape, deltas[place][1]) for place in of_columns}
    result: list[Piece] = []
    for first, piece in zip(first_rows(pieces, shape), pieces, strict=True):
        end = first + rows_of(piece, shape)
        own = tuple(
            (start, delta, norms.get(place))
            for place, (start, delta) in enumerate(deltas)
            if start < end and first < start + len(delta.b)
        )
        result.append(Merged(**vars(piece), first=first, deltas=own, token_rows=tuple(token_rows)))
    return result


def column_norms(pieces: list[Piece], shape: tuple[int, ...], delta: Delta) -> Tensor:
    """Of an embedding with what DoRA adds, float32 [dim]: summed in float64, as not all rows are in memory at once."""
    squares, first = torch.zeros(shape[-1], dtype=torch.float64), 0
    for piece in pieces:
        for rows in piece.read("weight"):
            update = (delta.b[first : first + len(rows)] @ delta.a) * delta.scale
            squares += (rows.float() + update).double().square().sum(0)
            first += len(rows)
    return squares.sqrt().float()


def rows_in(shape: tuple[int, ...]) -> int:
    """The rows of a tensor of ours, where experts lie one after the other; of a vector its elements."""
    return math.prod(shape[:-1]) if len(shape) > 1 else shape[0]


def rows_of(piece: Piece, shape: tuple[int, ...]) -> int:
    """The rows that a piece has of a tensor of this shape."""
    return math.prod(piece.tensor.shape) * rows_in(shape) // math.prod(shape)


def first_rows(pieces: list[Piece], shape: tuple[int, ...]) -> list[int]:
    return list(itertools.accumulate((rows_of(piece, shape) for piece in pieces[:-1]), initial=0))


def check_pairs(adapters: Weighted) -> None:
    """UserError where two adapters replace the same weights; a warning where a weight does not count."""
    owners: dict[str, str] = {}
    for adapter, weight in adapters:
        trained = {*adapter.saved.keys() - adapter.frozen, *adapter.token_rows}
        for ours in sorted(trained):
            if ours in owners:
                raise UserError(
                    f"the adapters {owners[ours]} and {adapter.name} both replace {ours!r}; merge one of them"
                )
            owners[ours] = adapter.name
        if weight != 1 and trained:
            log(
                f"warning: {adapter.name}: {min(trained)!r} was trained as a whole; the weight {weight:g} is not for it"
            )
