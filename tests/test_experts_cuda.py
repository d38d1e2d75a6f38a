"""Triton's kernels for experts against float64, from the definition: y[r, j] = x[r, j] W[chosen[r, j]]^T + its bias.

On the GPU if there is one, else in Triton's interpreter, in a process of its own; without a GPU the kernels are also
compiled for one. test_kernels_cuda.py says more, and holds what both need.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")
from test_kernels_cuda import (
    DEVICE,
    DTYPES,
    Compiler,
    check_compiled,
    gpu,
    int4_weight,
    no_gpu,
    run_in_the_interpreter,
    runs,
)

import kernels
from kernels import cuda, cuda_experts, packing

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
KERNELS = ("_sort", "_few", "_few_int4", "_many")
KINDS = ("floats", "int8", "int8 in groups", "int4 same", "int4 bytes", "int4 floats", "int4 fp4")


@pytest.mark.slow
@no_gpu
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@dataclass
class Weights:
    """Some experts, in float64 [E, N, K], and what calls the op for them.

    `size` is that of the numbers that go into the sums.
    """

    exact: Tensor
    size: Tensor
    arguments: dict
    op: str

    def __call__(self, x: Tensor, chosen: Tensor, bias: Tensor | None = None) -> Tensor:
        arguments = self.arguments | {"x": x, "chosen": chosen, "bias": bias}
        moved = {name: a.to(DEVICE) if isinstance(a, Tensor) else a for name, a in arguments.items()}
        return getattr(cuda_experts, self.op)(**moved).cpu()


def make(kind: str, E: int, N: int, K: int, dtype: torch.dtype, generator, groupsize=32, scales="bf16") -> Weights:
    if kind == "floats":
        weight = torch.randn(E, N, K, generator=generator).to(dtype)
        return Weights(weight.double(), weight.double().abs(), {"weight": weight}, "linear_experts")
    if kind.startswith("int8"):
        q = torch.randint(-128, 128, (E, N, K), dtype=torch.int8, generator=generator)
        if kind == "int8":
            grid = torch.rand(E, N, generator=generator) / 100
            exact = q.double() * grid.double()[:, :, None]
            return Weights(exact, exact.abs(), {"packed": q, "scales": grid}, "linear_int8_experts")
        grid = (torch.rand(E, K // groupsize, N, generator=generator) / 100).to(DTYPES[scales])
        exact = q.double() * grid.double().transpose(1, 2).repeat_interleave(groupsize, 2)
        arguments = {"packed": q, "scales": grid, "out_features": N, "groupsize": groupsize}
        return Weights(exact, exact.abs(), arguments, "linear_int8_grouped_experts")
    zero_kind, packed, exact, size = kind.split()[1], [], [], []
    # The first expert has the same zero everywhere: it is packed as the others need it.
    kinds = ["same"] + (E - 1) * ["same" if zero_kind == "fp4" else zero_kind]
    each = [int4_weight(generator, N, K, groupsize, scales, kind) for kind in kinds]
    zero = packing.kind_of_zeros(None if zero_kind == "fp4" else torch.stack([zeros for _, _, zeros in each]))
    for q, grid, zeros in each:
        levels = packing.unpack_nibbles(q, K)
        if zero_kind == "fp4":
            zeros, weight = None, packing.dequantize(E2M1[levels.int()], grid.double(), 0, groupsize)
            largest = weight.abs()
        else:
            weight = packing.dequantize(levels.double(), grid.double(), zeros.double(), groupsize)
            added = 15 + (1024 if dtype == torch.float16 else 128)  # a nibble goes into the sum with so much
            largest = ((added + zeros.double().abs()) * grid.double()).repeat_interleave(groupsize, 1)[:, :K]
        piece, same = cuda.pack_int4(q, grid, zeros, K, groupsize, zero)
        assert same == zero
        for part, parts in ((piece, packed), (weight, exact), (largest, size)):
            parts.append(part)
    if E > 1 and N * K > 64:
        assert zero == {"same": 8, "bytes": packing.ZERO_BYTES, "floats": packing.ZERO_FLOATS}.get(zero_kind, -3)
    arguments = {
        "packed": torch.stack(packed), "out_features": N, "groupsize": groupsize, "scale_dtype": each[0][1].dtype,
        "zero": zero,
    }  # fmt: skip
    return Weights(torch.stack(exact), torch.stack(size), arguments, "linear_int4_experts")


def check(
    y: Tensor, weights: Weights, x: Tensor, chosen: Tensor, bias: Tensor | None, pairs: int | None = None
) -> None:
    """`pairs`: how many there were, if these are only some of them."""
    R, k = chosen.shape
    E, N, K = weights.exact.shape
    many = (pairs or R * k) > cuda_experts.FEW_ROWS * E or x.dtype == torch.float32
    assert (y.shape, y.dtype, y.is_contiguous()) == ((R, k, N), x.dtype, True)
    rounding, x = torch.finfo(x.dtype).eps / 2, x.double()
    for r in range(R):
        for j in range(k):
            row, e = x[r, min(j, x.shape[1] - 1)], chosen[r, j]
            exact, products = weights.exact[e] @ row, weights.exact[e].abs() @ row.abs()
            summed = weights.size[e] @ row.abs()
            if bias is not None:
                exact, summed = exact + bias[e].double(), summed + bias[e].double().abs()
            # The output is rounded once, sums are in float32, and in large blocks weights are rounded to x's dtype.
            bound = (summed + products * (2 + K / 32)) * 2**-21 + rounding * 1.01 * (exact.abs() + many * products)
            error = (y[r, j].double() - exact).abs()
            assert (error <= bound + torch.finfo(y.dtype).tiny * K).all(), (r, j, (error / bound).max())


def choose(E: int, R: int, k: int, how: str, generator: torch.Generator) -> Tensor:
    if how == "distinct" and k <= E:  # as a router does
        return torch.rand(R, E, generator=generator).argsort(1)[:, :k].contiguous()
    if how == "one":
        return torch.full((R, k), E - 1)
    return torch.randint(0, E, (R, k), generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@runs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("R", [1, 3, 17, 70])
def test_against_the_definition(R, k, kind):
    rng, generator = random.Random(f"{R} {k} {kind}"), torch.Generator().manual_seed(R * 10 + k)
    dtype = DTYPES[rng.choice(["bf16", "bf16", "f16", "f32"])]
    E, N = rng.choice([1, 3, 8, 40]), rng.choice([1, 7, 33, 64, 71])
    groupsize = rng.choice([32, 64, 128])
    K = groupsize * rng.choice([1, 3]) if kind == "int8 in groups" else rng.choice([1, 37, 64, 191])
    weights = make(kind, E, N, K, dtype, generator, groupsize, rng.choice(["bf16", "f16", "f32"]))
    x = torch.randn(R, rng.choice([1, k]), K, generator=generator).to(dtype)
    chosen = choose(E, R, k, rng.choice(["distinct", "distinct", "any", "one"]), generator)
    bias = torch.randn(E, N, generator=generator).to(dtype) if rng.random() < 0.5 else None
    check(weights(x, chosen, bias), weights, x, chosen, bias)


@runs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "R, E, K, dtype",
    [(2, 8, 512, "bf16"), (2, 8, 512, "f16"), (40, 2, 128, "bf16"), (40, 2, 128, "f16"), (9, 2, 64, "f32")],
)
def test_every_dtype_in_small_and_large_blocks(R, E, K, dtype, kind):
    """40 rows with 2 choices of 2 experts are 40 pairs for each. All blocks divide these sizes."""
    generator = torch.Generator().manual_seed(R)
    weights = make(kind, E, 64, K, DTYPES[dtype], generator)
    x = torch.randn(R, 2, K, generator=generator).to(DTYPES[dtype])
    chosen, bias = choose(E, R, 2, "any", generator), torch.randn(E, 64, generator=generator)
    check(weights(x, chosen, bias), weights, x, chosen, bias)


@runs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("R", [1, 4, 50])
def test_nothing_of_other_experts_or_pairs(R, kind):
    """What no pair chose is not read, and a NaN in one pair's input stays there."""
    generator = torch.Generator().manual_seed(R)
    weights = make(kind, 6, 40, 96, torch.bfloat16, generator)
    for name in ("weight", "scales"):
        if name in weights.arguments:
            weights.arguments[name][[0, 2, 5]] = float("nan")
    if "int4" in kind:
        weights.arguments["packed"][[0, 2, 5]] = 255  # as bfloat16, NaN
    chosen = torch.tensor([1, 3, 4])[torch.randint(0, 3, (R, 2), generator=generator)]
    x = torch.randn(R, 2, 96, generator=generator).bfloat16()
    x[R // 2, 1, 50] = float("nan")
    y = weights(x, chosen)
    assert y[R // 2, 1].isnan().all()
    y[R // 2, 1] = 0
    assert y.isfinite().all()


@runs
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_values_of_fp4(repeats, dtype):
    """Every code in every place of a chunk, times scales that are powers of two, comes out exactly."""
    q = (torch.arange(32)[:, None] * 5 + torch.arange(32)[None, :]) % 16
    scales = 2.0 ** (torch.arange(32) % 12 - 6)[:, None]
    packed, zero = cuda.pack_int4(packing.pack_nibbles(q.byte()), scales.bfloat16(), None, 32, 32)
    assert zero == packing.FP4
    expected = (E2M1[q] * scales).T  # one-hot inputs pick columns
    eye = torch.eye(32).repeat(repeats, 1).to(DTYPES[dtype]).to(DEVICE)
    for x in (eye[:32], eye):
        y = cuda.linear_int4(x, packed.to(DEVICE), 32, 32, torch.bfloat16, zero)
        assert torch.equal(y.double().cpu(), expected.repeat(len(x) // 32, 1))
    chosen = torch.zeros(len(eye), 1, dtype=torch.long, device=DEVICE)
    y = cuda_experts.linear_int4_experts(
        eye[:, None], packed.to(DEVICE)[None], chosen, 32, 32, torch.bfloat16, packing.FP4
    )
    assert torch.equal(y[:, 0].double().cpu(), expected.repeat(repeats, 1))


@runs
@pytest.mark.parametrize("rows", [3, 66])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_one_weight_of_fp4(rows, dtype):
    """cuda.linear_int4, too, takes codes without zeros: as one expert."""
    generator = torch.Generator().manual_seed(0)
    weights = make("int4 fp4", 1, 45, 100, DTYPES[dtype], generator)
    x = torch.randn(rows, 1, 100, generator=generator).to(DTYPES[dtype])
    packed = weights.arguments["packed"][0].to(DEVICE)
    y = cuda.linear_int4(x[:, 0].to(DEVICE), packed, 45, 32, torch.bfloat16, packing.FP4)
    check(y.cpu()[:, None], weights, x, torch.zeros(rows, 1, dtype=torch.long), None)


@pytest.mark.parametrize("scales", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("N, K, groupsize", [(1, 1, 32), (45, 100, 32), (64, 256, 128)])
def test_packing_fp4_can_be_undone(N, K, groupsize, scales):
    q, grid, _ = int4_weight(torch.Generator().manual_seed(0), N, K, groupsize, scales)
    packed, zero = cuda.pack_int4(q, grid, None, K, groupsize)
    assert zero == packing.FP4
    unpacked = cuda.unpack_int4(packed, N, K, groupsize, grid.dtype, zero)
    assert torch.equal(unpacked[0], q) and torch.equal(unpacked[1], grid) and unpacked[2] is None


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of pairs


@runs
@pytest.mark.parametrize("BM", [8, 16, 128])
@pytest.mark.parametrize("P, E", [(1, 1), (65, 3), (30, 40), (1024, 2), (3000, 5)])
@pytest.mark.parametrize("how", ["any", "one"])
def test_sorted_pairs(P, E, BM, how):
    """Every pair is in one block, which holds one expert's, in order, and -1 after them."""
    chosen = choose(E, P, 1, how, torch.Generator().manual_seed(P)).view(-1).to(DEVICE)
    order = torch.full((E + P // BM + 1, BM), 12345, dtype=torch.int32, device=DEVICE)
    cuda_experts._sort[E,](chosen, order, P, BM, num_warps=4)
    order, chosen = order.cpu(), chosen.cpu()
    assert (order[-1] == 12345).all()  # nothing is written beyond what was promised
    order = order[:-1]
    pairs = order[order >= 0]
    assert torch.equal(pairs.sort().values, torch.arange(P).int())
    assert (order[:, 1:][order[:, :-1] < 0] < 0).all()
    blocks = [row[row >= 0].tolist() for row in order if row[0] >= 0]
    assert all(len(set(chosen[block].tolist())) == 1 for block in blocks)
    expected = [P // BM + (P % BM > 0)] if how == "one" else [-(-int(n) // BM) for n in chosen.bincount()]
    assert len(blocks) == sum(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("R", [0, 1, 5, 100])
def test_nothing_waits_for_the_device(monkeypatch, R, kind):
    """There are no values to look at here; the output is as promised, and grids follow from shapes."""
    grids = []

    class Launcher:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in KERNELS:
        monkeypatch.setattr(cuda_experts, name, Launcher())
    weights = make(kind, 4, 48, 96, torch.bfloat16, torch.Generator())
    with FakeTensorMode() as mode:
        arguments = weights.arguments | {
            "x": torch.empty(R, 1, 96, dtype=torch.bfloat16), "chosen": torch.empty(R, 4, dtype=torch.long),
        }  # fmt: skip
        arguments = {
            name: mode.from_tensor(a) if isinstance(a, Tensor) and not hasattr(a, "fake_mode") else a
            for name, a in arguments.items()
        }
        y = getattr(cuda_experts, weights.op)(**arguments)
    assert (y.shape, y.dtype, y.stride()) == ((R, 4, 48), torch.bfloat16, (192, 48, 1))
    assert grids == {0: [], 1: [(4, 3)], 5: [(20, 1)], 100: [(4,), (7, 1)]}[R]


@pytest.mark.parametrize("kind", KINDS[:4])
def test_cuda_tensors_come_here(kind):
    assert kernels.cuda_kernels() is cuda
    op = empty(kind, 1, 32, 32, torch.bfloat16)[0]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"brisk::{op}", "CUDA")


@runs
def test_what_does_not_fit_is_refused():
    weights = {kind: make(kind, 3, 40, 96, torch.bfloat16, torch.Generator()) for kind in KINDS}
    x, chosen = torch.randn(5, 2, 96).bfloat16(), torch.zeros(5, 2, dtype=torch.long)
    for kind, call in weights.items():
        for wrong in (
            (x[..., :32], chosen), (x[:4], chosen), (x, chosen[:, :1]), (x[:, 0], chosen),
            (x, chosen, torch.randn(3, 41)), (x, chosen, torch.randn(40, 3).T),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="expected"):
                call(*wrong)
        assert call(x[:0], chosen[:0]).shape == (0, 2, 40), kind
        y = call(x.transpose(0, 1).contiguous().transpose(0, 1), chosen.T.contiguous().T)
        assert torch.equal(y, call(x, chosen))


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@gpu
@pytest.mark.parametrize("R", [1, 4, 64, 700])
@pytest.mark.parametrize("E, k, N, K", [(32, 4, 5760, 2880), (128, 8, 1536, 2048), (8, 2, 4096, 14336)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sizes_of_models(kind, E, k, N, K, R):
    generator = torch.Generator().manual_seed(R)
    weights = make(kind, E, N, K, torch.bfloat16, generator)
    x = torch.randn(R, 1, K, generator=generator).bfloat16()
    chosen = choose(E, R, k, "distinct", generator)
    y = weights(x, chosen)
    some = torch.randint(0, R, (3,), generator=generator)
    check(y[some], weights, x[some], chosen[some], None, R * k)


@gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("R", [1, 4, 100])
def test_a_graph_follows_what_is_chosen(R, kind):
    generator = torch.Generator().manual_seed(0)
    weights = make(kind, 8, 256, 512, torch.bfloat16, generator)
    weights.arguments = {name: a.cuda() if isinstance(a, Tensor) else a for name, a in weights.arguments.items()}
    op = getattr(cuda_experts, weights.op)
    x, chosen = torch.zeros(R, 1, 512, device="cuda").bfloat16(), torch.zeros(R, 2, dtype=torch.long, device="cuda")
    op(x=x, chosen=chosen, **weights.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(x=x, chosen=chosen, **weights.arguments)
    for how in ("distinct", "any", "one"):
        x.copy_(torch.randn(R, 1, 512, generator=generator))
        chosen.copy_(choose(8, R, 2, how, generator))
        graph.replay()
        check(y.cpu(), weights, x.cpu(), chosen.cpu(), None)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for an H200, on any machine


@pytest.fixture
def compilers(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = {name: Compiler(getattr(cuda_experts, name)) for name in KERNELS}
    for name, compiler in made.items():
        monkeypatch.setattr(cuda_experts, name, compiler)
    return made


def empty(kind: str, E: int, N: int, K: int, dtype: torch.dtype) -> tuple[str, dict]:
    """The op of a kind, and what it takes of experts, without data."""
    bf16, sizes = torch.bfloat16, {"out_features": N, "groupsize": 32}
    if kind == "floats":
        return "linear_experts", {"weight": torch.empty(E, N, K, dtype=dtype, device="meta")}
    if kind == "int8":
        q, scales = torch.empty(E, N, K, dtype=torch.int8, device="meta"), torch.empty(E, N, device="meta")
        return "linear_int8_experts", {"packed": q, "scales": scales}
    if kind == "int8 in groups":
        q = torch.empty(E, N, K, dtype=torch.int8, device="meta")
        scales = torch.empty(E, K // 32, N, dtype=bf16, device="meta")
        return "linear_int8_grouped_experts", {"packed": q, "scales": scales} | sizes
    zero, zero_bytes = {"int4 same": (8, 0), "int4 bytes": (packing.ZERO_BYTES, 1), "int4 fp4": (packing.FP4, 0)}[kind]
    packed = torch.empty(E, N * (K // 2 + K // 32 * (2 + zero_bytes)), dtype=torch.uint8, device="meta")
    return "linear_int4_experts", {"packed": packed, "scale_dtype": bf16, "zero": zero} | sizes


@pytest.mark.slow
@no_gpu
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int4 floats"])
@pytest.mark.parametrize(
    "R, k, E, N, K, dtype",
    [
        (1, 4, 32, 5760, 2880, "bf16"),  # gpt-oss, where no block divides K
        (8, 8, 128, 1536, 2048, "f16"),
        (64, 2, 8, 4096, 14336, "bf16"),
        (512, 8, 128, 1536, 2048, "bf16"),  # 32 pairs of an expert
        (512, 4, 32, 5760, 2880, "bf16"),  # 64
        (2048, 2, 8, 4096, 14336, "bf16"),  # 128 and more
        (40, 8, 128, 1536, 2048, "f32"),
    ],
)
def test_experts_compile(compilers, tmp_path, kind, R, k, E, N, K, dtype):
    op, experts = empty(kind, E, N, K, DTYPES[dtype])
    x = torch.empty(R, 1, K, dtype=DTYPES[dtype], device="meta")
    chosen = torch.empty(R, k, dtype=torch.long, device="meta")
    bias = torch.empty(E, N, dtype=torch.bfloat16, device="meta") if E == 32 else None
    getattr(cuda_experts, op)(x=x, chosen=chosen, bias=bias, **experts)
    made = {name: compiler.compiled for name, compiler in compilers.items() if compiler.compiled is not None}
    assert ("_sort" in made) == (R * k > 64)
    if sort := made.pop("_sort", None):
        check_compiled(sort, tmp_path, wide_copies=False)
    [(name, compiled)] = made.items()
    assert name == ("_many" if R >= 512 or dtype == "f32" else "_few_int4" if "int4" in kind else "_few")
    check_compiled(compiled, tmp_path, wide_copies=name != "_many")
    if name == "_many" and dtype != "f32":
        assert "wgmma.mma_async" in compiled.asm["ptx"] and "cp.async" in compiled.asm["ptx"]
