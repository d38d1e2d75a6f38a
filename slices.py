"""Which slice of each tensor of a checkpoint a rank holds, where tp.py shares a model among ranks.

    slices = group.slices(config, {"layers.0.feed_forward.w2": 128, ...})      # group sizes of the quantized layers
    model = Transformer(slices.config)                                         # the shape of a rank's model
    weight = slices.slice("output.weight", tensor)

All slices are equally wide, so that all ranks compile the same code. Where the ranks do not divide a width, the last
ones end in padding: weights of zero, which add nothing, and rows of the vocabulary, whose logits are cut off.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import ModelConfig

ALIGNMENT = 16  # slices of widths that the ranks do not divide: matrix units and vector loads want multiples of this


@dataclass(frozen=True)
class Slices:
    """The slices of one rank. `groupsizes` are those of the quantized layers, 0 where a whole row has one scale."""

    rank: int
    ranks: int
    whole: ModelConfig
    groupsizes: Mapping[str, int]

    @property
    def config(self) -> ModelConfig:
        """The shape of a rank's model, padding included; with more ranks than key-value heads some share a head."""
        experts = self.whole.experts
        if experts is not None:
            shared = self._ffn_width("feed_forward.shared.w2") if experts.shared_width else 0
            experts = replace(experts, width=self._ffn_width("feed_forward.experts.w2"), shared_width=shared)
        return replace(
            self.whole,
            n_heads=self.whole.n_heads // self.ranks,
            n_kv_heads=max(self.whole.n_kv_heads // self.ranks, 1),
            ffn_dim=self._ffn_width("feed_forward.w2"),
            vocab_size=self._width(self.whole.vocab_size),
            experts=experts,
        )

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's slice of a tensor: a view, or a copy of no more than the slice."""
        if self.ranks == 1 or name.startswith("vision."):  # each rank sees all of an image
            return tensor
        layer, _, kind = name.rpartition(".")
        if kind == "bias" and self.rank > 0 and inputs_shared(self.whole, layer):  # it is added once
            return torch.zeros_like(tensor)
        # Padding has scales of zero, but zeros like the others: int4 has a shorter form where all are the same.
        fill = tensor[(slice(0, 1),) * tensor.ndim] if kind == "zeros" else tensor.new_zeros(())
        dim, runs = self.runs(name, tensor.shape)
        parts = []
        for start, end, width in runs:
            parts.append(tensor.narrow(dim, start, end - start))
            if missing := width - (end - start):
                parts.append(fill.expand(*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def numel(self, name: str, shape: tuple[int, ...]) -> int:
        """The elements of this rank's slice of a tensor, padding included."""
        dim, runs = self.runs(name, shape)
        return math.prod(shape) // shape[dim] * sum(width for _, _, width in runs)

    def runs(self, name: str, shape: tuple[int, ...]) -> tuple[int, list[tuple[int, int, int]]]:
        """Where this rank's slice lies: (dimension, [(start, end, width), ...]). Padding follows a run that is shorter
        than its width."""
        layer, _, kind = name.rpartition(".")
        matrix, config = layer.rpartition(".")[2], self.whole
        everything = 0, [(0, shape[0], shape[0])]
        if name.startswith("vision."):
            return everything
        outputs = int(".experts." in layer)  # the dimension of a layer's outputs: experts come before it
        if inputs := inputs_shared(config, layer):
            if kind == "bias" or (kind == "scales" and len(shape) == outputs + 1):
                return everything
            dim = 0 if kind == "order" else outputs + 1
            width = self._ffn_width(layer) if matrix == "w2" else self._heads_width(layer)
            return dim, [self._run(0, shape[dim], width * shape[dim] // inputs)]  # two inputs a byte, or a whole group
        if kind == "order":
            return everything
        if matrix == "wqkv":
            runs, first = [], 0
            for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads):
                runs.append(self._heads(heads, config.head_dim, first))
                first += heads * config.head_dim
            return 0, runs
        if kind == "sinks":
            return 0, [self._heads(config.n_heads, 1)]
        if matrix in ("q_norm", "k_norm") and config.qk_norm != "head":
            heads = config.n_heads if matrix == "q_norm" else config.n_kv_heads
            return 0, [self._heads(heads, shape[0] // heads)]
        if matrix in ("w1", "w13"):
            size = ffn_size(config, layer)
            starts = (0, size) if matrix == "w13" else (0,)
            return outputs, [self._run(first, size, self._ffn_width(layer)) for first in starts]
        if matrix in ("tok_embeddings", "output"):
            return 0, [self._run(0, config.vocab_size, self._width(config.vocab_size))]
        return everything

    def _heads(self, heads: int, rows: int, first: int = 0) -> tuple[int, int, int]:
        """Of so many heads of `rows` rows each, from `first` on, those of this rank."""
        start, width = first + self.rank * heads // self.ranks * rows, max(heads // self.ranks, 1) * rows
        return start, start + width, width

    def _run(self, first: int, size: int, width: int) -> tuple[int, int, int]:
        """Of `size` elements from `first` on, cut into equal widths, those of this rank."""
        start, end = (first + min(rank * width, size) for rank in (self.rank, self.rank + 1))
        return start, end, width

    def _ffn_width(self, layer: str) -> int:
        """Feed-forward channels of a rank. All layers of a kind are cut alike, in groups that are whole in each."""
        kind = ffn_kind(layer)
        groupsizes = (size for name, size in self.groupsizes.items() if name.endswith(".w2") and ffn_kind(name) == kind)
        return self._width(ffn_size(self.whole, layer), max(groupsizes, default=0))

    def _heads_width(self, layer: str) -> int:
        """The inputs that a rank has of wo: those of its heads, or whole groups, which may end inside of a head."""
        return self._width(self.whole.n_heads * self.whole.head_dim, self.groupsizes.get(layer) or self.whole.head_dim)

    def _width(self, size: int, unit: int = 0) -> int:
        """How many of `size` elements each rank has, in whole units."""
        unit = unit or (ALIGNMENT if size % self.ranks else 1)
        return -(-size // (self.ranks * unit)) * unit


def ffn_kind(layer: str) -> str:
    """Which of a block's feed-forwards a layer belongs to: "experts", "shared" or "feed_forward"."""
    return layer.split(".")[-2]


def ffn_size(config: ModelConfig, layer: str) -> int:
    """The channels of a layer's feed-forward."""
    kind = ffn_kind(layer)
    if kind in ("experts", "shared"):
        return config.experts.width if kind == "experts" else config.experts.shared_width
    return config.ffn_dim


def inputs_shared(config: ModelConfig, layer: str) -> int:
    """The inputs of a layer that is cut by its inputs, those of all ranks; 0 for other layers."""
    matrix = layer.rpartition(".")[2]
    if matrix == "w2":
        return ffn_size(config, layer)
    return config.n_heads * config.head_dim if matrix == "wo" else 0
