"""Checkpoints of compressed-tensors, packed here number by number as the format is defined, against float64; and files
that the library itself wrote."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import FUZZ, mutated
from test_convert import save_tokenizer
from test_gptq_awq import FloatLinear

import kernels
from checkpoint import load_model
from convert_hf_checkpoint import convert
from errors import UserError
from formats.compressed import collapse, unpack
from formats.compressed_config import find_scheme, read_schemes
from layout import MXFP4, Form
from weights import CHUNK_BYTES, read_header, read_safetensors

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]  # e2m1
NAME = "model.layers.0.mlp.up_proj"


@dataclass
class Held:
    """A tensor in a file, and how many bytes of it were read at once."""

    tensor: torch.Tensor
    most: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        rows = self.tensor[start:stop] if self.shape else self.tensor
        self.most = max(self.most, rows.nbytes)
        return rows


# -- the formats, by their definition


def pack(rows: np.ndarray, bits: int, gaps: bool = False) -> torch.Tensor:
    """Numbers [rows, n] -> int32 [rows, words]: each row is one long number, whose lowest bits are the first; with
    `gaps` each word is one, of as many as fit, as versions before 0.15 packed."""

    def words(numbers: list[int]) -> list[int]:
        if gaps:
            fit = 32 // bits
            return [word for i in range(0, len(numbers), fit) for word in longs(numbers[i : i + fit])]
        return longs(numbers)

    def longs(numbers: list[int]) -> list[int]:
        long = sum(int(number) << (bits * i) for i, number in enumerate(numbers))
        return [long >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(numbers) * bits // 32))]

    return torch.from_numpy(np.array([words(list(row)) for row in rows], np.uint32).view(np.int32))


def fields_of(format: str = "pack-quantized", **weights: object) -> dict:
    """quantization_config with one group."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


BLOCKS = {
    "group": lambda size: {"strategy": "group", "group_size": size},
    "channel": lambda size: {"strategy": "channel"},
    "tensor": lambda size: {"strategy": "tensor"},
    "block": lambda size: {"strategy": "block", "block_structure": [size, size]},
}


def spread(grid: np.ndarray, out: int, inputs: int, strategy: str, size: int, groups: np.ndarray | None = None):
    """What a tensor with a number for each block says of each weight, [out, in]."""
    if strategy == "group":
        return grid[:, np.arange(inputs) // size if groups is None else groups]
    if strategy == "block":
        return grid.repeat(size, 0).repeat(size, 1)[:out, :inputs]
    return np.broadcast_to(grid, (out, inputs))


def grid_shape(out: int, inputs: int, strategy: str, size: int) -> tuple[int, ...]:
    if strategy in ("channel", "tensor"):
        return (out, 1) if strategy == "channel" else (1,)
    return out if strategy == "group" else -(-out // size), -(-inputs // size)


def integers(
    out: int,
    inputs: int,
    bits: int = 4,
    strategy: str = "group",
    size: int = 32,
    symmetric: bool = True,
    packed: bool = True,
    gaps: bool = False,
    act_order: bool = False,
    zeros_packed: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The tensors of a layer, and its weight in float64."""
    random = np.random.default_rng(out * inputs + bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    levels = random.integers(low, high, (out, inputs))
    shape = grid_shape(out, inputs, strategy, size)
    scales = torch.from_numpy(random.uniform(0.005, 0.03, shape) * 16 / 2**bits).to(dtype)
    groups = random.permutation(np.arange(inputs) // size) if act_order else None
    zeros = np.zeros(shape, np.int64) if symmetric else random.integers(low, high, shape)
    over = (out, inputs, strategy, size, groups)
    weight = (levels - spread(zeros, *over)) * spread(scales.double().numpy(), *over)
    tensors = {"weight_scale": scales}
    if packed:
        tensors["weight_packed"] = pack(levels - low, bits, gaps)
        tensors["weight_shape"] = torch.tensor([out, inputs])
    else:
        tensors["weight"] = torch.from_numpy(levels.astype(np.int8))
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    if not symmetric:
        along = packed and zeros_packed and strategy in ("group", "channel")
        signed = torch.from_numpy(zeros.astype(np.int8))
        tensors["weight_zero_point"] = pack(zeros.T - low, bits, gaps).t().contiguous() if along else signed
    return tensors, weight


def held(tensors: dict[str, torch.Tensor], name: str = NAME) -> dict[str, Held]:
    return {f"{name}.{part}": Held(tensor) for part, tensor in tensors.items()}


def collapsed(fields: dict, tensors: dict[str, torch.Tensor]):
    result = collapse(fields, held(tensors))
    assert list(result) == [f"{NAME}.weight"]
    return result[f"{NAME}.weight"]


def from_parts(packed) -> np.ndarray:
    """The weight in float64 that the parts of our form stand for, see layout.quantized_shapes."""
    out, inputs = packed.shape
    form = packed.form
    parts = {part: torch.cat(list(packed.read_part(part))) for part in form.parts}
    assert parts["weight"].dtype == form.weight_dtype and parts["weight"].shape == (out, inputs * form.bits // 8)
    assert parts["scales"].dtype == packed.scale_dtype
    assert all(tensor.is_contiguous() for part in form.parts for tensor in packed.read_part(part))
    levels = parts["weight"].numpy()
    if form.bits == 4:
        levels = np.stack((levels & 15, levels >> 4), -1).reshape(out, inputs)
    scales, zeros = parts["scales"].double().numpy(), 0
    if form.groupsize == 0:
        assert scales.shape == (out,)
        return levels * scales[:, None]
    assert scales.shape == (out, inputs // form.groupsize)
    if form.floats:
        return np.array(FP4)[levels] * scales.repeat(form.groupsize, 1)
    if form.bits == 4:
        zeros = parts["zeros"].numpy()
        assert zeros.dtype == np.uint8 and zeros.shape == scales.shape and zeros.max() < 16
        zeros = zeros.astype(np.int64).repeat(form.groupsize, 1)
    weight = (levels.astype(np.int64) - zeros) * scales.repeat(form.groupsize, 1)
    if packed.order is not None:
        (order,) = packed.read_part("order")
        assert order.dtype == torch.int32 and torch.equal(order, packed.order)
        weight[:, order.numpy()] = weight.copy()
    return weight


def check(packed, weight: np.ndarray, form: Form | None, kind: str, exact: bool = True) -> None:
    """That the floats, in runs of rows too, and the parts are this weight. One product is exact to float32's last bit;
    two roundings may differ in it."""
    out, inputs = weight.shape
    expected = torch.from_numpy(weight).float()
    found = packed.read()
    assert (packed.form, packed.kind, packed.shape) == (form, kind, (out, inputs))
    assert found.dtype == packed.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0 if exact else 2**-22, atol=0)
    for start, stop in ((0, 1), (1, out), (out // 3, out // 2 + 1), (out - 1, None), (5, 5)):
        assert torch.equal(packed.read(start, stop), found[start:stop])
    if form is not None:
        assert np.array_equal(from_parts(packed), weight)


# -- integers


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("size", "inputs", "groupsize"),
    [(32, 96, 32), (64, 128, 64), (128, 256, 128), (256, 512, 128), (192, 384, 64), (128, 160, 32), (16, 64, None),
     (24, 96, None), (96, 96, 32)],
)  # fmt: skip
def test_groups_of_4_bits(size, inputs, groupsize, symmetric):
    tensors, weight = integers(24, inputs, size=size, symmetric=symmetric)
    packed = collapsed(fields_of(symmetric=symmetric, group_size=size), tensors)
    check(packed, weight, Form(4, groupsize) if groupsize else None, "int4")
    assert packed.scale_dtype == torch.bfloat16 and packed.order is None


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("gaps", [False, True], ids=["", "gaps"])
@pytest.mark.parametrize(("strategy", "size"), [("group", 64), ("channel", 0), ("tensor", 0), ("block", 32)])
def test_packed_integers(strategy, size, bits, gaps, symmetric):
    tensors, weight = integers(40, 192, bits, strategy, size, symmetric, gaps=gaps, dtype=torch.float16)
    fields = fields_of(num_bits=bits, symmetric=symmetric, **BLOCKS[strategy](size))
    if bits <= 4:
        form = Form(4, {"block": 32}.get(strategy, 64))
    elif not symmetric:
        form = None
    else:
        form = Form(8, {"group": 64, "block": 32}.get(strategy, 0))
    check(collapsed(fields, tensors), weight, form, f"int{bits}")


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("strategy", "size"), [("group", 64), ("channel", 0), ("tensor", 0), ("block", 32)])
def test_integers_that_are_not_packed(strategy, size, bits, symmetric):
    tensors, weight = integers(40, 192, bits, strategy, size, symmetric, packed=False, dtype=torch.float32)
    for format in ("int-quantized", "naive-quantized"):
        packed = collapsed(fields_of(format, num_bits=bits, symmetric=symmetric, **BLOCKS[strategy](size)), tensors)
        groupsize = {"group": 64, "block": 32}.get(strategy, 64 if bits == 4 else 0)
        check(packed, weight, Form(bits, groupsize) if symmetric or bits == 4 else None, f"int{bits}")


@pytest.mark.parametrize("act_order", ["group", "dynamic", True])
@pytest.mark.parametrize(("bits", "symmetric", "size"), [(4, True, 32), (4, False, 128), (8, True, 64), (8, False, 32)])
def test_scattered_groups(bits, symmetric, size, act_order):
    tensors, weight = integers(24, 256, bits, size=size, symmetric=symmetric, act_order=True)
    fields = fields_of(num_bits=bits, symmetric=symmetric, group_size=size, actorder=act_order)
    packed = collapsed(fields, tensors)
    check(packed, weight, Form(bits, size) if bits == 4 or symmetric else None, f"int{bits}")
    assert packed.order is not None


@pytest.mark.parametrize("act_order", ["weight", "static", False, None])
def test_groups_that_are_not_scattered(act_order):
    tensors, weight = integers(24, 128)
    for g_idx in (None, torch.arange(128, dtype=torch.int32) // 32, torch.full((128,), -1, dtype=torch.int32)):
        parts = tensors | ({} if g_idx is None else {"weight_g_idx": g_idx})
        packed = collapsed(fields_of(group_size=32, actorder=act_order), parts)
        check(packed, weight, Form(4, 32), "int4")
        assert packed.order is None


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_as_older_versions_store_them(bits):
    """Not packed, also of symmetric layers."""
    tensors, weight = integers(24, 128, bits, symmetric=False, zeros_packed=False)
    assert tensors["weight_zero_point"].dtype == torch.int8
    form = Form(4, 32) if bits == 4 else None
    check(collapsed(fields_of(num_bits=bits, symmetric=False, group_size=32), tensors), weight, form, f"int{bits}")
    tensors, weight = integers(24, 128, bits)
    tensors["weight_zero_point"] = torch.zeros(24, 4, dtype=torch.int8)
    check(collapsed(fields_of(num_bits=bits, group_size=32), tensors), weight, Form(bits, 32), f"int{bits}")


def test_8_bits_whose_zeros_are_all_0():
    """Asymmetric by name."""
    tensors, weight = integers(24, 128, 8)
    tensors["weight_zero_point"] = pack(np.full((4, 24), 128), 8).t().contiguous()
    check(collapsed(fields_of(num_bits=8, symmetric=False, group_size=32), tensors), weight, Form(8, 32), "int8")


def test_scales_without_a_second_dimension():
    tensors, weight = integers(24, 128, 8, "channel", packed=False)
    tensors["weight_scale"] = tensors["weight_scale"].flatten()
    check(collapsed(fields_of(num_bits=8, strategy="channel"), tensors), weight, Form(8), "int8")
    tensors, weight = integers(24, 128, 8, "tensor", packed=False)
    tensors["weight_scale"] = tensors["weight_scale"].reshape(())
    check(collapsed(fields_of(num_bits=8, strategy="tensor"), tensors), weight, Form(8), "int8")


@pytest.mark.parametrize(
    ("said", "strategy"),
    [({"strategy": None}, "tensor"), ({"strategy": None, "group_size": -1}, "channel"),
     ({"strategy": None, "group_size": 32}, "group"), ({"strategy": "CHANNEL", "group_size": -1}, "channel")],
)  # fmt: skip
def test_a_strategy_that_follows_from_the_group_size(said, strategy):
    tensors, weight = integers(24, 128, strategy=strategy)
    check(collapsed(fields_of(**said), tensors), weight, Form(4, 32 if strategy == "group" else 128), "int4")


# -- floats


def float8(random: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Every float8 but NaN."""
    codes = random.integers(0, 255, shape).astype(np.uint8)
    codes[(codes & 127) == 127] = 0
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def value_of_e4m3(tensor: torch.Tensor) -> np.ndarray:
    """By its definition: a sign, 4 bits of exponent plus 7, 3 of mantissa."""
    codes = tensor.view(torch.uint8).numpy().astype(np.int64)
    sign, exponent, mantissa = codes >> 7, codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(sign, -size, size)


@pytest.mark.parametrize("format", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize(("strategy", "size"), [("group", 128), ("channel", 0), ("tensor", 0), ("block", 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8(strategy, size, format, dtype):
    out, inputs = 136, 192
    random = np.random.default_rng(0)
    weight = float8(random, (out, inputs))
    scales = torch.from_numpy(random.uniform(1e-3, 1e-2, grid_shape(out, inputs, strategy, size))).to(dtype)
    expected = value_of_e4m3(weight) * spread(scales.double().numpy(), out, inputs, strategy, size)
    fields = fields_of(format, num_bits=8, type="float", **BLOCKS[strategy](size))
    tensors = {"weight": weight, "weight_scale": scales}
    check(collapsed(fields, tensors), expected, None, "fp8")
    # Older versions have zeros, all 0.
    zeros = torch.zeros_like(scales, dtype=torch.float8_e4m3fn)
    check(collapsed(fields, tensors | {"weight_zero_point": zeros}), expected, None, "fp8")


def nibbles(random: np.random.Generator, out: int, inputs: int) -> tuple[torch.Tensor, np.ndarray]:
    """Codes of e2m1, the first of two in the low half of a byte, and their values."""
    codes = random.integers(0, 16, (out, inputs)).astype(np.uint8)
    return torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4), np.array(FP4)[codes]


def test_nvfp4():
    """Scales of groups of 16 are float8, divided by one for all."""
    random = np.random.default_rng(0)
    packed, values = nibbles(random, 24, 160)
    scales = float8(random, (24, 10)).view(torch.uint8) & 127
    scales = scales.view(torch.float8_e4m3fn)
    whole = torch.tensor([2688 / 0.37])
    expected = values * (value_of_e4m3(scales) / whole.double().numpy()).repeat(16, 1)
    fields = fields_of("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    tensors = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole}
    check(collapsed(fields, tensors), expected, None, "nvfp4", exact=False)


@pytest.mark.parametrize(("inputs", "form"), [(160, MXFP4), (32, MXFP4)])
def test_mxfp4(inputs, form):
    random = np.random.default_rng(0)
    packed, values = nibbles(random, 24, inputs)
    exponents = random.integers(0, 255, (24, inputs // 32))
    expected = values * (2.0 ** (exponents - 127)).repeat(32, 1)
    exponents = torch.from_numpy(exponents.astype(np.uint8))
    fields = fields_of("mxfp4-pack-quantized", type="float", group_size=32, scale_dtype="torch.uint8")
    layer = collapsed(fields, {"weight_packed": packed, "weight_scale": exponents})
    # In float32 numbers below 2^-126 are rounded, and those beyond 2^128 infinite.
    assert torch.equal(layer.read(), torch.from_numpy(expected).float())
    assert np.array_equal(from_parts(layer), expected)
    assert (layer.form, layer.kind, layer.scale_dtype) == (form, "mxfp4", torch.bfloat16)


def test_mxfp6():
    """e2m3: a sign, 2 bits of exponent plus 1, 3 of mantissa; 4 codes in 3 bytes, the first in the lowest bits."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 64, (24, 96))
    exponent, mantissa = codes >> 3 & 3, codes & 7
    values = np.where(exponent == 0, mantissa / 8, (1 + mantissa / 8) * 2.0 ** (exponent - 1))
    values = np.where(codes >> 5, -values, values)
    exponents = random.integers(100, 150, (24, 3))
    tensors = {
        "weight_packed": pack(codes, 6).view(torch.uint8),
        "weight_scale": torch.from_numpy(exponents.astype(np.uint8)),
    }
    fields = fields_of("mxfp6-pack-quantized", type="float", num_bits=6, group_size=32)
    check(collapsed(fields, tensors), values * (2.0 ** (exponents - 127)).repeat(32, 1), None, "mxfp6")


def test_mxfp8():
    random = np.random.default_rng(0)
    weight, exponents = float8(random, (24, 96)), random.integers(100, 150, (24, 3))
    tensors = {"weight": weight, "weight_scale": torch.from_numpy(exponents.astype(np.uint8))}
    fields = fields_of("mxfp8-quantized", type="float", num_bits=8, group_size=32)
    check(collapsed(fields, tensors), value_of_e4m3(weight) * (2.0 ** (exponents - 127)).repeat(32, 1), None, "mxfp8")


# -- unpacking


@settings(deadline=None)
@given(st.data())
def test_unpack(data):
    bits, rows, count = (data.draw(st.integers(*span)) for span in ((2, 8), (1, 4), (1, 100)))
    gaps = data.draw(st.booleans())
    numbers = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * count, max_size=rows * count)))
    numbers = numbers.reshape(rows, count)
    assert np.array_equal(unpack(pack(numbers, bits, gaps), bits, count, gaps).numpy(), numbers)


@settings(deadline=None)
@given(st.data())
def test_any_shape(data):
    """Rows and inputs that no word divides, groups that do not divide the inputs, parts of any size."""
    bits, out, inputs = (
        data.draw(st.sampled_from([2, 4, 8])),
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 150)),
    )
    strategy, symmetric = data.draw(st.sampled_from(list(BLOCKS))), data.draw(st.booleans())
    size = data.draw(st.sampled_from([1, 7, 16, 32, 64]))
    tensors, weight = integers(out, inputs, bits, strategy, size, symmetric, packed=data.draw(st.booleans()))
    packed = collapsed(fields_of(num_bits=bits, symmetric=symmetric, **BLOCKS[strategy](size)), tensors)
    start = data.draw(st.integers(0, out))
    stop = data.draw(st.integers(start, out))
    assert np.array_equal(packed.read(start, stop).numpy(), weight[start:stop].astype(np.float32))
    if packed.form is not None:
        assert np.array_equal(from_parts(packed), weight)


def test_inputs_that_may_be_packed_in_two_ways():
    """100 numbers of 3 bits take 10 words with gaps and without."""
    tensors, _ = integers(8, 100, 3, "channel")
    with pytest.raises(
        UserError, match="which does not tell how integers of 3 bits"
    ):
        collapsed(fields_of(num_bits=3, strategy="channel"), tensors)


def test_nothing_is_read_at_once_that_is_large():
    tensors, _ = integers(64, 64)
    many = CHUNK_BYTES // (4 * 64) * 3
    tensors["weight_packed"] = tensors["weight_packed"].repeat(many // 64, 1)
    tensors["weight_scale"] = tensors["weight_scale"].repeat(many // 64, 1)
    tensors["weight_shape"] = torch.tensor([many, 64])
    source = held(tensors)
    packed = collapse(fields_of(group_size=32), source)[f"{NAME}.weight"]
    assert source[f"{NAME}.weight_packed"].most == 0
    assert sum(len(rows) for rows in packed.read_part("weight")) == many
    assert 0 < source[f"{NAME}.weight_packed"].most <= CHUNK_BYTES
    assert packed.read(64, 128).shape == (64, 64)
