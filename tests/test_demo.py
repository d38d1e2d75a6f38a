"""The demo checkpoint: its size, its shapes, its tokenizer, and the perplexity that demo/README.md states.

The weights are judged by transformers' Llama, under names mapped back from ours. scripts/train_demo.py, which made
them, is checked against transformers too.
"""

import json
import math
import re
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scripts import train_demo

DEMO = Path(__file__).parent.parent / "demo"
README = (DEMO / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sp() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "target" / "tokenizer.model"))


def load_in_transformers(folder: Path) -> LlamaForCausalLM:
    """The checkpoint in transformers' own Llama: our fused names split and renamed, and nothing left over."""
    config = LlamaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.replace("tok_embeddings", "model.embed_tokens").replace("attention_norm", "input_layernorm")
        name = name.replace("ffn_norm", "post_attention_layernorm").replace("feed_forward", "mlp")
        name = name.replace("attention.", "self_attn.").replace(".wo.", ".o_proj.").replace(".w2.", ".down_proj.")
        name = re.sub(r"^(layers|norm)\b", r"model.\1", name)
        if ".wqkv." in name:
            parts = dict(zip("qkv", tensor.split([queries, keys, keys]), strict=True))
            renamed |= {name.replace("wqkv", f"{part}_proj"): t for part, t in parts.items()}
        elif ".w13." in name:
            parts = dict(zip(("gate", "up"), tensor.chunk(2), strict=True))
            renamed |= {name.replace("w13", f"{part}_proj"): t for part, t in parts.items()}
        else:
            renamed[name] = tensor
    model = LlamaForCausalLM(config).float()  # bf16 weights, float32 arithmetic: the same on every machine
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embedding
    return model.eval()


def stated(row: str) -> dict[str, float]:
    """A row of the README's table of figures, `| row | target | draft |`."""
    target, draft = re.search(rf"^\| {row} \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE).groups()
    return {"target": float(target), "draft": float(draft)}


def test_the_whole_folder_is_small():
    assert sum(f.stat().st_size for f in DEMO.rglob("*") if f.is_file()) <= 25 * 2**20


@pytest.mark.parametrize("name", ["target", "draft"])
def test_shapes_divide_by_four_ranks_and_by_groups_of_32(name: str):
    config = json.loads((DEMO / name / "config.json").read_text())
    assert config["vocab_size"] == 4096 and config["max_position_embeddings"] >= 1024
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert config[field] % 4 == 0
    # The inputs of wqkv and w13 are whole on every rank, those of wo and w2 are split between ranks.
    assert config["hidden_size"] % 32 == 0
    assert config["num_attention_heads"] * config["head_dim"] // 4 % 32 == 0
    assert config["intermediate_size"] // 4 % 32 == 0
    total = sum(t.numel() for t in load_file(DEMO / name / "model.safetensors").values())
    assert total == stated("parameters")[name]


def test_both_have_the_same_tokenizer():
    assert (DEMO / "target/tokenizer.model").read_bytes() == (DEMO / "draft/tokenizer.model").read_bytes()


# U+2581 is sentencepiece's own mark for a space, so it comes back as one.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_the_tokenizer_round_trips_any_text(sp, text: str):
    assert sp.decode(sp.encode(text)) == text


@given(st.text(" \n\tdefx():=\"'#_1", max_size=60))
def test_the_tokenizer_round_trips_whitespace(sp, text: str):
    assert sp.decode(sp.encode(text)) == text


def test_transformers_reads_the_same_tokenizer(sp):
    hf = AutoTokenizer.from_pretrained(DEMO / "target")
    heldout = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    for text in (heldout[:20_000], " x", "x ", "\n\n  \n", "\tif é == '漢字🙂':\r\n", ""):
        assert hf(text).input_ids == [sp.bos_id(), *sp.encode(text)]
        assert hf.decode(sp.encode(text)) == text


def test_held_out_text_is_in_no_other_file():
    """No three lines in a row of the held-out files, short ones aside, are in the calibration text."""

    def triples(name: str) -> set[tuple[str, ...]]:
        lines = [line.strip() for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if len(line) > 15]
        return set(zip(lines, lines[1:], lines[2:], strict=False))

    heldout, calibration = triples("heldout.txt"), triples("calibration.txt")
    assert len(heldout) > 2000 and len(calibration) > 1500
    assert not heldout & calibration
    assert all(f"`{file}`" in README for file in train_demo.HELD_OUT)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_perplexity_is_what_the_readme_says(name: str, sp):
    """The first 4096 tokens of heldout.txt after bos, in windows of 1024, every token predicted once."""
    model = load_in_transformers(DEMO / name)
    ids = sp.encode((DEMO / "heldout.txt").read_text(encoding="utf-8"))[:4096]
    stream = torch.tensor([sp.bos_id(), *ids])
    with torch.no_grad():
        logits = model(stream[:-1].view(4, 1024)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream[1:]).item()
    assert math.exp(loss) == pytest.approx(stated(r"perplexity, first 4096 tokens")[name], rel=0.02)


# ---- the script that made it ----


def test_the_training_model_is_transformers_llama(tmp_path: Path):
    torch.manual_seed(0)
    model = train_demo.Llama(train_demo.SHARED | train_demo.TARGET).eval()
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16).float()
    train_demo.save_hf(model, tmp_path, DEMO / "target" / "tokenizer.model")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(train_demo.VOCAB_SIZE, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_corpus_keeps_held_out_files_apart():
    training, held_out = train_demo.read_corpus()
    assert sorted(held_out) == train_demo.HELD_OUT
    assert len(training) > 300 and not set(held_out) & set(training)
    assert not any(part in train_demo.SKIPPED_FOLDERS for name in training for part in name.split("/"))


@given(st.lists(st.integers(1025, 2000), min_size=2, max_size=6), st.integers(0, 2**32))
def test_an_epoch_is_whole_windows_of_the_documents(lengths: list[int], seed: int):
    total, first = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths))]
    documents = [list(range(f, f + n)) for f, n in zip(first, lengths, strict=True)]  # every token is unlike
    epoch = train_demo.windows(documents, train_demo.random.Random(seed))
    assert epoch.shape[1:] == (train_demo.CONTEXT + 1,)
    assert total - 2 * train_demo.CONTEXT <= len(epoch) * train_demo.CONTEXT <= total
    inputs = epoch[:, :-1].flatten().tolist()
    assert len(set(inputs)) == len(inputs)
