"""Layers of quantized experts: what kernels.Int8Linear and Int4Linear are for one weight, for many of which each row of
the input goes through a few.

    layer = Int8Experts.from_canonical(weight, scales, bias)             # from the tensors on disk
    layer = Int4Experts.from_canonical(q, scales, zeros, in_features, groupsize, bias)
    y = layer(x, chosen)                                                 # chosen: int64 [R, k]

x [R, 1, K], if all choices of a row get the same input, or [R, k, K] -> [R, k, N].
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kernels import _check_grid, _describe, pack_int4, pack_int8, pack_scales, packing
from kernels.packing import GROUPSIZES, kind_of_zeros


class Int8Experts(nn.Module):
    """y[r, j] = x[r, j] W[chosen[r, j]]^T + b[chosen[r, j]], with W int8, w = q * scale; a scale a row, or one for each
    group of K."""

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        out_features: int,
        in_features: int,
        groupsize: int = 0,
        bias: Tensor | None = None,
    ):
        """`groupsize` 0: a scale a row."""
        super().__init__()
        self.n_experts, self.in_features, self.out_features = len(packed), in_features, out_features
        self.groupsize = groupsize
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def from_canonical(cls, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> "Int8Experts":
        """From int8 [E, N, K]; scales [E, N] or [E, N, K / groupsize] and a bias [E, N], of any float dtype.
        ValueError for other shapes."""
        if weight.dtype != torch.int8 or weight.ndim != 3 or not len(weight):
            raise ValueError(f"expected int8 [E, N, K], got {_describe(weight)}")
        E, N, K = weight.shape
        groupsizes = {(E, N): 0} | {(E, N, K // size): size for size in GROUPSIZES if K % size == 0}
        if scales.shape not in groupsizes or not scales.dtype.is_floating_point:
            raise ValueError(f"expected scales of one of {list(groupsizes)}, got {_describe(scales)}")
        groupsize = groupsizes[scales.shape]
        _check_bias(bias, E, N)
        grid = _stack(map(pack_scales, scales), E) if groupsize else scales.float().contiguous()
        return cls(_stack(map(pack_int8, weight), E), grid, N, K, groupsize, bias)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        if not self.groupsize:
            return torch.ops.brisk.linear_int8_experts(x, self.packed, self.scales, chosen, self.bias)
        return torch.ops.brisk.linear_int8_grouped_experts(
            x, self.packed, self.scales, chosen, self.out_features, self.groupsize, self.bias
        )

    @property
    def weight_bytes(self) -> int:
        """Of all experts. A decode step reads those of the ones that are chosen."""
        return sum(buffer.nbytes for buffer in self.buffers())


class Int4Experts(nn.Module):
    """y[r, j] = x[r, j] W[chosen[r, j]]^T + b[chosen[r, j]], with W int4, w = (q - zero) * scale in groups of K, or
    4-bit floats (MXFP4), w = FP4_VALUES[q] * scale."""

    def __init__(
        self,
        packed: Tensor,
        zero: int,
        out_features: int,
        in_features: int,
        groupsize: int,
        scale_dtype: torch.dtype,
        bias: Tensor | None,
    ):
        super().__init__()
        self.n_experts, self.in_features, self.out_features = len(packed), in_features, out_features
        self.groupsize, self.scale_dtype, self.zero = groupsize, scale_dtype, zero
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def from_canonical(
        cls,
        q: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        in_features: int,
        groupsize: int,
        bias: Tensor | None = None,
    ) -> "Int4Experts":
        """From uint8 [E, N, ceil(K / 2)]; scales and zeros [E, N, ceil(K / groupsize)] and a bias [E, N], of the dtypes
        that kernels.Int4Linear takes, and without zeros as there. ValueError for other shapes."""
        if q.dtype != torch.uint8 or q.ndim != 3 or not len(q):
            raise ValueError(f"expected uint8 [E, N, ceil(K / 2)], got {_describe(q)}")
        E, N, K = len(q), q.shape[1], in_features
        shape = (E, N, -(-K // groupsize))
        if groupsize not in GROUPSIZES or q.shape[2] != -(-K // 2):
            raise ValueError(f"expected [E, N, {-(-K // 2)}] in groups of 32, 64 or 128, got {_describe(q)}")
        _check_grid(scales, zeros, shape, groupsize)
        _check_bias(bias, E, N)
        zero = kind_of_zeros(zeros)
        each = zip(q, scales, [None] * E if zeros is None else zeros, strict=True)
        packed = (pack_int4(*expert, K, groupsize, zero)[0] for expert in each)
        return cls(_stack(packed, E), zero, N, K, groupsize, scales.dtype, bias)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return torch.ops.brisk.linear_int4_experts(
            x, self.packed, chosen, self.out_features, self.groupsize, self.scale_dtype, self.zero, self.bias
        )

    @property
    def weight_bytes(self) -> int:
        """Of all experts. A decode step reads those of the ones that are chosen."""
        return sum(buffer.nbytes for buffer in self.buffers())


def _stack(experts: Iterable[Tensor], count: int) -> Tensor:
    """[count, ...] of tensors that are made one at a time: there is room for only one of them besides."""
    stacked = None
    for i, expert in enumerate(experts):
        if stacked is None:
            stacked = packing.allocate((count, *expert.shape), expert.dtype, expert.device)
        stacked[i] = expert
    return stacked


def _check_bias(bias: Tensor | None, E: int, N: int) -> None:
    if bias is not None and (bias.shape != (E, N) or not bias.dtype.is_floating_point):
        raise ValueError(f"expected a bias {[E, N]}, got {_describe(bias)}")
