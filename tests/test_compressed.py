"""Checkpoints of compressed-tensors, packed here number by number as the format is defined, against float64; and files
that the library itself wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_bitsandbytes import Held
from test_checkpoint import FUZZ, mutated
from test_convert import fused, save_tokenizer

from checkpoint import load_model
from convert_hf_checkpoint import convert
from errors import UserError
from formats.compressed import collapse, unpack
from formats.compressed_config import find_scheme, read_schemes
from layout import FORMS, MXFP4, Form
from weights import CHUNK_BYTES, read_safetensors

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]  # e2m1
SMALL = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 304, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
NAME = "model.layers.0.mlp.up_proj"


# -- the formats, by their definition


def pack(rows: np.ndarray, bits: int, gaps: bool = False) -> torch.Tensor:
    """Numbers [rows, n] -> int32 [rows, words]: each row is one long number, whose lowest bits are the first; with
    `gaps` each word is one, of as many as fit, as versions until 0.15 packed."""

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
    """The weight in float64 that the parts of our form stand for."""
    form = packed.form
    parts = {part: torch.cat(list(packed.read_part(part))) for part in form.parts}
    assert all(tensor.is_contiguous() for part in form.parts for tensor in packed.read_part(part))
    assert parts["scales"].dtype == packed.scale_dtype and parts["weight"].dtype == form.weight_dtype
    if packed.order is not None:
        (parts["order"],) = packed.read_part("order")
        assert torch.equal(parts["order"], packed.order)
    weight = stands_for(form, parts)
    assert weight.shape == packed.shape
    return weight


def stands_for(form: Form, parts: dict[str, torch.Tensor]) -> np.ndarray:
    """The weight [out, in] in float64 by the definition of our layout, see layout.quantized_shapes."""
    levels = parts["weight"].numpy().astype(np.int64)
    if form.bits == 4:
        levels = np.stack((levels & 15, levels >> 4), -1).reshape(len(levels), -1)
    out, inputs = levels.shape
    scales = parts["scales"].double().numpy()
    assert scales.shape == ((out, inputs // form.groupsize) if form.groupsize else (out,))
    scales = scales.repeat(form.groupsize, 1) if form.groupsize else scales[:, None]
    if form.floats:
        return np.array(FP4)[levels] * scales
    if form.bits == 4:
        assert parts["zeros"].dtype == torch.uint8 and parts["zeros"].max() < 16
        levels = levels - parts["zeros"].numpy().astype(np.int64).repeat(form.groupsize, 1)
    weight = levels * scales
    if "order" in parts:
        assert parts["order"].dtype == torch.int32
        weight[:, parts["order"].numpy()] = weight.copy()
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
    with pytest.raises(UserError, match=r"and 3-bit integers of the shape .* in two ways; convert"):
        collapsed(fields_of(num_bits=3, strategy="channel"), tensors)


def test_nothing_is_read_at_once_that_is_large():
    tensors, _ = integers(64, 64)
    many = CHUNK_BYTES // (4 * 64) * 3
    tensors["weight_packed"] = tensors["weight_packed"].repeat(many // 64, 1)
    tensors["weight_scale"] = tensors["weight_scale"].repeat(many // 64, 1)
    tensors["weight_shape"] = torch.tensor([many, 64])
    source = held(tensors)
    packed = collapse(fields_of(group_size=32), source)[f"{NAME}.weight"]
    reads = source[f"{NAME}.weight_packed"].reads
    assert not reads
    assert sum(len(rows) for rows in packed.read_part("weight")) == many
    assert len(reads) == 3 and max(reads) * 4 * 64 <= CHUNK_BYTES
    assert packed.read(64, 128).shape == (64, 64) and reads[3:] == [64]


# -- what the config says


def groups_of(*groups: tuple[list[str], dict]) -> dict:
    fields = fields_of()
    template = fields["config_groups"]["group_0"]
    fields["config_groups"] = {
        f"group_{i}": template | {"targets": targets, "weights": template["weights"] | weights}
        for i, (targets, weights) in enumerate(groups)
    }
    return fields


MIXED = groups_of(
    (["re:.*self_attn\\..*", "model.layers.1.mlp.up_proj"], {"num_bits": 8, "strategy": "channel"}),
    (["Linear"], {"num_bits": 4, "group_size": 32}),
    (["re:.*down_proj", "re:model\\.layers\\.0\\..*k_proj"], {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    (["Embedding"], {"num_bits": 8, "strategy": "tensor"}),
    (["re:.*q_proj"], {"num_bits": 2, "group_size": 64}),
) | {"format": "mixed-precision"}
LAYERS = {
    "model.layers.0.self_attn.o_proj": "int8",
    "model.layers.0.self_attn.k_proj": "int8",  # of two patterns the first in the alphabet
    "model.layers.0.self_attn.q_proj": "int2",
    "model.layers.1.mlp.up_proj": "int8",
    "model.layers.11.mlp.up_proj": "int4",
    "model.layers.0.mlp.gate_proj": "int4",
    "model.layers.0.mlp.down_proj": "fp8",
    "model.embed_tokens": "int8",
    "lm_head": "int4",
}


def test_targets():
    schemes = read_schemes(MIXED)
    found = {name: find_scheme(schemes, name) for name in LAYERS}
    assert {name: ("fp" if scheme.floats else "int") + str(scheme.bits) for name, scheme in found.items()} == LAYERS
    assert found["model.embed_tokens"].block == (0, 0) != found["model.layers.1.mlp.up_proj"].block == (1, 0)


def test_targets_as_the_library_matches_them():
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="the library is not installed")
    config = transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 12})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    fields = {name: value for name, value in MIXED.items() if name != "ignore"}
    quantization.apply_quantization_config(model, quantization.QuantizationConfig(**fields), show_progress=False)
    schemes, checked = read_schemes(MIXED), 0
    for name, module in model.named_modules():
        if args := getattr(getattr(module, "quantization_scheme", None), "weights", None):
            scheme = find_scheme(schemes, name)
            assert (scheme.bits, scheme.floats) == (args.num_bits, args.type == "float"), name
            checked += 1
    assert checked == 12 * 7 + 2


def test_one_group_is_for_all_that_is_quantized():
    """Whatever its targets are called: in the file names may be others than those in the model."""
    tensors, weight = integers(24, 128)
    fields = groups_of((["re:.*not_there"], {"group_size": 32}), (["re:never"], {"group_size": 32}))
    check(collapsed(fields, tensors), weight, Form(4, 32), "int4")


def test_floats_and_all_else_are_passed_on(capsys):
    """Layers that are not quantized, whatever `ignore` says; scales of activations and of the KV cache are not."""
    tensors, _ = integers(24, 128)
    scales = ["input_scale", "input_zero_point", "input_global_scale", "output_scale"]
    source = held(tensors | {"bias": torch.ones(24)} | {name: torch.ones(1) for name in scales})
    source |= {f"model.layers.0.self_attn.{name}_scale": Held(torch.ones(1)) for name in "qkv"}
    source |= {"lm_head.weight": Held(torch.ones(4, 4)), "model.norm.weight": Held(torch.ones(4))}
    fields = fields_of(group_size=32)
    fields["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True}
    result = collapse(fields, source)
    assert list(result) == [f"{NAME}.weight", f"{NAME}.bias", "lm_head.weight", "model.norm.weight"]
    assert result["lm_head.weight"] is source["lm_head.weight"]
    said = "this checkpoint quantizes activations or the KV cache as well; here they stay floats\n"
    assert capsys.readouterr().err == said
    collapse(fields | {"kv_cache_scheme": {"num_bits": 8}, "config_groups": {}}, {"x.k_scale": Held(torch.ones(1))})
    assert capsys.readouterr().err == said
    collapse(fields, {})  # only what the fields mean
    collapse(fields_of(group_size=32), source)
    assert capsys.readouterr().err == ""


def test_fields_that_are_unknown_or_nested(capsys):
    tensors, weight = integers(24, 128)
    fields = fields_of(group_size=32) | {"version": "0.9.4", "newer": {"a": 1}, "newest": None, "sparsity_config": {},
                                         "transform_config": {"config_groups": {}}}  # fmt: skip
    check(collapsed({"quant_method": "compressed-tensors", "quantization_config": fields}, tensors), weight,
          Form(4, 32), "int4")  # fmt: skip
    warning = "warning: config.json: quantization_config: newer: this field is unknown and is ignored; check that it"
    assert capsys.readouterr().err == f"{warning} does not matter\n"
    dense = {"format": "dense", "ignore": ["lm_head"], "sparsity_structure": "0:0", "global_sparsity": 0.1}
    check(collapsed(fields_of(group_size=32) | {"sparsity_config": dense}, tensors), weight, Form(4, 32), "int4")


def rotations(*locations: str) -> dict:
    steps = [{"targets": ["re:.*"], "location": location, "inverse": False, "ignore": []} for location in locations]
    return {"config_groups": {"R1": {"type": "hadamard", "apply": steps, "randomize": False}}}


def test_rotations_that_are_in_the_weights():
    """As SpinQuant's first two: the file holds what was rotated."""
    tensors, weight = integers(24, 128)
    fields = fields_of(group_size=32) | {"transform_config": rotations("weight_input", "weight_output")}
    check(collapsed(fields, tensors), weight, Form(4, 32), "int4")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24'"),
        ({"format": "sparse-24-bitmask"}, "format 'sparse-24-bitmask'"),
        ({"format": ["pack-quantized"]}, "format ['pack-quantized']"),
        ({"sparsity_config": {"format": "sparse-24-bitmask", "targets": []}}, "sparsity_config 'sparse-24-bitmask'"),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transform_config: location '?'"),
        ({"transform_config": rotations("weight_output", "input")}, "transform_config: location 'input'"),
        ({"transform_config": [1]}, "transform_config"),
        ({"moe_sparsity_config": {"method": "novice", "num_experts": [2]}}, "moe_sparsity_config"),
        ({"config_groups": [1]}, "config_groups [1]"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "W4A16: targets ['Linear']"),
        ({"config_groups": {"group_0": {"targets": ["re:("], "weights": {}}}}, "targets ['re:(']"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "format": "odd"}}}, "format 'odd'"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": 4}}}, "weights: 4"),
    ],
)
def test_refused_fields(changes, named):
    with pytest.raises(UserError) as error:
        collapse(fields_of() | changes, {})
    assert str(error.value).startswith("config.json: quantization_config: ") and named in str(error.value)
    assert str(error.value).endswith(" is not supported in compressed-tensors; convert the original model")


@pytest.mark.parametrize(
    "weights",
    [{"num_bits": 1}, {"num_bits": 16}, {"num_bits": "4"}, {"num_bits": True}, {"type": "float", "num_bits": 5},
     {"type": "complex"}, {"group_size": 0}, {"group_size": -2}, {"group_size": 2.0}, {"group_size": 2**70},
     {"group_size": None}, {"dynamic": True}, {"strategy": "token"}, {"strategy": "attn_head"},
     {"strategy": "block", "block_structure": None}, {"strategy": "block", "block_structure": "2x"},
     {"strategy": "block", "block_structure": [0, 1]}, {"symmetric": None}, {"actorder": "random"},
     {"type": "float", "symmetric": False}, {"levels": [1, 2]}],
)  # fmt: skip
def test_refused_weights(weights):
    with pytest.raises(UserError) as error:
        collapse(fields_of(**{"group_size": 32} | weights), {})
    name, value = list(weights.items())[-1]
    assert f"config_groups: group_0: weights: {name} {value!r} is not supported" in str(error.value)


def test_block_structure_in_words():
    """As older versions write it."""
    tensors, weight = integers(40, 128, 8, "block", 32)
    fields = fields_of(num_bits=8, strategy="block", block_structure="32x32", group_size=None)
    check(collapsed(fields, tensors), weight, Form(8, 32), "int8")


@FUZZ
@given(mutated(MIXED | {"sparsity_config": {"format": "dense"}, "transform_config": {}}))
def test_fuzz_config(fields):
    if not isinstance(fields, dict):
        return
    tensors, _ = integers(8, 32)
    try:
        for tensor in collapse(fields, held(tensors) | held(tensors, "model.layers.0.self_attn.q_proj")).values():
            assert tensor.shape == (8, 32) and tensor.read().isfinite().all()
    except UserError as error:
        assert str(error)


# -- damaged


def test_no_weight_shape():
    """Where all words are full it follows."""
    for bits in (4, 8):
        tensors, weight = integers(24, 128, bits)
        del tensors["weight_shape"]
        check(collapsed(fields_of(num_bits=bits, group_size=32), tensors), weight, Form(bits, 32), f"int{bits}")


def test_missing_tensors():
    tensors, _ = integers(24, 160, 3, symmetric=False, act_order=True)
    fields = fields_of(num_bits=3, group_size=32, symmetric=False, actorder="group")
    for missing in tensors:
        rest = {part: tensor for part, tensor in tensors.items() if part != missing}
        named = "weight" if missing == "weight_packed" else missing
        with pytest.raises(UserError, match=f"^tensor '{NAME}.{named}' is missing from the weights; "):
            collapsed(fields, rest)
    with pytest.raises(UserError, match=f"^tensor '{NAME}.weight_scale' is missing from the weights; "):
        collapsed(fields_of(num_bits=8, strategy="tensor"), {"weight": torch.ones(4, 4, dtype=torch.int8)})
    fields = groups_of((["re:.*q_proj"], {"num_bits": 8, "strategy": "channel"}), (["lm_head"], {"group_size": 32}))
    with pytest.raises(UserError, match=f"^layer '{NAME}' is quantized, and no target of config_groups "):
        collapsed(fields, integers(24, 128)[0])
    with pytest.raises(UserError, match=f"^layer '{NAME}' is quantized, and config_groups in config.json does not say"):
        collapsed(fields | {"config_groups": {}}, integers(24, 128)[0])


@pytest.mark.parametrize(
    ("part", "tensor", "said"),
    [
        ("weight_packed", torch.zeros(24, 17, dtype=torch.int32), r"has the shape \[24, 17\], and .* not fit in it;"),
        ("weight_packed", torch.zeros(23, 16, dtype=torch.int32), r"has the shape \[23, 16\], and .* not fit in it;"),
        ("weight_packed", torch.zeros(24, 16, 1, dtype=torch.int32), r"has the shape \[24, 16, 1\]; only \[outputs"),
        ("weight_packed", torch.zeros(0, 16, dtype=torch.int32), r"has the shape \[0, 16\]; only \[outputs"),
        ("weight_packed", torch.zeros(24, 64, dtype=torch.uint8), "is torch.uint8, where config.json means integers"),
        ("weight_packed", torch.zeros(24, 16), "is torch.float32, where config.json means integers of 4"),
        ("weight_shape", torch.tensor([24, 0]), "has the shape .* not fit in it; get the weights again"),
        ("weight_shape", torch.tensor([24, -128]), "has the shape .* not fit in it; get the weights again"),
        ("weight_shape", torch.tensor([24, 2**62]), "has the shape .* not fit in it; get the weights again"),
        ("weight_shape", torch.tensor([24]), "has the shape .* not fit in it; get the weights again"),
        ("weight_shape", torch.tensor([24.0, 128.0]), "has the shape .* not fit in it; get the weights again"),
        ("weight_scale", torch.ones(24, 3), r"has the shape \[24, 3\], a layer of 24 outputs and 128 inputs of this "
                                            r"config \[24, 4\]; get the config"),
        ("weight_scale", torch.ones(24, 4, dtype=torch.int32), "is torch.int32, not torch.float32 or"),
        ("weight_zero_point", torch.zeros(3, 5, dtype=torch.int32), r"has the shape \[3, 5\], a layer of"),
        ("weight_zero_point", torch.zeros(24, 4), "is torch.float32, not torch.int8 or"),
        ("weight_g_idx", torch.zeros(127, dtype=torch.int32), r"has the shape \[127\], a layer of .* \[128\];"),
        ("weight_g_idx", torch.zeros(128), "is torch.float32, not torch.int32 or torch.int64;"),
        ("weight_g_idx", torch.zeros(128, dtype=torch.int32), "gives group 0 128 inputs, not 32; get the weights"),
        ("weight_g_idx", torch.full((128,), 4, dtype=torch.int32), "holds 4, which is no group from 0 to 3; get the"),
        ("weight_g_idx", torch.arange(-1, 127), "holds -1, which is no group from 0 to 3; get the weights again"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(part, tensor, said):
    tensors, _ = integers(24, 128, symmetric=False, act_order=True)
    with pytest.raises(
        UserError, match=f"^tensor '{NAME}.{part if part != 'weight_shape' else 'weight_packed'}' {said}"
    ):
        collapsed(fields_of(group_size=32, symmetric=False), tensors | {part: tensor})


def test_other_weights_than_the_config_says():
    weight = {"weight_scale": torch.ones(24, 1)}
    for said, dtype in [({"num_bits": 8}, torch.float8_e4m3fn), ({"num_bits": 8, "type": "float"}, torch.int8),
                        ({"type": "float"}, torch.int8)]:  # fmt: skip
        with pytest.raises(UserError, match=f"^tensor '{NAME}.weight' is {dtype}, where config.json means "):
            fields = fields_of(strategy="channel", **said)
            collapsed(fields, weight | {"weight": torch.zeros(24, 128).to(dtype)})
    with pytest.raises(UserError, match=f"^tensor '{NAME}.weight_packed' is torch.uint8, where .* floats of 8 bits"):
        packed = torch.zeros(24, 64, dtype=torch.uint8)
        collapsed(fields_of(num_bits=8, type="float", strategy="channel"), weight | {"weight_packed": packed})


def test_weights_that_are_not_compressed():
    """Floats beside scales, which are rounded as the model runs; but not if they were decompressed before."""
    tensors = {"weight": torch.ones(24, 128), "weight_scale": torch.ones(24, 4)}
    fields = fields_of("dense", group_size=32) | {"quantization_status": "frozen"}
    with pytest.raises(
        UserError, match=f"^tensor '{NAME}.weight' is torch.float32 beside scales, .* not supported; save"
    ):
        collapsed(fields, tensors)
    source = held(tensors)
    result = collapse(fields | {"quantization_status": "decompressed"}, source)
    assert result == {f"{NAME}.weight": source[f"{NAME}.weight"]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scales_that_are_not_finite(value):
    tensors, _ = integers(24, 128)
    tensors["weight_scale"][20, 1] = value
    packed = collapsed(fields_of(group_size=32), tensors)
    assert packed.read(0, 20).isfinite().all()
    for read in (packed.read, lambda: list(packed.read_part("scales"))):
        with pytest.raises(UserError, match=f"^tensor '{NAME}.weight_scale' holds NaN or infinity; get the weights"):
            read()


def test_floats_that_are_not_finite():
    weight = torch.zeros(24, 128).to(torch.float8_e4m3fn)
    weight.view(torch.uint8)[3, 3] = 127
    fields = fields_of("float-quantized", num_bits=8, type="float", strategy="channel")
    packed = collapsed(fields, {"weight": weight, "weight_scale": torch.ones(24, 1)})
    with pytest.raises(UserError, match=f"^tensor '{NAME}.weight' holds NaN or infinity; get the weights again"):
        packed.read()
    exponents = torch.full((24, 4), 255, dtype=torch.uint8)
    fields = fields_of("mxfp4-pack-quantized", type="float", group_size=32)
    packed = collapsed(fields, {"weight_packed": torch.zeros(24, 64, dtype=torch.uint8), "weight_scale": exponents})
    for read in (packed.read, lambda: list(packed.read_part("scales"))):
        with pytest.raises(UserError, match=f"^tensor '{NAME}.weight_scale' holds NaN or infinity; get the weights"):
            read()


@pytest.mark.parametrize("whole", [0.0, float("nan"), float("inf")])
def test_a_global_scale_that_is_none(whole):
    packed, _ = nibbles(np.random.default_rng(0), 8, 32)
    tensors = {"weight_packed": packed, "weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn)}
    tensors["weight_global_scale"] = torch.tensor([whole])
    layer = collapsed(fields_of(type="float", strategy="tensor_group", group_size=16), tensors)
    with pytest.raises(UserError, match=f"^tensor '{NAME}.weight_global_scale' is {whole}; get the weights again"):
        layer.read()


def test_numbers_beyond_their_bits():
    tensors, _ = integers(24, 128, packed=False)
    tensors["weight"][3, 3] = 8
    packed = collapsed(fields_of(group_size=32), tensors)
    for read in (packed.read, lambda: list(packed.read_part("weight"))):
        with pytest.raises(UserError, match=f"^tensor '{NAME}.weight' holds numbers beyond 4 bits; get the weights"):
            read()
    tensors, _ = integers(24, 128, symmetric=False, zeros_packed=False)
    tensors["weight_zero_point"][3, 3] = -9
    packed = collapsed(fields_of(group_size=32, symmetric=False), tensors)
    for read in (packed.read, lambda: list(packed.read_part("zeros"))):
        with pytest.raises(UserError, match=f"^tensor '{NAME}.weight_zero_point' holds numbers beyond 4 bits; get the"):
            read()


def test_floats_with_zeros():
    tensors = {"weight": torch.ones(24, 128).to(torch.float8_e4m3fn), "weight_scale": torch.ones(24, 1)}
    tensors["weight_zero_point"] = torch.ones(24, 1).to(torch.float8_e4m3fn)
    with pytest.raises(UserError, match=f"^layer '{NAME}' has floats with zeros, not supported; convert the original"):
        collapsed(fields_of(num_bits=8, type="float", strategy="channel"), tensors)


def test_parts_of_what_no_form_holds():
    packed = collapsed(fields_of(group_size=16), integers(24, 128, size=16)[0])
    with pytest.raises(ValueError, match="has no form of ours"):
        list(packed.read_part("weight"))


# -- whole checkpoints


def llama(**changes: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | changes)).eval()


def float_layer(out: int, inputs: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """FP8, a scale an output."""
    random = np.random.default_rng(out * inputs)
    weight = torch.from_numpy(random.normal(0, 100, (out, inputs))).to(torch.float8_e4m3fn)
    scales = torch.from_numpy(random.uniform(1e-4, 3e-4, (out, 1))).float()
    return {"weight": weight, "weight_scale": scales}, value_of_e4m3(weight) * scales.double().numpy()


def mx_layer(out: int, inputs: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    random = np.random.default_rng(out * inputs)
    packed, values = nibbles(random, out, inputs)
    exponents = random.integers(120, 123, (out, inputs // 32))
    tensors = {"weight_packed": packed, "weight_scale": torch.from_numpy(exponents.astype(np.uint8))}
    return tensors, values * (2.0 ** (exponents - 127)).repeat(32, 1)


def scattered_layer(out: int, inputs: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Layers with the same input have the same order: it depends on the shape."""
    random = np.random.default_rng(inputs)
    groups = random.permutation(np.arange(inputs) // 32)
    tensors, _ = integers(out, inputs)
    levels = np.random.default_rng(out).integers(-8, 8, (out, inputs))
    tensors |= {"weight_packed": pack(levels + 8, 4), "weight_g_idx": torch.from_numpy(groups.astype(np.int32))}
    return tensors, levels * tensors["weight_scale"].double().numpy()[:, groups]


def write(folder: Path, fields: dict, make, plain: tuple[str, ...] = ("lm_head",)) -> transformers.PreTrainedModel:
    """A checkpoint whose layers `make(out, in, name)` quantized, and transformers' model of the same floats."""
    model = llama()
    tensors = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in plain:
            parts, weight = make(module.out_features, module.in_features, name)
            module.weight.data = torch.from_numpy(weight).float()
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_tokenizer(folder, 300)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads(model.config.to_json_string()) | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config | fields))
    return model


def same_model(out: Path, state: dict[str, torch.Tensor], exact: bool = True) -> set[str]:
    """That the converted file stands for these weights; the forms in it."""
    tensors, metadata = read_safetensors(out / "model.safetensors")
    forms = {layer: FORMS[name] for layer, name in json.loads(metadata.get("quantized", "{}")).items()}
    for name, expected in fused(state, False).items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in forms:
            stored = {part: tensors[f"{layer}.{part}"].read() for part in forms[layer].parts}
            if f"{layer}.order" in tensors:
                stored["order"] = tensors[f"{layer}.order"].read()
            found = torch.from_numpy(stands_for(forms[layer], stored)).float()
        else:
            found = tensors[name].read()
        torch.testing.assert_close(found, expected.float(), rtol=0 if exact else 2**-8, atol=0, msg=name)
    return {form.name for form in forms.values()}


def same_logits(out: Path, reference: transformers.PreTrainedModel, rounded: bool) -> None:
    """Roughly, where kernels round the inputs of quantized layers to 8 bits."""
    ids = torch.randint(0, 304, (2, 20), generator=torch.Generator().manual_seed(1))
    model = load_model(out, dtype=torch.float32)
    model.setup_caches(2, 32)
    with torch.inference_mode():
        expected, found = reference(ids).logits, model(ids, torch.arange(20).expand(2, -1))
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert error < (0.05 if rounded else 1e-5)


def mixed_layer(out: int, inputs: int, name: str) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    if "self_attn" in name:
        return integers(out, inputs, 8, "channel", packed=False)
    return float_layer(out, inputs) if "down_proj" in name else integers(out, inputs)


CHECKPOINTS = {
    "int4": (fields_of(group_size=32), integers, {"int4-g32"}),
    "int4 by channel": (fields_of(strategy="channel"),
                        lambda out, inputs: integers(out, inputs, strategy="channel"), {"int4-g64", "int4-g128"}),
    "asymmetric int4": (fields_of(group_size=64, symmetric=False),
                        lambda out, inputs: integers(out, inputs, size=64, symmetric=False), {"int4-g64"}),
    "int4 with an order": (fields_of(group_size=32, actorder="group"), scattered_layer, {"int4-g32"}),
    "int8": (fields_of("int-quantized", num_bits=8, strategy="channel"),
             lambda out, inputs: integers(out, inputs, 8, "channel", packed=False), {"int8"}),
    "int8 in groups": (fields_of(num_bits=8, group_size=64),
                       lambda out, inputs: integers(out, inputs, 8, size=64), {"int8-g64"}),
    "asymmetric int8": (fields_of(num_bits=8, strategy="channel", symmetric=False),
                        lambda out, inputs: integers(out, inputs, 8, "channel", symmetric=False), set()),
    "fp8": (fields_of("float-quantized", num_bits=8, type="float", strategy="channel"), float_layer, set()),
    "mxfp4": (fields_of("mxfp4-pack-quantized", type="float", group_size=32), mx_layer, {"mxfp4"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoint(tmp_path, kind):
    fields, make, forms = CHECKPOINTS[kind]
    where = "compression_config" if kind == "int8" else "quantization_config"  # as older versions call it
    model = write(tmp_path / "in", {where: fields}, lambda out, inputs, name: make(out, inputs))
    message = convert(tmp_path / "in", tmp_path / "out")
    assert same_model(tmp_path / "out", model.state_dict()) == forms
    assert ("(compressed-tensors) and float32" in message) == bool(forms)
    assert ("as floats now: attention.wqkv (fp8) " in message) == (kind == "fp8")
    same_logits(tmp_path / "out", model, rounded=bool(forms))


def test_a_checkpoint_of_mixed_precision(tmp_path):
    fields = groups_of(
        (["re:.*self_attn.*"], {"num_bits": 8, "strategy": "channel"}),
        (["re:.*down_proj"], {"num_bits": 8, "type": "float", "strategy": "channel"}),
        (["Linear"], {"group_size": 32}),
    )
    model = write(tmp_path / "in", {"quantization_config": fields | {"format": "mixed-precision"}}, mixed_layer)
    message = convert(tmp_path / "in", tmp_path / "out")
    assert "int8, int4-g32 (compressed-tensors) and float32" in message
    assert "as floats now: feed_forward.w2 (fp8) " in message
    assert same_model(tmp_path / "out", model.state_dict()) == {"int8", "int4-g32"}
    same_logits(tmp_path / "out", model, rounded=True)


# -- files that the library wrote


def ranges(weight: torch.Tensor, args) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest weight of each block."""
    if args.strategy in ("group", "tensor_group"):
        blocks = weight.unflatten(1, (-1, args.group_size))
        return blocks.amin(-1), blocks.amax(-1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    if args.strategy == "channel":
        return weight.amin(1, True), weight.amax(1, True)
    return weight.amin().view(1), weight.amax().view(1)


def compress(folder: Path, schemes: dict[str, dict], ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, torch.Tensor]:
    """Has the library quantize a Llama and save it; the floats that it gives for it. `schemes` are its own, by name,
    with changes to their weights."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="the library is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    groups = {}
    for i, (preset, changes) in enumerate(schemes.items()):
        changes = dict(changes)
        scheme = quantization.preset_name_to_scheme(preset, changes.pop("targets", ["Linear"]))
        args = scheme.weights.model_dump() | changes
        groups[f"group_{i}"] = scheme.model_copy(update={"weights": quantization.QuantizationArgs(**args)})
    model = llama(num_hidden_layers=1)
    config = quantization.QuantizationConfig(config_groups=groups, ignore=list(ignore))
    quantization.apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if args := getattr(getattr(module, "quantization_scheme", None), "weights", None):
            low, high = ranges(module.weight.data, args)
            whole = generate_gparam(low.amin(), high.amax()) if args.strategy == "tensor_group" else None
            if whole is not None:
                module.weight_global_scale.data = whole.view(1)
            scales, zeros = calculate_qparams(low, high, args, whole)
            module.weight_scale.data = scales.to(module.weight_scale.dtype)
            module.weight_zero_point.data = zeros.to(module.weight_zero_point.dtype)
            module.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_tokenizer(folder, 300)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".weight")}


def format_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["format"]


LIBRARY = [
    ("W4A16", {"group_size": 64}, "pack-quantized", "int4-g64"),
    ("W4A16", {"group_size": 32, "symmetric": False}, "pack-quantized", "int4-g32"),
    ("W4A16_ASYM", {"group_size": 64}, "pack-quantized", "int4-g64"),
    ("W4A16", {"strategy": "channel", "group_size": None, "symmetric": False}, "pack-quantized", "int4-g64"),
    ("W4A16", {"group_size": 16}, "pack-quantized", None),
    ("W8A16", {"group_size": 64}, "pack-quantized", "int8-g64"),
    ("W8A16", {"group_size": 64, "symmetric": False}, "pack-quantized", None),
    ("W8A16", {"strategy": "tensor", "group_size": None}, "pack-quantized", "int8"),
    ("W2A16", {"group_size": 32}, "pack-quantized", "int4-g32"),
    *((f"W{bits}A16", {"group_size": 64, "symmetric": symmetric}, "pack-quantized",
       "int4-g64" if bits == 3 else "int8-g64" if symmetric else None)
      for bits in (3, 5, 6, 7) for symmetric in (True, False)),
    ("W4A8", {"group_size": 64}, "int-quantized", "int4-g64"),
    ("W8A8", {}, "int-quantized", "int8"),
    ("W8A8", {"symmetric": False}, "int-quantized", None),
    ("FP8", {}, "float-quantized", None),
    ("FP8_DYNAMIC", {}, "float-quantized", None),
    ("FP8_BLOCK", {}, "float-quantized", None),
    ("NVFP4", {}, "nvfp4-pack-quantized", None),
    ("NVFP4A16", {}, "nvfp4-pack-quantized", None),
    ("MXFP4A16", {}, "mxfp4-pack-quantized", "mxfp4"),
    ("MXFP6A16", {}, "mxfp6-pack-quantized", None),
    ("MXFP8", {}, "mxfp8-quantized", None),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "changes", "format", "form"), LIBRARY)
def test_what_the_library_wrote(tmp_path, preset, changes, format, form):
    """The floats are those of the library, which gives NVFP4's in bfloat16."""
    state = compress(tmp_path / "in", {preset: changes})
    assert format_of(tmp_path / "in") == format
    convert(tmp_path / "in", tmp_path / "out", torch.float32)
    forms = same_model(tmp_path / "out", state, exact=not preset.startswith("NVFP4"))
    assert forms - {"int4-g128"} == ({form} if form else set())
    reference = llama(num_hidden_layers=1)
    reference.load_state_dict(state)
    same_logits(tmp_path / "out", reference, rounded=bool(form) or preset.startswith("NVFP4"))


def test_mixed_precision_that_the_library_wrote(tmp_path):
    schemes = {
        "W4A16": {"group_size": 64, "targets": ["re:.*mlp.*"]},
        "W8A8": {"targets": ["re:.*self_attn.*"]},
        "FP8_DYNAMIC": {"targets": ["Linear"]},
    }
    state = compress(tmp_path / "in", schemes, ignore=())
    assert format_of(tmp_path / "in") == "mixed-precision"
    convert(tmp_path / "in", tmp_path / "out", torch.float32)
    assert same_model(tmp_path / "out", state) == {"int4-g64", "int8"}
