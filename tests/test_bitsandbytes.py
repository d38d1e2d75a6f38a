"""bitsandbytes' formats, packed here value by value as they are defined, and as bitsandbytes itself writes them."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_convert import save_tokenizer
from test_gptq_awq import SMALL, same_logits

import kernels
from checkpoint import load_model
from convert_hf_checkpoint import convert
from errors import UserError
from formats.bitsandbytes import collapse
from layout import Form
from weights import read_header, read_safetensors

# The values of nf4 are in appendix E of https://arxiv.org/abs/2305.14314. fp4 has a sign, two bits of exponent and one
# of mantissa; 3 in the exponent is the smallest power of two, then 2, 0 and 1, and the largest value, 12, becomes 1.
TABLES = {
    "nf4": np.array([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ], np.float32),
    "fp4": np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3, -0.0, -1 / 16, -8, -12, -4, -6, -2, -3], np.float32) / 12,
}  # fmt: skip
STORAGE = {"uint8": torch.uint8, "int8": torch.int8, "bfloat16": torch.bfloat16, "float16": torch.float16,
           "float32": torch.float32, "float64": torch.float64}  # fmt: skip
X = "model.layers.0.mlp.up_proj"
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}


@dataclass
class Held:
    """A tensor in memory that reads like one in a file, and remembers how many rows were read."""

    tensor: torch.Tensor
    reads: list[int] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        rows = self.tensor[start:stop] if self.shape else self.tensor
        self.reads.append(len(rows) if self.shape else 1)
        return rows.clone()


def held(tensors: dict[str, torch.Tensor]) -> dict[str, Held]:
    return {name: Held(tensor) for name, tensor in tensors.items()}


def pack(codes: np.ndarray, storage: torch.dtype) -> torch.Tensor:
    """Two codes to a byte, the first in the high half; [bytes / size, 1]."""
    codes = np.append(codes.ravel(), [0] * (codes.size % 2)).astype(np.uint8)
    return torch.from_numpy(codes[::2] << 4 | codes[1::2]).view(storage)[:, None]


def four_bits(
    out: int,
    inputs: int,
    kind: str = "nf4",
    blocksize: int = 64,
    nested: int = 0,
    storage: str = "uint8",
    seed: int = 0,
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The tensors of X.weight, and the weight [out, in] in float64. `nested` is the outer blocksize."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (out, inputs))
    blocks = -(-out * inputs // blocksize)
    absmax = random.uniform(0.01, 0.2, blocks).astype(np.float32)
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16", "shape": [out, inputs]}
    tensors = {
        "weight": pack(codes, STORAGE[storage]),
        "weight.absmax": torch.from_numpy(absmax),
        "weight.quant_map": torch.from_numpy(TABLES[kind]),
    }
    scales = absmax.astype(np.float64)
    if nested:
        levels = random.integers(0, 256, blocks).astype(np.uint8)
        outer = random.uniform(0.001, 0.05, -(-blocks // nested)).astype(np.float32)
        values = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
        offset = float(np.float32(random.uniform(0.06, 0.2)))
        scales = values[levels].astype(np.float64) * outer[np.arange(blocks) // nested] + offset
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {
            "weight.absmax": torch.from_numpy(levels),
            "weight.nested_absmax": torch.from_numpy(outer),
            "weight.nested_quant_map": torch.from_numpy(values),
        }
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = as_bytes(state)
    weight = TABLES[kind][codes].astype(np.float64) * scales[np.arange(codes.size) // blocksize].reshape(codes.shape)
    return {f"{X}.{name}": tensor for name, tensor in tensors.items()}, weight


def as_bytes(state: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def eight_bits(out: int, inputs: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The tensors of X, and the weight [out, in] in float64."""
    random = np.random.default_rng(seed)
    levels = random.integers(-127, 128, (out, inputs)).astype(np.int8)
    absmax = random.uniform(0.01, 0.5, out).astype(np.float32)
    tensors = {"weight": torch.from_numpy(levels), "SCB": torch.from_numpy(absmax)}
    tensors["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return {f"{X}.{name}": tensor for name, tensor in tensors.items()}, levels * absmax[:, None].astype(
        np.float64
    ) / 127


# -- 4 bits


@pytest.mark.parametrize("kind", TABLES)
def test_a_weight_of_4_bits(kind):
    tensors, expected = four_bits(6, 64, kind)
    [(name, weight)] = collapse(FOUR | {"bnb_4bit_quant_type": kind}, held(tensors)).items()
    assert name == f"{X}.weight"
    assert (weight.shape, weight.dtype, weight.form, weight.kind) == ((6, 64), torch.float32, None, kind)
    found = weight.read()
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert torch.equal(found, torch.from_numpy(expected.astype(np.float32)))  # one product of floats, rounded once


@given(
    out=st.integers(1, 9),
    inputs=st.integers(1, 130),
    kind=st.sampled_from(list(TABLES)),
    blocksize=st.sampled_from([32, 64, 128, 256, 4096]),
    nested=st.sampled_from([0, 0, 3, 256]),
    storage=st.sampled_from(list(STORAGE)),
    rows=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
@settings(max_examples=200, deadline=None)
def test_rows_of_any_shape(out, inputs, kind, blocksize, nested, storage, rows):
    if -(-out * inputs // 2) % STORAGE[storage].itemsize:
        storage = "uint8"
    tensors, expected = four_bits(out, inputs, kind, blocksize, nested, storage, seed=out * inputs)
    weight = collapse(FOUR, held(tensors))[f"{X}.weight"]
    start, stop = min(min(rows), out), min(max(rows), out)
    found = weight.read(start, stop)
    assert found.shape == (stop - start, inputs)
    np.testing.assert_allclose(found.double(), expected[start:stop], rtol=1e-6, atol=0)
    assert torch.equal(found, weight.read()[start:stop])


def test_nested_scales_in_another_dtype():
    """Scales that bitsandbytes quantized as bfloat16 are added to the offset as such."""
    tensors, _ = four_bits(4, 64, nested=256)
    name = f"{X}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist()))
    tensors[name] = as_bytes(state | {"nested_dtype": "bfloat16"})
    scales = tensors[f"{X}.weight.nested_quant_map"][tensors[f"{X}.weight.absmax"].int()]
    scales = (scales * tensors[f"{X}.weight.nested_absmax"]).bfloat16()
    scales += torch.tensor(state["nested_offset"])
    weight = collapse(FOUR, held(tensors))[f"{X}.weight"]
    assert torch.equal(weight.read().abs().amax(1), scales.float() * TABLES["nf4"].max())


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("storage", ["uint8", "float32"])
def test_only_the_rows_asked_for_are_read(nested, storage):
    tensors, _ = four_bits(1000, 64, nested=nested, storage=storage)
    source = held(tensors)
    weight = collapse(FOUR, source)[f"{X}.weight"]
    for tensor in source.values():
        tensor.reads.clear()
    weight.read(500, 510)
    assert sum(source[f"{X}.weight"].reads) * STORAGE[storage].itemsize == 10 * 64 // 2
    assert sum(source[f"{X}.weight.absmax"].reads) == 10


# -- 8 bits


def test_a_weight_of_8_bits():
    tensors, expected = eight_bits(7, 40)
    [(name, weight)] = collapse(EIGHT, held(tensors)).items()
    assert name == f"{X}.weight" and weight.form == Form(8) and weight.shape == (7, 40)
    np.testing.assert_allclose(weight.read(2, 5).double(), expected[2:5], rtol=2e-7)
    np.testing.assert_allclose(weight.read().double(), expected, rtol=2e-7)
    levels, [scales] = torch.cat(list(weight.read_part("weight"))), weight.read_part("scales")
    assert torch.equal(levels, tensors[f"{X}.weight"]) and scales.dtype == weight.scale_dtype == torch.float32
    assert torch.equal(scales, tensors[f"{X}.SCB"] / 127)
    assert torch.equal(levels.float() * scales[:, None], weight.read())


def test_parts_are_read_in_runs(monkeypatch):
    monkeypatch.setattr("formats.bitsandbytes.CHUNK_BYTES", 100)
    tensors, _ = eight_bits(7, 40)
    weight = collapse(EIGHT, held(tensors))[f"{X}.weight"]
    assert [len(rows) for rows in weight.read_part("weight")] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(list(weight.read_part("weight"))), tensors[f"{X}.weight"])


# -- what stays, and what is refused


def test_layers_that_are_not_quantized_stay():
    tensors, _ = four_bits(6, 64)
    tensors |= {"lm_head.weight": torch.ones(3, 2), f"{X}.bias": torch.ones(6)}
    source = held(tensors)
    found = collapse(FOUR | {"llm_int8_skip_modules": ["lm_head"]}, source)
    assert found.keys() == {f"{X}.weight", f"{X}.bias", "lm_head.weight"}
    assert found["lm_head.weight"] is source["lm_head.weight"] and found[f"{X}.bias"] is source[f"{X}.bias"]


@pytest.mark.parametrize(
    "part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4", ""]
)
def test_a_missing_part_of_4_bits(part):
    tensors, _ = four_bits(6, 64, nested=256)
    name = f"{X}.weight.{part}".rstrip(".")
    del tensors[name]
    with pytest.raises(UserError, match=f"'{name}' is missing"):
        collapse(FOUR, held(tensors))


@pytest.mark.parametrize("part", ["SCB", "weight"])
def test_a_missing_part_of_8_bits(part):
    tensors, _ = eight_bits(4, 8)
    del tensors[f"{X}.{part}"]
    with pytest.raises(UserError, match=f"'{X}.{part}' is missing"):
        collapse(EIGHT, held(tensors))


@pytest.mark.parametrize(
    ("part", "tensor", "words"),
    [
        ("weight", torch.zeros(6 * 32 - 1, 1, dtype=torch.uint8), "384 values"),
        ("weight", torch.zeros(6 * 32, dtype=torch.uint8), "384 values"),
        ("weight.absmax", torch.zeros(7), r"shape \[7\], not \[6\]"),
        ("weight.absmax", torch.zeros(6, dtype=torch.uint8), "torch.uint8, not a float"),
        ("weight.quant_map", torch.zeros(8), r"shape \[8\], not \[16\]"),
        ("weight.quant_state.bitsandbytes__nf4", torch.zeros(3), "how the weight is quantized"),
        ("weight.quant_state.bitsandbytes__nf4", torch.zeros(3, dtype=torch.uint8), "how the weight is quantized"),
        ("weight.quant_state.bitsandbytes__nf4", as_bytes([]), "how the weight is quantized"),
        ("weight.quant_state.bitsandbytes__nf4", torch.full((5000,), 91, dtype=torch.uint8), "how the weight is"),
        ("weight.quant_state.bitsandbytes__nf4", as_bytes({"blocksize": 64, "shape": [2, 3, 64]}), "only .out, in."),
        ("weight.quant_state.bitsandbytes__nf4", as_bytes({"blocksize": 64, "shape": [6, "64"]}), "gives shape '64'"),
        ("weight.quant_state.bitsandbytes__nf4", as_bytes({"shape": [6, 64]}), "gives blocksize None"),
        ("weight.quant_state.bitsandbytes__nf4", as_bytes({"blocksize": 7, "shape": [6, 64]}), "odd"),
        (
            "weight.quant_state.bitsandbytes__nf4",
            as_bytes({"blocksize": 64, "shape": [6, 64], "quant_type": "fp4"}),
            "quant_type 'fp4'",
        ),
        (
            "weight.quant_state.bitsandbytes__nf4",
            as_bytes({"blocksize": 64, "shape": [6, 64], "nested_blocksize": 256, "nested_offset": float("nan")}),
            "nested_offset nan",
        ),
        (
            "weight.quant_state.bitsandbytes__nf4",
            as_bytes(
                {"blocksize": 64, "shape": [6, 64], "nested_blocksize": 2, "nested_offset": 0.5, "nested_dtype": "int8"}
            ),
            "nested_dtype 'int8'",
        ),
    ],
)
def test_parts_of_4_bits_that_do_not_fit(part, tensor, words):
    tensors, _ = four_bits(6, 64)
    with pytest.raises(UserError, match=words) as error:
        collapse(FOUR, held(tensors | {f"{X}.{part}": tensor}))
    assert X in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "tensor", "words"),
    [
        ("weight", torch.zeros(2, 4, 8, dtype=torch.int8), r"shape \[2, 4, 8\]"),
        ("weight", torch.zeros(4, 8), "torch.float32, not torch.int8"),
        ("SCB", torch.zeros(5), r"shape \[5\], not \[4\]"),
        ("SCB", torch.zeros(4, dtype=torch.int8), "torch.int8, not a float"),
        ("weight_format", torch.tensor(2, dtype=torch.uint8), "row by row"),
    ],
)
def test_parts_of_8_bits_that_do_not_fit(part, tensor, words):
    tensors, _ = eight_bits(4, 8)
    with pytest.raises(UserError, match=words) as error:
        collapse(EIGHT, held(tensors | {f"{X}.{part}": tensor}))
    assert X in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_damaged_scales_of_4_bits(part, value):
    tensors, _ = four_bits(6, 64, nested=256 if part != "absmax" else 0)
    tensors[f"{X}.weight.{part}"] = tensors[f"{X}.weight.{part}"].index_fill(0, torch.tensor(0), value)
    weight = collapse(FOUR, held(tensors))[f"{X}.weight"]
    with pytest.raises(UserError, match=f"'{X}.weight.{part}' holds NaN or infinity"):
        weight.read()


def test_damaged_scales_of_8_bits():
    tensors, _ = eight_bits(4, 8)
    tensors[f"{X}.SCB"][2] = float("nan")
    weight = collapse(EIGHT, held(tensors))[f"{X}.weight"]
    for read in (weight.read, lambda: list(weight.read_part("scales"))):
        with pytest.raises(UserError, match=f"'{X}.SCB' holds NaN or infinity"):
            read()


def test_other_codes_are_refused():
    with pytest.raises(UserError, match="bnb_4bit_quant_type 'af4'"):
        collapse(FOUR | {"bnb_4bit_quant_type": "af4"}, {})
    tensors, _ = four_bits(6, 64)
    name = f"{X}.weight.quant_state.bitsandbytes__"
    tensors[f"{name}int4"] = tensors.pop(f"{name}nf4")
    with pytest.raises(UserError, match="int4"):
        collapse(FOUR, held(tensors))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [6, 64], "nested_blocksize": 256,
         "nested_dtype": "float32", "nested_offset": 0.1}  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(list(STATE)), JSON, min_size=1, max_size=2), nested=st.booleans())
@example(changes={"nested_offset": 1e39}, nested=True)
@example(changes={"nested_offset": 10**400}, nested=True)
@example(changes={"nested_dtype": []}, nested=True)
@settings(max_examples=300, deadline=None)
def test_any_other_state_is_refused_or_read(changes, nested):
    tensors, _ = four_bits(6, 64, nested=256 if nested else 0)
    tensors[f"{X}.weight.quant_state.bitsandbytes__nf4"] = as_bytes(STATE | changes)
    try:
        assert collapse(FOUR, held(tensors))[f"{X}.weight"].read().isfinite().all()
    except UserError as error:
        assert X in str(error) and "\n" not in str(error)


# -- a whole checkpoint


def write_checkpoint(folder, fields, layer, family="Llama"):
    """Writes a small checkpoint, its linear layers but for the first o_proj and the head as the tensors that `layer`
    (out, in, seed) gives. Returns transformers' model with what they stand for as floats."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
        parameter.data = parameter.data.bfloat16().float()
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    skipped = ["lm_head", "model.layers.0.self_attn.o_proj"]
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name not in skipped:
            parts, weight = layer(module.out_features, module.in_features, seed)
            tensors.pop(f"{name}.weight")
            tensors |= {part.replace(X, name): tensor for part, tensor in parts.items()}
            module.weight.data = torch.from_numpy(weight).float()
    save_tokenizer(folder, 300)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    named = {"architectures": [f"{family}ForCausalLM"], "dtype": "bfloat16", "quantization_config": fields}
    (folder / "config.json").write_text(json.dumps(json.loads(config.to_json_string()) | named))
    return model


def same_int8(out, reference):
    """The logits, exact with float activations, rough with those that the kernels round."""
    ids = torch.randint(0, 304, (2, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20).expand(2, -1)
    model = load_model(out, dtype=torch.float32)
    model.setup_caches(2, 32)
    with torch.inference_mode():
        expected, rounded = reference(ids).logits, model(ids, positions)
        for name, module in list(model.named_modules()):
            if isinstance(module, kernels.Int8Linear):
                layer = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
                levels = kernels.unpack_int8(module.packed, module.out_features, module.in_features)
                layer.weight = torch.nn.Parameter(levels.float() * module.scales[:, None])
                if module.bias is not None:
                    layer.bias = torch.nn.Parameter(module.bias)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer)
        exact = model(ids, positions)
    assert (exact - expected).abs().max() < 1e-4 * expected.std()
    assert (rounded - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize(("kind", "nested", "storage"), [("nf4", 256, "uint8"), ("fp4", 0, "bfloat16")])
def test_a_checkpoint_of_4_bits(tmp_path, kind, nested, storage):
    fields = FOUR | {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": bool(nested)}
    fields |= {"llm_int8_skip_modules": ["lm_head"], "bnb_4bit_quant_storage": storage}
    model = write_checkpoint(
        tmp_path / "in", fields, lambda out, inputs, seed: four_bits(out, inputs, kind, 64, nested, storage, seed)
    )
    message = convert(tmp_path / "in", tmp_path / "out", torch.float32)
    assert kind in message and "as floats now" in message
    same_logits(tmp_path / "out", model)
    convert(tmp_path / "in", tmp_path / "bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "bfloat16" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_checkpoint_of_8_bits(tmp_path):
    """Its levels stay as they are, but where the parts of a fused layer are not all quantized."""
    model = write_checkpoint(tmp_path / "in", EIGHT, eight_bits, "Qwen2")
    assert "int8" in convert(tmp_path / "in", tmp_path / "out", torch.float32)
    same_int8(tmp_path / "out", model)
    stored, metadata = read_header(tmp_path / "out" / "model.safetensors")
    quantized = json.loads(metadata["quantized"])
    assert metadata["mode"] == "bitsandbytes" and set(quantized.values()) == {"int8"} and len(quantized) == 7
    assert all(stored[f"{layer}.weight"].dtype == torch.int8 for layer in quantized)
    assert stored["layers.0.attention.wo.weight"].dtype == torch.float32
    source = load_file(tmp_path / "in" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(found["layers.1.feed_forward.w2.weight"], source[f"{name}.weight"])
    assert torch.equal(found["layers.1.feed_forward.w2.scales"], source[f"{name}.SCB"] / 127)


# -- what bitsandbytes writes


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("kind", TABLES)
def test_4_bits_by_bitsandbytes(tmp_path, kind, storage, nested):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        192, 40, bias=False, quant_type=kind, compress_statistics=nested, quant_storage=STORAGE[storage]
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(40, 192) * 0.05, quant_type=kind, compress_statistics=nested, quant_storage=STORAGE[storage]
    )
    layer = layer.to("cpu")
    save_file({f"{X}.{name}": tensor for name, tensor in layer.state_dict().items()}, tmp_path / "model.safetensors")
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    weight = collapse(FOUR | {"bnb_4bit_quant_type": kind}, tensors)[f"{X}.weight"]
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(weight.read(), expected)
    assert torch.equal(weight.read(13, 29), expected[13:29])


def test_8_bits_by_bitsandbytes(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(192, 40, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(40, 192) * 0.05, requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    save_file({f"{X}.{name}": tensor for name, tensor in layer.state_dict().items()}, tmp_path / "model.safetensors")
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    weight = collapse(EIGHT, tensors)[f"{X}.weight"]
    expected = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    np.testing.assert_allclose(weight.read(), expected, rtol=3e-7)  # it multiplies by 1 / 127


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
        {"load_in_8bit": True, "llm_int8_skip_modules": ["o_proj"]},
    ],
)
def test_a_checkpoint_by_transformers(tmp_path, options):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.manual_seed(0)
    # The CPU kernel of bitsandbytes 0.50 takes a wrong scale where a block goes on in the next row.
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"intermediate_size": 128})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(tmp_path / "plain")
    quantized = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=transformers.BitsAndBytesConfig(**options), dtype=torch.float32
    )
    quantized.save_pretrained(tmp_path / "in")
    save_tokenizer(tmp_path / "in", 300)
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.get_submodule(name).weight.data = weight
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weight = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            model.get_submodule(name).weight.data = weight
    convert(tmp_path / "in", tmp_path / "out", torch.float32)
    same = same_int8 if "load_in_8bit" in options else same_logits
    same(tmp_path / "out", model)
