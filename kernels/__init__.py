"""The few ops PyTorch has no fast form of, as `torch.ops.brisk.*`: they compile, trace and can be checked.

    y = torch.ops.brisk.linear_bf16(x, weight, bias)                     # few rows, at the speed of memory
    layer = Int8Linear.from_canonical(weight, scales, bias)              # from the tensors on disk; y = layer(x)
    layer = Int4Linear.from_canonical(q, scales, zeros, in_features, groupsize, bias)
    y = torch.ops.brisk.linear_experts(x, weight, chosen, bias)          # of many weights, those chosen for each row
    y = torch.ops.brisk.decode_attention(q, k_cache, v_cache, input_pos, window, sinks, scale, softcap, ring, rows,
                                         k_scale, v_scale)
    y = torch.ops.brisk.prefill_attention(q, k, v, input_pos, first_pos, window, sinks, scale, softcap, rows,
                                          k_scale, v_scale)

Each op has a reference version in plain PyTorch, here and in attention.py, which runs on any device; one in C++ for
CPUs (cpu_*.cpp, which build.py compiles at the first use); and most have one in Triton for CUDA (cuda*.py, imported at
the first use). Without a compiler there is one warning, and the reference versions do the work. packing.py brings
weights into the order in which the CPU kernels read them, cuda.py into one of its own.

On CPUs the quantized ops quantize activations to 8 bits on the fly: symmetric, a scale for each row and each group of
K: the weight's own groups, or groups of 128 where a row of an int8 weight has one scale. So products are of integers,
which a CPU does four at a time. They don't for 64 or more bfloat16 rows on CPUs with AMX, where weights become bfloat16
in the cache instead (cpu_gemm.cpp), and on CUDA.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import log
from kernels import packing
from kernels.attention import decode_attention, prefill_attention
from kernels.build import cpu_library
from kernels.packing import GROUPSIZES, dequantize, unpack_nibbles

INT8_GROUP = 128  # activations that share a scale, where the weights have no groups

# ---------------------------------------------------------------------------------------------------------------------
# The ops

_library = torch.library.Library("brisk", "DEF")
_library.define("linear_bf16(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
_library.define("linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor? bias=None) -> Tensor")
_library.define(
    "linear_int8_grouped(Tensor x, Tensor packed, Tensor scales, int out_features, int groupsize, Tensor? bias=None) "
    "-> Tensor"
)
_library.define(
    "linear_int4(Tensor x, Tensor packed, int out_features, int groupsize, ScalarType scale_dtype, int zero, "
    "Tensor? bias=None) -> Tensor"
)
_library.define("linear_experts(Tensor x, Tensor weight, Tensor chosen, Tensor? bias=None) -> Tensor")
_library.define(
    "linear_int8_experts(Tensor x, Tensor packed, Tensor scales, Tensor chosen, Tensor? bias=None) -> Tensor"
)
_library.define(
    "linear_int8_grouped_experts(Tensor x, Tensor packed, Tensor scales, Tensor chosen, int out_features, "
    "int groupsize, Tensor? bias=None) -> Tensor"
)
_library.define(
    "linear_int4_experts(Tensor x, Tensor packed, Tensor chosen, int out_features, int groupsize, "
    "ScalarType scale_dtype, int zero, Tensor? bias=None) -> Tensor"
)
_library.define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor input_pos, int? window=None, "
    "Tensor? sinks=None, float? scale=None, float softcap=0.0, bool ring=False, Tensor? rows=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor"
)
_library.define(
    "prefill_attention(Tensor q, Tensor k, Tensor v, Tensor input_pos, Tensor? first_pos=None, int? window=None, "
    "Tensor? sinks=None, float? scale=None, float softcap=0.0, Tensor? rows=None, Tensor? k_scale=None, "
    "Tensor? v_scale=None) -> Tensor"
)
_library.define("reach(Tensor numbers, Tensor? weights, Tensor limit) -> Tensor")
_library.define("all_reduce(Tensor x) -> Tensor")


def _op(fake):
    """Registers the decorated reference version of an op, and `fake`, which makes an output of the right shape."""

    def register(reference):
        name = reference.__name__
        torch.library.register_fake(f"brisk::{name}")(fake)

        def first_use(*args):
            # The versions of a device come before this one, once they are loaded.
            device = args[0].device.type
            loaded = {"cpu": cpu_library, "cuda": cuda_kernels}.get(device, lambda: None)() is not None
            if loaded and torch._C._dispatch_has_kernel_for_dispatch_key(f"brisk::{name}", device.upper()):
                return getattr(torch.ops.brisk, name).default(*args)
            return reference(*args)

        _library.impl(name, first_use, "CompositeExplicitAutograd")
        return reference

    return register


@_op(lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], weight.shape[0]))
def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """bfloat16 x [..., K] times bfloat16 weight [N, K] -> [..., N]. Accumulates in float32."""
    return F.linear(x, weight, bias)


@_op(lambda x, packed, scales, bias=None: x.new_empty(*x.shape[:-1], scales.shape[0]))
def linear_int8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times an int8 weight from `pack_int8`, with a float32 scale for each of its N rows -> [..., N]."""
    weight = unpack_int8(packed, scales.shape[0], x.shape[-1]).float() * scales[:, None]
    return _reference_linear(x, weight, INT8_GROUP, bias)


@_op(lambda x, packed, scales, out_features, *args: x.new_empty(*x.shape[:-1], out_features))
def linear_int8_grouped(
    x: Tensor, packed: Tensor, scales: Tensor, out_features: int, groupsize: int, bias: Tensor | None = None
) -> Tensor:
    """x [..., K] times an int8 weight from `pack_int8` with scales from `pack_scales` -> [..., out_features]."""
    q, grid = unpack_int8(packed, out_features, x.shape[-1]), unpack_scales(scales, out_features)
    return _reference_linear(x, dequantize(q.float(), grid.float(), 0, groupsize), groupsize, bias)


@_op(lambda x, packed, out_features, *args: x.new_empty(*x.shape[:-1], out_features))
def linear_int4(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    groupsize: int,
    scale_dtype: torch.dtype,
    zero: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x [..., K] times an int4 weight from `pack_int4`, which also says what `zero` is -> [..., out_features]."""
    q, scales, zeros = unpack_int4(packed, out_features, x.shape[-1], groupsize, scale_dtype, zero)
    levels = unpack_nibbles(q, x.shape[-1]).float()
    zeros = None if zeros is None else zeros.float()
    return _reference_linear(x, dequantize(levels, scales.float(), zeros, groupsize), groupsize, bias)


# Mixtures of experts: each row of x goes through the weights of k of E experts, those in `chosen`, int64 [R, k]. x is
# [R, 1, K] where all choices of a row get the same input, or [R, k, K]. y [R, k, N] is in x's dtype:
#     y[r, j] = x[r, min(j, x.shape[1] - 1)] @ W[chosen[r, j]].T + bias[chosen[r, j]]
# On CPUs the weights of experts that are chosen are read, once for all rows of a batch, and no others. IndexError
# (RuntimeError from the C++ versions) for an expert that there isn't.


@_op(lambda x, weight, chosen, bias=None: x.new_empty(*chosen.shape, weight.shape[1]))
def linear_experts(x: Tensor, weight: Tensor, chosen: Tensor, bias: Tensor | None = None) -> Tensor:
    """The chosen of the weights [E, N, K], of x's dtype, with a bias [E, N] -> [R, k, N]. bfloat16 is fastest."""
    return _reference_experts(F.linear, x, (weight,), chosen, weight.shape[1], (), bias)


@_op(lambda x, packed, scales, chosen, bias=None: x.new_empty(*chosen.shape, scales.shape[1]))
def linear_int8_experts(
    x: Tensor, packed: Tensor, scales: Tensor, chosen: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The chosen of E int8 weights, each packed by `pack_int8`, scales float32 [E, N], a bias [E, N] -> [R, k, N]."""
    return _reference_experts(linear_int8, x, (packed, scales), chosen, scales.shape[1], (), bias)


@_op(lambda x, packed, scales, chosen, out_features, *args: x.new_empty(*chosen.shape, out_features))
def linear_int8_grouped_experts(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    chosen: Tensor,
    out_features: int,
    groupsize: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The chosen of E int8 weights, each packed by `pack_int8`, with scales from `pack_scales` -> [R, k, N]."""
    options = (out_features, groupsize)
    return _reference_experts(linear_int8_grouped, x, (packed, scales), chosen, out_features, options, bias)


@_op(lambda x, packed, chosen, out_features, *args: x.new_empty(*chosen.shape, out_features))
def linear_int4_experts(
    x: Tensor,
    packed: Tensor,
    chosen: Tensor,
    out_features: int,
    groupsize: int,
    scale_dtype: torch.dtype,
    zero: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The chosen of E int4 weights, each packed by `pack_int4` with the same `zero` -> [R, k, N]."""
    options = (out_features, groupsize, scale_dtype, zero)
    return _reference_experts(linear_int4, x, (packed,), chosen, out_features, options, bias)


for _attention in (decode_attention, prefill_attention):
    _op(lambda q, *args: torch.empty_like(q, memory_format=torch.contiguous_format))(_attention)


@_op(lambda numbers, weights, limit: torch.empty_like(limit))
def reach(numbers: Tensor, weights: Tensor | None, limit: Tensor) -> Tensor:
    """Where the smallest numbers first weigh as much as a limit: of numbers >= 0 and their weights (by default 1),
    both float32 [..., N], the least with which all up to it reach the limit [..., 1]; infinity where all don't."""
    order = numbers.sort(-1)
    ones = torch.ones_like(numbers) if weights is None else weights.gather(-1, order.indices)
    at = (ones.cumsum(-1) < limit).sum(-1, keepdim=True)
    found = order.values.gather(-1, at.clamp(max=numbers.shape[-1] - 1))
    return torch.where(at < numbers.shape[-1], found, torch.inf)


@_op(lambda x: torch.empty_like(x))
def all_reduce(x: Tensor) -> Tensor:
    """The sum of contiguous x over the ranks of one machine that `open_channel` was called for; only in C++."""
    raise RuntimeError("brisk::all_reduce needs the CPU kernels, which could not be built")


def _reference_linear(x: Tensor, weight: Tensor, group: int, bias: Tensor | None) -> Tensor:
    q, scale = quantize_activations(x.float(), group)
    y = F.linear((q * scale).flatten(-2)[..., : x.shape[-1]], weight)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _reference_experts(
    linear: Callable,
    x: Tensor,
    weights: tuple[Tensor, ...],
    chosen: Tensor,
    out_features: int,
    options: tuple,
    bias: Tensor | None,
) -> Tensor:
    """One expert after the other: linear(its rows of x, its weights, options, its bias)."""
    y = x.new_empty(*chosen.shape, out_features)
    for expert in chosen.unique().tolist():
        if not 0 <= expert < len(weights[0]):
            raise IndexError(f"chosen: expected experts from 0 to {len(weights[0]) - 1}, got {expert}")
        row, choice = (chosen == expert).nonzero(as_tuple=True)
        inputs = x[row, choice.clamp(max=x.shape[1] - 1)]
        added = None if bias is None else bias[expert]
        y[row, choice] = linear(inputs, *(weight[expert] for weight in weights), *options, added)
    return y


def quantize_activations(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Float32 [..., K] -> whole numbers from -127 to 127 [..., groups, group] and scales [..., groups, 1]."""
    x = F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    amax = x.abs().amax(-1, keepdim=True)
    tiny = amax < 1e-36
    inverse = torch.full_like(amax, 127) / amax  # 127 / amax would be 127 * (1 / amax), rounded twice
    return (x * inverse.masked_fill(tiny, 0)).round(), (amax / 127).masked_fill(tiny, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Packing: for the kernels of the device where the tensors are


def pack_int8(weight: Tensor) -> Tensor:
    """int8 [N, K] -> what linear_int8 takes: as it is on CUDA, else as packing.pack_int8 has it."""
    if weight.device.type == "cuda" and cuda_kernels() is not None:
        return weight.contiguous()
    return packing.pack_int8(weight)


def unpack_int8(packed: Tensor, N: int, K: int) -> Tensor:
    """What pack_int8 packed: int8 [N, K]."""
    return packed if packed.dtype == torch.int8 else packing.unpack_int8(packed, N, K)


def pack_scales(scales: Tensor) -> Tensor:
    """[N, groups] -> what linear_int8_grouped takes: [groups, N] on CUDA, else as packing.pack_scales has it."""
    if scales.device.type == "cuda" and cuda_kernels() is not None:
        return scales.t().contiguous()
    return packing.pack_scales(scales)


def unpack_scales(packed: Tensor, N: int) -> Tensor:
    """What pack_scales packed: [N, groups]."""
    return packed.t() if packed.ndim == 2 else packing.unpack_scales(packed, N)


def pack_int4(
    q: Tensor, scales: Tensor, zeros: Tensor | None, K: int, groupsize: int, zero: int | None = None
) -> tuple[Tensor, int]:
    """uint8 [N, ceil(K / 2)], scales and zeros [N, groups] -> (packed, zero); packing.py and cuda.py say how."""
    cuda = cuda_kernels() if q.device.type == "cuda" else None
    return (cuda or packing).pack_int4(q, scales, zeros, K, groupsize, *([] if zero is None else [zero]))


def unpack_int4(
    packed: Tensor, N: int, K: int, groupsize: int, scale_dtype: torch.dtype, zero: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What pack_int4 packed: q uint8 [N, ceil(K / 2)], scales and zeros [N, groups], or None for FP4."""
    cuda = cuda_kernels() if packed.ndim == 1 else None
    return (cuda or packing).unpack_int4(packed, N, K, groupsize, scale_dtype, zero)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class Int8Linear(nn.Module):
    """y = x W^T + b with W int8, w = q * scale; a scale a row, or one for each group of K. Takes the place of
    model.Linear."""

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        out_features: int,
        in_features: int,
        groupsize: int = 0,
        bias: Tensor | None = None,
        order: Tensor | None = None,
    ):
        """`groupsize` 0: a scale a row."""
        super().__init__()
        self.in_features, self.out_features, self.groupsize = in_features, out_features, groupsize
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("order", order, persistent=False)

    @classmethod
    def from_canonical(
        cls, weight: Tensor, scales: Tensor, bias: Tensor | None = None, order: Tensor | None = None
    ) -> "Int8Linear":
        """From int8 [N, K]; scales [N] or [N, K / groupsize] and a bias [N], of any float dtype; an order of the
        inputs as for Int4Linear. ValueError for other shapes."""
        if weight.dtype != torch.int8 or weight.ndim != 2:
            raise ValueError(f"expected int8 [N, K], got {_describe(weight)}")
        N, K = weight.shape
        groupsizes = {(N,): 0} | {(N, K // size): size for size in GROUPSIZES if K % size == 0}
        if scales.shape not in groupsizes or not scales.dtype.is_floating_point:
            raise ValueError(f"expected scales of one of {list(groupsizes)}, got {_describe(scales)}")
        groupsize = groupsizes[scales.shape]
        _check_order(order, K)
        grid = pack_scales(scales) if groupsize else scales.float().contiguous()
        return cls(pack_int8(weight), grid, N, K, groupsize, bias, order)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x[..., self.order]
        return getattr(torch.ops.brisk, self.op)(x, *self.operands)

    @property
    def op(self) -> str:
        return "linear_int8_grouped" if self.groupsize else "linear_int8"

    @property
    def operands(self) -> tuple:
        """What the op takes besides x."""
        sizes = (self.out_features, self.groupsize) if self.groupsize else ()
        return self.packed, self.scales, *sizes, self.bias

    @property
    def weight_bytes(self) -> int:
        """What one decode step reads."""
        return sum(buffer.nbytes for buffer in self.buffers())


class Int4Linear(nn.Module):
    """y = x W^T + b with W int4, w = (q - zero) * scale in groups of K, or 4-bit floats (MXFP4), w = FP4_VALUES[q] *
    scale. Takes the place of model.Linear."""

    def __init__(
        self,
        packed: Tensor,
        zero: int,
        out_features: int,
        in_features: int,
        groupsize: int,
        scale_dtype: torch.dtype,
        bias: Tensor | None,
        order: Tensor | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.groupsize = in_features, out_features, groupsize
        self.scale_dtype, self.zero = scale_dtype, zero
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("order", order, persistent=False)

    @classmethod
    def from_canonical(
        cls,
        q: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        in_features: int,
        groupsize: int,
        bias: Tensor | None = None,
        order: Tensor | None = None,
    ) -> "Int4Linear":
        """From uint8 [N, ceil(K / 2)], the low nibble the even k; scales (float16, bfloat16 or float32) and zeros (in
        units of q, any dtype) [N, ceil(K / groupsize)]; a bias [N] of any float dtype; an order of the inputs, int32
        [K], where x[..., order] is what the weight is for. Without zeros, q are codes of 4-bit floats, in groups of 32
        with bfloat16 scales. ValueError for other shapes."""
        N, K = q.shape[0], in_features
        shape = (N, -(-K // groupsize))
        if groupsize not in GROUPSIZES or q.dtype != torch.uint8 or q.shape != (N, -(-K // 2)):
            raise ValueError(f"expected uint8 [N, {-(-K // 2)}] in groups of 32, 64 or 128, got {_describe(q)}")
        _check_grid(scales, zeros, shape, groupsize)
        _check_order(order, K)
        packed, zero = pack_int4(q, scales, zeros, K, groupsize)
        return cls(packed, zero, N, K, groupsize, scales.dtype, bias, order)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x[..., self.order]
        return torch.ops.brisk.linear_int4(x, *self.operands)

    op = "linear_int4"

    @property
    def operands(self) -> tuple:
        """What the op takes besides x."""
        return self.packed, self.out_features, self.groupsize, self.scale_dtype, self.zero, self.bias

    @property
    def weight_bytes(self) -> int:
        """What one decode step reads."""
        return sum(buffer.nbytes for buffer in self.buffers())


def _check_grid(scales: Tensor, zeros: Tensor | None, shape: tuple[int, ...], groupsize: int) -> None:
    """Of int4 weights: ValueError for scales and zeros of another shape, or none for what 4-bit floats have."""
    if scales.shape != shape or not scales.dtype.is_floating_point:
        raise ValueError(f"expected scales {list(shape)}, got {_describe(scales)}")
    if zeros is not None and zeros.shape != shape:
        raise ValueError(f"expected zeros {list(shape)}, got {_describe(zeros)}")
    if zeros is None and (groupsize != 32 or scales.dtype != torch.bfloat16):
        raise ValueError(
            f"expected zeros, or groups of 32 with bfloat16 scales, got {groupsize} with {_describe(scales)}"
        )


def _check_order(order: Tensor | None, K: int) -> None:
    if order is not None and order.shape != (K,):
        raise ValueError(f"expected an order of {K} inputs, got {_describe(order)}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# ---------------------------------------------------------------------------------------------------------------------
# The versions for CUDA


@functools.cache
def cuda_kernels() -> ModuleType | None:
    """cuda.py, whose ops are registered for CUDA, with those of cuda_experts.py; None, after a warning, where Triton is
    missing."""
    try:
        from kernels import cuda, cuda_experts
    except ImportError as error:
        log(f"warning: no Triton, so quantized layers and attention will be slow: {error}")
        return None
    for function in (
        cuda.linear_int8, cuda.linear_int8_grouped, cuda.linear_int4, cuda.decode_attention, linear_bf16,
        cuda_experts.linear_experts, cuda_experts.linear_int8_experts, cuda_experts.linear_int8_grouped_experts,
        cuda_experts.linear_int4_experts,
    ):  # fmt: skip
        _library.impl(function.__name__, function, "CUDA")
    return cuda
