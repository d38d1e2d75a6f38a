"""GPTQ and AWQ checkpoints, packed here number by number as their formats are defined, against transformers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import assert_refused, parse
from fake_hub import FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import FUZZ, mutated
from test_convert import error_line, fused, run_script, save_tokenizer

import convert_hf_checkpoint
import kernels
import quantize
from checkpoint import load_model
from convert_hf_checkpoint import convert
from errors import UserError
from formats import gptq_awq
from formats.gptq_awq import Format
from formats.quantized import METHODS, read_quantization
from kernels import packing
from model import Linear
from weights import read_header, read_safetensors

ROOT = Path(__file__).parent.parent
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 304, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
CONFIGS = {
    "v1": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False,
           "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
}  # fmt: skip


# -- the formats, by their definition


def word(values: list[int], bits: int = 4) -> int:
    """Numbers of so many bits, the first in the lowest ones."""
    return sum(int(value) << (bits * i) for i, value in enumerate(values))


def words(rows: list[list[int]], less: int = 0) -> torch.Tensor:
    """As int32, which has the same bits as uint32."""
    return torch.from_numpy(
        np.array([[(value - less) % 2**32 for value in row] for row in rows], np.uint32).view(np.int32)
    )


def pack_outputs(matrix: np.ndarray, order: list[int], less: int = 0, bits: int = 4) -> torch.Tensor:
    """[rows, out] -> int32 [rows, out / 8] (of 8 bits out / 4), the outputs of each word in this order."""
    n = len(order)
    rows = [[word([row[n * c + i] for i in order], bits) for c in range(len(row) // n)] for row in matrix]
    return words(rows, less)


def pack_gptq(levels: np.ndarray, zeros: np.ndarray, version: str, bits: int = 4) -> dict[str, torch.Tensor]:
    """Levels [in, out] and zeros [groups, out]."""
    (rows, columns), n = levels.shape, 32 // bits
    qweight = [[word(levels[n * r : n * r + n, c], bits) for c in range(columns)] for r in range(rows // n)]
    less = word([1] * n, bits) if version == "v1" else 0
    return {"qweight": words(qweight), "qzeros": pack_outputs(zeros, list(range(n)), less, bits)}


def pack_awq(levels: np.ndarray, zeros: np.ndarray) -> dict[str, torch.Tensor]:
    return {"qweight": pack_outputs(levels, AWQ_ORDER), "qzeros": pack_outputs(zeros, AWQ_ORDER)}


class Maker:
    """Draws quantized layers and remembers the floats that they stand for."""

    def __init__(self, version: str, groupsize: int, symmetric: bool = False, act_order: bool = False, bits: int = 4):
        self.version, self.groupsize, self.symmetric, self.act_order = version, groupsize, symmetric, act_order
        self.bits = bits
        self.random = np.random.default_rng(0)
        self.orders: dict[tuple[str, int], np.ndarray] = {}

    def groups(self, name: str, inputs: int) -> np.ndarray:
        """The group of each input. Layers that have the same input have the same."""
        size = inputs if self.groupsize == -1 else self.groupsize
        groups = np.arange(inputs) // size
        if not self.act_order:
            return groups
        block, part = re.fullmatch(r"(.*\.)?(\w+)", name).groups()
        key = (
            block,
            {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "13", "up_proj": "13"}.get(part, part),
        )
        return groups[self.orders.setdefault(key, self.random.permutation(inputs))]

    def layer(self, name: str, out: int, inputs: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The tensors, and the weight [out, in] in float64."""
        groups = self.groups(name, inputs)
        count = 2**self.bits
        zeros = (
            np.full((groups.max() + 1, out), count // 2)
            if self.symmetric
            else self.random.integers(0, count, (groups.max() + 1, out))
        )
        levels = self.random.integers(0, count, (inputs, out))
        scales = (self.random.uniform(0.005, 0.03, zeros.shape) * 16 / count).astype(np.float16)
        weight = (levels - zeros[groups]) * scales[groups].astype(np.float64)
        tensors = (
            pack_awq(levels, zeros) if self.version == "awq" else pack_gptq(levels, zeros, self.version, self.bits)
        )
        tensors["scales"] = torch.from_numpy(scales)
        if self.version != "awq":
            tensors["g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return tensors, torch.from_numpy(np.ascontiguousarray(weight.T))


def make(
    folder: Path,
    maker: Maker,
    family: str = "Llama",
    plain: str = "lm_head",
    config: dict | None = None,
    **changes: object,
) -> transformers.PreTrainedModel:
    """Writes a checkpoint and returns transformers' model with the same weights as floats, in float32.

    Layers whose name the pattern `plain` finds are not quantized.
    """
    torch.manual_seed(0)
    model_config = getattr(transformers, f"{family}Config")(**SMALL | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(model_config).eval()
    for parameter in model.parameters():  # such as float16 has; biases and norms too
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
        parameter.data = parameter.data.half().float()
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    if model_config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not re.search(plain, name):
            parts, weight = maker.layer(name, module.out_features, module.in_features)
            module.weight.data = weight.float()
            tensors.pop(f"{name}.weight", None)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_tokenizer(folder, 300)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    fields = json.loads(model_config.to_json_string()) | {"architectures": [f"{family}ForCausalLM"], "dtype": "float16"}
    said = CONFIGS[maker.version] | {"group_size": maker.groupsize, "bits": maker.bits}
    said |= {} if maker.version == "awq" else {"desc_act": maker.act_order, "sym": maker.symmetric}
    fields["quantization_config"] = said | (config or {})
    (folder / "config.json").write_text(json.dumps(fields))
    return model


def floats_of(out: Path) -> dict[str, torch.Tensor]:
    """The weights that a converted file stands for, in float32, in the order of the original inputs."""
    tensors = load_file(out / "model.safetensors")
    forms = json.loads(read_header(out / "model.safetensors")[1]["quantized"])
    weights = {name: tensor.float() for name, tensor in tensors.items() if name.rpartition(".")[0] not in forms}
    weights |= {name: tensors[name].float() for name in tensors if name.endswith(".bias")}
    for layer, form in forms.items():
        q, scales = (tensors[f"{layer}.{part}"] for part in ("weight", "scales"))
        bits, group = map(int, re.fullmatch(r"int(\d)-g(\d+)", form).groups())
        zeros = tensors[f"{layer}.zeros"].float() if bits == 4 else 0
        levels = packing.unpack_nibbles(q, 2 * q.shape[1]) if bits == 4 else q
        weight = packing.dequantize(levels.float(), scales.float(), zeros, group)
        order = tensors.get(f"{layer}.order")
        weights[f"{layer}.weight"] = weight if order is None else weight[:, order.argsort()]
    return weights


def same_weights(out: Path, model: transformers.PreTrainedModel) -> None:
    expected = fused(model.state_dict(), model.config.tie_word_embeddings)
    found = floats_of(out)
    assert found.keys() - {"output.weight"} == expected.keys() - {"output.weight"}
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


class FloatLinear(torch.nn.Module):
    """A layer of ours with floats in place of integers: what it would be if activations were not rounded to 8 bits."""

    def __init__(self, linear: kernels.Int4Linear | kernels.Int8Linear):
        super().__init__()
        N, K, group = linear.out_features, linear.in_features, linear.groupsize
        if isinstance(linear, kernels.Int8Linear):
            levels, zeros = kernels.unpack_int8(linear.packed, N, K), 0
            scales = kernels.unpack_scales(linear.scales, N)
        else:
            q, scales, zeros = kernels.unpack_int4(linear.packed, N, K, group, linear.scale_dtype, linear.zero)
            levels = packing.unpack_nibbles(q, K)
        self.weight, self.bias = packing.dequantize(levels.float(), scales.float(), zeros, group), linear.bias
        self.order = linear.order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x if self.order is None else x[..., self.order], self.weight, self.bias)


def same_logits(out: Path, reference: transformers.PreTrainedModel) -> None:
    """To float32's precision with float activations, and roughly with those that the kernels round."""
    ids = torch.randint(0, 304, (2, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20).expand(2, -1)
    model = load_model(out, dtype=torch.float32)
    model.setup_caches(2, 32)
    with torch.inference_mode():
        expected = reference(ids).logits
        rounded = model(ids, positions)
        for name, module in list(model.named_modules()):
            if isinstance(module, (kernels.Int4Linear, kernels.Int8Linear)):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, FloatLinear(module))
        exact = model(ids, positions)
    assert (exact - expected).abs().max() < 1e-4 * expected.std()
    assert (rounded - expected).square().mean().sqrt() < 0.05 * expected.std()


# -- what is converted


@pytest.mark.parametrize("act_order", [False, True], ids=["", "act-order"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gptq(tmp_path, version, symmetric, act_order):
    model = make(tmp_path / "in", Maker(version, 32, symmetric, act_order))
    message = convert(tmp_path / "in", tmp_path / "out")
    assert " M parameters, int4-g32 (gptq) and float16, 0.1 MB; try" in message
    same_weights(tmp_path / "out", model)
    same_logits(tmp_path / "out", model)
    tensors, metadata = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert {metadata[key] for key in ("format", "version", "dtype", "mode")} == {"gpt-brisk", "1", "float16", "gptq"}
    layers = json.loads(metadata["quantized"])
    assert len(layers) == 8 and set(layers.values()) == {"int4-g32"}
    assert [name for name in tensors if name.endswith(".order")] == ([f"{name}.order" for name in layers] * act_order)
    assert all(tensors[f"{name}.scales"].dtype == torch.float16 for name in layers)


@pytest.mark.parametrize(
    ("version", "groupsize", "act_order", "form"),
    [("v1", 32, False, "int8-g32"), ("v1", 128, True, "int8-g128"), ("v2", -1, False, "int8-g64")],
)
def test_gptq_of_8_bits(tmp_path, version, groupsize, act_order, form):
    """As Qwen publishes them: symmetric, in int8 of groups."""
    widths = dict(hidden_size=384, intermediate_size=192 if groupsize == -1 else 384, num_attention_heads=8)
    maker = Maker(version, groupsize, symmetric=True, act_order=act_order, bits=8)
    model = make(tmp_path / "in", maker, "Qwen2", num_hidden_layers=1, **widths)
    assert " (gptq) and float16, " in convert(tmp_path / "in", tmp_path / "out")
    same_weights(tmp_path / "out", model)
    same_logits(tmp_path / "out", model)
    tensors, metadata = read_safetensors(tmp_path / "out" / "model.safetensors")
    layers = json.loads(metadata["quantized"])
    assert metadata["mode"] == "gptq" and len(layers) == 4 and layers["layers.0.feed_forward.w2"] == form
    assert [name for name in tensors if name.endswith(".order")] == ([f"{name}.order" for name in layers] * act_order)
    assert all(tensors[f"{name}.weight"].dtype == torch.int8 for name in layers)
    assert all(tensors[f"{name}.scales"].dtype == torch.float16 for name in layers)
    assert not [name for name in tensors if name.endswith(".zeros")]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gptq_of_8_bits_that_is_not_symmetric(tmp_path, version):
    """Our int8 has no zeros: such layers become floats, and one line says so."""
    model = make(tmp_path / "in", Maker(version, 32, act_order=True, bits=8), num_hidden_layers=1)
    said = convert(tmp_path / "in", tmp_path / "out", torch.float32)
    names = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")
    floats = ", ".join(rf"{name} \(GPTQ, 8 bits\) \d+.\d .B" for name in names)
    assert re.search(f" float32, .*; as floats now: {floats}; try", said), said
    tensors, metadata = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert "quantized" not in metadata and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    expected = fused(model.state_dict(), False)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_awq(tmp_path, family):
    changes = {"modules_to_not_convert": ["lm_head"]} if family == "Llama" else {}
    model = make(tmp_path / "in", Maker("awq", 32), family, config=changes)
    assert "int4-g32 (awq) and float16" in convert(tmp_path / "in", tmp_path / "out")
    same_weights(tmp_path / "out", model)
    same_logits(tmp_path / "out", model)
    assert read_header(tmp_path / "out" / "model.safetensors")[1]["mode"] == "awq"


def test_biases_and_a_quantized_head(tmp_path):
    model = make(tmp_path / "in", Maker("v1", 32, act_order=True), "Qwen2", plain="never")
    convert(tmp_path / "in", tmp_path / "out")
    same_weights(tmp_path / "out", model)
    same_logits(tmp_path / "out", model)
    assert "output.order" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_quantized_head_beside_its_embedding(tmp_path):
    """tie_word_embeddings, though the two are not the same any more: the embedding is a float."""
    maker = Maker("v2", 32)
    model = make(tmp_path / "in", maker, tie_word_embeddings=True)
    parts, weight = maker.layer("lm_head", 304, 64)
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    save_file(tensors | {f"lm_head.{k}": v for k, v in parts.items()}, tmp_path / "in" / "model.safetensors")
    convert(tmp_path / "in", tmp_path / "out")
    same_weights(tmp_path / "out", model)
    assert torch.equal(floats_of(tmp_path / "out")["output.weight"], weight.float())
    model.lm_head.weight = torch.nn.Parameter(weight.float())
    same_logits(tmp_path / "out", model)


@pytest.mark.parametrize(
    ("version", "act_order", "groupsize", "hidden", "ffn", "forms"),
    [
        ("v1", False, -1, 384, 320, {"int4-g128", "int4-g64"}),
        ("v2", True, -1, 384, 320, {"int4-g128", "int4-g64"}),
        ("awq", False, -1, 384, 320, {"int4-g128", "int4-g64"}),
        ("awq", False, 64, 384, 320, {"int4-g64"}),
        ("v1", True, 128, 256, 256, {"int4-g128"}),
        ("v2", True, 256, 256, 512, {"int4-g128"}),
        ("v1", False, 192, 384, 320, {"int4-g64"}),  # the second group of the 320 is smaller, the 128 are less than one
        ("v1", True, 192, 384, 320, {"int4-g64"}),
    ],
)
def test_group_sizes(tmp_path, version, act_order, groupsize, hidden, ffn, forms):
    """Larger groups than ours are cut, which changes nothing."""
    maker = Maker(version, groupsize, act_order=act_order)
    fields = {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": 8, "head_dim": 16}
    model = make(tmp_path / "in", maker, num_hidden_layers=1, **fields)
    convert(tmp_path / "in", tmp_path / "out")
    same_weights(tmp_path / "out", model)
    same_logits(tmp_path / "out", model)
    metadata = read_header(tmp_path / "out" / "model.safetensors")[1]
    assert set(json.loads(metadata["quantized"]).values()) == forms


def test_version_2_that_says_it_is_version_1(tmp_path):
    """A symmetric zero can only be 8."""
    model = make(tmp_path / "in", Maker("v2", 32, symmetric=True), config={"checkpoint_format": "gptq"})
    convert(tmp_path / "in", tmp_path / "out")
    same_weights(tmp_path / "out", model)


def test_dtype_is_that_of_the_rest(tmp_path):
    make(tmp_path / "in", Maker("v1", 32))
    convert(tmp_path / "in", tmp_path / "half")
    convert(tmp_path / "in", tmp_path / "float", torch.float32)
    half, full = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "float"))
    layers = json.loads(read_header(tmp_path / "half" / "model.safetensors")[1]["quantized"])
    for name, tensor in half.items():
        expected = tensor if name.rpartition(".")[0] in layers else tensor.float()
        assert full[name].dtype == expected.dtype and torch.equal(full[name], expected), name


@pytest.mark.parametrize("way", ["quantize_config.json", "quant_config.json", "gptq_model", "bin", "shards"])
def test_files_of_older_tools(tmp_path, way):
    source, awq = tmp_path / "in", way == "quant_config.json"
    model = make(source, Maker("awq" if awq else "v1", 32, act_order=not awq))
    config = json.loads((source / "config.json").read_text())
    if way.endswith(".json"):
        fields = config.pop("quantization_config")
        del fields["quant_method"]
        if awq:
            fields = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
        (source / way).write_text(json.dumps(fields))
        (source / "config.json").write_text(json.dumps(config))
    state = load_file(source / "model.safetensors")
    if way == "gptq_model":
        (source / "model.safetensors").rename(source / "gptq_model-4bit-32g.safetensors")
    if way in ("bin", "shards"):
        (source / "model.safetensors").unlink()
        torch.save(state, source / "pytorch_model.bin")
    if way == "shards":
        (source / "pytorch_model.bin").unlink()
        files = {name: f"gptq_model-4bit-32g-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(state)}
        for file in set(files.values()):
            save_file({name: tensor for name, tensor in state.items() if files[name] == file}, source / file)
        (source / "gptq_model-4bit-32g.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    convert(source, tmp_path / "out")
    same_weights(tmp_path / "out", model)
    assert read_header(tmp_path / "out" / "model.safetensors")[1]["mode"] == ("awq" if awq else "gptq")
    assert not list((tmp_path / "out").glob("quant*"))
    convert(source, tmp_path / "many", shard_bytes=10_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 4
    ours, sharded = load_model(tmp_path / "out"), load_model(tmp_path / "many")
    for (name, one), (_, other) in zip(ours.named_buffers(), sharded.named_buffers(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("case", ["order", "no order", "not quantized"])
def test_parts_that_cannot_be_fused(tmp_path, case):
    """The whole of the fused layer becomes floats, and one line says so."""
    maker = Maker("v1", 32, act_order=case != "not quantized")
    model = make(tmp_path / "in", maker, plain="lm_head" + r"|0\.self_attn\.k_proj" * (case == "not quantized"))
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.up_proj"
        if case != "not quantized":
            maker.orders.clear()  # another one than gate has
            maker.act_order = case == "order"
            parts, weight = maker.layer(name, 96, 64)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            model.get_submodule(name).weight.data = weight.float()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    said = convert(tmp_path / "in", tmp_path / "out", torch.float32)
    name = "attention.wqkv" if case == "not quantized" else "feed_forward.w13"
    assert re.search(rf"; as floats now: {name} \(GPTQ, 4 bits\) [\d.]+ .B; try", said), said
    same_weights(tmp_path / "out", model)
    same_logits(tmp_path / "out", model)
    convert(tmp_path / "in", tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")[f"layers.0.{name}.weight"]
    assert stored.dtype == torch.float16


def test_biases_of_zero(tmp_path):
    """AutoGPTQ wrote one for every layer."""
    model = make(tmp_path / "in", Maker("v1", 32))
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.bias"
    save_file(tensors | {name: torch.zeros(64, dtype=torch.half)}, tmp_path / "in" / "model.safetensors")
    convert(tmp_path / "in", tmp_path / "out")
    same_weights(tmp_path / "out", model)
    save_file(tensors | {name: torch.ones(64, dtype=torch.half)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match=f"'{name}' is unexpected"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.slow
def test_resident_memory(tmp_path):
    """Peak memory above the start is a small part of the weights'."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 10, "num_attention_heads": 16, "vocab_size": 512, "max_position_embeddings": 64,
        "dtype": "float16", "quantization_config": CONFIGS["v1"] | {"group_size": 128, "desc_act": True},
    }  # fmt: skip
    make(tmp_path / "in", Maker("v1", 32), num_hidden_layers=1)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | {"quantization_config": None}))
    tensors = {name: torch.ones(tensor.shape, dtype=torch.half) for name, tensor in model.state_dict().items()
               if "_proj" not in name}  # fmt: skip
    for name, module in model.named_modules():
        if "_proj" in name:
            out, inputs = module.weight.shape
            tensors |= {
                f"{name}.qweight": torch.ones(inputs // 8, out, dtype=torch.int32),
                f"{name}.qzeros": torch.ones(inputs // 128, out // 8, dtype=torch.int32),
                f"{name}.scales": torch.ones(inputs // 128, out, dtype=torch.half),
                f"{name}.g_idx": (torch.arange(inputs) * 7 % inputs // 128).int(),
            }
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size > 300e6
    del tensors
    code = """
import resource, sys
from pathlib import Path
from convert_hf_checkpoint import convert
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
start = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - start)
"""
    command = [sys.executable, "-c", code, tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 250e6


# -- unpacking, against packing number by number


def matrix(rows: st.SearchStrategy[int], columns: st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
    seeds = st.integers(0, 2**32 - 1)
    draw = lambda r, c, seed, low, high: np.random.default_rng(seed).integers(low, high + 1, (r, c))  # noqa: E731
    ranges = st.tuples(st.integers(0, 15), st.integers(0, 15)).map(sorted)
    return st.builds(lambda r, c, seed, ends: draw(r, c, seed, *ends), rows, columns, seeds, ranges)


@given(matrix(st.integers(1, 9).map(lambda n: 8 * n), st.integers(1, 4).map(lambda n: 8 * n)))
@settings(max_examples=50, deadline=None)
def test_unpack_weight(levels):
    for method, packed in (("gptq", pack_gptq(levels, levels[:1], "v2")), ("awq", pack_awq(levels, levels[:1]))):
        found = gptq_awq.unpack_weight(packed["qweight"], Format(method, 32))
        assert np.array_equal(found.numpy(), levels.T)
        assert np.array_equal(packing.pack_nibbles(found).numpy(), levels.T[:, 0::2] + 16 * levels.T[:, 1::2])
    packed = pack_gptq(levels * 17, levels[:1], "v2", 8)
    assert np.array_equal(gptq_awq.unpack_weight(packed["qweight"], Format("gptq", 32, 8)).numpy(), levels.T * 17)


@given(matrix(st.integers(1, 5), st.integers(1, 4).map(lambda n: 8 * n)))
@settings(max_examples=50, deadline=None)
def test_unpack_zeros(zeros):
    """All zeros from 0 to 15 come back, in version 1 too, where a 0 borrows from the next."""
    levels = np.zeros((8, zeros.shape[1]), int)
    for version in ("v1", "v2", "awq"):
        packed = pack_awq(levels, zeros) if version == "awq" else pack_gptq(levels, zeros, version)
        form = Format("awq" if version == "awq" else "gptq", 32, less_one=version == "v1")
        assert np.array_equal(gptq_awq.unpack_zeros(packed["qzeros"], form).numpy(), zeros.T)
    for version in ("v1", "v2"):
        packed = pack_gptq(levels, zeros * 17, version, 8)
        form = Format("gptq", 32, 8, less_one=version == "v1")
        assert np.array_equal(gptq_awq.unpack_zeros(packed["qzeros"], form).numpy(), zeros.T * 17)


@given(st.permutations(range(24)), st.sampled_from([1, 5, 8, 24, 100]))
@settings(max_examples=50, deadline=None)
def test_sorted_inputs(inputs, size):
    groups = [i // size for i in inputs]
    order = gptq_awq.sorted_inputs(torch.tensor(groups, dtype=torch.int32), size)
    if groups == sorted(groups):
        assert order is None
    else:
        assert order.dtype == torch.int32 and sorted(order.tolist()) == list(range(24))
        assert [groups[i] for i in order.tolist()] == [i // size for i in range(24)]


class InMemory:
    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.dtype, self.shape = tensor, tensor.dtype, tuple(tensor.shape)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.tensor[start:stop].clone()


@pytest.mark.parametrize("version", ["v1", "awq"])
def test_any_rows(version, monkeypatch):
    """Layers are read in runs of rows, whatever these are."""
    parts, weight = Maker(version, 32, act_order=version == "v1").layer("layer", 40, 64)
    tensors = {f"layer.{part}": InMemory(tensor) for part, tensor in parts.items()}
    form = Format("awq" if version == "awq" else "gptq", 32, less_one=version == "v1")
    linear = gptq_awq.quantized_linear(form, "layer", tensors)
    for start in range(40):
        for stop in range(start + 1, 41):
            assert torch.equal(linear.read(start, stop), weight[start:stop].float())
    whole = torch.cat(list(linear.read_part("weight")))
    monkeypatch.setattr(gptq_awq, "CHUNK_BYTES", 1000)
    runs = list(linear.read_part("weight"))
    assert len(runs) == 5 and torch.equal(torch.cat(runs), whole)


# -- what the scripts make of it


@pytest.mark.parametrize("version", ["v1", "awq"])
def test_scripts(tmp_path, script, version):
    """The converter and generate.py; nobody mistakes what goes in or comes out."""
    make(tmp_path / "in", Maker(version, 32, act_order=version == "v1"), "Qwen2")
    main = convert_hf_checkpoint.main
    done = script("--checkpoint_dir", tmp_path / "in", "--out", tmp_path / "out", main=main)
    assert done.code == 0 and re.fullmatch("wrote [^\n]*int4-g32 [^\n]*\n", done.err), done.err
    arguments = ("--prompt", "Hello", "--max_new_tokens", 5, "--json", "--checkpoint_path", tmp_path / "out")
    (sample,) = parse(script(*arguments))
    assert "text" in sample
    with pytest.raises(UserError, match=r"quantized already \((gptq|awq)\)"):
        quantize.quantize(tmp_path / "out", "int8")
    with pytest.raises(UserError, match="is already converted"):
        convert(tmp_path / "out", tmp_path / "again")
    with pytest.raises(UserError, match=r"has the tensor names of Hugging Face.*convert_hf_checkpoint\.py"):
        load_model(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")  # replaces it


@pytest.mark.slow
def test_compiled(tmp_path, script):
    """The same text, though a layer has an order and another has none."""
    make(tmp_path / "in", Maker("v1", 32, act_order=True), plain="lm_head|1.self_attn|1.mlp.down")
    convert(tmp_path / "in", tmp_path / "out")
    arguments = ("--checkpoint_path", tmp_path / "out", "--prompt", "Hello", "--temperature", 0, "--max_new_tokens", 20)
    plain, compiled = script(*arguments), script(*arguments, "--compile", "--compile_prefill")
    assert plain.code == compiled.code == 0 and plain.out == compiled.out and plain.out


def test_hub(tmp_path):
    """quantize_config.json is fetched as well, and believed before the weights are."""
    make(tmp_path / "hub" / "org" / "good", Maker("v1", 32))
    config = json.loads((tmp_path / "hub" / "org" / "good" / "config.json").read_text())
    fields = config.pop("quantization_config")
    (tmp_path / "hub" / "org" / "good" / "config.json").write_text(json.dumps(config))
    shutil.copytree(tmp_path / "hub" / "org" / "good", tmp_path / "hub" / "org" / "bad")
    (tmp_path / "hub" / "org" / "good" / "quantize_config.json").write_text(json.dumps(fields))
    (tmp_path / "hub" / "org" / "bad" / "quantize_config.json").write_text(json.dumps(fields | {"bits": 3}))
    with FakeHub(tmp_path / "hub") as hub:
        environment = os.environ | hub.env(tmp_path / "home")
        done = run_script("--repo", "org/good", cwd=tmp_path, env=environment)
        assert done.returncode == 0 and "int4-g32 (gptq)" in done.stderr, done.stderr
        hub.requests.clear()
        assert "quantize_config.json: bits 3" in error_line(
            run_script("--repo", "org/bad", cwd=tmp_path, env=environment)
        )
        assert "model.safetensors" not in hub.fetched()


# -- what is refused


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        convert(folder / "in", folder / "out")
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    assert not (folder / "out").exists() and not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("version", "fields", "match"),
    [
        ("v1", {"quant_method": "quanto"}, "quant_method 'quanto' is not supported, only"),
        ("v1", {"bits": 2}, "bits 2"),
        ("v1", {"bits": 3}, "bits 3"),
        ("v1", {"bits": None}, "bits None"),
        ("v1", {"group_size": 0}, "group_size 0"),
        ("v1", {"group_size": None}, "group_size None"),
        ("v1", {"group_size": "128"}, "group_size '128'"),
        ("v1", {"checkpoint_format": "marlin"}, "GPTQ format 'marlin'"),
        ("v1", {"is_marlin_format": True}, "GPTQ format 'marlin'"),
        ("v1", {"format": "bitblas"}, "GPTQ format 'bitblas'"),
        ("v1", {"rotation": "hadamard"}, "rotation 'hadamard'"),
        ("v1", {"dynamic": {"+:.*up_proj": {"bits": 8}}}, r"dynamic '\+:\.\*up_proj'"),
        ("v1", {"dynamic": 3}, "dynamic 3"),
        ("awq", {"version": "gemv"}, "AWQ format 'gemv'"),
        ("awq", {"version": "marlin"}, "AWQ format 'marlin'"),
        ("awq", {"bits": 8}, "bits 8"),
    ],
)
def test_configs_that_are_refused(tmp_path, version, fields, match):
    make(tmp_path / "in", Maker(version, 32), config=fields, num_hidden_layers=1)
    refused(tmp_path, "quantization_config: .*" + match)


def test_rules_for_single_layers(tmp_path):
    """GPTQModel's, as far as they only leave layers out."""
    rules = {"-:.*0.mlp.down.*": {}, "+:.*up_proj": {"desc_act": True, "group_size": 32}}
    model = make(tmp_path / "in", Maker("v1", 32), plain="lm_head|0.mlp.down", config={"dynamic": rules})
    convert(tmp_path / "in", tmp_path / "out")
    same_weights(tmp_path / "out", model)
    assert load_file(tmp_path / "out" / "model.safetensors")["layers.0.feed_forward.w2.weight"].dtype == torch.float16


def test_no_config(tmp_path):
    make(tmp_path / "in", Maker("v1", 32))
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "'model.layers.0.mlp.down_proj' is quantized, and config.json does not say how; put")


def test_groups_that_do_not_fit(tmp_path):
    make(tmp_path / "in", Maker("v1", 16))
    refused(tmp_path, "down_proj' has 96 inputs in groups of 16 and 64 outputs; only")
    shutil.rmtree(tmp_path / "in")
    make(tmp_path / "in", Maker("v1", 32), plain="lm_head|down", intermediate_size=100)
    refused(tmp_path, "tensor|gate_proj' has 64 inputs in groups of 32 and 100 outputs; only")


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("version", "changes", "match"),
    [
        ("v1", {f"{Q}.qzeros": None}, f"'{Q}.qzeros' is missing"),
        ("v1", {f"{Q}.scales": None}, f"'{Q}.scales' is missing"),
        ("v1", {f"{Q}.qweight": None}, f"'{Q}.qweight' is missing"),
        ("v1", {f"{Q}.g_idx": None}, f"'{Q}.g_idx' is missing"),
        ("awq", {f"{Q}.qzeros": None}, f"'{Q}.qzeros' is missing"),
        ("v1", {f"{Q}.{part}": None for part in ("qweight", "qzeros", "scales", "g_idx")}, f"'{Q}.weight' is missing"),
        ("v1", {f"{Q}.qweight": torch.zeros(8, 56).int()}, rf"'{Q}.qzeros' has the shape \[2, 8\] where .* \[2, 7\]"),
        ("v1", {f"{Q}.qzeros": torch.zeros(1, 8).int()}, rf"'{Q}.qzeros' has the shape \[1, 8\] where .* \[2, 8\]"),
        ("v1", {f"{Q}.scales": torch.ones(2, 63)}, rf"'{Q}.scales' has the shape \[2, 63\] where .* \[2, 64\]"),
        ("v1", {f"{Q}.g_idx": torch.zeros(63).int()}, rf"'{Q}.g_idx' has the shape \[63\] where .* \[64\]"),
        ("awq", {f"{Q}.qweight": torch.zeros(8, 64).int()}, f"'{Q}' has 8 inputs in groups of 32 and 512 out"),
        ("v1", {f"{Q}.qweight": torch.zeros(8, 64)}, f"'{Q}.qweight' is torch.float32, not torch.int32"),
        ("v1", {f"{Q}.scales": torch.ones(2, 64).int()}, f"'{Q}.scales' is torch.int32, not a float"),
        ("v1", {f"{Q}.scales": torch.full((2, 64), torch.nan)}, f"'{Q}.scales' holds NaN or infinity"),
        ("awq", {f"{Q}.scales": torch.full((2, 64), torch.inf)}, f"'{Q}.scales' holds NaN or infinity"),
        ("v1", {f"{Q}.g_idx": torch.arange(64).int() // 31}, f"'{Q}.g_idx' holds 2, which is no group from 0 to 1"),
        ("v1", {f"{Q}.g_idx": torch.arange(64).int() // 32 - 1}, f"'{Q}.g_idx' holds -1, which is no group"),
        ("v1", {f"{Q}.g_idx": torch.zeros(64).int()}, f"'{Q}.g_idx' gives group 0 64 inputs, not 32"),
        ("v1", {f"{Q}.weight": torch.ones(64, 64)}, f"'{Q}.weight' is unexpected"),
        ("v1", {"model.norm.weight": None}, "'model.norm.weight' is missing"),
        ("v1", {"model.norm.scales": torch.ones(64)}, "'model.norm.scales' is unexpected"),
        ("v1", {"model.embed_tokens.weight": None, "model.embed_tokens.qweight": torch.zeros(1).int()},
         "'model.embed_tokens.qweight' is missing from the weights or no matrix"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(tmp_path, version, changes, match):
    make(tmp_path / "in", Maker(version, 32, act_order=version == "v1"))
    tensors = load_file(tmp_path / "in" / "model.safetensors") | changes
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "in" / "model.safetensors"
    )
    refused(tmp_path, match)


def test_no_group_indices_are_needed_without_activation_order(tmp_path):
    model = make(tmp_path / "in", Maker("v1", 32))
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    save_file(kept, tmp_path / "in" / "model.safetensors")
    convert(tmp_path / "in", tmp_path / "out")
    same_weights(tmp_path / "out", model)


def test_an_error_is_one_line(tmp_path):
    make(tmp_path / "in", Maker("v1", 32), config={"bits": 2})
    done = run_script("--checkpoint_dir", tmp_path / "in", "--out", tmp_path / "out")
    assert "bits 2 is not supported" in error_line(done)


@pytest.fixture(scope="module")
def ordered(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ordered")
    make(folder / "in", Maker("v1", 32, act_order=True))
    convert(folder / "in", folder / "out")
    return folder / "out"


@pytest.mark.parametrize(
    ("order", "match"),
    [
        (torch.zeros(64).int(), "does not hold each input once"),
        (torch.arange(1, 65).int(), "does not hold each input once"),
        (torch.arange(64), "is torch.int64, not torch.int32"),
        (torch.arange(63).int(), r"has the shape \[63\]"),
    ],
)
def test_orders_that_are_refused(ordered, tmp_path, script, order, match):
    shutil.copytree(ordered, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {"layers.0.attention.wo.order": order}, path, read_header(path)[1])
    with pytest.raises(UserError, match=f"'layers.0.attention.wo.order' {match}") as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert_refused(script("--checkpoint_path", path, "--prompt", "x"), "layers.0.attention.wo.order")


def test_orders_that_belong_to_no_int4_layer(ordered, tmp_path):
    shutil.copytree(ordered, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    metadata = read_header(path)[1]
    save_file(load_file(path) | {"output.order": torch.arange(64).int()}, path, metadata)
    with pytest.raises(UserError, match=r"'output\.order' is unexpected"):
        load_model(path)


def test_order_of_a_layer():
    """y = W x[order], with any leading dimensions."""
    q, order = torch.randint(0, 256, (8, 32), dtype=torch.uint8), torch.randperm(64).int()
    parts = q, torch.rand(8, 2), torch.randint(0, 16, (8, 2)), 64, 32
    x = torch.randn(2, 3, 64)
    plain = kernels.Int4Linear.from_canonical(*parts)
    ordered = kernels.Int4Linear.from_canonical(*parts, order=order)
    assert torch.equal(ordered(x), plain(x[..., order.long()]))
    assert ordered.weight_bytes == plain.weight_bytes + 64 * 4
    with pytest.raises(ValueError, match="order of 64 inputs"):
        kernels.Int4Linear.from_canonical(*parts, order=order[:-1])


@FUZZ
@given(mutated(CONFIGS["v1"] | {"dynamic": {"-:x": {}}, "meta": {"a": [1]}}) | mutated(CONFIGS["awq"] | {"w_bit": 4}))
def test_fuzz_config(fields):
    try:
        read = read_quantization({"quantization_config": fields}, ROOT / "nowhere")
        assert read is None or read["quant_method"] in METHODS
    except UserError as error:
        assert str(error)


def test_linear_is_what_the_model_has(ordered):
    """Only what is quantized is Int4Linear."""
    model = load_model(ordered)
    kinds = {
        name: type(module) for name, module in model.named_modules() if isinstance(module, (Linear, kernels.Int4Linear))
    }
    assert kinds.pop("output") is Linear and set(kinds.values()) == {kernels.Int4Linear}
