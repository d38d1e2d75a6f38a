"""Mixtures of experts on CPUs: ops and layers against float64 in every instruction set, and against the linear ops of
each expert alone. MXFP4 against transformers.

Bounds are those of test_kernels.py: they follow from the arithmetic.
"""

# ruff: noqa: F401, F811  (pytest finds the fixtures `library` and `op` by their names)

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from test_kernels import (
    DTYPES,
    activation_error,
    activations,
    check,
    few,
    int4_floats,
    int4_weight,
    int8_weight,
    library,
    op,
    weight_size,
)
from torch import nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import kernels
from kernels import Int4Linear, Int8Linear, build, packing
from kernels.experts import Int4Experts, Int8Experts

KINDS = ["float", "int8", "int8_grouped", "int4_same", "int4_whole", "int4_float", "fp4"]


class Weights:
    """Of E experts, of one kind: as the ops take them, and in float64."""

    def __init__(self, kind: str, E: int, N: int, K: int, generator: torch.Generator, dtype=torch.bfloat16):
        self.kind, self.N = kind, N
        self.group = {"float": None, "int8": 128}.get(kind, 32)
        self.apart = torch.zeros(E, N, K)  # what float32 rounds of the zeros
        if kind == "float":
            weight = torch.randn(E, N, K, generator=generator).to(dtype)
            self.floats, self.name, self.tensors, self.options = weight.double(), "linear", (weight,), ()
        elif kind == "int8":
            q = torch.randint(-128, 128, (E, N, K), dtype=torch.int8, generator=generator)
            scales = torch.rand(E, N, generator=generator) / 100
            self.layer = Int8Experts.from_canonical(q, scales)
            self.floats, self.name = q.double() * scales.double()[..., None], "linear_int8"
            self.tensors, self.options = (self.layer.packed, self.layer.scales), ()
        elif kind == "int8_grouped":
            q, scales = (
                torch.stack(t) for t in zip(*(int8_weight(generator, N, K, 32) for _ in range(E)), strict=True)
            )
            self.layer = Int8Experts.from_canonical(q, scales)
            self.floats, self.name = q.double() * scales.double().repeat_interleave(32, 2), "linear_int8_grouped"
            self.tensors, self.options = (self.layer.packed, self.layer.scales), (N, 32)
        elif kind == "fp4":
            codes, scales = mxfp4(generator, E, N, K)
            q = packing.pack_nibbles(codes.flatten(0, 1)).view(E, N, -1)[..., : -(-K // 2)]
            self.layer = Int4Experts.from_canonical(q, scales, None, K, 32)
            self.floats = fp4_floats(codes, scales)[..., :K]
            self.name, self.tensors, self.options = "linear_int4", (self.layer.packed,), (N, 32, torch.bfloat16, -3)
        else:
            each = [int4_weight(generator, N, K, 32, "f16", kind.removeprefix("int4_")) for _ in range(E)]
            q, scales, zeros = (torch.stack(tensors) for tensors in zip(*each, strict=True))
            self.layer = Int4Experts.from_canonical(q, scales, zeros, K, 32)
            self.floats = torch.stack([int4_floats(*expert, K, 32) for expert in each])
            self.apart = torch.stack([weight_size(s, z, K, 32) for _, s, z in each]) * 2**-20
            self.name, self.tensors = "linear_int4", (self.layer.packed,)
            self.options = (N, 32, torch.float16, self.layer.zero)

    def experts(self, ops, x, chosen, bias):
        name = "linear_experts" if self.kind == "float" else f"{self.name}_experts"
        return getattr(ops, name)(x, *self.tensors, chosen, *self.options, bias)

    def one(self, ops, expert: int, x, bias):
        """The linear op, of the weight of one expert."""
        if self.kind == "float" and x.dtype != torch.bfloat16:
            return torch.nn.functional.linear(x, self.tensors[0][expert], bias)
        name = "linear_bf16" if self.kind == "float" else self.name
        return getattr(ops, name)(x, *(tensor[expert] for tensor in self.tensors), *self.options, bias)

    def extra(self, expert: int, x: torch.Tensor) -> torch.Tensor | float:
        if self.group is None:
            return 0.0
        apart = x.double().abs() @ self.apart[expert].double().T
        return activation_error(x, self.floats[expert], self.group) + apart


def mxfp4(generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., N, K up to whole groups] and scales bfloat16 [..., N, groups]."""
    groups = -(-shape[-1] // 32)
    codes = torch.randint(0, 16, (*shape[:-1], groups * 32), dtype=torch.uint8, generator=generator)
    codes[..., shape[-1] :] = 0
    scales = 2.0 ** torch.randint(-12, 3, (*shape[:-1], groups), generator=generator)
    return codes, scales.bfloat16()


def fp4_floats(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """By the definition of e2m1: a sign, two bits of exponent, with a bias of 1, one of mantissa."""
    sign, exponent, mantissa = codes // 8, codes // 2 % 4, (codes % 2).double()
    magnitude = torch.where(exponent == 0, mantissa / 2, 2.0 ** (exponent.double() - 1) * (1 + mantissa / 2))
    return (1 - 2 * sign.double()) * magnitude * scales.double().repeat_interleave(32, -1)


def choose(generator, R: int, k: int, E: int, uneven: bool) -> torch.Tensor:
    """int64 [R, k], distinct within a row; uneven: some experts by nearly all rows."""
    likely = 4.0 ** -torch.arange(E) if uneven else torch.ones(E)
    return torch.multinomial(likely.expand(R, E), k, generator=generator)


shapes = st.fixed_dictionaries(
    {
        "R": st.one_of(st.integers(1, 40), st.just(1)),
        "k": st.integers(1, 4),
        "E": st.integers(4, 9),
        "N": st.integers(1, 100),
        "K": st.one_of(st.integers(1, 300), st.sampled_from([64, 256])),
        "own_inputs": st.booleans(),
        "uneven": st.booleans(),
        "activations": st.sampled_from(["normal", "normal", "outlier", "large", "tiny", "zero", "one"]),
        "dtype": st.sampled_from(["bf16", "bf16", "f16", "f32"]),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)
DECODE = dict(R=1, k=4, E=8, N=96, K=256, own_inputs=False, uneven=False, activations="normal", dtype="bf16", bias=True)


@few
@given(shape=shapes, kind=st.sampled_from(KINDS))
@example(DECODE | {"seed": 0}, "float")
@example(DECODE | {"seed": 0, "own_inputs": True}, "int4_same")
def test_experts(op, shape, kind):
    R, k, E, N, K = (shape[name] for name in ("R", "k", "E", "N", "K"))
    K = -(-K // 32) * 32 if kind == "int8_grouped" else K
    generator, dtype = torch.Generator().manual_seed(shape["seed"]), DTYPES[shape["dtype"]]
    weights = Weights(kind, E, N, K, generator, dtype)
    inputs = k if shape["own_inputs"] else 1
    x = activations(generator, R * inputs, K, shape["activations"], dtype).view(R, inputs, K)
    bias = torch.randn(E, N, generator=generator).to(dtype) if shape["bias"] else None
    chosen = choose(generator, R, k, E, shape["uneven"])
    y = weights.experts(op, x, chosen, bias)
    assert y.shape == (R, k, N) and y.dtype == dtype and y.is_contiguous()
    for expert in range(E):
        rows, choices = (chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            its_x, its_bias = x[rows, choices.clamp(max=inputs - 1)], None if bias is None else bias[expert]
            its_y = y[rows, choices]
            check(its_y, its_x, weights.floats[expert], its_bias, weights.extra(expert, its_x))
            assert torch.equal(its_y.nan_to_num(), weights.one(op, expert, its_x, its_bias).nan_to_num())


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_of_an_expert(op, kind):
    """As in prefill: tens of rows for some experts, a few for others, none for the last."""
    generator = torch.Generator().manual_seed(0)
    weights = Weights(kind, 6, 70, 192, generator)
    x, bias = torch.randn(200, 1, 192, generator=generator).bfloat16(), torch.randn(6, 70).bfloat16()
    chosen = choose(generator, 200, 2, 5, True)
    assert chosen.unique(return_counts=True)[1].tolist()[0] > 150
    y = weights.experts(op, x, chosen, bias)
    for expert in range(5):
        rows, choices = (chosen == expert).nonzero(as_tuple=True)
        check(y[rows, choices], x[rows, 0], weights.floats[expert], bias[expert], weights.extra(expert, x[rows, 0]))
        assert torch.equal(y[rows, choices], weights.one(op, expert, x[rows, 0], bias[expert]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expert", [-1, 4, 2**40])
def test_an_expert_that_there_is_not(op, kind, expert):
    weights, x = Weights(kind, 4, 40, 64, torch.Generator().manual_seed(0)), torch.randn(3, 1, 64).bfloat16()
    with pytest.raises((RuntimeError, IndexError), match=f"experts from 0 to 3, got {expert}"):
        weights.experts(op, x, torch.tensor([[0, 1], [2, expert], [3, 0]]), None)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes_are_refused(kind, library):
    brisk = torch.ops.brisk
    weights, x = Weights(kind, 4, 40, 64, torch.Generator().manual_seed(0)), torch.randn(3, 2, 64).bfloat16()
    chosen = torch.tensor([[0, 1], [2, 3], [1, 0]])
    for wrong_x, wrong_chosen, bias in (
        (x[:2], chosen, None),
        (x[0], chosen, None),
        (x[..., :32], chosen, None),
        (x[..., :0], chosen, None),
        (torch.cat((x, x), 1), chosen, None),
        (x, chosen.int(), None),
        (x, chosen[:, 0], None),
        (x, chosen, torch.ones(40)),
        (x, chosen, torch.ones(3, 40)),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            weights.experts(brisk, wrong_x, wrong_chosen, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_views_no_rows_and_an_expert_twice(op, kind):
    generator = torch.Generator().manual_seed(0)
    weights = Weights(kind, 4, 40, 64, generator)
    x = torch.randn(3, 64, 2, generator=generator).bfloat16().transpose(1, 2)
    chosen = torch.tensor([[0, 2, 1], [1, 3, 3], [2, 2, 0]])
    y = weights.experts(op, x, chosen[:, :2], None)
    assert torch.equal(y, weights.experts(op, x.contiguous(), chosen[:, :2].contiguous(), None))
    assert weights.experts(op, x[:0], chosen[:0, :2], None).shape == (0, 2, 40)
    twice = weights.experts(op, x[2:, :1], chosen[2:], None)  # two rows of one expert have one input
    assert torch.equal(twice[:, 0], twice[:, 1])


def test_weights_that_are_not_chosen_do_not_matter(op):
    weight = torch.full((5, 40, 64), float("nan")).bfloat16()
    weight[[1, 3]] = 1
    y = op.linear_experts(torch.ones(2, 1, 64).bfloat16(), weight, torch.tensor([[1, 3], [3, 1]]))
    assert (y == 64).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind, library):
    """As long as no expert has so many that a GEMM is faster: whatever shares the reading of its weights."""
    generator = torch.Generator().manual_seed(0)
    weights = Weights(kind, 5, 70, 200 if kind != "int8_grouped" else 192, generator)
    x, chosen = (
        torch.randn(16, 1, weights.floats.shape[2], generator=generator).bfloat16(),
        choose(generator, 16, 3, 5, True),
    )
    for isa in reversed(build.available_isas()):
        build.use_isa(isa)
        y = weights.experts(torch.ops.brisk, x, chosen, None)
        alone = [weights.experts(torch.ops.brisk, x[i : i + 1], chosen[i : i + 1], None) for i in range(16)]
        assert torch.equal(y, torch.cat(alone))


# ---------------------------------------------------------------------------------------------------------------------
# As PyTorch ops


def examples(kind: str, R: int) -> tuple:
    generator = torch.Generator().manual_seed(0)
    weights = Weights(kind, 5, 48, 96, generator)
    x, bias = torch.randn(R, 1, 96, generator=generator).bfloat16(), torch.randn(5, 48, generator=generator).bfloat16()
    return weights, (x, choose(generator, R, 3, 5, True), bias)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, library):
    weights, (x, chosen, bias) = examples(kind, 3)
    name = "linear_experts" if kind == "float" else f"{weights.name}_experts"
    torch.library.opcheck(getattr(torch.ops.brisk, name).default, (x, *weights.tensors, chosen, *weights.options, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("R", [1, 7, 50])
def test_the_result_does_not_depend_on_the_threads(kind, R, library):
    weights, args = examples(kind, R)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(weights.experts(torch.ops.brisk, *args))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class Mixture(nn.Module):
    """A router, and experts as a model has them: their first weights get one input, the second ones each its own."""

    def __init__(self, kind: str):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.router = nn.Linear(64, 6)
        self.w13, self.w2 = Weights(kind, 6, 128, 64, generator).layer, Weights(kind, 6, 64, 64, generator).layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).topk(2)
        gate, up = self.w13(x[:, None], chosen).split(64, -1)
        return (self.w2(torch.tanh(gate) * up, chosen) * weights[..., None]).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int8_grouped", "int4_same", "fp4"])
@torch.inference_mode()
def test_compiled(kind, library, compiler):
    """One graph, whatever experts are chosen."""
    torch.manual_seed(0)
    mixture = Mixture(kind)
    step = torch.compile(mixture, fullgraph=True, dynamic=False)
    for x in torch.randn(4, 3, 64):
        torch.testing.assert_close(step(x), mixture(x), rtol=0.02, atol=0.02 * float(mixture(x).abs().max()))


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@few
@given(E=st.integers(1, 4), N=st.integers(1, 70), K=st.integers(1, 200), seed=st.integers(0, 999))
def test_a_layer_packs_each_expert_as_a_linear_layer_does(E, N, K, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (E, N, K), dtype=torch.int8, generator=generator)
    layer = Int8Experts.from_canonical(q, torch.rand(E, N).double())
    assert layer.scales.dtype == torch.float32
    assert all(torch.equal(kernels.unpack_int8(layer.packed[e], N, K), q[e]) for e in range(E))
    kind = ["same", "whole", "float"][seed % 3]
    each = [int4_weight(generator, N, K, 64, "f32", kind) for _ in range(E)]
    layer = Int4Experts.from_canonical(*(torch.stack(tensors) for tensors in zip(*each, strict=True)), K, 64)
    for packed, expert in zip(layer.packed, each, strict=True):
        unpacked = kernels.unpack_int4(packed, N, K, 64, torch.float32, layer.zero)
        assert all(torch.equal(before, after) for before, after in zip(expert, unpacked, strict=True))


def test_experts_whose_zeros_are_of_different_kinds(op):
    """One has the same zero everywhere, another several: all are packed as the second one needs it."""
    generator, x, chosen = torch.Generator().manual_seed(0), torch.randn(2, 1, 64), torch.tensor([[0, 1], [1, 2]])
    kinds = {packing.ZERO_BYTES: ["same", "whole", "same"], packing.ZERO_FLOATS: ["float", "same", "whole"]}
    for zero, names in kinds.items():
        each = [int4_weight(generator, 40, 64, 32, "f32", name) for name in names]
        layer = Int4Experts.from_canonical(*(torch.stack(tensors) for tensors in zip(*each, strict=True)), 64, 32)
        assert layer.zero == zero
        y = op.linear_int4_experts(x, layer.packed, chosen, 40, 32, torch.float32, zero)
        for r, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            expert = each[chosen[r, j]]
            weight = int4_floats(*expert, 64, 32)
            apart = (x[r].double().abs() @ weight_size(*expert[1:], 64, 32).T) * 2**-20
            check(y[r, j][None], x[r], weight, None, activation_error(x[r], weight, 32) + apart)


def test_what_a_layer_says_of_itself():
    int8 = Int8Experts.from_canonical(torch.ones(3, 64, 128, dtype=torch.int8), torch.ones(3, 64, 2), torch.ones(3, 64))
    assert (int8.n_experts, int8.out_features, int8.in_features, int8.groupsize) == (3, 64, 128, 64)
    assert int8.weight_bytes == 3 * 64 * (128 + 2 * 4 + 4)
    assert Int8Experts.from_canonical(torch.ones(3, 64, 128, dtype=torch.int8), torch.ones(3, 64)).groupsize == 0
    q, scales = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.ones(3, 64, 4).bfloat16()
    int4 = Int4Experts.from_canonical(q, scales, torch.full((3, 64, 4), 8.0), 128, 32)
    assert (int4.n_experts, int4.out_features, int4.in_features, int4.groupsize) == (3, 64, 128, 32)
    assert int4.zero == 8 and int4.weight_bytes == 3 * 64 * (64 + 4 * 2)
    assert int4.state_dict() == {}


CODES, SCALES = torch.zeros(2, 4, 16, dtype=torch.uint8), torch.ones(2, 4, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Int8Experts.from_canonical(torch.zeros(2, 4, 64), torch.ones(2, 4)),
        lambda: Int8Experts.from_canonical(torch.zeros(4, 64, dtype=torch.int8), torch.ones(4)),
        lambda: Int8Experts.from_canonical(torch.zeros(0, 4, 64, dtype=torch.int8), torch.ones(0, 4)),
        lambda: Int8Experts.from_canonical(torch.zeros(2, 4, 64, dtype=torch.int8), torch.ones(3, 4)),
        lambda: Int8Experts.from_canonical(torch.zeros(2, 4, 64, dtype=torch.int8), torch.ones(2, 4, 3)),
        lambda: Int8Experts.from_canonical(torch.zeros(2, 4, 64, dtype=torch.int8), torch.ones(2, 4), torch.ones(4)),
        lambda: Int4Experts.from_canonical(CODES, SCALES, SCALES, 40, 32),
        lambda: Int4Experts.from_canonical(CODES, SCALES, SCALES, 32, 48),
        lambda: Int4Experts.from_canonical(CODES, SCALES, SCALES[..., 0], 32, 32),
        lambda: Int4Experts.from_canonical(CODES, SCALES[:1], SCALES, 32, 32),
        lambda: Int4Experts.from_canonical(CODES[0], SCALES[0], SCALES[0], 32, 32),
        lambda: Int4Experts.from_canonical(CODES, SCALES, None, 32, 32),
        lambda: Int4Linear.from_canonical(CODES[0], SCALES[0], None, 32, 32),
        lambda: Int4Linear.from_canonical(CODES[0], SCALES[0].bfloat16(), None, 32, 64),
    ],
)
def test_canonical_tensors_of_the_wrong_shape(make):
    with pytest.raises(ValueError, match="expected"):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# MXFP4


def test_fp4_values_are_those_of_transformers():
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)  # [E, N, groups, bytes]
    exponents = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32).transpose(1, 2)
    scales = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127).bfloat16()
    for e in range(2):
        levels = packing.unpack_nibbles(blocks[e].flatten(1), 96)
        assert torch.equal(packing.dequantize(levels, scales[e].float(), None, 32), expected[e])
        layer = Int4Linear.from_canonical(blocks[e].flatten(1), scales[e], None, 96, 32)
        torch.testing.assert_close(layer(torch.eye(96)).T, expected[e], rtol=1e-6, atol=0)
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(torch.tensor(packing.FP4_VALUES).double(), fp4_floats(codes.repeat(2), torch.ones(1))[:16])


@few
@given(
    R=st.integers(1, 17), N=st.integers(1, 100), K=st.integers(1, 300), dtype=st.sampled_from(list(DTYPES)),
    kind=st.sampled_from(["normal", "outlier", "large", "tiny", "one"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_fp4(op, R, N, K, dtype, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    codes, scales = mxfp4(generator, N, K)
    q = packing.pack_nibbles(codes)[:, : -(-K // 2)]
    packed, zero = kernels.pack_int4(q, scales, None, K, 32)
    assert zero == packing.FP4
    unpacked = kernels.unpack_int4(packed, N, K, 32, torch.bfloat16, zero)
    assert torch.equal(unpacked[0], q) and torch.equal(unpacked[1], scales) and unpacked[2] is None
    x, bias = activations(generator, R, K, kind, DTYPES[dtype]), torch.randn(N, generator=generator)
    y = op.linear_int4(x, packed, N, 32, torch.bfloat16, zero, bias)
    weight = fp4_floats(codes, scales)[:, :K]
    check(y, x, weight, bias, activation_error(x, weight, 32))


def test_fp4_at_its_extremes(op):
    """Weights 6 or -6, all activations of a block the largest: in tiles of every size. And every power of two."""
    codes = torch.where(torch.arange(64) // 2 % 2 == 0, 0x77, 0xFF).to(torch.uint8)[:, None].repeat(1, 160)
    weight = torch.where(codes == 0x77, 6.0, -6.0).double().repeat_interleave(2, 1)
    packed, zero = kernels.pack_int4(codes, torch.ones(64, 10).bfloat16(), None, 320, 32)
    for rows in range(1, 18):
        x = torch.randn(rows, 10).sign().repeat_interleave(32, 1)
        y = op.linear_int4(x, packed, 64, 32, torch.bfloat16, zero)
        torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-5, atol=0.01)
    powers = torch.ldexp(torch.ones(254), torch.arange(-127, 127)).bfloat16()[:, None]
    packed, zero = kernels.pack_int4(torch.full((254, 16), 0x11, dtype=torch.uint8), powers, None, 32, 32)
    x = torch.zeros(1, 32)
    x[0, 5] = 127.0
    assert torch.equal(op.linear_int4(x, packed, 254, 32, torch.bfloat16, zero), powers.float().T * 63.5)


def test_fp4_without_its_groups_or_scales_is_refused(library):
    for groupsize, dtype in ((64, torch.bfloat16), (32, torch.float16)):
        with pytest.raises(RuntimeError, match="groups of 32 with bfloat16 scales"):
            torch.ops.brisk.linear_int4(torch.ones(1, 64), torch.zeros(1, dtype=torch.uint8), 1, groupsize, dtype, -3)


def test_experts_are_as_linear_layers(library):
    """From the same tensors on disk."""
    x, q, scales = torch.randn(4, 96), torch.randint(-128, 128, (3, 40, 96), dtype=torch.int8), torch.rand(3, 40, 3)
    chosen, bias = torch.tensor([[2], [0], [1], [2]]), torch.randn(3, 40)
    y = Int8Experts.from_canonical(q, scales, bias)(x[:, None], chosen)
    for i, e in enumerate([2, 0, 1, 2]):
        assert torch.equal(y[i], Int8Linear.from_canonical(q[e], scales[e], bias[e])(x[i : i + 1]))
