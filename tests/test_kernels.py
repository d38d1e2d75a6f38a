"""The ops of kernels/ against float64, in every instruction set that this processor has, and under torch.compile.

The bounds follow from the arithmetic: the output is rounded once to its dtype, sums are in float32, and where
activations are quantized, each is off by at most half a step of its group.
"""

import ctypes
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from torch import nn

import kernels
from errors import UserError
from kernels import Int4Linear, Int8Linear, build, packing

ROOT = Path(__file__).parent.parent
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
few = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def library():
    if kernels.cpu_library() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="module", params=[*build.ISAS, "reference"])
def op(request, library, tmp_path_factory):
    """The ops, as one instruction set or the reference versions do them."""
    best = build.available_isas()[0]
    if request.param == "reference":
        yield kernels
    elif request.param in build.available_isas():
        build.use_isa(request.param)
        yield torch.ops.brisk
    elif request.param in ("amx", "avx512"):
        library = emulated(request.param, tmp_path_factory.mktemp("emulated") / "kernels.so")
        build._use(kernels.cpu_library(), library, build.GEMMS[request.param][0])
        yield torch.ops.brisk
    else:
        pytest.skip(f"this processor has no {request.param}")
    build.use_isa(best)


def emulated(isa: str, library: Path) -> ctypes.CDLL:
    """The kernels on a processor without this instruction set: emulated/immintrin.h is found before the compiler's."""
    sources = [build.FOLDER / source for source in build.KERNELS]
    flags = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", f"-DBRISK_ISA={isa}", "-shared"]
    subprocess.run(
        [os.environ.get("CXX", "g++"), *flags, "-I", ROOT / "tests" / "emulated", *sources, "-o", library], check=True
    )
    return ctypes.CDLL(str(library))


# ---------------------------------------------------------------------------------------------------------------------
# What may go in


def activations(generator: torch.Generator, rows: int, K: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, K, generator=generator)
    if kind == "outlier":
        x[:, K // 2] *= 1000
    elif kind == "large":
        x *= 1e3 if dtype == torch.float16 else 1e15
    elif kind == "tiny":
        x *= 1e-4 if dtype == torch.float16 else 1e-15
    elif kind == "zero":
        x.zero_()
    elif kind == "equal":
        x[:] = x[0, 0]
    elif kind == "one":
        x = F.one_hot(torch.randint(0, K, (rows,), generator=generator), K).float() * 3
    return x.to(dtype)


shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 17),
        "N": st.one_of(st.integers(1, 100), st.just(128)),
        "K": st.one_of(st.integers(1, 400), st.sampled_from([64, 256, 512])),
        "kind": st.sampled_from(["normal", "normal", "outlier", "large", "tiny", "zero", "equal", "one"]),
        "dtype": st.sampled_from(["bf16", "f16", "f32"]),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def draw(shape: dict) -> tuple[torch.Generator, torch.Tensor, torch.Tensor | None]:
    """A generator, activations [rows, K] and a bias [N] that the activations' dtype holds exactly."""
    dtype = DTYPES[shape["dtype"]]
    generator = torch.Generator().manual_seed(shape["seed"])
    x = activations(generator, shape["rows"], shape["K"], shape["kind"], dtype)
    bias = torch.randn(shape["N"], generator=generator).to(dtype) if shape["bias"] else None
    return generator, x, bias


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias, extra: torch.Tensor | float = 0.0) -> None:
    """y [rows, N] against x W^T + b in float64; `extra` is what quantizing the activations may change."""
    products = x.double().abs() @ weight.double().abs().T
    exact = x.double() @ weight.double().T
    if bias is not None:
        exact, products = exact + bias.double(), products + bias.double().abs()
    tiny = torch.finfo(y.dtype).tiny * (1 + x.shape[1])  # what is smaller may be flushed to zero
    summed = products * 2**-23 * (8 + x.shape[1] / 8)  # float32, in lanes
    rounded = (exact.abs() + extra + summed) * torch.finfo(y.dtype).eps / 2
    bound = rounded + summed + extra + tiny
    finite = exact.abs() + bound < torch.finfo(y.dtype).max
    error = (y.double() - exact).abs()
    assert y.shape == exact.shape
    assert (error[finite] <= bound[finite]).all(), (error / bound)[finite].max()


def activation_error(x: torch.Tensor, weight: torch.Tensor, group: int) -> torch.Tensor:
    """At most half a step of each group (and what float32 rounds) times the sum of the weights in it, [rows, N]."""
    K = x.shape[1]
    pad = (0, -K % group)
    steps = F.pad(x.double().abs(), pad).unflatten(1, (-1, group)).amax(-1) / 127
    sums = F.pad(weight.double().abs(), pad).unflatten(1, (-1, group)).sum(-1)
    return (0.5001 * steps) @ sums.T + 1e-36 * sums.sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers


@few
@given(shape=shapes)
def test_bf16(op, shape):
    generator, x, bias = draw(shape | {"dtype": "bf16"})
    weight = torch.randn(shape["N"], shape["K"], generator=generator).bfloat16()
    check(op.linear_bf16(x, weight, bias), x, weight, bias)


@few
@given(shape=shapes, low=st.sampled_from([-128, -127, 0]))
def test_int8(op, shape, low):
    generator, x, bias = draw(shape)
    q = torch.randint(low, 128, (shape["N"], shape["K"]), dtype=torch.int8, generator=generator)
    scales = torch.rand(shape["N"], generator=generator) / 100
    y = op.linear_int8(x, kernels.pack_int8(q), scales, bias)
    weight = q.double() * scales.double()[:, None]
    check(y, x, weight, bias, activation_error(x, weight, 128))


@few
@given(
    shape=shapes,
    groupsize=st.sampled_from(kernels.GROUPSIZES),
    groups=st.integers(1, 7),
    scale_dtype=st.sampled_from(["bf16", "f16", "f32"]),
    low=st.sampled_from([-128, -127, 0]),
)
def test_int8_grouped(op, shape, groupsize, groups, scale_dtype, low):
    N, K = shape["N"], groups * groupsize
    generator, x, bias = draw(shape | {"K": K})
    q, scales = int8_weight(generator, N, K, groupsize, scale_dtype, low)
    y = op.linear_int8_grouped(x, kernels.pack_int8(q), kernels.pack_scales(scales), N, groupsize, bias)
    weight = q.double() * scales.double().repeat_interleave(groupsize, 1)
    check(y, x, weight, bias, activation_error(x, weight, groupsize))


def int8_weight(generator, N: int, K: int, groupsize: int, scale_dtype: str = "bf16", low: int = -128):
    q = torch.randint(low, 128, (N, K), dtype=torch.int8, generator=generator)
    return q, (torch.rand(N, K // groupsize, generator=generator) / 100).to(DTYPES[scale_dtype])


@few
@given(
    shape=shapes,
    groupsize=st.sampled_from(kernels.GROUPSIZES),
    scale_dtype=st.sampled_from(["bf16", "f16", "f32"]),
    zero_kind=st.sampled_from(["same", "whole", "float"]),
)
def test_int4(op, shape, groupsize, scale_dtype, zero_kind):
    generator, x, bias = draw(shape)
    q, scales, zeros = int4_weight(generator, shape["N"], shape["K"], groupsize, scale_dtype, zero_kind)
    packed, zero = kernels.pack_int4(q, scales, zeros, shape["K"], groupsize)
    assert {"same": zero == 8, "whole": zero != packing.ZERO_FLOATS, "float": True}[zero_kind]
    y = op.linear_int4(x, packed, shape["N"], groupsize, scales.dtype, zero, bias)
    weight = int4_floats(q, scales, zeros, shape["K"], groupsize)
    # The zero is subtracted after the sum: float32 rounds q and the zero on their own.
    apart = (x.double().abs() @ weight_size(scales, zeros, shape["K"], groupsize).T) * 2**-20
    check(y, x, weight, bias, activation_error(x, weight, groupsize) + apart)


def int4_weight(generator, N: int, K: int, groupsize: int, scale_dtype: str = "f16", zero_kind: str = "same"):
    groups = -(-K // groupsize)
    q = torch.randint(0, 256, (N, -(-K // 2)), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(N, groups, generator=generator) / 8).to(DTYPES[scale_dtype])
    zeros = torch.full((N, groups), 8.0)
    if zero_kind == "whole":
        zeros = torch.randint(0, 17, (N, groups), generator=generator).float()
    elif zero_kind == "float":
        zeros = torch.randn(N, groups, generator=generator) * 10
    return q, scales, zeros


def int4_floats(q, scales, zeros, K: int, groupsize: int) -> torch.Tensor:
    """The weight [N, K] in float64, by the definition of the format."""
    levels = torch.stack((q % 16, q // 16), -1).flatten(1)[:, :K].double()
    zeros, scales = (grid.double().repeat_interleave(groupsize, 1)[:, :K] for grid in (zeros, scales))
    return (levels - zeros) * scales


def weight_size(scales: torch.Tensor, zeros: torch.Tensor, K: int, groupsize: int) -> torch.Tensor:
    return ((15 + zeros.double().abs()) * scales.double().abs()).repeat_interleave(groupsize, 1)[:, :K]


@pytest.mark.parametrize("groupsize", kernels.GROUPSIZES)
@pytest.mark.parametrize("zeros", [(0, 0), (8, 8), (16, 16), (0, 16), (17, 17)])
def test_int4_at_its_extremes(op, groupsize, zeros):
    """Weights 0 or 15, all activations of a block the largest: sums need all of 16 bits. In tiles of every size."""
    K, row, generator = 323, torch.arange(64)[:, None], torch.Generator().manual_seed(0)
    q = (row // 2 % 2 * 255).to(torch.uint8).repeat(1, 162)
    scales = torch.ones(64, -(-K // groupsize), dtype=torch.bfloat16)
    all_zeros = torch.tensor(zeros).float()[row % 2].expand(scales.shape)
    packed, zero = kernels.pack_int4(q, scales, all_zeros, K, groupsize)
    weight = (row // 2 % 2 * 15 - all_zeros[:, :1]).double().expand(64, K)
    for rows in range(1, 18):
        x = torch.randn(rows, 11, generator=generator).sign().repeat_interleave(32, 1)[:, :K]
        y = op.linear_int4(x, packed, 64, groupsize, scales.dtype, zero, None)
        torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-5, atol=0.01)


def test_int4_low_nibble_is_the_even_k():
    q = torch.tensor([[0x21, 0x43]], dtype=torch.uint8)
    levels = packing.unpack_nibbles(q, 4)
    assert levels.tolist() == [[1, 2, 3, 4]] and torch.equal(packing.pack_nibbles(levels), q)
    weight = packing.dequantize(levels.float(), torch.tensor([[0.5]]), torch.tensor([[8.0]]), 32)
    assert weight.tolist() == [[-3.5, -3.0, -2.5, -2.0]]
    layer = Int4Linear.from_canonical(q, torch.tensor([[0.5]]), torch.tensor([[8.0]]), 4, 32)
    assert layer(torch.eye(4)).flatten().tolist() == [-3.5, -3.0, -2.5, -2.0]


@few
@given(
    N=st.integers(1, 100),
    K=st.integers(1, 300),
    groupsize=st.sampled_from(kernels.GROUPSIZES),
    seed=st.integers(0, 999),
)
def test_packing_can_be_undone(N, K, groupsize, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator)
    assert torch.equal(kernels.unpack_int8(kernels.pack_int8(w), N, K), w)
    grid = torch.rand(N, -(-K // groupsize), generator=generator)
    assert torch.equal(kernels.unpack_scales(kernels.pack_scales(grid), N), grid)
    kind = ["same", "whole", "float"][seed % 3]
    q, scales, zeros = int4_weight(generator, N, K, groupsize, ["bf16", "f16", "f32"][seed // 3 % 3], kind)
    packed, zero = kernels.pack_int4(q, scales, zeros, K, groupsize)
    unpacked = kernels.unpack_int4(packed, N, K, groupsize, scales.dtype, zero)
    for before, after in zip((q, scales, zeros), unpacked, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(op, value):
    x = torch.randn(3, 200).bfloat16()
    x[1, 77] = value
    w = torch.randint(-127, 128, (40, 200), dtype=torch.int8)
    grid = kernels.pack_scales(torch.ones(40, 6))
    outputs = [
        op.linear_bf16(x, torch.randn(40, 200).bfloat16(), None),
        op.linear_int8(x, kernels.pack_int8(w), torch.ones(40), None),
        op.linear_int8_grouped(x[:, :192], kernels.pack_int8(w[:, :192]), grid, 40, 32, None),
    ]
    for kind in ("same", "whole", "float"):
        q, scales, zeros = int4_weight(torch.Generator().manual_seed(0), 40, 200, 32, "bf16", kind)
        packed, zero = kernels.pack_int4(q, scales, zeros, 200, 32)
        outputs.append(op.linear_int4(x, packed, 40, 32, torch.bfloat16, zero, None))
    for y in outputs:
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


def test_leading_dimensions_and_views(op):
    x = torch.randn(2, 3, 100, 2)[..., 0].bfloat16()
    w = torch.randint(-127, 128, (40, 100), dtype=torch.int8)
    scales = torch.rand(40)
    y = op.linear_int8(x, kernels.pack_int8(w), scales, None)
    assert y.shape == (2, 3, 40)
    torch.testing.assert_close(y.view(6, 40), op.linear_int8(x.reshape(6, 100), kernels.pack_int8(w), scales, None))
    assert op.linear_int8(x[:0], kernels.pack_int8(w), scales, None).shape == (0, 3, 40)


@few
@given(
    rows=st.integers(17, 140), N=st.integers(1, 70), K=st.integers(1, 600), bias=st.booleans(), seed=st.integers(0, 9)
)
def test_bf16_of_many_rows(op, rows, N, K, bias, seed):
    """A GEMM of tiles: of rows, of columns, of the depth, with something left over of each."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, K, generator=generator).bfloat16() for n in (rows, N))
    added = torch.randn(N, generator=generator).bfloat16() if bias else None
    check(op.linear_bf16(x, weight, added), x, weight, added)
    if 32 < K < 43:  # PyTorch's own GEMM, which some processors use, then spreads a NaN to the next row (AMX, 2.13)
        return
    x[rows // 2, K // 2] = float("nan")
    y = op.linear_bf16(x, weight, added)
    assert y[rows // 2].isnan().all() and y.isnan().sum() == N


KINDS = ["int8", "int8_grouped", "same", "whole", "float", "fp4"]  # int4 has zeros of three kinds


def quantized_layer(op, generator, kind: str, N: int, groups: int, groupsize: int, missing: int, bias):
    """A layer of some groups, the last one of which may lack some inputs -> (inputs, x -> y, the weight, what scales of
    zeros make of ones)."""
    K = groups * groupsize - (missing if kind in ("int8", "same", "whole", "float") else 0)
    if kind == "int8":
        q = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator)
        scales = torch.rand(N, generator=generator) / 100
        weight = q.double() * scales.double()[:, None]
        return K, lambda x: op.linear_int8(x, kernels.pack_int8(q), scales, bias), weight, 0 * weight
    if kind == "int8_grouped":
        q, scales = int8_weight(generator, N, K, groupsize)
        weight = q.double() * scales.double().repeat_interleave(groupsize, 1)
        packed = kernels.pack_int8(q), kernels.pack_scales(scales)
        return K, lambda x: op.linear_int8_grouped(x, *packed, N, groupsize, bias), weight, 0 * weight
    q, scales, zeros = int4_weight(generator, N, K, groupsize, "bf16", "same" if kind == "fp4" else kind)
    if kind == "fp4":
        weight, zeros = packing.dequantize(packing.unpack_nibbles(q, K), scales.double(), None, 32), None
        size = 0 * weight
    else:
        weight = int4_floats(q, scales, zeros, K, groupsize)
        size = weight_size(scales, zeros, K, groupsize)
    packed, zero = kernels.pack_int4(q, scales, zeros, K, groupsize)
    return K, lambda x: op.linear_int4(x, packed, N, groupsize, scales.dtype, zero, bias), weight, size


@settings(few, max_examples=15)
@given(
    rows=st.integers(64, 140),
    N=st.integers(1, 70),
    groups=st.integers(1, 11),
    groupsize=st.sampled_from(kernels.GROUPSIZES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 9),
)
def test_quantized_layers_of_many_rows(op, request, rows, N, groups, groupsize, kind, seed):
    """With AMX weights become bf16, off by half of its last place, and activations stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    groupsize = 32 if kind == "fp4" else groupsize
    bias = torch.randn(N, generator=generator).bfloat16()
    K, layer, weight, size = quantized_layer(op, generator, kind, N, groups, groupsize, seed, bias)
    x = torch.randn(rows, K, generator=generator).bfloat16()
    y, zeros_size = layer(x), (x.double().abs() @ size.T) * 2**-20
    group = 128 if kind == "int8" else groupsize
    if request.node.callspec.params["op"] == "amx":
        off = x.double().abs() @ weight.abs().T * 2**-8
    else:
        off = activation_error(x, weight, group)
    check(y, x, weight, bias, off + zeros_size)


@settings(few, max_examples=25)
@given(
    rows=st.integers(2, 63),
    N=st.integers(1, 200),
    groups=st.integers(1, 11),
    groupsize=st.sampled_from(kernels.GROUPSIZES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 9),
)
def test_a_row_is_the_same_among_some(op, rows, N, groups, groupsize, kind, seed):
    """To the bit, whatever multiplies so many."""
    if op is kernels:
        pytest.skip("the reference is a GEMM of floats, where a row may depend on their number")
    generator = torch.Generator().manual_seed(seed)
    groupsize = 32 if kind == "fp4" else groupsize
    K, layer, _, _ = quantized_layer(op, generator, kind, N, groups, groupsize, seed, None)
    x = torch.randn(rows, K, generator=generator).bfloat16()
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


def test_many_rows():
    torch.manual_seed(0)
    x = torch.randn(70, 256).bfloat16()
    weight = torch.randn(96, 256).bfloat16()
    check(torch.ops.brisk.linear_bf16(x, weight), x, weight, None)
    q = torch.randint(-127, 128, (96, 256), dtype=torch.int8)
    weight = q.double() / 100
    y = Int8Linear.from_canonical(q, torch.full((96,), 0.01, dtype=torch.float64).float())(x)
    check(y, x, weight, None, activation_error(x, weight, 128) + 1e-5)


def test_the_instruction_sets_agree():
    """Activations are quantized to the same integers everywhere, so only the order of float32 sums differs."""
    torch.manual_seed(0)
    x = torch.randn(5, 512).bfloat16() * torch.tensor([1, 1e-3, 30, 1e5, 1]).bfloat16()[:, None]
    x = x.float()  # of bfloat16 numbers: many lie exactly between two integers once they are scaled
    weight = torch.randint(-127, 128, (70, 512), dtype=torch.int8)
    rows, groups = (Int8Linear.from_canonical(weight, scales) for scales in (torch.rand(70), torch.rand(70, 8)))
    expected = {
        rows: kernels.linear_int8(x, rows.packed, rows.scales),
        groups: kernels.linear_int8_grouped(x, groups.packed, groups.scales, 70, 64),
    }
    for isa in reversed(build.available_isas()):
        build.use_isa(isa)
        for layer, y in expected.items():
            torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


def test_groups_of_equal_scales_are_rows():
    """With a scale that all groups of a row share, and groups as large as those of the activations, both are one."""
    torch.manual_seed(0)
    weight, scales, bias = torch.randint(-128, 128, (70, 384), dtype=torch.int8), torch.rand(70), torch.randn(70)
    rows = Int8Linear.from_canonical(weight, scales, bias)
    groups = Int8Linear.from_canonical(weight, scales[:, None].repeat(1, 3), bias)
    assert (rows.groupsize, groups.groupsize) == (0, 128)
    for count in (1, 3, 9):
        x = torch.randn(count, 384)
        torch.testing.assert_close(groups(x), rows(x), rtol=1e-5, atol=1e-4)


def test_order_of_an_int8_layer():
    """y = W x[order], with any leading dimensions."""
    weight, scales, order = torch.randint(-128, 128, (8, 64), dtype=torch.int8), torch.rand(8, 2), torch.randperm(64)
    plain = Int8Linear.from_canonical(weight, scales)
    ordered = Int8Linear.from_canonical(weight, scales, order=order.int())
    x = torch.randn(2, 3, 64)
    assert torch.equal(ordered(x), plain(x[..., order]))
    assert ordered.weight_bytes == plain.weight_bytes + 64 * 4
    with pytest.raises(ValueError, match="order of 64 inputs"):
        Int8Linear.from_canonical(weight, scales, order=order[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Attention

attention_shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "S": st.integers(1, 5),
        "KV": st.integers(1, 3),
        "G": st.sampled_from([1, 2, 3, 4, 7, 8]),
        "D": st.sampled_from([2, 16, 20, 32, 48, 64, 80, 96, 128, 160]),
        "T": st.integers(8, 700),
        "window": st.one_of(st.none(), st.integers(1, 10), st.integers(11, 600)),
        "dtype": st.sampled_from(["bf16", "f16", "f32"]),
        "size": st.sampled_from([0.0, 1.0, 1.0, 30.0]),  # of the queries
        "sinks": st.sampled_from([None, None, "bf16", "f16", "f32"]),
        "scale": st.sampled_from([None, None, 0.05, 1.0]),
        "softcap": st.sampled_from([0.0, 0.0, 0.5, 50.0]),
        "ring": st.booleans(),
        "cache": st.sampled_from(["float", "float", "int8", "int8 exact"]),
        "seed": st.integers(0, 2**31),
    }
)

# Position 586, so whole blocks of keys, and the head sizes that the CPU kernels know at compile time.
FULL = dict(B=1, S=1, KV=2, G=7, T=700, window=None, dtype="bf16", size=1.0, seed=3)
FULL |= dict(sinks=None, scale=None, softcap=0.0, ring=False, cache="float")
ALL = FULL | dict(window=600, sinks="bf16", scale=0.1, softcap=5.0, ring=True)


def exact_attention(
    q, k, v, pos, window=None, sinks=None, scale=None, softcap=0.0, ring=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64, a query after the other over what it sees -> [B, S, H, D], slots seen [B, T]."""
    (B, S, H, D), (KV, T) = q.shape, k.shape[1:3]
    y, seen = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(B, T, dtype=torch.bool)
    for b, s in itertools.product(range(B), range(S)):
        p = pos[b, s].item()
        slots = torch.arange(0 if window is None else max(0, p - window + 1), p + 1)
        if ring:
            slots %= T - 1
        seen[b, slots] = True
        keys, values = (cache[b, :, slots].double().repeat_interleave(H // KV, 0) for cache in (k, v))  # [H, n, D]
        scores = torch.einsum("hd,hnd->hn", q[b, s].double(), keys) * (D**-0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        sink = torch.full((H, 1), -torch.inf, dtype=torch.float64) if sinks is None else sinks.double()[:, None]
        most = torch.maximum(scores.amax(1, keepdim=True), sink)
        weights = (scores - most).exp()
        y[b, s] = torch.einsum("hn,hnd->hd", weights / (weights.sum(1, keepdim=True) + (sink - most).exp()), values)
    return y, seen


def int8_cache(
    generator: torch.Generator, *shape: int, exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What it is in float32, int8 numbers of this shape and their scales; `exact`: bf16 holds that as well."""
    q = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape[:-1], generator=generator) / 32 + 2**-9
    scale = 2.0 ** scale.log2().floor() if exact else scale
    return q * scale[..., None], q, scale


@few
@given(shape=attention_shapes)
@example(FULL | {"D": 64})
@example(FULL | {"D": 64, "cache": "int8 exact"})
@example(FULL | {"D": 128, "cache": "int8 exact", "G": 4})
@example(ALL | {"D": 64, "B": 3, "S": 3, "cache": "int8 exact"})
@example(ALL | {"D": 80, "B": 3, "dtype": "f32", "cache": "int8"})
@example(FULL | {"D": 128})
@example(ALL | {"D": 64})
@example(ALL | {"D": 128, "B": 3, "S": 3})
@example(ALL | {"D": 80, "B": 3, "dtype": "f32"})
def test_attention(op, shape):
    B, S, KV, G, D, T = (shape[name] for name in ("B", "S", "KV", "G", "D", "T"))
    dtype, generator = DTYPES[shape["dtype"]], torch.Generator().manual_seed(shape["seed"])
    options = {name: shape[name] for name in ("window", "scale", "softcap", "ring")}
    start = torch.randint(0, T - S + 1, (B, 1), generator=generator)
    if shape["ring"]:
        options["window"] = min(shape["window"] or T, T - S)
        start[1:2] += T * 3
        start[2:] += 10**12
    pos = start + torch.arange(S)
    if S > 1 and start[0, 0] + S < T:
        pos[0, -1] = T - 1  # padding, as the prefill puts it into the cache's last slot
    H = KV * G
    options["sinks"] = shape["sinks"] and (torch.randn(H, generator=generator) * 3).to(DTYPES[shape["sinks"]])
    q = (torch.randn(B, S, H, D, generator=generator) * shape["size"]).to(dtype)
    k, v = (torch.randn(B + 1, KV, T, D, generator=generator).to(dtype) for _ in range(2))
    caches = k, v
    if shape["cache"] != "float":
        (k, *key_parts), (v, *value_parts) = (int8_cache(generator, B + 1, KV, T, D) for _ in range(2))
        caches = key_parts[0], value_parts[0]
        scales = options["k_scale"], options["v_scale"] = key_parts[1], value_parts[1]
    if shape["cache"] == "int8 exact":  # multiples of 1057 / 32767 of the largest, to which queries may be rounded
        q = (torch.randint(-31, 32, q.shape, generator=generator) * (shape["size"] // 30 + 1) / 8).to(dtype)
        q[..., 0] = q.new_tensor(31 * (shape["size"] // 30 + 1) / 8)
    definition = {name: value for name, value in options.items() if not name.endswith("_scale")}
    expected, seen = exact_attention(q, k, v, pos, **definition)
    factor = options["scale"] or D**-0.5
    largest = q.double().abs().amax() * k.double().abs().amax() * D * factor
    for cache in caches if shape["cache"] == "float" else scales:  # what no query of a row sees may be anything
        cache[:B].masked_fill_(~seen[:, None].view(B, 1, T, *[1] * (cache.ndim - 3)), float("nan"))
    y = op.decode_attention(q, *caches, pos, **options)
    # Scores are off by what float32 rounds of the largest, and a cap by what it rounds of itself; values are below 6.
    scores = largest.item() + options["softcap"]
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2**-22 * (8 + scores) * 6 + torch.finfo(dtype).tiny
    if shape["cache"] == "int8":  # queries may be rounded to 16 bits: scores are off by so much at most
        off = q.double().abs().amax() / 65534 * k.double().abs().sum(-1).amax() * factor
        bound += torch.expm1(2 * off) * 8
    assert y.dtype == dtype and ((y.double() - expected).abs() <= bound).all()


@few
@given(
    shape=attention_shapes,
    S=st.integers(1, 70),
    L=st.integers(1, 400),
    first=st.sampled_from([None, -5, 0, 1000]),
    dense=st.booleans(),
)
@example(FULL | {"D": 64, "G": 4}, 40, 300, None, True)
@example(FULL | {"D": 128, "B": 3, "window": 40}, 40, 300, -5, False)
@example(FULL | {"D": 80, "G": 2, "B": 2}, 70, 300, -5, False)
@example(FULL | {"D": 80, "G": 2, "B": 2, "cache": "int8"}, 70, 300, -5, False)
@example(ALL | {"D": 64, "B": 2, "cache": "int8"}, 70, 300, None, True)
@example(ALL | {"D": 64, "B": 2}, 70, 150, 1000, True)
def test_prefill_attention(op, shape, S, L, first, dense):
    B, KV, G, D = (shape[name] for name in ("B", "KV", "G", "D"))
    reference = op is kernels  # rounds scores to its dtype, and does not hide NaN
    dtype = torch.float32 if reference else DTYPES[shape["dtype"]]
    generator, S, H = torch.Generator().manual_seed(shape["seed"]), min(S, L), KV * G
    options = {name: shape[name] for name in ("window", "scale", "softcap")}
    options["sinks"] = shape["sinks"] and (torch.randn(H, generator=generator) * 3).to(DTYPES[shape["sinks"]])
    slots = torch.randint(0, L - S + 1, (B, 1), generator=generator) + torch.arange(S)
    slots[0, -1] = torch.randint(0, L, (), generator=generator)  # padding may be anywhere
    q = (torch.randn(B, S, H, D, generator=generator) * shape["size"]).to(dtype)
    k, v = (torch.randn(B + 1, KV, L, D, generator=generator).to(dtype) for _ in range(2))
    caches, quantized = (k, v), shape["cache"] != "float"
    if quantized:
        (k, *key_parts), (v, *value_parts) = (int8_cache(generator, B + 1, KV, L, D, exact=True) for _ in range(2))
        caches = key_parts[0], value_parts[0], key_parts[1], value_parts[1]
    rows = torch.randperm(B + 1, generator=generator)[:B]
    begin = max(0, -(first or 0))  # the slot of position 0
    sees, (expected, size) = slots >= begin, torch.zeros(2, *q.shape, dtype=torch.float64)
    for b, row in enumerate(rows):
        keys, values = (cache[row : row + 1, :, begin:] for cache in (k, v))
        at = q[b : b + 1, sees[b]], keys, values, slots[b : b + 1, sees[b]] - begin
        expected[b, sees[b]], _ = exact_attention(*at, **options)
        size[b, sees[b]], _ = exact_attention(at[0], keys, values.abs(), at[3], **options)
        if not reference:  # what is before position 0 or beyond all queries may be anything
            for cache in caches[-2:]:
                cache[row, :, :begin] = float("nan")
                cache[row, :, slots[b].max() + 1 :] = float("nan")
    pos, first_pos = slots + (first or 0), None if first is None else torch.full((B,), first)
    largest = q.double().abs().amax() * k.double().nan_to_num().abs().amax() * D * (options["scale"] or D**-0.5)
    if not dense:  # as of [B, L, KV, D]
        caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
    scales = dict(zip(("k_scale", "v_scale"), caches[2:], strict=False))
    y = op.prefill_attention(q, *caches[:2], pos, first_pos, rows=rows, **options, **scales)
    scores = largest.item() + options["softcap"]
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2**-22 * (8 + scores) * 6 + torch.finfo(dtype).tiny
    if dtype == torch.bfloat16:  # weights may be rounded to it
        bound += torch.finfo(dtype).eps / 2 * size
    assert y.dtype == dtype and y.shape == q.shape and y.is_contiguous()
    assert ((y.double() - expected).abs() <= bound)[sees].all()


def test_attention_of_a_long_cache(op):
    """Of more parts than are put together at once."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*s, generator=generator) for s in ((1, 1, 4, 32), (1, 2, 5001, 32), (1, 2, 5001, 32)))
    y = op.decode_attention(q, k, v, torch.tensor([[4800]]), None, None, None, 0.0, False, None, None, None)
    k, v = (x[:, :, :4801].double().repeat_interleave(2, 1) for x in (k, v))
    exact = F.scaled_dot_product_attention(q.double().transpose(1, 2), k, v).transpose(1, 2)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-6)


def test_attention_sees_nothing_of_other_queries(op):
    """Of two queries of one row, the earlier one must not be touched by what the later one sees."""
    q = torch.randn(1, 2, 4, 64).bfloat16()
    k, v = torch.randn(1, 2, 200, 64).bfloat16(), torch.randn(1, 2, 200, 64).bfloat16()
    k[:, :, 50:], v[:, :, 50:] = float("nan"), float("nan")
    y = op.decode_attention(q, k, v, torch.tensor([[49, 199]]), None)
    assert y[:, 0].isfinite().all() and y[:, 1].isnan().all()


def test_a_ring_holds_the_last_positions(op):
    """Written token by token, far beyond its length, with proposals rolled back, it gives what a whole cache gives."""
    torch.manual_seed(0)
    window, S, length = 20, 4, 150
    q = torch.randn(1, length, 4, 16)
    whole = torch.randn(2, 1, 2, length, 16)
    ring = torch.full((2, 1, 2, window + S, 16), float("nan"))
    slots = window + S - 1
    for p in range(0, length, 2):  # writes S tokens, of which the last two are written again, as others
        pos = torch.arange(p, min(p + S, length))[None]
        ring[..., pos[0] % slots, :] = torch.cat(
            (whole[..., pos[0, :2], :], torch.randn(2, 1, 2, pos.shape[1] - 2, 16)), 3
        )
        y = op.decode_attention(q[:, pos[0]], *ring, pos, window, ring=True)
        expected = op.decode_attention(q[:, pos[0, :2]], *whole, pos[:, :2], window)
        torch.testing.assert_close(y[:, :2], expected)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("parked", [300, 131_072, 2**40, 2**63 - 1])
def test_parked_rows_and_padding_change_nothing_of_others(op, parked, ring):
    torch.manual_seed(0)
    q, sinks = torch.randn(3, 3, 4, 64).bfloat16(), torch.randn(4)
    k, v = torch.randn(2, 3, 2, 300, 64).bfloat16()
    pos = torch.tensor([[100, 101, parked], [parked] * 3, [200, 201, 202]])
    begin = time.monotonic()
    y = op.decode_attention(q, k, v, pos, 50, sinks, ring=ring)
    assert time.monotonic() - begin < 5  # what is seen counts, and not how far apart positions are
    k[1], v[1] = float("nan"), float("nan")
    for b, count in ((0, 2), (2, 3)):
        alone = op.decode_attention(q[b : b + 1, :count], k[b:], v[b:], pos[b : b + 1, :count], 50, sinks, ring=ring)
        torch.testing.assert_close(y[b : b + 1, :count], alone)
    op.decode_attention(q, k, v, pos, 299, softcap=3.0, ring=ring)


@pytest.mark.parametrize("ring", [False, True])
def test_attention_of_some_rows_of_the_cache(op, ring):
    """In any order, more than once, more than the cache has: each gives what it gives as the only one."""
    torch.manual_seed(0)
    q, pos = torch.randn(5, 3, 4, 64).bfloat16(), torch.randint(60, 200, (5, 1)) + torch.arange(3)
    k, v = torch.randn(2, 4, 2, 300, 64).bfloat16()
    rows = torch.tensor([3, 0, 0, 2, 3])
    k[1], v[1] = float("nan"), float("nan")
    y = op.decode_attention(q, k, v, pos, 50, ring=ring, rows=rows)
    for b, row in enumerate(rows):
        alone = op.decode_attention(q[b : b + 1], k[row:], v[row:], pos[b : b + 1], 50, ring=ring)
        assert torch.equal(y[b : b + 1], alone)


def test_rows_that_a_cache_does_not_have_are_refused():
    q, cache, pos = torch.randn(2, 1, 4, 16), torch.randn(2, 2, 100, 16), torch.tensor([[5], [6]])
    for rows in ([0, 2], [-1, 0], [0], [0, 1, 1], [0.0, 1.0]):
        with pytest.raises(RuntimeError, match="rows"):
            torch.ops.brisk.decode_attention(q, cache, cache, pos, rows=torch.tensor(rows))


def test_wrong_options_of_attention_are_refused(op):
    q, cache, pos = torch.randn(1, 1, 4, 16), torch.randn(1, 2, 100, 16), torch.tensor([[5]])
    for options in (
        {"ring": True},
        {"ring": True, "window": 100},
        {"scale": 0.0},
        {"scale": -1.0},
        {"softcap": -1.0},
        {"sinks": torch.zeros(5)},
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"expected|invalid for input of size"):
            op.decode_attention(q, cache, cache, pos, **options)
    op.decode_attention(q, cache, cache, pos, window=99, ring=True)


@pytest.mark.parametrize("name", ["decode_attention", "prefill_attention"])
def test_scales_go_with_int8_caches_only(op, name):
    q, pos, scales = torch.randn(1, 1, 4, 16), torch.tensor([[5]]), torch.rand(1, 2, 100)
    floats, numbers = torch.randn(1, 2, 100, 16), torch.randint(-9, 9, (1, 2, 100, 16), dtype=torch.int8)
    for cache, k_scale, v_scale in ((numbers, None, None), (numbers, scales, None), (floats, scales, scales)):
        with pytest.raises((RuntimeError, ValueError), match="expected scales with a cache in int8"):
            getattr(op, name)(q, cache, cache, pos, k_scale=k_scale, v_scale=v_scale)
    if op is not kernels:
        for wrong in (scales[:, :, :99], scales.double(), scales[0]):
            with pytest.raises(RuntimeError, match="expected float32 scales"):
                getattr(op, name)(q, numbers, numbers, pos, k_scale=wrong, v_scale=wrong)


# ---------------------------------------------------------------------------------------------------------------------
# As PyTorch ops


def examples() -> dict[str, tuple]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 100).bfloat16()
    q, scales, zeros = int4_weight(torch.Generator().manual_seed(0), 48, 100, 32, zero_kind="whole")
    packed, zero = kernels.pack_int4(q, scales, zeros, 100, 32)
    cache = torch.randn(2, 2, 300, 32).bfloat16()
    numbers, multiples = torch.randint(-126, 126, cache.shape, dtype=torch.int8), torch.rand(2, 2, 300)
    options = 290, torch.randn(8).bfloat16(), 0.2, 30.0, True
    int8, grid = int8_weight(torch.Generator().manual_seed(0), 48, 96, 32)
    return {
        "linear_bf16": (x, torch.randn(48, 100).bfloat16(), torch.randn(48).bfloat16()),
        "linear_int8": (x, kernels.pack_int8(torch.randint(-127, 128, (48, 100), dtype=torch.int8)), torch.rand(48)),
        "linear_int8_grouped": (x[..., :96], kernels.pack_int8(int8), kernels.pack_scales(grid), 48, 32, None),
        "linear_int4": (x, packed, 48, 32, scales.dtype, zero, None),
        "decode_attention": (torch.randn(2, 1, 8, 32).bfloat16(), cache, cache + 1, torch.tensor([[7], [299]]), 100),
        "prefill_attention": (
            torch.randn(2, 20, 8, 32).bfloat16(), cache, cache + 1, torch.arange(20) + torch.tensor([[7], [270]])
        ),
        "prefill_attention with options": (
            torch.randn(2, 20, 8, 32).bfloat16(), cache, cache + 1, torch.arange(20) + torch.tensor([[0], [1170]]),
            torch.tensor([-10, 900]), 100, *options[1:-1], torch.tensor([1, 0]),
        ),
        "decode_attention with options": (
            torch.randn(2, 3, 8, 32).bfloat16(), cache, cache + 1, torch.tensor([[7, 8, 9], [900, 901, 5000]]), *options
        ),
        "decode_attention of int8": (
            torch.randn(2, 3, 8, 32).bfloat16(), numbers, numbers + 1, torch.tensor([[7, 8, 9], [900, 901, 5000]]),
            *options, None, multiples, multiples + 1
        ),
        "prefill_attention of int8": (
            torch.randn(2, 20, 8, 32).bfloat16(), numbers, numbers + 1, torch.arange(20) + torch.tensor([[7], [270]]),
            None, None, None, None, 0.0, None, multiples, multiples + 1
        ),
    }  # fmt: skip


def named(name: str) -> torch._ops.OpOverloadPacket:
    return getattr(torch.ops.brisk, name.split()[0])


@pytest.mark.parametrize("name", examples())
def test_opcheck(name):
    torch.library.opcheck(named(name).default, examples()[name])


@pytest.mark.parametrize("name", examples())
def test_the_result_does_not_depend_on_the_threads(name):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(named(name)(*examples()[name]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_inputs_without_columns_are_refused():
    packed, scales = torch.empty(1, 0, packing.PANEL, 4, dtype=torch.uint8), torch.ones(4)
    with pytest.raises(RuntimeError, match="at least one column"):
        torch.ops.brisk.linear_int8(torch.ones(3, 0), packed, scales)


@pytest.mark.parametrize("name", examples())
def test_wrong_shapes_are_refused(name):
    x, *rest = examples()[name]
    with pytest.raises(RuntimeError, match=r"expected|does not go"):
        named(name)(x[..., :20], *rest)


class Layer(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.int8 = Int8Linear.from_canonical(
            torch.randint(-127, 128, (96, 64), dtype=torch.int8, generator=generator),
            torch.rand(96, generator=generator),
        )
        self.int4 = Int4Linear.from_canonical(*int4_weight(generator, 64, 64, 32), 64, 32)
        self.weight = nn.Parameter(torch.randn(64, 64, generator=generator).bfloat16(), requires_grad=False)
        self.register_buffer("k", torch.zeros(1, 1, 16, 32).bfloat16())

    @torch.compiler.nested_compile_region
    def forward(self, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        q, k = torch.tanh(self.int8(x) / 100).view(1, 1, 3, 32).split([2, 1], 2)
        self.k[:, :, pos[0]] = k.transpose(1, 2)
        y = torch.ops.brisk.decode_attention(q, self.k, self.k, pos).view(1, 1, 64)
        return x + torch.ops.brisk.linear_bf16(torch.tanh(self.int4(y)), self.weight) / 50  # does not amplify rounding


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_in_a_nested_region(compiler):
    layers = nn.ModuleList(Layer(seed) for seed in range(3))

    def step(x, pos):
        for layer in layers:
            x = layer(x, pos)
        return x

    x = torch.randn(1, 1, 64).bfloat16()
    expected = [step(x + i, torch.tensor([[i]])) for i in range(3)]
    for layer in layers:
        layer.k.zero_()
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    for i in range(3):
        torch.testing.assert_close(compiled(x + i, torch.tensor([[i]])), expected[i], rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# The library


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_the_instruction_set_can_be_forced():
    code = (
        "import kernels, torch; x = torch.ones(1, 4).bfloat16(); w = torch.ones(1, 4).bfloat16();"
        "print(torch.ops.brisk.linear_bf16(x, w).item())"
    )
    assert run(code, GPT_BRISK_ISA="portable").stdout == "4.0\n"


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("GPT_BRISK_ISA", "sse9")
    with pytest.raises(UserError, match="sse9 is unknown; set it to one of amx, avx512, avx2, portable"):
        kernels.cpu_library.__wrapped__()


def test_the_fastest_gemm_is_measured_once(monkeypatch, tmp_path):
    """With AVX512; then the name that is kept is taken, and what is no name is measured anew."""
    used = []
    monkeypatch.setattr(build, "_use", lambda ops, library, gemm: used.append(gemm))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("GPT_BRISK_GEMM", raising=False)

    def choose(isa: str = "avx512") -> list[str]:
        used.clear()
        build._use_fastest_gemm(None, None, isa)
        return list(used)

    assert choose("amx") == ["tiles"] and choose("avx2") == ["floats"] and not list(tmp_path.iterdir())
    measured = choose()
    (kept,) = tmp_path.iterdir()
    assert measured == [*build.GEMMS["avx512"] * 5, kept.read_text()]
    kept.write_text("onednn")
    assert choose() == ["onednn"]
    kept.write_text("")
    assert len(choose()) == 11 and kept.read_text() == used[-1]
    monkeypatch.setenv("GPT_BRISK_GEMM", "onednn")
    assert choose() == choose("amx") == ["onednn"]


def test_an_unknown_gemm_is_refused(monkeypatch):
    monkeypatch.setenv("GPT_BRISK_GEMM", "mkl")
    with pytest.raises(UserError, match="GPT_BRISK_GEMM=mkl: with avx2 it may be floats; set it so, or unset it"):
        build._use_fastest_gemm(None, None, "avx2")


def test_without_a_compiler_there_is_one_warning(tmp_path):
    code = (
        "import kernels, torch; x = torch.ones(1, 4).bfloat16(); w = torch.ones(1, 4).bfloat16();"
        "print([torch.ops.brisk.linear_bf16(x, w).item() for _ in range(2)])"
    )
    for environment, words in (
        (dict(CXX="false"), "be slow: false ("),
        (dict(CXX="/no/such/compiler"), "no C++ compiler (/no/such/compiler)"),
        (dict(CXX="", PATH="/nowhere"), "no C++ compiler (g++)"),
    ):
        result = run(code, **environment, TORCH_EXTENSIONS_DIR=str(tmp_path))
        assert result.stdout == "[4.0, 4.0]\n"
        (warning,) = result.stderr.splitlines()
        assert warning.startswith("warning: ") and words in warning and f"install {build.COMPILERS}" in warning
        assert not list(tmp_path.glob("*.so"))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++-11", "g++-13", "g++-14", "clang++"])
def test_other_compilers(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    code = """
import torch, kernels
from kernels import build
isas = dict.fromkeys((build.available_isas()[0], "portable"))
build.load("ops", *isas)
for isa in isas:
    build.use_isa(isa)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 320, generator=generator) for n in (40, 48))
    x, weight = x.bfloat16(), weight.bfloat16()
    torch.set_num_threads(2)
    layer = kernels.Int8Linear.from_canonical((weight * 30).to(torch.int8), torch.full((48,), 1 / 30))
    for rows in (1, 5, 40):
        for y in (torch.ops.brisk.linear_bf16(x[:rows], weight), layer(x[:rows])):
            torch.testing.assert_close(y.float(), x[:rows].float() @ weight.float().T, atol=2, rtol=0.02)
print("done")
"""
    result = run(code, CXX=compiler, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert (result.stdout, result.stderr) == ("done\n", "")
    assert list(tmp_path.glob("*.so"))


@pytest.fixture
def copying_compiler(tmp_path, monkeypatch):
    """A compiler that takes no time: it copies a library that there is -> the folder where libraries are kept."""
    real = build.load("portable")[0]._name
    script = tmp_path / "compiler"
    script.write_text(f"""#!/bin/sh
for last; do :; done
echo called >> {tmp_path}/calls
[ "$1" = -shared ] && cp {real} "$last" || true
""")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_a_damaged_library_is_built_anew(copying_compiler, tmp_path):
    (library,) = (Path(library._name) for library in build.load("portable"))
    content, calls = library.read_bytes(), tmp_path / "calls"
    assert calls.read_text().count("called") == 2  # it compiles, and it links
    assert build.find(copying_compiler, "portable") == library
    for damaged in (content[: len(content) // 2], bytes(len(content)), content[:-4096] + bytes(4096), b""):
        library.unlink()  # what is loaded must not be written to
        library.write_bytes(damaged)
        assert build.find(copying_compiler, "portable") is None
    build.load("portable")
    assert calls.read_text().count("called") == 4 and library.read_bytes() == content


def test_libraries_that_are_not_used_are_deleted(copying_compiler, tmp_path):
    def age(path: Path, days: int) -> Path:
        os.utime(path, (time.time() - days * 86400,) * 2)
        return path

    library = age(Path(build.load("portable")[0]._name), 40)
    build.load("portable")  # which uses it
    paths = [
        copying_compiler / name for name in ("brisk_avx2_0.so", "brisk_avx2_0.lock", "brisk_avx2_1.so", "other.so")
    ]
    for path, days in zip(paths, (31, 31, 29, 99), strict=True):
        path.touch()
        age(path, days)
    build.build(copying_compiler, "avx2")
    assert [path.exists() for path in (library, *paths)] == [True, False, False, True, True]


def test_a_folder_that_cannot_be_written_is_a_warning(copying_compiler, capsys):
    copying_compiler.touch()  # a file
    build.load("portable", "avx2")
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {copying_compiler} cannot be written") and "TORCH_EXTENSIONS_DIR" in warning


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert build.cache_folder("NO_SUCH_VARIABLE").is_absolute()


@pytest.mark.slow
def test_two_processes_may_build_at_once(tmp_path):
    code = "from kernels import build; print(build.load('portable'))"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "g++ -pipe"}  # arguments are allowed
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert all(process.communicate()[0].startswith("[<CDLL") for process in both)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".so"]


BYTES = torch.zeros(4, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Int8Linear.from_canonical(torch.zeros(4, 4), torch.ones(4)),
        lambda: Int8Linear.from_canonical(torch.zeros(4, 4, dtype=torch.int8), torch.ones(3)),
        lambda: Int8Linear.from_canonical(torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 3)),
        lambda: Int8Linear.from_canonical(torch.zeros(4, 48, dtype=torch.int8), torch.ones(4, 1)),
        lambda: Int8Linear.from_canonical(torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 2).int()),
        lambda: Int4Linear.from_canonical(
            torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1), torch.ones(4, 1), 40, 32
        ),
        lambda: Int4Linear.from_canonical(
            torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1), torch.ones(4, 2), 32, 32
        ),
        lambda: Int4Linear.from_canonical(
            torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1), torch.ones(4, 1), 32, 48
        ),
    ],
)
def test_canonical_tensors_of_the_wrong_shape(make):
    with pytest.raises(ValueError, match="expected"):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# reach


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_reach_is_where_a_sorted_sum_reaches_the_limit(data):
    """Against float64 sums in order; with weights whose sums are exact."""
    rows, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    numbers = st.sampled_from([0.0, 1e-38, 0.25, 0.5, 0.5000001, 1.0, 7.0, 1e30, math.inf]) | st.floats(
        0, 100, width=32
    )
    numbers = torch.tensor([[data.draw(numbers) for _ in range(n)] for _ in range(rows)])
    weights = torch.tensor([[data.draw(st.integers(0, 8)) / 8 for _ in range(n)] for _ in range(rows)])
    weights = data.draw(st.sampled_from([None, weights]))
    limit = torch.tensor([[data.draw(st.integers(1, 8 * n + 8)) / 8] for _ in range(rows)])
    limit[0] = data.draw(st.sampled_from([limit[0].item(), math.inf]))
    expected = []
    for row in range(rows):
        order = numbers[row].argsort()
        ones = torch.ones(n) if weights is None else weights[row]
        reached = (ones[order].double().cumsum(0) >= limit[row].double()).nonzero()
        expected.append([numbers[row][order[reached[0, 0]]].item() if len(reached) else math.inf])
    for function in (torch.ops.brisk.reach, kernels.reach):
        assert function(numbers, weights, limit).tolist() == expected


@pytest.mark.parametrize("n", [1, 1000, 151_936])
def test_reach_of_a_distribution(n):
    """As top-p uses it: rounding may move the place, but by no more than a float32 sum's error."""
    generator = torch.Generator().manual_seed(n)
    distance = torch.randn(2, 3, n, generator=generator).mul(3).abs()
    weights, share = (-distance).exp(), torch.tensor([0.01, 0.5, 0.999]).view(1, 3, 1).expand(2, 3, 1)
    limit = share * weights.sum(-1, keepdim=True)
    found = torch.ops.brisk.reach(distance, weights, limit)
    total = weights.double().sum(-1, keepdim=True)
    up_to, below = (
        (weights.double() * (mask)).sum(-1, keepdim=True) / total for mask in (distance <= found, distance < found)
    )
    assert (up_to >= share - 1e-5).all() and (below <= share + 1e-5).all()
