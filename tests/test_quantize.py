"""quantize.py against the formulas in float64, GPTQ as its paper writes it, transformers, and damaged input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file

import checkpoint
import eval as evaluation
import layout
import quantize
import rounding
from checkpoint import load_model
from convert_hf_checkpoint import convert
from errors import UserError
from kernels import packing
from tokenizer import load_tokenizer
from writer import write_safetensors

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "model.py").read_text()[:5000]  # two windows of the tiny tokenizer's tokens
TINY = torch.finfo(torch.float32).tiny
LAYERS = ["attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2"]


def matrix(width: int) -> st.SearchStrategy:
    """float32 [1..4, width] of any size that bfloat16 weights have, zeros and equal rows among them."""
    values = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1e-30, -1e-6, 1e4, -1e30, 2.0**127, -3e38])
    shapes = st.tuples(st.integers(1, 4), st.just(width))
    return arrays.arrays(np.float32, shapes, elements=values, fill=st.sampled_from([0.0, 0.25, -1e-3])).map(
        torch.from_numpy
    )


@pytest.fixture
def folder(base_folder, tmp_path) -> Path:
    """A copy of the shared checkpoint, with a text to calibrate on."""
    shutil.copytree(base_folder, tmp_path / "model")
    (tmp_path / "calibration.txt").write_text(TEXT)
    return tmp_path / "model"


def run(*arguments: object, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, arguments)])
    quantize.main()


def unpack(tensors: dict[str, torch.Tensor], layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An int4 layer by the definition of the format: levels [out, in], scales and zeros [out, groups], float64."""
    packed = tensors[f"{layer}.weight"].numpy()
    levels = np.empty((packed.shape[0], 2 * packed.shape[1]))
    levels[:, 0::2], levels[:, 1::2] = packed % 16, packed // 16
    return levels, tensors[f"{layer}.scales"].double().numpy(), tensors[f"{layer}.zeros"].double().numpy()


def dequantized(path: Path) -> dict[str, torch.Tensor]:
    """The float32 weights that a file stands for, by the definition of the format."""
    tensors = load_file(path)
    weights = {name: tensor.float() for name, tensor in tensors.items() if not re.search("scales|zeros", name)}
    for name in tensors:
        layer = name.removesuffix(".scales")
        if f"{layer}.zeros" in tensors:
            levels, scales, zeros = unpack(tensors, layer)
            size = levels.shape[1] // scales.shape[1]
            weight = (levels - zeros.repeat(size, 1)) * scales.repeat(size, 1)
            weights[f"{layer}.weight"] = torch.from_numpy(weight).float()
        elif name.endswith("scales"):
            weight, scales = tensors[f"{layer}.weight"].float(), tensors[name].float()
            scales = scales[:, None] if scales.dim() == 1 else scales
            weights[f"{layer}.weight"] = weight * scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    return weights


def in_transformers(hf_folder: Path, weights: dict[str, torch.Tensor]) -> transformers.LlamaForCausalLM:
    """transformers' model with these weights, of which the shared checkpoint has 64, 32 and 32 rows of q, k and v."""
    model = transformers.LlamaForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()
    state = {"model.embed_tokens.weight": weights["tok_embeddings.weight"], "model.norm.weight": weights["norm.weight"]}
    state["lm_head.weight"] = weights["output.weight"]
    for i in range(2):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for part, rows in zip("qkv", weights[ours + "attention.wqkv.weight"].split([64, 32, 32]), strict=True):
            state[f"{theirs}self_attn.{part}_proj.weight"] = rows
        for part, rows in zip(("gate", "up"), weights[ours + "feed_forward.w13.weight"].chunk(2), strict=True):
            state[f"{theirs}mlp.{part}_proj.weight"] = rows
        for mine, name in (
            ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            state[f"{theirs}{name}.weight"] = weights[f"{ours}{mine}.weight"]
    model.load_state_dict(state)
    return model


# -- rounding


@given(matrix(32))
@settings(max_examples=60, deadline=None)
def test_int8_is_within_half_a_step_of_the_formula(weight):
    levels, scales = rounding.quantize_int8(weight)
    exact, s = weight.double(), scales.double()[:, None]
    assert levels.dtype == torch.int8 and levels.abs().max() <= 127
    torch.testing.assert_close(s, (exact.abs().amax(1, keepdim=True) / 127).clamp(min=TINY), rtol=1e-6, atol=0)
    assert ((levels.double() * s - exact).abs() <= s * (0.5 + 1e-4)).all()


@given(matrix(128), st.sampled_from([32, 64, 128]))
@settings(max_examples=60, deadline=None)
def test_int8_in_groups_is_within_half_a_step(weight, size):
    levels, scales = rounding.quantize_int8(weight, size)
    assert levels.dtype == torch.int8 and levels.abs().max() <= 127 and scales.dtype == torch.bfloat16
    exact, s = weight.double().unflatten(1, (-1, size)), scales.double()
    torch.testing.assert_close(s, (exact.abs().amax(-1) / 127).clamp(min=TINY), rtol=2**-8, atol=0)
    found = levels.double().unflatten(1, (-1, size)) * s[..., None]
    assert ((found - exact).abs() <= s[..., None] * (0.5 + 1e-4)).all()


def nearest(groups: torch.Tensor) -> torch.Tensor:
    """Rounding to -8..7 times a scale that makes the largest -8, in float64: what the search has to beat."""
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    scale = torch.where(scale.abs() < TINY, TINY, scale)
    return (groups / scale).round().clamp(-8, 7) * scale


@given(matrix(64), st.sampled_from([32, 64]))
@settings(max_examples=60, deadline=None)
def test_int4_is_no_worse_than_without_clipping(weight, size):
    levels, scales = rounding.quantize_int4(weight, size)
    assert torch.equal(levels, levels.round()) and levels.min() >= 0 and levels.max() <= 15
    assert torch.equal(scales, scales.bfloat16().float()) and scales.isfinite().all() and (scales != 0).all()
    found = packing.dequantize(levels.double(), scales.double(), 8, size)
    assert (found[weight == 0] == 0).all()
    exact = weight.double().unflatten(1, (-1, size))
    errors = (found.unflatten(1, (-1, size)) - exact).square().sum(-1).sqrt()
    plain = (nearest(exact) - exact).square().sum(-1).sqrt()
    # A scale that is rounded to bfloat16 (2^-9 of itself) moves the widest level, 8, by so much.
    assert (errors <= plain + 8 * 2**-8 * scales.double().abs() * size**0.5 + 1e-37).all()


def test_clipping_pays():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    found = packing.dequantize(*rounding.quantize_int4(weight, 32), 8, 32)
    plain = nearest(weight.unflatten(1, (-1, 32))).flatten(1)
    assert (found - weight).square().mean() < 0.95 * (plain - weight).square().mean()


# -- GPTQ


def correlated(width: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, width] and the Hessian of inputs that hang together, some of which hardly move."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * width, width // 4, generator=generator, dtype=torch.float64) @ mix[: width // 4]
    x += 0.3 * torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-1, 1, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), x.T @ x


def textbook(weight, hessian, scales, order, damping=0.01) -> np.ndarray:
    """GPTQ's levels, column after column, as section 3 of the paper derives it from optimal brain surgery: the inverse
    Hessian of the inputs that are left is got from that of before by eliminating one."""
    weight, size = weight.copy(), weight.shape[1] // scales.shape[1]
    hessian = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    inverse = np.linalg.inv(hessian)
    levels = np.empty_like(weight)
    for i in order:
        scale = scales[:, i // size]
        levels[:, i] = np.clip(np.round(weight[:, i] / scale + 8), 0, 15)
        error = (weight[:, i] - (levels[:, i] - 8) * scale) / inverse[i, i]
        weight -= np.outer(error, inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return levels


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("width", "size"), [(160, 32), (256, 128)])  # a block of 128 inputs and a shorter one; two
def test_gptq_is_the_papers(act_order, width, size):
    weight, hessian = correlated(width, rows=12)
    order = hessian.diagonal().argsort(descending=True) if act_order else None
    factor = rounding.inverse_factor(hessian if order is None else hessian[order][:, order])
    levels, scales = rounding.gptq(weight, hessian.diagonal(), factor, size, order)
    taken = range(width) if order is None else order.tolist()
    expected = textbook(weight.numpy(), hessian.numpy(), scales.numpy(), taken)
    assert np.array_equal(levels.numpy(), expected)


def test_the_factor_is_that_of_the_inverse():
    _, hessian = correlated(96, rows=1)
    factor = rounding.inverse_factor(hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    torch.testing.assert_close(factor, torch.linalg.cholesky(damped.inverse(), upper=True))


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_changes_outputs_less_than_rounding(act_order):
    weight, hessian = (x.float() for x in correlated(256, rows=64, seed=1))
    (packed, scales, zeros), error = rounding.gptq_layer([rounded := weight.clone()], hessian, 32, act_order)
    assert packed.shape == (64, 128) and scales.shape == zeros.shape == (64, 8)

    def off(other: torch.Tensor) -> float:
        change = (other - weight).double()
        whole = ((weight.double() @ hessian.double()) * weight).sum()
        return float((((change @ hessian.double()) * change).sum() / whole).sqrt())

    assert error == pytest.approx(off(rounded), rel=1e-3)
    assert error < 0.6 * off(packing.dequantize(*rounding.quantize_int4(weight, 32), 8, 32))


def test_inputs_that_never_moved_are_rounded():
    weight, hessian = (x.float() for x in correlated(64, rows=8))
    dead = [3, 40, 41]
    hessian[dead], hessian[:, dead] = 0, 0
    for curvature in (hessian, torch.zeros(64, 64)):
        (packed, scales, _), _ = rounding.gptq_layer([weight.clone()], curvature, 32, False)
        levels = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
        for i in dead:
            assert torch.equal(levels[:, i], (weight[:, i] / scales[:, i // 32] + 8).round().clamp(0, 15).byte())


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_the_size_of_the_inputs_makes_no_difference(size):
    """Squares that float32 has no room for, or only denormal numbers."""
    weight, hessian = correlated(96, rows=8, seed=2)
    expected, other = (
        rounding.gptq_layer([weight.float()], hessian * scale, 32, act_order=True) for scale in (1.0, size)
    )
    assert all(torch.equal(a, b) for a, b in zip(expected[0], other[0], strict=True))
    assert other[1] == pytest.approx(expected[1], rel=1e-3)
    small = (hessian * (1e-42 / hessian.diagonal().mean())).float()  # what float32 makes of them is little, but ends
    assert rounding.gptq_layer([weight.float()], small, 32)[1] < 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_hessian_ends_in_an_error(value):
    weight, hessian = (x.float() for x in correlated(64, rows=4))
    hessian[3, 3] = value
    with pytest.raises(UserError, match="calibrate on another text"):
        rounding.gptq_layer([weight], hessian, 32)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_factor_does_not_depend_on_the_threads(threads):
    _, hessian = correlated(400, rows=1)
    factors = []
    for count in (1, 2, 3, 5):
        threads(count)
        factors.append(rounding.inverse_factor(hessian))
    assert all(torch.equal(factor, factors[0]) for factor in factors)
    lower = torch.linalg.cholesky(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(400))
    torch.testing.assert_close(factors[0].T @ factors[0], torch.cholesky_inverse(lower))


def test_gptq_does_not_depend_on_the_threads(folder, threads):
    written = []
    for count in (1, 3):
        threads(count)
        out = quantize.quantize(folder, "int4-gptq", calibration=folder.parent / "calibration.txt", overwrite=True)
        written.append(out.read_bytes())
    assert written[0] == written[1]


def test_each_layer_is_calibrated_on_the_quantized_ones_before_it(folder, hf_folder):
    """Recomputed with transformers: with the weights of the file in it, each layer sees what it was calibrated on."""
    written = quantize.quantize(folder, "int4-gptq", 32, folder.parent / "calibration.txt")
    model = in_transformers(hf_folder, dequantized(written))
    ids = torch.tensor(load_tokenizer(folder).encode(TEXT))
    ids = ids[: len(ids) // 1024 * 1024].view(-1, 1024)
    seen: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        parts = (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj)
        for name, part in zip(LAYERS, parts, strict=True):
            key = f"layers.{i}.{name}"
            part.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0]}))
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.update({"output": args[0]}))
    with torch.inference_mode():
        model(ids)
    original, tensors = load_file(folder / "model.safetensors"), load_file(written)
    assert len(seen) == 9
    for layer, x in seen.items():
        levels, scales, zeros = unpack(tensors, layer)
        x = x.flatten(0, 1).double().numpy()
        assert (zeros == 8).all()
        expected = textbook(original[f"{layer}.weight"].double().numpy(), x.T @ x, scales, range(levels.shape[1]))
        # Where float32 puts a weight on the other side of a half, the rest of its row can go another way.
        assert (levels == expected).mean() > 0.97, layer


# -- files


@pytest.mark.parametrize(
    ("mode", "arguments", "name", "form"),
    [
        ("int8", [], "int8", "int8"),
        ("int8", ["--groupsize", 32], "int8-g32", "int8-g32"),
        ("int4", [], "int4-g32", "int4-g32"),
        ("int4-gptq", ["--calibration", "calibration.txt", "--act_order"], "int4-gptq-g32-act_order", "int4-g32"),
    ],
    ids=["int8", "int8-g32", "int4", "int4-gptq"],
)
def test_what_is_written(mode, arguments, name, form, folder, hf_folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    run("--mode", mode, "--checkpoint_path", folder, *arguments, monkeypatch=monkeypatch)
    written = folder / f"model_{name}.safetensors"
    assert capsys.readouterr().out == "" and sorted(folder.glob(".*")) == []
    original, tensors = load_file(folder / "model.safetensors"), load_file(written)
    with safetensors.safe_open(written, "pt") as file:
        metadata = file.metadata()
    quantized = json.loads(metadata["quantized"])
    names = [f"layers.{i}.{name}" for i in range(2) for name in LAYERS] + ["output"]
    assert quantized == dict.fromkeys(names, form)
    assert (metadata["format"], metadata["version"], metadata["mode"]) == ("gpt-brisk", "1", mode)
    for name, weight in original.items():
        layer, (out, *rest) = name.removesuffix(".weight"), weight.shape
        if layer not in quantized:
            assert torch.equal(tensors.pop(name), weight)
            continue
        found = {
            kind: (tensors.pop(f"{layer}.{kind}")) for kind in ("weight", "scales", "zeros")[: 2 + (mode != "int8")]
        }
        shapes = {kind: tuple(tensor.shape) for kind, tensor in found.items()}
        dtypes = [tensor.dtype for tensor in found.values()]
        groups = (out, rest[0] // 32)
        if form == "int8":
            assert shapes == {"weight": (out, *rest), "scales": (out,)} and dtypes == [torch.int8, torch.float32]
        elif form == "int8-g32":
            assert shapes == {"weight": (out, *rest), "scales": groups} and dtypes == [torch.int8, torch.bfloat16]
        else:
            assert shapes == {"weight": (out, rest[0] // 2), "scales": groups, "zeros": groups}
            assert dtypes == [torch.uint8, torch.bfloat16, torch.uint8]
    assert not tensors
    # The scripts take the file: logits are those of transformers with the weights that it stands for, but for the
    # activations, which the kernels round to 8 bits.
    ids = torch.tensor([load_tokenizer(folder).encode("def read_lines(path):")])
    model = load_model(written)
    model.setup_caches(1, 64)
    with torch.inference_mode():
        logits = model(ids, torch.arange(ids.shape[1])[None]).float()
        expected = in_transformers(hf_folder, dequantized(written))(ids).logits
    assert (logits - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_shards_give_the_same_file(folder, hf_folder, tmp_path):
    convert(hf_folder, tmp_path / "sharded", shard_bytes=40_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one, other = quantize.quantize(folder, "int4"), quantize.quantize(tmp_path / "sharded", "int4")
    assert other == tmp_path / "sharded/model_int4-g32.safetensors" and one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_a_group_that_does_not_fit_becomes_smaller(folder, mode):
    """128 divides neither 64 nor 96 inputs."""
    written = quantize.quantize(folder, mode, groupsize=128)
    assert written.name == f"model_{mode}-g128.safetensors"
    with safetensors.safe_open(written, "pt") as file:
        forms = json.loads(file.metadata()["quantized"])
        assert file.metadata()["groupsize"] == "128"
    assert {form for name, form in forms.items() if name.endswith("w2")} == {f"{mode}-g32"}
    assert {form for name, form in forms.items() if not name.endswith("w2")} == {f"{mode}-g64"}
    load_model(written)


def test_chunks_make_no_difference(folder, monkeypatch):
    for mode in ("int8", "int4", "int4-gptq"):
        written = quantize.quantize(folder, mode, calibration=folder.parent / "calibration.txt")
        whole = written.read_bytes()
        monkeypatch.setattr(quantize, "ELEMENTS", 5000)
        quantize.quantize(folder, mode, calibration=folder.parent / "calibration.txt", overwrite=True)
        monkeypatch.undo()
        same = np.frombuffer(whole, np.uint8) == np.frombuffer(written.read_bytes(), np.uint8)
        assert same.all() if mode != "int4-gptq" else same.mean() > 0.99  # a matmul may add up in another order


@pytest.fixture
def tied(hf_folder, tmp_path) -> Path:
    config = transformers.LlamaConfig.from_pretrained(hf_folder)
    config.tie_word_embeddings, config.attention_bias, config.mlp_bias = True, True, True
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf_folder / name, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "tied")
    (tmp_path / "calibration.txt").write_text(TEXT)
    return tmp_path / "tied"


@pytest.mark.parametrize("mode", ["int8", "int4", "int4-gptq"])
def test_tied(tied, mode):
    original = load_file(tied / "model.safetensors")
    written = quantize.quantize(tied, mode, calibration=tied.parent / "calibration.txt")
    tensors = load_file(written)
    assert torch.equal(tensors["tok_embeddings.weight"], original["tok_embeddings.weight"])
    assert "layers.0.attention.wo.bias" in original
    assert all(torch.equal(tensors[name], original[name]) for name in original if name.endswith(".bias"))
    found = dequantized(written)["output.weight"]
    assert (found - original["tok_embeddings.weight"].float()).square().mean().sqrt() < 0.15 * found.std()
    ids = torch.tensor([[5, 6, 7]])
    plain, model = load_model(tied), load_model(written)
    for one in (plain, model):
        one.setup_caches(1, 8)
    logits, expected = (one(ids, torch.arange(3)[None]).float() for one in (model, plain))
    assert model.output is not None and plain.output is None
    assert torch.nn.functional.cosine_similarity(logits, expected, dim=-1).min() > 0.95
    kept = quantize.quantize(tied, mode, 32, tied.parent / "calibration.txt", keep_output=True)
    assert load_file(kept).keys() == tensors.keys() - {"output.weight", "output.scales", "output.zeros"}
    assert load_model(kept).output is None


def test_kept_output_is_as_it_was(folder):
    tensors = load_file(quantize.quantize(folder, "int8", keep_output=True))
    assert torch.equal(tensors["output.weight"], load_file(folder / "model.safetensors")["output.weight"])


@pytest.mark.slow
def test_memory_follows_the_largest_tensor_at_most(tmp_path):
    """400 MB of bf16 in 16 layers, under 200 MB more than at the start."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 16, "num_attention_heads": 16, "vocab_size": 512, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = layout.expected_shapes(checkpoint.load_config(tmp_path))
    row = torch.randn(2**22).to(torch.bfloat16)
    write_safetensors(
        tmp_path / "model.safetensors",
        {name: (torch.bfloat16, shape) for name, shape in shapes.items()},
        lambda name: row[: np.prod(shapes[name])].split(2**20) if np.prod(shapes[name]) <= 2**22 else [
            row[:2**21]] * (int(np.prod(shapes[name])) // 2**21),
        {},
    )  # fmt: skip
    assert (tmp_path / "model.safetensors").stat().st_size > 4e8
    code = (
        "import resource, sys, torch, quantize, rounding\n"
        "rounding.quantize_int4(torch.randn(64, 64), 32)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = peak(); quantize.quantize(sys.argv[1], sys.argv[2]); print(peak() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, "int8"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(done.stdout) * 1024 < 200e6


# -- the demo


@pytest.mark.slow
@pytest.mark.skipif(not quantize.CALIBRATION.exists(), reason="the demo checkpoint is not here")
def test_quality_on_the_demo(tmp_path, monkeypatch):
    """Of the first 4096 held-out tokens, with the activations rounded as the kernels do, and GPTQ on a quarter of the
    text that it would take, which makes it worse, not better."""
    monkeypatch.setattr(quantize, "WINDOWS", 8)
    shutil.copytree(checkpoint.DEMO, tmp_path / "demo")
    tokenizer = load_tokenizer(tmp_path / "demo")
    text = (checkpoint.DEMO.parent / "heldout.txt").read_text()
    text = tokenizer.decode(tokenizer.encode(text)[:4096])

    def perplexity(path: Path) -> float:
        model = load_model(path)
        model.setup_caches(1, 1024)
        return evaluation.perplexity(model, tokenizer, text, 1024, 1024)["perplexity"]

    plain = perplexity(tmp_path / "demo")
    worse = {mode: perplexity(quantize.quantize(tmp_path / "demo", mode)) / plain - 1 for mode in quantize.MODES}
    assert worse["int8"] < 0.002 and worse["int4-gptq"] < 0.03 and worse["int4-gptq"] < 0.7 * worse["int4"], worse


# -- what a user can do wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "int3"], "int3"),
        (["--mode", "int4", "--groupsize", "48"], "48"),
        (["--mode", "int8", "--out", "weights.bin"], "weights.bin: a weight file is called"),
        (["--mode", "int8", "--out", "nowhere/model.safetensors"], "is no checkpoint of this model; copy"),
        (["--mode", "int4", "--act_order"], "--act_order"),
        (["--mode", "int4", "--calibration", "x"], "--calibration"),
        ([], "--mode"),
        (["--mode", "int4-gptq", "--calibration", "missing.txt"], "missing.txt"),
        (["--mode", "int8", "--checkpoint_path", "nowhere"], "nowhere"),
    ],
)
def test_arguments(arguments, message, folder, monkeypatch):
    before = sorted(folder.iterdir())
    path = [] if "--checkpoint_path" in arguments else ["--checkpoint_path", folder]
    with pytest.raises(UserError, match=message):
        run(*path, *arguments, monkeypatch=monkeypatch)
    assert sorted(folder.iterdir()) == before


def test_an_error_is_one_line(folder):
    command = [sys.executable, ROOT / "quantize.py", "--mode", "int4-gptq", "--checkpoint_path", folder]
    (short := folder / "short.txt").write_text("too short")
    done = subprocess.run([*command, "--calibration", short], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        r"error: the calibration text \S+short.txt has \d+ tokens, [^\n]*96 or more[^\n]*\n", done.stderr
    )
    assert not list(folder.glob("*gptq*")) and not list(folder.glob(".*"))


def test_calibration_that_is_no_text(folder):
    (path := folder.parent / "binary").write_bytes(b"\xff\xfe" * 999)
    with pytest.raises(UserError, match=r"binary is not UTF-8"):
        quantize.quantize(folder, "int4-gptq", calibration=path)


def test_a_quantized_file(folder):
    written = quantize.quantize(folder, "int8")
    before = written.read_bytes()
    with pytest.raises(UserError, match="quantized already"):
        quantize.quantize(written, "int8")
    assert written.read_bytes() == before


def test_no_group_fits(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 80}
    shutil.copytree(folder, tmp_path / "odd")
    (tmp_path / "odd/config.json").write_text(json.dumps(config))
    shapes = layout.expected_shapes(checkpoint.load_config(tmp_path / "odd"))
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "odd/model.safetensors")
    with pytest.raises(UserError, match=r"80 inputs of 'layers.0.feed_forward.w2'"):
        quantize.quantize(tmp_path / "odd", "int4")
    with pytest.raises(UserError, match="take --mode int8 without --groupsize"):
        quantize.quantize(tmp_path / "odd", "int8", 128)
    quantize.quantize(tmp_path / "odd", "int8")


def test_settings_have_names_of_their_own(folder, monkeypatch):
    """Each of these would be a loss if it took the place of another."""
    text = folder.parent / "calibration.txt"
    written = [
        quantize.quantize(folder, "int8"),
        quantize.quantize(folder, "int8", 32),
        quantize.quantize(folder, "int8", keep_output=True),
        quantize.quantize(folder, "int4-gptq", 64, text),
        quantize.quantize(folder, "int4-gptq", 64, text, act_order=True, keep_output=True),
    ]
    assert [path.name.removeprefix("model_").removesuffix(".safetensors") for path in written] == [
        "int8", "int8-g32", "int8-keep_output", "int4-gptq-g64", "int4-gptq-g64-act_order-keep_output"
    ]  # fmt: skip
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = ["--mode", "int4-gptq", "--checkpoint_path", folder, "--calibration", text, "--groupsize", 64]
    there = "is there already, quantized to int4-gptq --groupsize 64 --calibration calibration.txt"
    with pytest.raises(UserError, match=rf"g64\.safetensors {there};[^\n]*--overwrite"):
        run(*again, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=rf"keep_output\.safetensors {there} --act_order --keep_output;"):
        run(*again, "--act_order", "--keep_output", monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=f"{there};"):
        run("--mode", "int8", "--checkpoint_path", folder, "--out", written[3], monkeypatch=monkeypatch)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    run("--mode", "int8", "--checkpoint_path", folder, "--out", written[3], "--overwrite", monkeypatch=monkeypatch)
    assert written[3].read_bytes() == before[written[0]]


def test_out(folder, tmp_path):
    """In the folder, or in another one of the same model; weights that quantize.py did not write stay."""
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other/model.safetensors").unlink()
    default = quantize.quantize(folder, "int8")
    for out in (folder / "mine.safetensors", tmp_path / "other/model.safetensors"):
        assert quantize.quantize(folder, "int8", out=out) == out and out.read_bytes() == default.read_bytes()
    load_model(tmp_path / "other")
    before = (folder / "model.safetensors").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"model\.safetensors is there already, and quantize\.py did not write it"):
            quantize.quantize(folder, "int8", out=folder / "model.safetensors", overwrite=overwrite)
    (folder / "text.safetensors").write_text("mine")
    with pytest.raises(UserError, match="did not write it"):
        quantize.quantize(folder, "int8", out=folder / "text.safetensors", overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its folder is no checkpoint of this model"):
        quantize.quantize(folder, "int8", out=tmp_path / "other/model_int8.safetensors")


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}])
def test_several_ranks_are_refused(folder, monkeypatch, environment):
    for name, value in ({"RANK": "0"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start it without torchrun"):
        run("--mode", "int8", "--checkpoint_path", folder, monkeypatch=monkeypatch)
    assert not list(folder.glob("*int8*"))


@pytest.mark.slow
def test_torchrun_is_refused_in_one_line(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "quantize.py", "--mode", "int8", "--checkpoint_path", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and done.stderr.count("error: ") == 1, done.stderr
    assert "start it without torchrun" in done.stderr and not list(folder.glob("*int8*"))


@pytest.mark.parametrize("mode", ["int8", "int4", "int4-gptq"])
@pytest.mark.parametrize("name", ["layers.1.feed_forward.w2.weight", "norm.weight", "tok_embeddings.weight"])
def test_weights_that_are_not_finite(folder, mode, name):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[17] = torch.nan if mode == "int4" else -torch.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"'{name}' holds NaN or infinity"):
        quantize.quantize(folder, mode, calibration=folder.parent / "calibration.txt")
    assert not list(folder.glob("*int*")) and not list(folder.glob(".*"))


def damage(path: Path, tensors: dict | None = None, **metadata: str | None) -> None:
    with safetensors.safe_open(path, "pt") as file:
        old = file.metadata()
    new = {key: value for key, value in (old | metadata).items() if value is not None}
    save_file(tensors or load_file(path), path, new)


@pytest.mark.parametrize(
    ("mode", "metadata", "message"),
    [
        ("int8", {"version": "2"}, "version '2'"),
        ("int8", {"quantized": None}, "'layers.0.attention.wqkv.weight' is torch.int8"),
        ("int4", {"quantized": None}, "'layers.0.attention.wqkv.weight' has the shape"),
        ("int8", {"quantized": '{"output": "int8"}'}, "'layers.0.attention.wqkv.weight' is torch.int8"),
        ("int8", {"quantized": '{"output": "int4-g32"}'}, "'layers.0.attention.wqkv.weight' is torch.int8"),
        ("int4", {"quantized": '{"output": "int4-g128"}'}, "'output' .* groups of 128"),
        ("int8", {"quantized": '{"tok_embeddings": "int8"}'}, "'tok_embeddings'"),
        ("int8", {"quantized": '{"norm": "int8"}'}, "'norm'"),
        ("int8", {"quantized": '{"layers.9.attention.wo": "int8"}'}, "layers.9"),
        ("int8", {"quantized": '{"output": "int3"}'}, "malformed"),
        ("int8", {"quantized": '{"output": ["int8"]}'}, "malformed"),
        ("int8", {"quantized": "[1]"}, "malformed"),
        ("int8", {"quantized": "{"}, "malformed"),
    ],
)
def test_metadata_that_does_not_fit_the_tensors(folder, mode, metadata, message):
    written = quantize.quantize(folder, mode)
    damage(written, **metadata)
    with pytest.raises(UserError, match=message) as caught:
        load_model(written)
    assert str(written) in str(caught.value)


@pytest.mark.parametrize("name", ["output.scales", "output.zeros", "layers.1.attention.wo.weight"])
def test_tensors_that_do_not_fit_the_metadata(folder, name):
    written = quantize.quantize(folder, "int4")
    tensors = load_file(written)
    changed = tensors[name][:, :1].contiguous() if name != "output.zeros" else tensors[name].int()
    for broken in ({**tensors, name: changed}, {key: value for key, value in tensors.items() if key != name}):
        damage(written, broken)
        with pytest.raises(UserError, match=f"'{name}'"):
            load_model(written)


def test_interrupted(folder, monkeypatch):
    """Ctrl-C leaves what was there, kill -9 also a temporary file, which the next run takes over."""
    written = quantize.quantize(folder, "int8")
    before, files = written.read_bytes(), sorted(folder.iterdir())
    calls = []

    def third_time(weight, groupsize):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return weight.to(torch.int8), weight[:, 0].contiguous()

    monkeypatch.setattr(quantize, "quantize_int8", third_time)
    with pytest.raises(KeyboardInterrupt):
        quantize.quantize(folder, "int8", overwrite=True)
    monkeypatch.undo()
    assert sorted(folder.iterdir()) == files and written.read_bytes() == before

    code = (
        "import os, sys, quantize\n"
        "def work(source, quantized):\n"
        "    for i, result in enumerate(original(source, quantized)):\n"
        "        if i == 3: os.kill(os.getpid(), 9)\n"
        "        yield result\n"
        "original, quantize.rounded_layers = quantize.rounded_layers, work\n"
        "quantize.quantize(sys.argv[1], 'int8', overwrite=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert sorted(folder.glob("*.safetensors")) == [folder / "model.safetensors", written]
    assert written.read_bytes() == before
    quantize.quantize(folder, "int8", overwrite=True)
    assert sorted(folder.iterdir()) == files and written.read_bytes() == before
