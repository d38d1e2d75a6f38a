"""Checkpoints in 8-bit floats, made here bit by bit as they are defined, and as transformers makes and reads them."""

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_bitsandbytes import JSON, Held, held, write_checkpoint
from test_convert import save_tokenizer
from test_gptq_awq import SMALL, same_logits
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.utils.quantization_config import FineGrainedFP8Config

from convert_hf_checkpoint import convert
from errors import UserError
from formats.fp8 import collapse
from weights import read_safetensors

X = "model.layers.0.mlp.up_proj"
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WHOLE = {"quant_method": "fp8", "activation_scheme": "static"}
ROWS = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}


def value(byte: int, exponent_bits: int) -> float:
    """A float of 8 bits: https://arxiv.org/abs/2209.05433. NaN and infinity as NaN."""
    fraction_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1.0 if byte & 128 else 1.0
    exponent, fraction = (byte & 127) >> fraction_bits, byte & (2**fraction_bits - 1)
    top = 2**exponent_bits - 1
    if exponent == top and (fraction == 2**fraction_bits - 1 if exponent_bits == 4 else True):
        return float("nan")
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias - fraction_bits)
    return sign * (1 + fraction / 2**fraction_bits) * 2.0 ** (exponent - bias)


TABLES = {dtype: np.array([value(byte, bits) for byte in range(256)])
          for dtype, bits in ((torch.float8_e4m3fn, 4), (torch.float8_e5m2, 5))}  # fmt: skip
E4M3, E5M2 = TABLES
FINITE = {dtype: np.flatnonzero(np.isfinite(table)) for dtype, table in TABLES.items()}


def make(
    out: int, inputs: int, block: tuple[int, int], dtype: torch.dtype = E4M3, powers: bool = False, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """A weight [out, in], its scales [out / rows, in / columns], and their product in float64."""
    random = np.random.default_rng(seed)
    codes = random.choice(FINITE[dtype], (out, inputs)).astype(np.uint8)
    grid = -(-out // block[0]), -(-inputs // block[1])
    if powers:
        exponents = random.integers(100, 130, grid).astype(np.uint8)
        scales, factors = torch.from_numpy(exponents), 2.0 ** (exponents.astype(np.float64) - 127)
    else:
        factors = random.uniform(1e-4, 2e-2, grid).astype(np.float32)
        scales = torch.from_numpy(factors)
    each = factors.astype(np.float64).repeat(block[0], 0)[:out].repeat(block[1], 1)[:, :inputs]
    return torch.from_numpy(codes).view(dtype), scales, TABLES[dtype][codes] * each


def exact(found: torch.Tensor, expected: np.ndarray) -> bool:
    """Whether each is the product, rounded once."""
    return found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(expected.astype(np.float32)))


@pytest.mark.parametrize("dtype", TABLES)
def test_blocks(dtype):
    weight, scales, expected = make(300, 200, (128, 128), dtype)
    source = held({f"{X}.weight": weight, f"{X}.weight_scale_inv": scales, "norm.weight": torch.ones(3)})
    found = collapse(BLOCKS, source)
    assert found.keys() == {f"{X}.weight", "norm.weight"} and found["norm.weight"] is source["norm.weight"]
    packed = found[f"{X}.weight"]
    assert (packed.shape, packed.dtype, packed.form, packed.kind) == ((300, 200), torch.float32, None, "fp8")
    assert exact(packed.read(), expected)
    assert exact(packed.read(100, 290), expected[100:290])


@given(
    out=st.integers(1, 40),
    inputs=st.integers(1, 40),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    dtype=st.sampled_from(list(TABLES)),
    powers=st.booleans(),
    rows=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
@settings(max_examples=200, deadline=None)
def test_rows_of_any_shape(out, inputs, block, dtype, powers, rows):
    weight, scales, expected = make(out, inputs, block, dtype, powers, seed=out * inputs)
    fields = BLOCKS | {"weight_block_size": list(block)} | ({"scale_fmt": "ue8m0"} if powers else {})
    packed = collapse(fields, held({f"{X}.weight": weight, f"{X}.weight_scale_inv": scales}))[f"{X}.weight"]
    start, stop = min(min(rows), out), min(max(rows), out)
    assert exact(packed.read(start, stop), expected[start:stop])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("size", [{}, {"weight_block_size": None}])
def test_one_scale(name, shape, size):
    weight, scales, expected = make(200, 150, (200, 150))
    source = {f"{X}.weight": weight, f"{X}.{name}": scales.reshape(shape), f"{X}.input_scale": torch.ones(1)}
    found = collapse(WHOLE | size, held(source))
    assert found.keys() == {f"{X}.weight"}
    assert exact(found[f"{X}.weight"].read(), expected)
    assert exact(found[f"{X}.weight"].read(7, 31), expected[7:31])


@pytest.mark.parametrize("shape", [(200,), (200, 1)])
def test_a_scale_for_each_row(shape):
    weight, scales, expected = make(200, 150, (1, 150))
    for fields in (ROWS, WHOLE | {"weight_block_size": None}):
        source = {f"{X}.weight": weight, f"{X}.weight_scale": scales.reshape(shape), f"{X}.bias": torch.ones(200)}
        found = collapse(fields, held(source))
        assert found.keys() == {f"{X}.weight", f"{X}.bias"}
        assert exact(found[f"{X}.weight"].read(), expected)
        assert exact(found[f"{X}.weight"].read(7, 31), expected[7:31])


def test_powers_of_two_in_either_dtype():
    weight, scales, expected = make(256, 256, (128, 128), powers=True)
    scales[0, 0] = 0  # 2 ** -127, which float32 has only as a subnormal
    expected[:128, :128] = TABLES[E4M3][weight.view(torch.uint8)[:128, :128].numpy()] * 2.0**-127
    for stored in (scales, scales.view(torch.float8_e8m0fnu)):
        source = held({f"{X}.weight": weight, f"{X}.weight_scale_inv": stored})
        assert exact(collapse(BLOCKS | {"scale_fmt": "ue8m0"}, source)[f"{X}.weight"].read(), expected)
    with pytest.raises(UserError, match=f"'{X}.weight_scale_inv' is torch.uint8"):
        collapse(BLOCKS, held({f"{X}.weight": weight, f"{X}.weight_scale_inv": scales}))


def test_powers_of_two_in_a_file(tmp_path):
    weight, scales, expected = make(256, 256, (128, 128), powers=True)
    tensors = {f"{X}.weight": weight, f"{X}.weight_scale_inv": scales.view(torch.float8_e8m0fnu)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored, _ = read_safetensors(tmp_path / "model.safetensors")
    packed = collapse(BLOCKS | {"scale_fmt": "ue8m0"}, stored)[f"{X}.weight"]
    assert exact(packed.read(130, 200), expected[130:200])


def test_powers_of_two_that_are_floats():
    """As DeepSeek-V3.1 has them."""
    weight, scales, expected = make(256, 256, (128, 128), powers=True)
    factors = torch.exp2(scales.double() - 127).float()
    source = held({f"{X}.weight": weight, f"{X}.weight_scale_inv": factors})
    assert exact(collapse(BLOCKS | {"scale_fmt": "ue8m0"}, source)[f"{X}.weight"].read(), expected)


def test_only_the_rows_asked_for_are_read():
    weight, scales, _ = make(1000, 64, (128, 128))
    source = {f"{X}.weight": Held(weight), f"{X}.weight_scale_inv": Held(scales)}
    collapse(BLOCKS, source)[f"{X}.weight"].read(500, 520)
    assert [tensor.reads for tensor in source.values()] == [[20], [2]]


def test_experts_one_by_one():
    tensors, expected = {}, {}
    for i in range(3):
        name = f"model.layers.0.mlp.experts.{i}.down_proj"
        weight, scales, expected[f"{name}.weight"] = make(130, 64, (128, 128), seed=i)
        tensors |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scales}
    found = collapse(BLOCKS, held(tensors))
    assert found.keys() == expected.keys()
    assert all(exact(found[name].read(), expected[name]) for name in expected)


def test_scales_of_what_is_not_quantized_here_are_left_out():
    weight, scales, _ = make(8, 8, (8, 8))
    names = ("input_scale", "activation_scale", "output_scale", "kv_scale", "k_scale", "v_scale")
    tensors = {f"{X}.weight": weight, f"{X}.weight_scale": scales, **{f"{X}.{name}": scales for name in names}}
    assert collapse(WHOLE | {"kv_cache_scheme": "static"}, held(tensors)).keys() == {f"{X}.weight"}


# -- what is refused


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"activation_scheme": "token"}, "activation_scheme 'token'"),
        ({"scale_fmt": "e5m3"}, "scale_fmt 'e5m3'"),
        ({"expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        ({"fmt": "e3m4"}, "fmt 'e3m4'"),
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size is \[128, 0\]"),
        ({"weight_block_size": 128}, "weight_block_size is 128"),
    ],
)
def test_options_that_are_not_supported(fields, words):
    with pytest.raises(UserError, match=words) as error:
        collapse(BLOCKS | fields, {})
    assert "\n" not in str(error.value)


@given(
    fields=st.dictionaries(st.sampled_from([*BLOCKS, "scale_fmt", "expert_dtype"]), JSON, max_size=3),
    size=st.none() | st.lists(st.integers(-1, 2**70), min_size=2, max_size=2),
)
@settings(max_examples=200, deadline=None)
def test_any_options_are_refused_or_read(fields, size):
    weight, scales, _ = make(3, 4, (3, 4))
    fields |= {} if size is None else {"weight_block_size": size}
    try:
        packed = collapse(fields, held({f"{X}.weight": weight, f"{X}.weight_scale": scales}))[f"{X}.weight"]
        assert packed.read().shape == (3, 4)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("weight_scale_inv", None, "weight_scale_inv' is missing"),
        ("weight_scale_inv", torch.ones(2, 1), r"shape \[2, 1\].*\[300, 200\].*\[128, 128\]"),
        ("weight_scale_inv", torch.ones(3, 2, 1), r"shape \[3, 2, 1\]"),
        ("weight_scale_inv", torch.ones(3, 2, dtype=torch.int8), "torch.int8"),
        ("weight", torch.ones(2, 300, 200).to(E4M3), r"shape \[2, 300, 200\]"),
        ("weight", torch.ones(300).to(E4M3), r"shape \[300\]"),
        ("gate_up_proj", torch.ones(300, 200).to(E4M3), "gate_up_proj"),
    ],
)
def test_tensors_that_do_not_fit(name, tensor, words):
    weight, scales, _ = make(300, 200, (128, 128))
    tensors = {f"{X}.weight": weight, f"{X}.weight_scale_inv": scales, f"{X}.{name}": tensor}
    with pytest.raises(UserError, match=words) as error:
        collapse(BLOCKS, held({name: tensor for name, tensor in tensors.items() if tensor is not None}))
    assert X in str(error.value) and "\n" not in str(error.value)


def test_blocks_without_a_size():
    weight, scales, _ = make(300, 200, (128, 128))
    tensors = held({f"{X}.weight": weight, f"{X}.weight_scale_inv": scales})
    with pytest.raises(UserError, match="weight_scale_inv"):
        collapse(BLOCKS | {"weight_block_size": None}, tensors)


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), 255])
def test_damaged_scales(damage):
    powers = damage == 255  # NaN of ue8m0
    weight, scales, _ = make(300, 200, (128, 128), powers=powers)
    scales[1, 1] = damage
    fields = BLOCKS | ({"scale_fmt": "ue8m0"} if powers else {})
    packed = collapse(fields, held({f"{X}.weight": weight, f"{X}.weight_scale_inv": scales}))[f"{X}.weight"]
    packed.read(0, 128)
    with pytest.raises(UserError, match=f"'{X}.weight_scale_inv' holds NaN or infinity"):
        packed.read(100, 200)


@pytest.mark.parametrize(("dtype", "byte"), [(E4M3, 0x7F), (E4M3, 0xFF), (E5M2, 0x7C), (E5M2, 0x7E)])
def test_damaged_weights(dtype, byte):
    weight, scales, _ = make(30, 20, (30, 20), dtype)
    weight.view(torch.uint8)[20, 3] = byte
    packed = collapse(WHOLE, held({f"{X}.weight": weight, f"{X}.weight_scale": scales}))[f"{X}.weight"]
    packed.read(0, 20)
    with pytest.raises(UserError, match=f"'{X}.weight' holds NaN or infinity"):
        packed.read()


# -- a whole checkpoint


def normal(out: int, inputs: int, block: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """As `make`, of values that a model can have."""
    weight, scales, expected = make(out, inputs, block, seed=seed)
    return weight, scales / 8, expected / 8


@pytest.mark.parametrize(
    ("fields", "block", "name", "family"),
    [
        (BLOCKS, (128, 128), "weight_scale_inv", "Qwen3"),
        (WHOLE, (1000, 1000), "weight_scale", "Llama"),
        (ROWS, (1, 1000), "weight_scale", "Llama"),
    ],
)
def test_a_checkpoint(tmp_path, fields, block, name, family):
    def layer(out: int, inputs: int, seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        weight, scales, expected = normal(out, inputs, block, seed)
        parts = {"weight": weight, name: scales} | ({"input_scale": torch.ones(1)} if fields == WHOLE else {})
        return {f"{X}.{part}": tensor for part, tensor in parts.items()}, expected

    model = write_checkpoint(tmp_path / "in", fields, layer, family)
    message = convert(tmp_path / "in", tmp_path / "out", torch.float32)
    assert "(fp8)" in message and "as floats now" in message
    same_logits(tmp_path / "out", model)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_a_checkpoint_of_experts(tmp_path):
    """As Qwen3-30B-A3B-FP8 is published: each expert with its own tensors, the router and the norms floats."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2, head_dim=16, norm_topk_prob=True
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(tmp_path / "floats")
    tensors = load_file(tmp_path / "floats" / "model.safetensors")
    source = dict(tensors)
    for seed, (name, tensor) in enumerate(tensors.items()):
        if name.endswith("_proj.weight"):
            source[name], source[f"{name}_scale_inv"], weight = normal(*tensor.shape, (32, 32), seed)
            tensors[name] = torch.from_numpy(weight).float()
    assert sum(".experts.3." in name for name in source) == 2 * 3 * 2
    save_file(tensors, tmp_path / "floats" / "model.safetensors")
    (tmp_path / "in").mkdir()
    save_file(source, tmp_path / "in" / "model.safetensors")
    save_tokenizer(tmp_path / "in", 300)
    fields = json.loads((tmp_path / "floats" / "config.json").read_text())
    fields["quantization_config"] = BLOCKS | {"weight_block_size": [32, 32]}
    (tmp_path / "in" / "config.json").write_text(json.dumps(fields))
    assert "experts.w13 (fp8)" in convert(tmp_path / "in", tmp_path / "out", torch.float32)
    same_logits(tmp_path / "out", transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "floats"))


# -- transformers


@pytest.mark.parametrize("fmt", ["float", "ue8m0"])
def test_transformers_writes_and_reads_the_same(fmt):
    class Quantizer:
        quantization_config = FineGrainedFP8Config(scale_fmt=fmt)

    torch.manual_seed(0)
    written = Fp8Quantize(Quantizer()).convert({"up_proj.weight": torch.randn(384, 256) * 0.1})
    read = Fp8Dequantize(Quantizer()).convert(
        {"weight": [written["up_proj.weight"]], "weight_scale_inv": [written["up_proj.weight_scale_inv"]]}
    )
    found = collapse(BLOCKS | {"scale_fmt": fmt}, held(written))["up_proj.weight"].read()
    assert torch.equal(found.to(read["weight"].dtype), read["weight"])


def test_transformers_reads_the_same_checkpoint(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    def layer(out: int, inputs: int, seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        weight, scales, expected = normal(out, inputs, (128, 128), seed)
        return {f"{X}.weight": weight, f"{X}.weight_scale_inv": scales}, expected

    fields = BLOCKS | {"modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.o_proj"]}
    write_checkpoint(tmp_path / "in", fields, layer)
    convert(tmp_path / "in", tmp_path / "out", torch.float32)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)
    same_logits(tmp_path / "out", model.float())  # what is not quantized stays in bfloat16 without
