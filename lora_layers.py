"""LoRA adapters at run time (https://arxiv.org/abs/2106.09685): each row of a batch may have one of its own, or none.

    adapters = Adapters(model, config, read_adapters({"sql": path}, checkpoint))
    engine = Engine(model, adapters=adapters)
    request = Request(prompt, params, 100, adapter="sql")
    adapters.load("sql", other)                            # takes its place, and no step is compiled anew

The low-rank part runs beside a layer, whatever form its weight has, in the compiled step. All adapters of a model lie
in slots of the same tensors, with ranks padded to the largest; `slots`, a buffer that all these layers share, says
which of them each row of the next call has. So a step is the same whatever adapters there are, and a model without any
has no part in this. Under tensor parallelism A or B is cut as the weight of its layer is.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from errors import UserError
from files import check_memory, read_json
from kernels import lora
from model import Linear, Transformer, expected_shapes
from slices import inputs_shared
from tp import ALONE, Group, RowParallel

if TYPE_CHECKING:
    from formats.names import Piece
    from lora import Adapter, Delta

MERGE = "merge it into the model: python convert_hf_checkpoint.py --adapter"
Parts = tuple[tuple[int, int], ...]  # the outputs (first, end) of a layer that each pair of matrices adds to


class Room(NamedTuple):
    """What one adapter may add to a layer."""

    inputs: int
    rank: int
    parts: Parts

    @property
    def numbers(self) -> int:
        """In its matrices."""
        return self.rank * sum(self.inputs + end - begin for begin, end in self.parts)


class LowRank(nn.Module):
    """y + scale B A x, with A, B and scale of the adapter that each row of the batch has."""

    def __init__(self, count: int, room: Room, like: Tensor):
        """Room for `count` adapters, whose matrices have the dtype and the device of `like`."""
        super().__init__()
        self.count, self.room = count, room
        on_cpu, made = like.device.type == "cpu", dict(dtype=like.dtype, device=like.device)
        self.register_buffer("packed", lora.empty_slots(count, *room, like.dtype) if on_cpu else None, persistent=False)
        if not on_cpu:
            parts, outputs = len(room.parts), sum(end - begin for begin, end in room.parts)
            self.register_buffer("a", torch.zeros(count, parts, room.rank, room.inputs, **made), persistent=False)
            self.register_buffer("b", torch.zeros(count, outputs, room.rank, **made), persistent=False)
            self.register_buffer("scales", torch.zeros(count, parts, device=like.device), persistent=False)
        self.register_buffer("slots", None, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, ..., in], the layer's output y [B, ..., out] -> the same."""
        if self.packed is None:
            return lora.add_low_rank(y, x, self.a, self.b, self.scales, self.slots, self.room.parts)
        return torch.ops.brisk.lora(y, x, self.packed, self.slots)

    def put(self, slot: int, found: Mapping[tuple[int, int], "Delta"]) -> None:
        """Fills a slot with the matrices of each part; those that are not there add nothing, with a scale of 0."""
        a = torch.zeros(len(self.room.parts), self.room.rank, self.room.inputs)
        b = [torch.zeros(end - begin, self.room.rank) for begin, end in self.room.parts]
        scales = torch.zeros(len(self.room.parts))
        for i, part in enumerate(self.room.parts):
            if part in found:
                a[i, : len(found[part].a)] = found[part].a
                b[i][:, : len(found[part].a)] = found[part].b
                scales[i] = found[part].scale
        b = torch.cat(b)
        if self.packed is None:
            into = self.a, self.b, self.scales
        else:
            into, a, b = lora.views(self.packed)[:3], lora.pack_a(a), lora.pack_b(b, self.room.parts)
        for tensor, numbers in zip(into, (a, b, scales), strict=True):
            tensor[slot] = numbers.to(tensor)

    @property
    def weight_bytes(self) -> int:
        """Of all adapters."""
        return sum(buffer.nbytes for name, buffer in self.named_buffers() if name != "slots")


class AdaptedLinear(nn.Module):
    """Takes the place of a linear layer that adapters have something to add to."""

    def __init__(self, linear: nn.Module, low_rank: LowRank):
        super().__init__()
        self.linear, self.low_rank = linear, low_rank

    def forward(self, x: Tensor) -> Tensor:
        layer, low_rank = self.linear, self.low_rank
        if low_rank.packed is None or (op := op_of(layer)) is None:
            return low_rank(x, layer(x))
        return getattr(torch.ops.brisk, f"{op}_lora")(x, *layer.operands, low_rank.packed, low_rank.slots)


class Adapters:
    """The adapters of a model by their names, and which of them the rows of a call have."""

    def __init__(
        self,
        model: Transformer,
        config: ModelConfig,
        adapters: Mapping[str, "Adapter"],
        scale: float = 1.0,
        group: Group = ALONE,
    ):
        """Puts the adapters into a model, of which `config` is that of all ranks; what they add is multiplied by
        `scale`. UserError for what can only be merged."""
        self.model, self.config, self.scale, self.group = model, config, scale, group
        self.slots = torch.full((1,), -1, device=model.tok_embeddings.weight.device)
        self.names: dict[str, int] = {}  # of the adapters -> their slots
        self.identities: dict[str, str] = {}  # hashes of what they are
        self.layers: dict[str, LowRank] = {}
        self._of_rows: list[int] = []  # the slot that each row has, and those of the last call
        self._used: list[int] = []
        self._slices = group.slices(config, groupsizes(model))
        found = {name: self._cut(name, adapter) for name, adapter in adapters.items()}
        rooms, like = plan(found), model.tok_embeddings.weight
        numbers = sum(room.numbers for room in rooms.values()) * len(adapters)
        check_memory(group.sharing * numbers * like.itemsize, "the room for the adapters", like.device)
        for layer, room in rooms.items():
            self.layers[layer] = LowRank(len(adapters), room, like)
            insert(model, layer, self.layers[layer])
        for slot, name in enumerate(adapters):
            self.names[name] = slot
            self._fill(slot, found[name])
            self.identities[name] = identity(adapters[name], scale)
        group.check_same({f"the hash of adapter {name}": self.identities[name] for name in adapters})
        self.setup(1)

    def setup(self, rows: int) -> None:
        """Makes room for calls of so many rows, which have no adapter at first. Steps have to be compiled anew."""
        self.slots = torch.full((rows,), -1, device=self.slots.device)
        self._of_rows, self._used = [-1] * rows, [-1] * rows
        for low_rank in self.layers.values():
            low_rank.slots = self.slots

    def load(self, name: str, adapter: "Adapter") -> None:
        """Puts an adapter in the place of the one of this name. UserError where it does not fit: it has a larger rank,
        or targets other layers."""
        found = self._cut(name, adapter)
        for layer, parts in found.items():
            room = self.layers[layer].room if layer in self.layers else None
            if room is None or not parts.keys() <= set(room.parts):
                raise UserError(f"adapter {name!r} adds to {layer}, for which there is no room; start with it")
            if (rank := max(len(delta.a) for delta in parts.values())) > room.rank:
                raise UserError(f"adapter {name!r} has rank {rank}, and there is room for {room.rank}; start with it")
        self._fill(self.names[name], found)
        self.identities[name] = identity(adapter, self.scale)

    def identity(self, name: str | None) -> str:
        """What tells an adapter from others, and from none, whose is "". ValueError for a name that there is not."""
        if name is not None and name not in self.identities:
            raise ValueError(f"there is no adapter {name!r} among {list(self.identities)}")
        return "" if name is None else self.identities[name]

    def give(self, row: int, name: str | None) -> None:
        """A row has this adapter from now on."""
        self._of_rows[row] = self.names.get(name, -1)

    def park(self, row: int | slice) -> None:
        """It has none."""
        self._of_rows[row] = -1 if isinstance(row, int) else [-1] * len(self._of_rows[row])

    def use(self, rows: Sequence[int]) -> None:
        """The next calls of the model are for these rows, in this order."""
        slots = [self._of_rows[row] for row in rows]
        if self._used[: len(slots)] != slots:
            self.slots[: len(slots)] = torch.tensor(slots, device=self.slots.device)
            self._used[: len(slots)] = slots

    def _check(self, name: str, adapter: "Adapter") -> None:
        """UserError for an adapter that can only be merged."""
        if problem := self._problem(adapter):
            raise UserError(f"adapter {name!r} {problem}: that cannot be chosen at run time; {MERGE} PATH")

    def _problem(self, adapter: "Adapter") -> str | None:
        """What an adapter does that is not done beside the layers."""
        if adapter.is_dora:
            return "is a DoRA, which scales whole weights"
        if adapter.vocab_size != self.config.vocab_size:
            return f"has a vocabulary of {adapter.vocab_size}, not {self.config.vocab_size}"
        if adapter.token_rows:
            return f"has trained tokens in {next(iter(adapter.token_rows))}"
        for layer in adapter.deltas:
            if layer in ("tok_embeddings", "pos_embeddings"):
                return f"adds to the embedding {layer}"
            if ".experts." in layer or layer.endswith(".router"):
                return f"adds to {layer}, of a mixture of experts"
        for tensor, pieces in adapter.saved.items():
            if tensor not in adapter.frozen and not self._has(tensor, pieces):
                return f"replaces {tensor}"
        return None

    def _has(self, name: str, pieces: Mapping[int, "Piece"]) -> bool:
        """Whether the model's tensor of this name holds the same: embeddings are saved along where one is adapted."""
        own = dict(self.model.named_parameters()).get(name)
        if own is None:
            return False
        saved = torch.cat([rows for first in sorted(pieces) for rows in pieces[first].read("weight")])
        saved = self._slices.slice(name, saved).to(own.device, own.dtype)
        return saved.shape == own.shape and torch.equal(saved, own)

    def _fill(self, slot: int, found: Mapping[str, Mapping[tuple[int, int], "Delta"]]) -> None:
        for layer, low_rank in self.layers.items():
            low_rank.put(slot, found.get(layer, {}))

    def _cut(self, name: str, adapter: "Adapter") -> dict[str, dict[tuple[int, int], "Delta"]]:
        """This rank's slices of what an adapter adds to each layer, by the outputs of the parts of the layer. UserError
        for an adapter that can only be merged."""
        self._check(name, adapter)
        cut: dict[str, dict[tuple[int, int], Delta]] = {}
        shapes = expected_shapes(self.config) if self.group.size > 1 else {}
        for layer, deltas in adapter.deltas.items():
            for delta in deltas:
                a, b, begin = delta.a, delta.b, delta.start
                end = begin + len(b)
                if self.group.size > 1 and inputs_shared(self.config, layer):
                    width = inputs_shared(self.model.config, layer)  # of what the layer gets, whatever of the weight
                    a = a[:, self.group.rank * width :][:, :width]
                    a = F.pad(a, (0, width - a.shape[1]))
                elif self.group.size > 1:
                    outputs = shapes.get(f"{layer}.weight", (self.config.vocab_size,))[0]  # a tied model has no output
                    numbers = torch.arange(1, outputs + 1)[:, None]
                    own = self._slices.slice(f"{layer}.weight", numbers)[:, 0] - 1
                    begin, end, b = rows_of(own, begin, end, b)
                cut.setdefault(layer, {})[begin, end] = replace(delta, a=a, b=b, scale=delta.scale * self.scale)
        return cut


def plan(found: Mapping[str, Mapping[str, Mapping[tuple[int, int], "Delta"]]]) -> dict[str, Room]:
    """The room in each layer for any of these adapters, as `_cut` has cut them. UserError where parts overlap."""
    parts: dict[str, set[tuple[int, int]]] = {}
    inputs: dict[str, int] = {}
    ranks: dict[str, int] = {}  # by kinds of layers, so that those of a kind are compiled once
    for layers in found.values():
        for layer, deltas in layers.items():
            parts.setdefault(layer, set()).update(deltas)
            for delta in deltas.values():
                rank, inputs[layer] = delta.a.shape
                ranks[kind_of(layer)] = max(rank, ranks.get(kind_of(layer), 0))
    rooms = {}
    for layer in parts:
        ordered = tuple(sorted(parts[layer]))
        if any(before[1] > after[0] for before, after in pairwise(ordered)):
            raise UserError(f"the adapters cut {layer} in ways that do not go together; {MERGE} PATH")
        rooms[layer] = Room(inputs[layer], -(-ranks[kind_of(layer)] // lora.RANKS) * lora.RANKS, ordered)
    return rooms


def rows_of(numbers: Tensor, begin: int, end: int, b: Tensor) -> tuple[int, int, Tensor]:
    """Of a layer whose outputs have these numbers in the whole one, -1 for padding, those from `begin` to `end`: their
    place (first, end) and their rows of `b`, zeros for padding."""
    inside = ((numbers >= begin) & (numbers < end)).nonzero()[:, 0]
    if not len(inside):
        return 0, 0, b[:0]
    first, last = int(inside[0]), int(inside[-1]) + 1
    while last < len(numbers) and numbers[last] < 0:  # so that the parts of all ranks are alike
        last += 1
    own = numbers[first:last]
    return first, last, torch.where(own[:, None] < 0, 0, b[(own - begin).clamp(min=0)])


def read_adapters(paths: Mapping[str, str], checkpoint: Path) -> dict[str, "Adapter"]:
    """Reads the adapters at these paths, by their names, for the checkpoint in a folder. UserError for one that is
    broken, or does not fit."""
    if not paths:
        return {}
    from lora import read_adapter  # most runs need none

    fields, base = read_json(checkpoint / "config.json"), str(checkpoint.resolve())
    return {name: read_adapter(path, fields, base) for name, path in paths.items()}


def kind_of(layer: str) -> str:
    """ "wqkv" of "layers.3.attention.wqkv"."""
    return layer.rpartition(".")[2]


def insert(model: Transformer, layer: str, low_rank: LowRank) -> None:
    """Has a layer of a model add a low-rank part to its output."""
    if layer == "output" and model.output is None:  # the logits only: the embedding stays as it is
        with torch.device("meta"):
            model.output = Linear(*reversed(model.tok_embeddings.weight.shape))
        model.output.weight = model.tok_embeddings.weight
    parent, _, child = layer.rpartition(".")
    module = model.get_submodule(layer)
    if isinstance(module, RowParallel):
        module.low_rank = low_rank
    else:
        setattr(model.get_submodule(parent), child, AdaptedLinear(module, low_rank))


def op_of(layer: nn.Module) -> str | None:
    """The op by which a layer is computed on CPUs; None where it is none of kernels.lora.LAYERS, or takes other inputs
    than the adapters."""
    op = getattr(layer, "op", None)
    return op if op in lora.LAYERS and getattr(layer, "order", None) is None else None


def groupsizes(model: Transformer) -> dict[str, int]:
    """Of the quantized layers of a rank's model."""
    return {
        name.removesuffix(".linear").removesuffix(".module"): module.groupsize
        for name, module in model.named_modules()
        if hasattr(module, "groupsize")
    }


def identity(adapter: "Adapter", scale: float) -> str:
    """A short hash of what an adapter adds, with this scale."""
    digest = hashlib.sha256(repr(scale).encode())
    for layer, deltas in sorted(adapter.deltas.items()):
        for delta in deltas:
            digest.update(f"{layer} {delta.start} {delta.scale} {delta.a.shape} {delta.b.shape}".encode())
            for matrix in (delta.a, delta.b):
                digest.update(matrix.contiguous().numpy())
    return digest.hexdigest()[:12]
