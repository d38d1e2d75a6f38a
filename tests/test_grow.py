"""scripts/grow_checkpoint.py: the grown model says what the small one does, by the logits of transformers for that."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import DEMO, load_model
from convert_hf_checkpoint import convert
from errors import UserError
from quantize import quantize
from scripts.grow_checkpoint import grow
from tokenizer import load_tokenizer

SHAPE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=320, max_position_embeddings=128, head_dim=32, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
# Each with something of its own: norms of q and k, biases, a tied output, sliding windows, groups of 1, 2 and 3.
MODELS = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_attention_heads": 6, "hidden_size": 96}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
}


@pytest.fixture(params=MODELS)
def original(request, tmp_path) -> tuple[transformers.PreTrainedModel, Path]:
    """A small model of random weights in transformers, and the folder of it in our form; fp32."""
    family, others = MODELS[request.param]
    config = getattr(transformers, f"{family}Config")(**SHAPE | others)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.dim() == 1 else 0.2, generator=generator)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "small")
    return model, tmp_path / "small"


def logits_of(path: Path, tokens: Tensor) -> Tensor:
    model = load_model(path, dtype=torch.float32)
    model.setup_caches(*tokens.shape)
    return model(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape))


def total(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("parameters", [1e6, 4e6])
def test_logits_are_those_of_the_original(original, tmp_path: Path, parameters: float):
    model, small = original
    grow(small, tmp_path / "grown", parameters)
    assert total(tmp_path / "grown") == pytest.approx(parameters, rel=0.25)
    tokens = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens).logits
    scale = wanted.abs().max().item()
    torch.testing.assert_close(logits_of(tmp_path / "grown", tokens), wanted, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("original", ["qwen3"], indirect=True)  # the tied one
def test_int4_rounds_it_like_the_original(original, tmp_path: Path):
    """Groups of 32 inputs stay together, and dividing by a power of two changes the scales alone."""
    small = original[1]
    grow(small, tmp_path / "grown", 3e6)
    # The first query head and the embedding are at the same place in both.
    rows = {"layers.0.attention.wqkv": 32, "output": 320}
    files = [load_file(quantize(folder, "int4")) for folder in (small, tmp_path / "grown")]
    for layer, count in rows.items():
        (weight, scales), (grown, divided) = (
            [file[f"{layer}.{part}"][:count] for part in ("weight", "scales")] for file in files
        )
        copies = grown.shape[1] // weight.shape[1]
        assert copies > 1 and torch.equal(grown, weight.repeat(1, copies))
        tied = layer == "output" and "output.weight" not in load_file(small / "model.safetensors")
        assert torch.equal(divided * (1 if tied else copies), scales.repeat(1, copies))


def test_nothing_of_it_is_cheaper_than_a_trained_model(tmp_path: Path):
    """All that adds nothing is dense: of no matrix but wo and w2 is a column or a row zero."""
    grow(DEMO, tmp_path / "grown", 3e7)
    for name, tensor in load_file(tmp_path / "grown" / "model.safetensors").items():
        if re.search(r"wqkv|w13|tok_embeddings", name):
            assert (tensor != 0).any(0).all() and (tensor != 0).any(1).all()
            assert tensor.dtype == torch.bfloat16


def test_the_demo_says_the_same(tmp_path: Path):
    """Greedy, in fp32: the same tokens. The tokenizer and the rest come along."""
    grow(DEMO, tmp_path / "grown", 2e7)
    for file in DEMO.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "grown" / file.name).read_bytes() == file.read_bytes()
    texts = []
    for folder in (DEMO, tmp_path / "grown"):
        model = load_model(folder, dtype=torch.float32)
        model.setup_caches(1, 48)
        tokens = load_tokenizer(folder).encode("def read_lines(path):\n")
        start = 0
        while len(tokens) < 48:
            some = torch.tensor([tokens[start:]])
            start = len(tokens)
            positions = torch.arange(start - some.shape[1], start)[None]
            tokens.append(int(model(some, positions)[0, -1].argmax()))
        texts.append(tokens)
    assert texts[0] == texts[1]


def test_what_it_cannot_do_it_says(tmp_path: Path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists already"):
        grow(DEMO, tmp_path / "there")
    for parameters in (6e6, 1e13, float("nan"), float("inf")):
        with pytest.raises(UserError, match="out of range; the model has 6,557,440 already"):
            grow(DEMO, tmp_path / "grown", parameters)
    with pytest.raises(UserError, match="is too few, take more"):
        grow(DEMO, tmp_path / "grown", 6557440)
    with pytest.raises(UserError, match="nowhere is not there"):
        grow(tmp_path / "nowhere", tmp_path / "grown")
    for file in DEMO.iterdir():
        (tmp_path / "there" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"is quantized \(int8\); grow the original weights"):
        grow(quantize(tmp_path / "there", "int8"), tmp_path / "grown")
    weights = load_file(DEMO / "model.safetensors")
    weights["layers.3.feed_forward.w2.weight"][5, 7] = float("nan")
    save_file(weights, tmp_path / "there" / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.3\.feed_forward\.w2\.weight' holds NaN"):
        grow(tmp_path / "there", tmp_path / "grown", 3e7)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["there"]


def test_the_command(tmp_path: Path):
    script = Path(__file__).parent.parent / "scripts" / "grow_checkpoint.py"
    command = [sys.executable, script, "--out", tmp_path / "grown", "--parameters", "1e7"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0 and re.match(r"wrote .*: [\d.]+ M parameters \(\d+ layers, hidden size", first.stderr)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith("error: --out") and again.stderr.count("\n") == 1
