"""The demo checkpoint: its size, its shapes, its tokenizer, and the perplexity that demo/README.md states.

The weights are judged by transformers' Llama, under names mapped back from ours. demo/train.py, which made
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

from demo import corpus, train
from demo import model as demo_model

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
    assert all(f"`{file}`" in README for file in corpus.HELD_OUT)


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


@torch.no_grad()
def greedy(model: LlamaForCausalLM, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Appends so many tokens to [B, S], past any end token."""
    result = model(tokens, use_cache=True)
    for _ in range(count):
        tokens = torch.cat((tokens, result.logits[:, -1:].argmax(-1)), dim=1)
        result = model(tokens[:, -1:], past_key_values=result.past_key_values)
    return tokens


def test_the_draft_guesses_what_the_readme_says(sp):
    """On what the target itself writes: greedy continuations by 256 tokens of 20 prompts of 64 from heldout.txt."""
    ids = sp.encode((DEMO / "heldout.txt").read_text(encoding="utf-8"))
    starts = range(0, len(ids) - 64, (len(ids) - 64) // 19)
    tokens = torch.tensor([[sp.bos_id(), *ids[start : start + 63]] for start in starts])
    tokens = greedy(load_in_transformers(DEMO / "target"), tokens, 256)
    with torch.no_grad():
        same = load_in_transformers(DEMO / "draft")(tokens[:, :-1]).logits.argmax(-1) == tokens[:, 1:]
    same = same[:, 63:].tolist()
    accepted = {}
    for k in (4, 8):
        rounds = []
        for row in same:
            while row:  # a round: what is accepted, and a token of the target's own
                rounds.append([*row[:k], False].index(False))
                row = row[rounds[-1] + 1 :]
        accepted[k] = sum(rounds) / len(rounds)
    words = " ".join(README.split())
    agreement = re.search(r"on what the target itself writes at ([\d.]+) %", words)[1]
    of_4, of_8 = re.search(r"of 4 drafted tokens ([\d.]+) are accepted, of 8 ([\d.]+)", words).groups()
    assert 100 * sum(map(sum, same)) / (20 * 256) == pytest.approx(float(agreement), abs=1)
    assert (accepted[4], accepted[8]) == pytest.approx((float(of_4), float(of_8)), rel=0.02)


# ---- the script that made it ----


def test_what_the_target_writes_for_the_draft_is_greedy_text(sp):
    """Prompts of different lengths, in one batch; and the likeliest tokens with their log-probabilities."""
    reference = load_in_transformers(DEMO / "target")
    model = demo_model.Llama(demo_model.SHARED | demo_model.TARGET)
    model.load_state_dict({name: p for name, p in reference.state_dict().items() if name != "lm_head.weight"})
    prompts = [[1, *sp.encode(text)] for text in ("def read(", "class Queue:\n    def put(self, item):\n", "")]
    tokens, likeliest, logprobs = train.write(model, prompts, 48, torch.zeros(3, 1), "cpu")
    for row, prompt in zip(tokens, prompts, strict=True):
        assert torch.equal(greedy(reference, torch.tensor([prompt]), 48 - len(prompt))[0], row)
    with torch.no_grad():
        wanted = reference(tokens[:, :-1]).logits.log_softmax(-1).topk(train.LIKELIEST)
    torch.testing.assert_close(logprobs.float(), wanted.values, atol=1e-2, rtol=0)  # stored in float16
    assert (likeliest == wanted.indices).float().mean() > 0.99  # the same but for ties


def test_the_draft_loss_is_least_where_the_draft_is_the_target():
    """Half of it is the cross-entropy to the target's distribution, of which all but the likeliest count as one."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, 100, generator=generator, dtype=torch.float64) * 3
    logprobs, likeliest = target.log_softmax(-1).topk(16)
    p = torch.cat((logprobs.exp(), 1 - logprobs.exp().sum(-1, keepdim=True)), -1)
    entropy = -(p * p.log()).sum(-1)
    wanted = 0.5 * (entropy - logprobs[:, 0]).mean()
    loss = train.draft_loss(target, likeliest, logprobs)
    torch.testing.assert_close(loss, wanted)
    moved = target + 0.1 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    said = moved.log_softmax(-1)
    q = torch.cat((said.exp().gather(-1, likeliest), 1 - said.exp().gather(-1, likeliest).sum(-1, keepdim=True)), -1)
    wanted = 0.5 * (-(p * q.log()).sum(-1) - said.gather(-1, likeliest[:, :1])[:, 0]).mean()
    torch.testing.assert_close(train.draft_loss(moved, likeliest, logprobs), wanted)


def test_muon_is_that_of_torch():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 48), (48, 32), (32, 32))]
    references = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    ours = train.Muon(parameters, {"lr": 1e-2, "weight_decay": 0.05})
    theirs = torch.optim.Muon(references, lr=1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, reference in zip(parameters, references, strict=True):
            p.grad = torch.randn(p.shape)
            reference.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, reference in zip(parameters, references, strict=True):
        # Of three steps of 0.002 root mean square, theirs orthogonalized in bfloat16.
        torch.testing.assert_close(p, reference, atol=3e-4, rtol=0)


def test_the_clock_counts_no_interruptions(monkeypatch):
    now = 0.0
    monkeypatch.setattr(train.time, "monotonic", lambda: now)
    clock, counted = train.Clock(), []
    for seconds in (100.0, 1.0, 1.0, 1.5, 60.0, 1.0):
        now += seconds
        counted.append(clock.tick())
    assert counted[0] == 0 and counted[2:4] == [1.0, 1.5] and counted[4] <= 4.5 and counted[5] == 1.0


def test_the_training_model_is_transformers_llama(tmp_path: Path):
    torch.manual_seed(0)
    model = demo_model.Llama(demo_model.SHARED | demo_model.TARGET).eval()
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16).float()
    demo_model.save_hf(model, tmp_path, DEMO / "target" / "tokenizer.model")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(corpus.VOCAB_SIZE, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_corpus_keeps_held_out_files_apart():
    training, held_out = corpus.read_corpus()
    assert sorted(held_out) == corpus.HELD_OUT
    assert len(training) > 300 and not set(held_out) & set(training)
    assert not any(part in corpus.SKIPPED_FOLDERS for name in training for part in name.split("/"))


@given(st.lists(st.integers(1025, 2000), min_size=2, max_size=6), st.integers(0, 2**32))
def test_an_epoch_is_whole_windows_of_the_documents(lengths: list[int], seed: int):
    total, first = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths))]
    documents = [list(range(f, f + n)) for f, n in zip(first, lengths, strict=True)]  # every token is unlike
    epoch = corpus.windows(documents, corpus.random.Random(seed))
    assert epoch.shape[1:] == (corpus.CONTEXT + 1,)
    assert total - 2 * corpus.CONTEXT <= len(epoch) * corpus.CONTEXT <= total
    inputs = epoch[:, :-1].flatten().tolist()
    assert len(set(inputs)) == len(inputs)
