"""The Triton kernels against float64: on the GPU if there is one, else in Triton's interpreter, on CPU tensors.

The interpreter must be asked for before anything imports Triton, so it gets a process of its own, with this same file.
Without a GPU the kernels are also compiled for one: the compiler and the assembler come with Triton.

The bounds: the output is rounded once to its dtype, what is summed is in float32, and a weight that is dequantized for
a GEMM, or one of attention's weights, is rounded once.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import Int4Linear, Int8Linear, packing

triton = pytest.importorskip("triton", reason="Triton is not installed")
from test_kernels import exact_attention, int8_cache  # noqa: E402

from kernels import cuda  # noqa: E402

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
H200_SHARED_MEMORY = 227 * 1024
few = settings(max_examples=10 if INTERPRETED else 40, deadline=None)  # the interpreter takes a second for each
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU; test_in_the_interpreter runs it"
)
gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
no_gpu = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.mark.slow
@no_gpu
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def run_in_the_interpreter(file: str) -> None:
    """The tests of a file, which must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


if INTERPRETED:
    # The interpreter keeps bfloat16 as the integers that have its bits. It truncates instead of rounding, and
    # multiplies and converts the integers themselves.
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def floats(handle: TensorHandle) -> np.ndarray:
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, c, *_):
        with np.errstate(invalid="ignore"):
            return TensorHandle(np.matmul(floats(a), floats(b), dtype=c.data.dtype) + c.data, c.dtype.scalar)

    def cast_impl(self, x, to):
        if to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(floats(x), np.float32)).bfloat16()
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), to.scalar)
        if x.dtype.scalar == tl.bfloat16:
            x = TensorHandle(floats(x), tl.float32)
        return cast(self, x, to)

    cast = InterpreterBuilder.cast_impl
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers

shapes = st.fixed_dictionaries(
    {
        "rows": st.one_of(st.integers(1, 9), st.integers(10, 33)),
        "N": st.one_of(st.integers(1, 100), st.sampled_from([128, 256])),
        "K": st.one_of(st.integers(1, 400), st.sampled_from([512, 1024])),
        "kind": st.sampled_from(["normal", "normal", "outlier", "large", "tiny", "zero", "one"]),
        "dtype": st.sampled_from(["bf16", "bf16", "f16", "f32"]),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def draw(shape: dict) -> tuple[torch.Generator, torch.Tensor, torch.Tensor | None]:
    """A generator, activations [rows, K], and a bias [N]."""
    dtype, generator = DTYPES[shape["dtype"]], torch.Generator().manual_seed(shape["seed"])
    x = torch.randn(shape["rows"], shape["K"], generator=generator)
    if shape["kind"] == "outlier":
        x[:, shape["K"] // 2] *= 1000
    elif shape["kind"] == "large":
        x *= 1e3 if dtype == torch.float16 else 1e15
    elif shape["kind"] == "tiny":
        x *= 1e-4 if dtype == torch.float16 else 1e-15
    elif shape["kind"] == "zero":
        x.zero_()
    elif shape["kind"] == "one":
        x = F.one_hot(torch.randint(0, shape["K"], (shape["rows"],), generator=generator), shape["K"]).float() * 3
    bias = torch.randn(shape["N"], generator=generator).to(dtype) if shape["bias"] else None
    return generator, *on_device(x.to(dtype), bias)


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias, size: torch.Tensor) -> None:
    """y [rows, N] against x W^T + b in float64; float32 sums hold products of x with values up to `size` [N, K]."""
    x = x.double()
    exact, products, summed = (a @ b.double().T for a, b in ((x, weight), (x.abs(), weight.abs()), (x.abs(), size)))
    if bias is not None:
        exact, summed = exact + bias.double(), summed + bias.double().abs()
    rounding = torch.finfo(y.dtype).eps / 2
    gemm = len(x) > cuda.FEW_ROWS or y.dtype == torch.float32
    bound = (summed + products * (2 + x.shape[1] / 32)) * 2**-21 + rounding * (exact.abs() + gemm * products)
    bound += bound / 100 + torch.finfo(y.dtype).tiny * (1 + x.shape[1])  # what is smaller may be flushed to zero
    finite = exact.abs() + bound < torch.finfo(y.dtype).max
    error = (y.double() - exact).abs()
    assert y.shape == exact.shape
    assert (error[finite] <= bound[finite]).all(), (error / bound)[finite].max()


def int8_weight(generator: torch.Generator, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator)
    return q, torch.rand(N, generator=generator) / 100


def int4_weight(generator, N: int, K: int, groupsize: int, scale_dtype: str = "bf16", zero_kind: str = "same"):
    groups = -(-K // groupsize)
    q = torch.randint(0, 256, (N, -(-K // 2)), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(N, groups, generator=generator) / 8).to(DTYPES[scale_dtype])
    zeros = torch.full((N, groups), 8.0)
    if zero_kind == "bytes":
        zeros = torch.randint(0, 16, (N, groups), generator=generator).float()
    elif zero_kind == "floats":
        zeros = torch.randn(N, groups, generator=generator) * 10
    return q, scales, zeros


def on_device(*tensors):
    return [tensor.to(DEVICE) if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


def check_int8(shape: dict) -> None:
    generator, x, bias = draw(shape)
    q, scales = on_device(*int8_weight(generator, shape["N"], shape["K"]))
    y = cuda.linear_int8(x, q, scales, bias)
    weight = q.double() * scales.double()[:, None]
    check(y, x, weight, bias, weight.abs())


def check_int8_grouped(shape: dict, groupsize: int, scale_dtype: str) -> None:
    shape = shape | {"K": max(shape["K"] // groupsize, 1) * groupsize}
    generator, x, bias = draw(shape)
    N, K = shape["N"], shape["K"]
    q, _ = int8_weight(generator, N, K)
    scales = (torch.rand(N, K // groupsize, generator=generator) / 100).to(DTYPES[scale_dtype])
    q, grid = on_device(q, scales.t().contiguous())
    y = cuda.linear_int8_grouped(x, q, grid, N, groupsize, bias)
    weight = q.double() * grid.t().double().repeat_interleave(groupsize, 1)
    check(y, x, weight, bias, weight.abs())


def check_int4(shape: dict, groupsize: int, scale_dtype: str, zero_kind: str) -> None:
    generator, x, bias = draw(shape)
    N, K = shape["N"], shape["K"]
    q, scales, zeros = on_device(*int4_weight(generator, N, K, groupsize, scale_dtype, zero_kind))
    packed, zero = cuda.pack_int4(q, scales, zeros, K, groupsize)
    assert zero_kind == "floats" or (zero == 8) == (bool((zeros == 8).all()))
    y = cuda.linear_int4(x, packed, N, groupsize, scales.dtype, zero, bias)
    levels = torch.stack((q % 16, q // 16), -1).flatten(1)[:, :K].double()
    weight = packing.dequantize(levels, scales.double(), zeros.double(), groupsize)
    # A nibble goes into the sum as 128 + q, or 1024 + q in float16.
    added = 15 + (1024 if x.dtype == torch.float16 else 128)
    size = ((added + zeros.double().abs()) * scales.double()).repeat_interleave(groupsize, 1)[:, :K]
    check(y, x, weight, bias, size)


@runs
@few
@given(shape=shapes)
def test_int8(shape):
    check_int8(shape)


@runs
@few
@given(
    shape=shapes,
    groupsize=st.sampled_from(kernels.GROUPSIZES),
    scale_dtype=st.sampled_from(["bf16", "f16", "f32"]),
)
def test_int8_grouped(shape, groupsize, scale_dtype):
    check_int8_grouped(shape, groupsize, scale_dtype)


@runs
@few
@given(
    shape=shapes,
    groupsize=st.sampled_from(kernels.GROUPSIZES),
    scale_dtype=st.sampled_from(["bf16", "f16", "f32"]),
    zero_kind=st.sampled_from(["same", "bytes", "floats"]),
)
def test_int4(shape, groupsize, scale_dtype, zero_kind):
    check_int4(shape, groupsize, scale_dtype, zero_kind)


@runs
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, "bf16"), (1, "f16"), (2, "bf16"), (8, "f16"), (17, "bf16"), (65, "f16")]
)
def test_sizes_that_all_blocks_divide(rows, dtype):
    shape = {"rows": rows, "N": 128, "K": 2048, "kind": "normal", "dtype": dtype, "bias": rows == 2, "seed": rows}
    check_int8(shape)
    for groupsize in kernels.GROUPSIZES:
        check_int8_grouped(shape, groupsize, "bf16")
    for zero_kind in ("same", "bytes", "floats"):
        check_int4(shape, 128, "bf16", zero_kind)


@gpu
@pytest.mark.parametrize("N, K", [(6144, 4096), (4096, 14336), (28672, 4096)])
@pytest.mark.parametrize("rows", [1, 4, 16, 100])
def test_the_sizes_of_a_model(rows, N, K):
    shape = {"rows": rows, "N": N, "K": K, "kind": "normal", "dtype": "bf16", "bias": False, "seed": rows}
    check_int8(shape)
    check_int8_grouped(shape, 32, "bf16")
    check_int4(shape, 32, "bf16", "same")


@few
@given(
    N=st.integers(1, 100),
    K=st.integers(1, 300),
    groupsize=st.sampled_from(kernels.GROUPSIZES),
    scale_dtype=st.sampled_from(["bf16", "f16", "f32"]),
    zero_kind=st.sampled_from(["same", "bytes", "floats"]),
    seed=st.integers(0, 999),
)
def test_packing_can_be_undone(N, K, groupsize, scale_dtype, zero_kind, seed):
    parts = int4_weight(torch.Generator().manual_seed(seed), N, K, groupsize, scale_dtype, zero_kind)
    packed, zero = cuda.pack_int4(*parts, K, groupsize)
    unpacked = kernels.unpack_int4(packed, N, K, groupsize, parts[1].dtype, zero)
    for before, after in zip(parts, unpacked, strict=True):
        assert torch.equal(before, after)


@runs
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    for layer in layers(200, 40):
        x = torch.randn(3, 200).bfloat16()
        x[1, 77] = value
        y = call(layer, x)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


@runs
def test_leading_dimensions_and_views():
    x = torch.randn(2, 3, 100, 2)[..., 0].bfloat16()
    for layer in layers(100, 40):
        y = call(layer, x)
        assert y.shape == (2, 3, 40) and call(layer, x[:0]).shape == (0, 3, 40)
        torch.testing.assert_close(y.view(6, 40), call(layer, x.reshape(6, 100)))
        with pytest.raises(RuntimeError, match="expected"):
            call(layer, x[..., :20])


def layers(K: int, N: int, device: str = DEVICE, seed: int = 0) -> list[nn.Module]:
    """Quantized layers that are packed for CUDA, wherever they are."""
    generator = torch.Generator().manual_seed(seed)
    q, scales = int8_weight(generator, N, K)
    parts = int4_weight(generator, N, K, 32)
    packed, zero = cuda.pack_int4(*parts, K, 32)
    made = Int8Linear(q, scales, N, K), Int4Linear(packed, zero, N, K, 32, parts[1].dtype, None)
    return [layer.to(device) for layer in made]


def call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, Int8Linear):
        return cuda.linear_int8(x.to(DEVICE), layer.packed, layer.scales)
    sizes = layer.out_features, layer.groupsize, layer.scale_dtype, layer.zero
    return cuda.linear_int4(x.to(DEVICE), layer.packed, *sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Attention

attention_shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "S": st.sampled_from([1, 1, 2, 3, 5]),
        "KV": st.integers(1, 3),
        "G": st.sampled_from([1, 2, 3, 4, 7, 8]),
        "D": st.sampled_from([2, 16, 20, 64, 80, 128, 160]),
        "T": st.integers(8, 400),
        "window": st.one_of(st.none(), st.integers(1, 10), st.integers(11, 300)),
        "dtype": st.sampled_from(["bf16", "f16", "f32"]),
        "size": st.sampled_from([0.0, 1.0, 1.0, 30.0]),  # of the queries
        "sinks": st.sampled_from([None, None, "bf16", "f32"]),
        "scale": st.sampled_from([None, None, 0.05, 1.0]),
        "softcap": st.sampled_from([0.0, 0.0, 0.5, 50.0]),
        "ring": st.booleans(),
        "cache": st.sampled_from(["float", "float", "int8"]),
        "seed": st.integers(0, 2**31),
    }
)
PLAIN = dict(cache="float", dtype="bf16", size=1.0, sinks=None, scale=None, softcap=0.0, ring=False, seed=0)
OPTIONS = "window", "sinks", "scale", "softcap", "ring"
ALL = PLAIN | dict(sinks="bf16", scale=0.1, softcap=5.0, ring=True)


def check_attention(shape: dict) -> None:
    B, S, KV, G, D, T = (shape[name] for name in ("B", "S", "KV", "G", "D", "T"))
    dtype, generator = DTYPES[shape["dtype"]], torch.Generator().manual_seed(shape["seed"])
    start = torch.randint(0, T - S + 1, (B, 1), generator=generator)
    options = {name: shape[name] for name in ("window", "scale", "softcap", "ring")}
    if shape["ring"]:
        options["window"] = min(shape["window"] or T, T - S)
        start[1:2] += T * 3
        start[2:] += 10**12
    pos = start + torch.arange(S)
    if S > 1 and start[0, 0] + S < T:
        pos[0, -1] = T - 1  # padding, as the prefill puts it into the cache's last slot
    options["sinks"] = shape["sinks"] and (torch.randn(KV * G, generator=generator) * 3).to(DTYPES[shape["sinks"]])
    q = (torch.randn(B, S, KV * G, D, generator=generator) * shape["size"]).to(dtype)
    k, v = (torch.randn(B + 1, KV, T, D, generator=generator).to(dtype) for _ in range(2))
    caches, scales = (k, v), (None, None)
    if shape["cache"] == "int8":
        (k, *key_parts), (v, *value_parts) = (int8_cache(generator, B + 1, KV, T, D) for _ in range(2))
        caches, scales = zip(key_parts, value_parts, strict=True)
    (expected, seen), (size, _) = (exact_attention(q, k, values, pos, **options) for values in (v, v.abs()))
    largest = q.double().abs().amax() * k.double().abs().amax() * D * (options["scale"] or D**-0.5)
    for cache in caches if scales[0] is None else scales:  # what no query of a row sees may be anything
        cache[:B].masked_fill_(~seen[:, None].view(B, 1, T, *[1] * (cache.ndim - 3)), float("nan"))
    y = cuda.decode_attention(*on_device(q, *caches, pos, *(options[name] for name in OPTIONS), None, *scales)).cpu()
    scores = largest.item() + options["softcap"]
    rounding = torch.finfo(dtype).eps / 2
    bound = rounding * 1.01 * (expected.abs() + 2 * size) + 2**-21 * (8 + scores) * 6 + torch.finfo(dtype).tiny
    # In a ring, padding that stands too far off to share it with the others may be left out.
    near = pos - (pos[:, :1] - (options["window"] or 0) + 1).clamp(min=0) < T - 1 if shape["ring"] else pos >= 0
    assert y.dtype == dtype and y.is_contiguous() and ((y.double() - expected).abs() <= bound)[near].all()


@runs
@few
@given(shape=attention_shapes)
def test_attention(shape):
    check_attention(shape)


@runs
@pytest.mark.parametrize("window, options", [(None, PLAIN), (37, PLAIN), (37, ALL), (37, ALL | {"cache": "int8"})])
def test_attention_of_many_queries(window, options):
    check_attention({"B": 1, "S": 16, "KV": 1, "G": 8, "D": 32, "T": 200, "window": window} | options)


@runs
@pytest.mark.parametrize("T, window", [(200, 150), (300, 37)])
def test_attention_of_a_ring(T, window):
    """In a row of each kind: at the beginning, after some turns, after very many."""
    for S in (1, 3):
        check_attention({"B": 3, "S": S, "KV": 2, "G": 4, "D": 64, "T": T, "window": window} | ALL)


@runs
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("parked", [300, 131_072, 2**31 + 100, 2**40, 2**63 - 1])
def test_parked_rows_and_padding_change_nothing_of_others(parked, ring):
    torch.manual_seed(0)
    q, sinks = torch.randn(3, 3, 4, 64).bfloat16(), torch.randn(4)
    k, v = torch.randn(2, 3, 2, 300, 64).bfloat16()
    k[1], v[1] = float("nan"), float("nan")
    pos = torch.tensor([[100, 101, parked], [parked] * 3, [200, 201, 202]])
    options = 50, sinks.to(DEVICE), None, 0.0, ring
    y = cuda.decode_attention(*on_device(q, k, v, pos, *options)).cpu()
    for b, count in ((0, 2), (2, 3)):
        expected, _ = exact_attention(q[b : b + 1, :count], k[b:], v[b:], pos[b : b + 1, :count], 50, sinks, ring=ring)
        torch.testing.assert_close(y[b : b + 1, :count].double(), expected, atol=0.02, rtol=0.02)


@runs
def test_wrong_options_of_attention_are_refused():
    tensors = on_device(torch.randn(1, 1, 4, 16), *torch.randn(2, 1, 2, 100, 16), torch.tensor([[5]]))
    for options in (
        {"ring": True},
        {"ring": True, "window": 100},
        {"scale": 0.0},
        {"softcap": -1.0},
        {"sinks": torch.zeros(5)},
    ):
        with pytest.raises(RuntimeError, match="expected"):
            cuda.decode_attention(*tensors, **options)


@runs
@pytest.mark.parametrize("window", [None, 40])
def test_attention_sees_nothing_of_other_queries(window):
    """Of two queries of one row, neither may be touched by what only the other one sees."""
    q = torch.randn(1, 2, 4, 64).bfloat16()
    k, v = torch.randn(2, 1, 2, 200, 64).bfloat16()
    k[:, :, 50:], v[:, :, 50:] = float("nan"), float("nan")
    pos = torch.tensor([[49, 199]])
    y = cuda.decode_attention(*on_device(q, k, v, pos, window))
    assert y[:, 0].isfinite().all() and y[:, 1].isnan().all()
    if window:
        k, v = k.flip(2), v.flip(2)  # NaN first
        y = cuda.decode_attention(*on_device(q, k, v, pos, window))
        assert y[:, 0].isnan().all() and y[:, 1].isfinite().all()


@runs
@pytest.mark.parametrize("ring", [False, True])
def test_attention_of_some_rows_of_the_cache(ring):
    torch.manual_seed(0)
    q, pos = torch.randn(3, 2, 4, 64).bfloat16(), torch.randint(60, 200, (3, 1)) + torch.arange(2)
    k, v = torch.randn(2, 4, 2, 300, 64).bfloat16()
    k[1], v[1] = float("nan"), float("nan")
    rows = torch.tensor([3, 0, 3])
    y = cuda.decode_attention(*on_device(q, k, v, pos, 50, None, None, 0.0, ring, rows))
    for b, row in enumerate(rows):
        alone = cuda.decode_attention(
            *on_device(q[b : b + 1], k[row:], v[row:], pos[b : b + 1], 50, None, None, 0.0, ring)
        )
        assert torch.equal(y[b : b + 1], alone)
    with pytest.raises(RuntimeError, match="does not go with"):
        cuda.decode_attention(*on_device(q, k, v, pos, 50, None, None, 0.0, ring, rows[:2]))


@runs
def test_attention_reads_what_is_seen_and_no_more():
    """A position far below the length, caches that are slices, and a batch smaller than theirs."""
    q = torch.randn(1, 1, 4, 32).bfloat16()
    k, v = torch.full((2, 3, 2, 5000, 64), float("nan")).bfloat16()
    k[:, :, :70], v[:, :, :70] = torch.randn(2, 3, 2, 70, 64)
    pos = torch.tensor([[69]])
    y = cuda.decode_attention(*on_device(q, k[..., :32], v[..., 32:], pos))
    short = cuda.decode_attention(*on_device(q, k[:1, :, :70, :32], v[:1, :, :70, 32:], pos))
    torch.testing.assert_close(y, short, atol=0.02, rtol=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# As PyTorch ops


def examples(device: str) -> dict[str, tuple]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 96).bfloat16().to(device)
    int8, int4 = layers(96, 48, device)
    grid = torch.rand(3, 48).bfloat16().to(device)
    cache = torch.randn(2, 2, 300, 32).bfloat16().to(device)
    pos = torch.tensor([[7], [299]], device=device)
    options = 100, torch.randn(8).bfloat16().to(device), 0.2, 30.0, True
    return {
        "linear_int8": (x, int8.packed, int8.scales, torch.randn(48).bfloat16().to(device)),
        "linear_int8_grouped": (x, int8.packed, grid, 48, 32, None),
        "linear_int4": (x, int4.packed, 48, 32, int4.scale_dtype, int4.zero, None),
        "decode_attention": (torch.randn(2, 1, 8, 32).bfloat16().to(device), cache, cache + 1, pos, 100),
        "decode_attention with options": (
            torch.randn(2, 1, 8, 32).bfloat16().to(device), cache, cache + 1, pos, *options
        ),
    }  # fmt: skip


EXAMPLES = [
    "linear_int8", "linear_int8_grouped", "linear_int4", "decode_attention", "decode_attention with options"
]  # fmt: skip


@runs
@pytest.mark.parametrize("name", EXAMPLES)
def test_outputs_are_as_the_fake_versions_promise(name):
    arguments, name = examples(DEVICE)[name], name.split()[0]
    y = getattr(cuda, name)(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = getattr(torch.ops.brisk, name)(*fakes)
    assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())


def test_layers_trace_without_data():
    model = nn.Sequential(layers(96, 64, "meta")[0], layers(64, 48, "meta")[1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(torch.empty(2, 1, 96, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype) == ((2, 1, 48), torch.bfloat16)


@pytest.mark.parametrize(
    "name", ["linear_bf16", "linear_int8", "linear_int8_grouped", "linear_int4", "decode_attention"]
)
def test_cuda_tensors_come_here(name):
    assert kernels.cuda_kernels() is cuda
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"brisk::{name}", "CUDA")


def test_an_op_without_a_kernel_of_its_own_is_seen():
    """Otherwise its first use, which sends tensors on to it, would call itself."""
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("brisk::reach", "CUDA")


@no_gpu
def test_without_triton_there_is_one_warning():
    code = (
        "import sys, torch; sys.modules['triton'] = None; import kernels;"
        "print([kernels.cuda_kernels() for _ in range(2)])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[None, None]\n" and result.stderr.count("warning:") == 1


@gpu
@pytest.mark.parametrize("name", EXAMPLES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.brisk, name.split()[0]).default, examples("cuda")[name])


@gpu
def test_layers_pack_for_the_device():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 256).bfloat16()
    q, scales = int8_weight(generator, 96, 256)
    parts = int4_weight(generator, 96, 256, 64, zero_kind="bytes")
    grid = torch.rand(96, 4, generator=generator).bfloat16()
    for args, cls in (((q, scales), Int8Linear), ((q, grid), Int8Linear), ((*parts, 256, 64), Int4Linear)):
        y = cls.from_canonical(*on_device(*args))(x.cuda()).cpu()
        expected = cls.from_canonical(*args)(x.float())
        torch.testing.assert_close(y.float(), expected, atol=0.03 * float(expected.abs().max()), rtol=0.03)


class Layer(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        self.int8, self.int4 = layers(64, 96, "cuda", seed)
        self.register_buffer("k", torch.zeros(1, 1, 4096, 32, device="cuda").bfloat16())

    @torch.compiler.nested_compile_region
    def forward(self, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        q, k = torch.tanh(self.int8(x) / 100).view(1, 1, 3, 32).split([2, 1], 2)
        self.k[:, :, pos[0]] = k.transpose(1, 2)
        y = torch.ops.brisk.decode_attention(q, self.k, self.k, pos).view(1, 1, 64)
        return x + torch.tanh(self.int4(y))[..., :64] / 50  # does not amplify rounding


@gpu
@torch.inference_mode()
def test_compiled_in_a_nested_region_into_a_cuda_graph():
    blocks = nn.ModuleList(Layer(seed) for seed in range(3))

    def step(x, pos):
        for block in blocks:
            x = block(x, pos)
        return x

    x = torch.randn(1, 1, 64, device="cuda").bfloat16()
    positions = [*range(6), 100, 1000, 4000]
    expected = [step(x + i / 10, torch.tensor([[pos]], device="cuda")) for i, pos in enumerate(positions)]
    for block in blocks:
        block.k.zero_()
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):  # one graph for all positions
        for i, pos in enumerate(positions):
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x + i / 10, torch.tensor([[pos]], device="cuda")).clone()
            torch.testing.assert_close(y, expected[i], rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for an H200, on any machine

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Compiler:
    """In the place of a kernel: what would launch it compiles it, for the same arguments."""

    def __init__(self, kernel):
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps: int, num_stages: int = 3, **kwargs):
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for at, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name], constants[at,] = "constexpr", value
                continue
            number = isinstance(value, (int, float))
            kind = {int: "i32", float: "fp32"}[type(value)] if number else POINTERS[value.dtype]
            signature[parameter.name] = kind
            if kind != "fp32" and (not number or value % 16 == 0):
                attributes[at,] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(self.kernel, signature, constants, attributes)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        self.compiled = triton.compile(source, target, {"num_warps": num_warps, "num_stages": num_stages})


@pytest.fixture
def compilers(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = {}
    for name in ("_linear_int8", "_linear_int4", "_dequantize_int4", "_attend", "_combine"):
        made[name] = Compiler(getattr(cuda, name))
        monkeypatch.setattr(cuda, name, made[name])
    return made


def check_compiled(compiled, folder: Path, wide_copies: bool = True) -> None:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assert " STACK:0 " in usage, usage  # no register is kept in memory
    assert compiled.metadata.shared <= H200_SHARED_MEMORY
    if wide_copies:
        copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x(\w+)", compiled.asm["ptx"])
        assert copies and set(copies) <= {"10", "8", "4"} and copies.count("10") > len(copies) / 2
        assert "mma.sync" in compiled.asm["ptx"]


@pytest.mark.slow
@no_gpu
@pytest.mark.parametrize(
    "rows, N, dtype", [(1, 4096, "bf16"), (4, 6144, "bf16"), (16, 28672, "bf16"), (1, 4096, "f16")]
)
def test_linear_compiles(compilers, tmp_path, rows, N, dtype):
    K = 4096
    x = torch.empty(rows, K, dtype=DTYPES[dtype], device="meta")
    scales = torch.empty(N, device="meta")
    cuda.linear_int8(x, torch.empty(N, K, dtype=torch.int8, device="meta"), scales)
    check_compiled(compilers["_linear_int8"].compiled, tmp_path)
    grid = torch.empty(K // 32, N, dtype=torch.bfloat16, device="meta")
    cuda.linear_int8_grouped(x, torch.empty(N, K, dtype=torch.int8, device="meta"), grid, N, 32)
    check_compiled(compilers["_linear_int8"].compiled, tmp_path)
    for zero, zero_bytes in ((8, 0), (packing.ZERO_BYTES, 1)):
        packed = torch.empty(N * (K // 2 + K // 32 * (2 + zero_bytes)), dtype=torch.uint8, device="meta")
        cuda.linear_int4(x, packed, N, 32, torch.bfloat16, zero)
        check_compiled(compilers["_linear_int4"].compiled, tmp_path)
        assert compilers["_linear_int4"].compiled.asm["ptx"].count("lop3.b32")
    cuda.linear_int4(torch.empty(100, K, device="meta"), packed, N, 32, torch.bfloat16, zero)
    check_compiled(compilers["_dequantize_int4"].compiled, tmp_path, wide_copies=False)


SCALES = torch.empty(1, 8, 8193, device="meta")


@pytest.mark.slow
@no_gpu
@pytest.mark.parametrize(
    "S, H, KV, D, window, options",
    [
        (1, 32, 8, 128, None, {}),
        (8, 32, 8, 128, 4096, {}),
        (1, 14, 2, 64, None, {}),
        (
            1,
            64,
            8,
            64,
            128,
            {
                "sinks": torch.empty(64, dtype=torch.bfloat16, device="meta"),
                "ring": True,
                "rows": torch.empty(1, dtype=torch.long, device="meta"),
            },
        ),
        (1, 16, 8, 256, 4096, {"scale": 1 / 16, "softcap": 50.0, "ring": True}),
        (4, 16, 8, 256, None, {"scale": 1 / 16, "softcap": 50.0}),
        (1, 32, 8, 128, None, {"k_scale": SCALES, "v_scale": SCALES}),
        (4, 16, 8, 256, 4096, {"k_scale": SCALES, "v_scale": SCALES, "softcap": 50.0, "ring": True}),
    ],
)
def test_attention_compiles(compilers, tmp_path, S, H, KV, D, window, options):
    q = torch.empty(1, S, H, D, dtype=torch.bfloat16, device="meta")
    dtype = torch.int8 if "k_scale" in options else torch.bfloat16
    k, v = (torch.empty(1, KV, 8193, D, dtype=dtype, device="meta") for _ in range(2))
    cuda.decode_attention(q, k, v, torch.empty(1, S, dtype=torch.long, device="meta"), window, **options)
    wide_copies = "k_scale" not in options  # scales are copied one by one
    check_compiled(compilers["_attend"].compiled, tmp_path, wide_copies)
    check_compiled(compilers["_combine"].compiled, tmp_path, wide_copies=False)


@no_gpu
def test_the_examples_cover_the_blocks():
    """The rule that chooses sizes gives each of the three in the compiled cases above."""
    blocks = {cuda._block(rows, N) for rows, N in ((1, 4096), (4, 6144), (16, 28672))}
    assert blocks == {(8, 16), (8, 32), (16, 64)}
    for rows, N in itertools.product(range(1, 65), (64, 4096, 28672, 128256)):
        assert cuda._block(rows, N)[1] in (16, 32, 64)
