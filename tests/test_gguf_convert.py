"""From a GGUF file to text: what the converter makes of it, as a function and as a process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from conftest import assert_refused
from fake_hub import FakeHub
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from test_convert import error_line, run_script

import convert_hf_checkpoint
from checkpoint import load_model
from convert_hf_checkpoint import convert
from errors import UserError
from formats.gguf import open_gguf
from formats.hub import choose_gguf
from formats.names import Piece
from kernels.packing import dequantize as expand
from kernels.packing import unpack_nibbles

ROOT = Path(__file__).parent.parent
VOCABULARY = ROOT / "demo" / "target" / "tokenizer.model"
DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 256, 4, 2, 64, 512, 2
# As in files of the kind Q4_K_M, which mix: what is stored as what. The package writes no K-quants, so their blocks are
# random ones.
MIXED = {
    "token_embd": "Q8_0", "attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q4_0", "attn_output": "Q5_0",
    "ffn_gate": "Q4_K", "ffn_up": "Q4_K", "ffn_down": "Q6_K",
}  # fmt: skip
PARTS = {  # ours -> those of GGUF
    "attention.wqkv": ("attn_q", "attn_k", "attn_v"), "attention.wo": ("attn_output",),
    "feed_forward.w13": ("ffn_gate", "ffn_up"), "feed_forward.w2": ("ffn_down",),
}  # fmt: skip


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Bytes of a quantized matrix whose scales, float16 of about 1e-4, are finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(rows + columns)
    data = random.integers(0, 256, (rows * columns // block, size), np.uint8)
    scale = np.float16(1e-4).reshape(1).view(np.uint8)
    places = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for place in places:
        data[:, place : place + 2] = scale
    return data.reshape(rows, -1)


class Maker:
    """Writes a small Llama and remembers the floats that its tensors stand for, by their names in the file."""

    def __init__(self, kinds: dict[str, str], tied: bool = True):
        self.kinds, self.tied = kinds, tied
        self.floats: dict[str, torch.Tensor] = {}
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))
        self.vocab = len(self.processor)

    def add(self, writer: gguf.GGUFWriter, name: str, *shape: int) -> None:
        kind = self.kinds.get(re.sub(r"blk\.\d+\.", "", name), "F32") if len(shape) == 2 else "F32"
        seed = sum(name.encode())
        values = np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)
        if len(shape) == 1:
            values += 1
        kind = gguf.GGMLQuantizationType[kind]
        data = random_blocks(kind, *shape) if kind.name in ("Q4_K", "Q6_K") else quantize(values, kind)
        self.floats[name] = torch.from_numpy(np.array(dequantize(data, kind), np.float32))
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    def write(self, path: Path, shards: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"split_max_tensors": -(-(2 + LAYERS * 9) // shards)} if shards else {}
        writer = gguf.GGUFWriter(path, "llama", **options)
        writer.add_context_length(128)
        writer.add_embedding_length(DIM)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(FFN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(1e4)
        writer.add_tokenizer_model("llama")
        ids = range(self.vocab)
        kinds = [
            gguf.TokenType.BYTE if self.processor.is_byte(i)
            else gguf.TokenType.CONTROL if self.processor.is_control(i)
            else gguf.TokenType.UNKNOWN if self.processor.is_unknown(i)
            else gguf.TokenType.NORMAL
            for i in ids
        ]  # fmt: skip
        writer.add_token_list([self.processor.id_to_piece(i) for i in ids])
        writer.add_token_scores([self.processor.get_score(i) for i in ids])
        writer.add_token_types(kinds)
        for token in ("bos", "eos", "unk"):
            getattr(writer, f"add_{token}_token_id")(getattr(self.processor, f"{token}_id")())
        self.add(writer, "token_embd", self.vocab, DIM)
        self.add(writer, "output_norm", DIM)
        if not self.tied:
            self.add(writer, "output", self.vocab, DIM)
        for i in range(LAYERS):
            self.add(writer, f"blk.{i}.attn_norm", DIM)
            self.add(writer, f"blk.{i}.ffn_norm", DIM)
            self.add(writer, f"blk.{i}.attn_q", HEADS * HEAD_DIM, DIM)
            self.add(writer, f"blk.{i}.attn_k", KV_HEADS * HEAD_DIM, DIM)
            self.add(writer, f"blk.{i}.attn_v", KV_HEADS * HEAD_DIM, DIM)
            self.add(writer, f"blk.{i}.attn_output", DIM, HEADS * HEAD_DIM)
            self.add(writer, f"blk.{i}.ffn_gate", FFN, DIM)
            self.add(writer, f"blk.{i}.ffn_up", FFN, DIM)
            self.add(writer, f"blk.{i}.ffn_down", DIM, FFN)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def ours(self, layer: str) -> torch.Tensor:
        """What one of our layers has to hold: q and k of the file have the two halves of each head by turns."""
        number, part = re.fullmatch(r"layers\.(\d+)\.(.+)", layer).groups()
        rows = []
        for name in PARTS[part]:
            weight = self.floats[f"blk.{number}.{name}"]
            if name in ("attn_q", "attn_k"):
                weight = weight.view(-1, HEAD_DIM // 2, 2, DIM).transpose(1, 2).reshape(weight.shape)
            rows.append(weight)
        return torch.cat(rows)

    def transformers(self) -> transformers.LlamaForCausalLM:
        config = transformers.LlamaConfig(
            hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, vocab_size=self.vocab, max_position_embeddings=128, rms_norm_eps=1e-5,
            tie_word_embeddings=self.tied,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        named = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
        state = {f"{theirs}.weight": self.floats[name] for theirs, name in named.items()}
        state["lm_head.weight"] = self.floats["token_embd" if self.tied else "output"]
        for i in range(LAYERS):
            prefix = f"model.layers.{i}."
            q, k, v = self.ours(f"layers.{i}.attention.wqkv").split([HEADS * HEAD_DIM, *[KV_HEADS * HEAD_DIM] * 2])
            gate, up = self.ours(f"layers.{i}.feed_forward.w13").chunk(2)
            weights = {
                "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                "self_attn.o_proj": self.ours(f"layers.{i}.attention.wo"), "mlp.gate_proj": gate, "mlp.up_proj": up,
                "mlp.down_proj": self.ours(f"layers.{i}.feed_forward.w2"),
                "input_layernorm": self.floats[f"blk.{i}.attn_norm"],
                "post_attention_layernorm": self.floats[f"blk.{i}.ffn_norm"],
            }  # fmt: skip
            state |= {f"{prefix}{name}.weight": tensor for name, tensor in weights.items()}
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)


def stored_floats(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a converted checkpoint, by its layer, dequantized from what its metadata says."""
    from weights import read_safetensors

    path = folder / "model.safetensors"
    tensors, (_, metadata) = load_file(path), read_safetensors(path)
    forms = json.loads(metadata.get("quantized", "{}"))
    found = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        if layer in forms:
            scales, zeros = tensors[f"{layer}.scales"].float(), tensors.get(f"{layer}.zeros", torch.zeros(1)).float()
            if forms[layer].startswith("int4"):
                tensor = expand(unpack_nibbles(tensor, 2 * tensor.shape[1]).float(), scales, zeros, 32)
            else:
                tensor = tensor.float() * scales.repeat_interleave(32, 1)
        found[layer] = tensor
    return found


def test_a_mixture_keeps_its_values(tmp_path):
    """What has a form of ours keeps its bits, q and k in our order; the rest are floats, and the line says which."""
    maker = Maker(MIXED)
    said = convert(maker.write(tmp_path / "mixed.gguf"), tmp_path / "out")
    assert re.search(
        r" M parameters, int4-g32, int8-g32 \(gguf\) and bfloat16, .*; as floats now: tok_embeddings \(Q8_0\) [\d.]+ MB"
        r", feed_forward.w2 \(Q6_K\) [\d.]+ MB; try",
        said,
    ), said
    stored = stored_floats(tmp_path / "out")
    for i in range(LAYERS):
        for part in PARTS:
            expected, found = maker.ours(f"layers.{i}.{part}"), stored[f"layers.{i}.{part}"]
            if found.dtype == torch.bfloat16:
                assert part == "feed_forward.w2" and torch.equal(found, expected.bfloat16())
            else:
                assert (found - expected).abs().max() <= 1e-6 * expected.abs().max(), part
    assert torch.equal(stored["output"], maker.floats["token_embd"])  # tied, but it may stay quantized
    assert torch.equal(stored["tok_embeddings"], maker.floats["token_embd"].bfloat16())


@pytest.mark.parametrize("run", [1, 70_000, 150_000])
def test_heads_are_turned_in_runs_of_any_length(tmp_path, monkeypatch, run):
    """q and k, quantized and as floats, are not read as a whole; no run cuts a head of 64 rows."""
    path = Maker(MIXED).write(tmp_path / "mixed.gguf")
    for dtype in (None, torch.float32):
        with monkeypatch.context() as patched:
            for module in ("packed", "gguf"):
                patched.setattr(f"formats.{module}.CHUNK_BYTES", run)
            convert(path, tmp_path / f"runs-{dtype}", dtype)
        convert(path, tmp_path / f"whole-{dtype}", dtype)
        a, b = (load_file(tmp_path / f"{name}-{dtype}" / "model.safetensors") for name in ("runs", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    sizes = []
    tensor = open_gguf(path).tensors["blk.0.attn_q.weight"]
    piece = Piece(tensor, lambda rows: sizes.append(len(rows)) or rows, group=HEAD_DIM, form=tensor.form)
    monkeypatch.setattr("formats.gguf.CHUNK_BYTES", run)
    assert len(torch.cat(list(piece.read("weight")))) == HEADS * HEAD_DIM
    assert all(size % HEAD_DIM == 0 for size in sizes) and max(sizes) <= 3 * HEAD_DIM


@pytest.mark.parametrize("tied", [True, False])
def test_dtype_dequantizes_all(tmp_path, tied):
    maker = Maker(MIXED | {"output": "Q6_K"}, tied)
    path = maker.write(tmp_path / "mixed.gguf")
    assert " M parameters, float32, " in convert(path, tmp_path / "out", torch.float32)
    model = load_model(tmp_path / "out")
    model.setup_caches(1, 64)
    ids = torch.randint(0, maker.vocab, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = maker.transformers()(ids).logits
        assert (model(ids, torch.arange(40)[None]) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (model.output is None) == tied


def test_parts_of_different_kinds_become_floats(tmp_path):
    maker = Maker(MIXED | {"attn_v": "Q8_0"})
    said = convert(maker.write(tmp_path / "mixed.gguf"), tmp_path / "out")
    assert "attention.wqkv (Q4_0, Q8_0)" in said
    stored = stored_floats(tmp_path / "out")["layers.1.attention.wqkv"]
    assert torch.equal(stored, maker.ours("layers.1.attention.wqkv").bfloat16())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_stay(tmp_path, kind):
    names = ("token_embd", *(name for parts in PARTS.values() for name in parts))
    maker = Maker(dict.fromkeys(names, kind))
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]
    assert f" M parameters, {dtype}, " in convert(maker.write(tmp_path / "x.gguf"), tmp_path / "out")
    stored = stored_floats(tmp_path / "out")
    for part in PARTS:
        expected = maker.ours(f"layers.1.{part}")
        assert torch.equal(stored[f"layers.1.{part}"].float(), expected), part


def test_as_a_process_and_then_text(tmp_path):
    """One line, a folder with all files, and generate.py and quantize.py take it like any other."""
    maker = Maker(MIXED)
    maker.write(tmp_path / "mixed.gguf")
    done = run_script("--checkpoint_dir", "mixed.gguf", cwd=tmp_path)
    assert done.returncode == 0 and re.fullmatch(r"wrote checkpoints/local/mixed: [^\n]+\n", done.stderr), done.stderr
    out = tmp_path / "checkpoints" / "local" / "mixed"
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == files
    command = [sys.executable, ROOT / "generate.py", "--checkpoint_path", out, "--prompt", "def f(", "--json"]
    done = subprocess.run([*command, "--max_new_tokens", "5"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    again = run_script("--checkpoint_dir", "mixed.gguf", cwd=tmp_path)
    assert "(unchanged, so kept: model.safetensors)" in again.stderr
    command = [sys.executable, ROOT / "quantize.py", "--checkpoint_path", out, "--mode", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "quantized already (gguf)" in done.stderr


def test_folders_and_shards(tmp_path):
    maker = Maker(MIXED)
    folder = tmp_path / "in"
    maker.write(folder / "one.gguf")
    (folder / "mmproj-one.gguf").touch()
    expected = convert(folder, tmp_path / "out")
    maker.write(folder / "two.gguf", shards=3)
    assert len(list(folder.glob("two-0000?-of-00003.gguf"))) == 3
    with pytest.raises(UserError, match=r"several GGUF files \(one.gguf, two-00001-of-00003.gguf\); name one of them"):
        convert(folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"has no GGUF file 'three.gguf', but one.gguf, two-00001"):
        convert(folder, tmp_path / "out", file="three.gguf")
    with pytest.raises(UserError, match=r"--file three.gguf is for a folder, and .*one.gguf is a file"):
        convert(folder / "one.gguf", tmp_path / "out", file="three.gguf")
    for path in (folder, folder / "one.gguf"):
        with pytest.raises(UserError, match=f"{path} is not converted; run `python convert_hf_checkpoint.py"):
            load_model(path)
    said = convert(folder, tmp_path / "out", file="two-00002-of-00003.gguf")
    assert "unchanged, so kept" in said and said.split(" (unchanged")[0] == expected.split("; as floats")[0]
    (folder / "two-00003-of-00003.gguf").unlink()
    with pytest.raises(UserError, match=r"two-00003-of-00003.gguf is missing; .* one of 3 parts"):
        convert(folder, tmp_path / "out", file="two-00001-of-00003.gguf")


def test_a_folder_below(tmp_path):
    """The only GGUF file of a folder may lie in one below; other weights are looked for in the folder itself."""
    maker = Maker(MIXED)
    maker.write(tmp_path / "in" / "Q4" / "x.gguf")
    (tmp_path / "in" / "original").mkdir()
    (tmp_path / "in" / "original" / "consolidated.00.pth").touch()
    assert convert(tmp_path / "in", tmp_path / "out").startswith("wrote ")
    names = ["Q4/x.gguf", "original/consolidated.00.pth"]
    assert choose_gguf(names, "org/name", None) == ["Q4/x.gguf"]
    assert choose_gguf([*names, "model.safetensors", "config.json"], "org/name", None) is None
    assert choose_gguf([*names, "model.safetensors", "config.json"], "org/name", "Q4/x.gguf") == ["Q4/x.gguf"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no GGUF file 'x.safetensors'; leave --file out"):
        convert(tmp_path / "empty", tmp_path / "out", file="x.safetensors")


def test_files_by_other_names(tmp_path):
    """ollama's have a hash for a name, those in the hub's cache are links to such; a shard gives its model's name."""
    blob = Maker(MIXED).write(tmp_path / "cache" / "sha256-0123")
    (tmp_path / "name-Q4_0-00001-of-00001.gguf").symlink_to(blob)
    assert convert(blob, tmp_path / "out").startswith("wrote ")
    done = run_script("--checkpoint_dir", "name-Q4_0-00001-of-00001.gguf", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.startswith("wrote checkpoints/local/name-Q4_0: "), done.stderr
    done = run_script("--checkpoint_dir", blob, "--file", "other.gguf", cwd=tmp_path)
    assert "--file other.gguf is for a folder" in error_line(done)


def test_no_tokenizer(tmp_path, capsys, monkeypatch):
    """One warning, which names the file and not the folder that was made for it."""
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_model", lambda writer, name: None)
    path = Maker(MIXED).write(tmp_path / "x.gguf")
    convert(path, tmp_path / "out")
    said = capsys.readouterr().err
    assert said == f"warning: {path} has no tokenizer; put its files into the converted folder\n"


def test_without_the_package(tmp_path):
    path = Maker(MIXED).write(tmp_path / "x.gguf")
    (tmp_path / "gguf.py").write_text("raise ModuleNotFoundError(\"No module named 'gguf'\", name='gguf')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = run_script("--checkpoint_dir", path, "--out", tmp_path / "out", env=env)
    assert "GGUF files need 'gguf'; run `pip install -r requirements.txt`" in error_line(done)


def test_a_repo(tmp_path):
    """Only the named file is fetched, with its shards; offline the cache serves."""
    repo = tmp_path / "hub" / "org" / "name-GGUF"
    maker = Maker(MIXED)
    maker.write(repo / "name-Q4_K_M.gguf")
    maker.write(repo / "Q8_0" / "name-Q8_0.gguf", shards=2)
    (repo / "README.md").write_text("not needed")
    with FakeHub(tmp_path / "hub") as hub:
        env = os.environ | hub.env(tmp_path / "home")
        done = run_script("--repo", "org/name-GGUF", cwd=tmp_path, env=env)
        assert "(Q8_0/name-Q8_0-00001-of-00002.gguf, name-Q4_K_M.gguf); name one of them as --file" in error_line(done)
        assert hub.fetched() == [] and not (tmp_path / "checkpoints").exists()
        options = "--repo", "org/name-GGUF", "--file", "Q8_0/name-Q8_0-00001-of-00002.gguf"
        done = run_script(*options, cwd=tmp_path, env=env)
        assert done.returncode == 0 and "wrote checkpoints/org/name-GGUF: " in done.stderr, done.stderr
        assert sorted(hub.fetched()) == [f"name-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
        hub.requests.clear()
        done = run_script(*options, cwd=tmp_path, env=env | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0 and "unchanged, so kept" in done.stderr and hub.requests == []
        done = run_script(*options[:3], "name-Q4_K_M.gguf", cwd=tmp_path, env=env | {"HF_HUB_OFFLINE": "1"})
        assert "does not hold all of org/name-GGUF" in error_line(done)


@pytest.mark.parametrize("damage", ["cut", "magic", "version", "architecture", "nan"])
def test_damaged_files_leave_nothing(tmp_path, script, damage):
    path = Maker(MIXED).write(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "magic":
        data[:4] = b"GGML"
    elif damage == "version":
        data[4:8] = (99).to_bytes(4, "little")
    elif damage == "architecture":
        data = data.replace(b"llama", b"lamas")
    else:
        data[-210 * 100 - 2 : -210 * 100] = b"\xff\x7e"  # the scale of a block of Q6_K in the last tensor
    path.write_bytes(data)
    refused = script("--checkpoint_dir", path, "--out", tmp_path / "out", main=convert_hf_checkpoint.main)
    expected = {
        "cut": "ends at byte", "magic": "not a valid GGUF", "version": "version 99", "architecture": "'lamas' is not",
        "nan": "holds NaN",
    }  # fmt: skip
    assert_refused(refused, expected[damage])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.gguf"]
