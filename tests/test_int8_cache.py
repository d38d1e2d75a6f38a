"""--cache_dtype int8: what the cache then holds, and that all that is done with a cache is done with its scales."""

import json
import math
import sys

import hypothesis.strategies as st
import pytest
import torch
from conftest import GREEDY, assert_refused, ids_of, parse, run_rows
from hypothesis import given, settings
from test_process import finish, start

import attention
import errors
import eval as evaluate
from attention import KVCache, quantize_heads
from beam import BeamParams, beam_search
from checkpoint import DEMO, load_model
from engine import Engine, Request, cache_bytes
from prompt_cache import load_row, save_row

INT8 = torch.int8


def prompt(length, seed=0):
    return torch.randint(5, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=["base", "windowed"])
def folder(request, base_folder, windowed_folder):
    return base_folder if request.param == "base" else windowed_folder


def engine_of(path, rows=1, length=512, **others):
    engine = Engine(load_model(path, cache_dtype=INT8), **others)
    engine.setup(rows, length)
    return engine


# ---------------------------------------------------------------------------------------------------------------------
# What it holds


@settings(deadline=None)
@given(
    size=st.sampled_from([0.0, 1e-45, 1e-38, 1e-30, 1e-3, 1.0, 1e4, 1e30, 3.3e38]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    head_dim=st.integers(1, 130),
    kind=st.sampled_from(["normal", "one", "zeros among others"]),
    seed=st.integers(0, 2**31),
)
def test_a_number_is_off_by_half_a_scale_at_most(size, dtype, head_dim, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(2, 3, 4, head_dim, generator=generator) * 2 - 1) * size
    if kind == "one":
        x[..., 1:] = 0
    elif kind == "zeros among others":
        x[0, 1] = 0
    x = x.to(dtype)
    q, scale = quantize_heads(x)
    assert q.dtype == INT8 and q.shape == x.shape and scale.dtype == torch.float32 and scale.shape == x.shape[:-1]
    assert q.min() >= -127 and scale.isfinite().all()
    error = (x.double() - q.double() * scale.double()[..., None]).abs()
    assert (error <= scale.double()[..., None] * 0.50001 + 1e-36).all()
    largest = x.float().abs().amax(-1)
    assert (q.abs().amax(-1)[largest > 1e-35] == 127).all() and not scale[largest == 0].any()


def test_the_memory(folder, monkeypatch):
    """(head_dim + 4) / (2 head_dim) of a cache in bf16, and what `cache_bytes` says."""
    engine, other = engine_of(folder, 3), Engine(load_model(folder, dtype=torch.bfloat16))
    other.setup(3, 512)
    held, in_bf16 = (
        [sum(part[:, :, 1:].numel() * part.itemsize for part in layer.attention.kv_cache.parts) for layer in layers]
        for layers in (engine.model.layers, other.model.layers)
    )
    size = engine.model.config.head_dim
    assert sum(held) == cache_bytes(engine.model, 3, 512)
    assert sum(held) / sum(in_bf16) == (size + 4) / (2 * size)
    assert engine.model.layers[0].attention.kv_cache.k.dtype == INT8


@torch.no_grad()
def test_the_logits_are_those_of_a_float_cache_of_the_same_numbers(folder, monkeypatch):
    """In a prefill of chunks, in steps of some tokens and of one; windows come around several times."""
    model, reference = load_model(folder, cache_dtype=INT8), load_model(folder)
    for each in (model, reference):
        each.setup_caches(2, 512)
    tokens, update = torch.tensor([prompt(300, 1), prompt(300, 2)]), KVCache.update

    def rounded(self, input_pos, k, v, rows):
        if self.k_scale is None:
            k, v = (q * scale[..., None] for q, scale in map(quantize_heads, (k, v)))
        return update(self, input_pos, k, v, rows)

    monkeypatch.setattr(attention.KVCache, "update", rounded)
    begin, differences = 0, []
    for count in (100, 90, 12, 1, 1, 70, 3, 1):
        pos = torch.arange(begin, begin + count).expand(2, -1)
        ours, theirs = (each(tokens[:, pos[0]], pos, each.key_pos[:320]) for each in (model, reference))
        differences.append(((ours - theirs).abs().max() / theirs.std()).item())
        begin += count
    assert max(differences) < 0.01, differences


# ---------------------------------------------------------------------------------------------------------------------
# What is done with it


def test_rows_of_a_batch_are_what_they_are_alone(folder, tokenizer):
    """Ragged ones, some of one prompt, whose row is copied; then the same again, from what is in the cache."""
    shared = prompt(70, 5)
    prompts = [prompt(5), prompt(180, 1), shared, shared, prompt(33, 2), shared[:60] + prompt(9, 6)]
    requests = [Request(each, GREEDY, count) for each, count in zip(prompts, (40, 12, 30, 30, 3, 20), strict=True)]
    single, engine = engine_of(folder), engine_of(folder, 3)
    alone = []
    for request in requests:
        single.forget()
        alone += ids_of(run_rows(single, tokenizer, [request]))
    assert ids_of(run_rows(engine, tokenizer, requests)) == alone
    assert engine.stats.cached_tokens > 0
    again = [
        Request([*request.prompt, *tokens[:2]], GREEDY, 1) for request, tokens in zip(requests, alone, strict=True)
    ]
    engine.forget()
    run_rows(engine, tokenizer, [requests[1]])
    (found,) = run_rows(engine, tokenizer, [again[1]])
    assert found[0].id == alone[1][2] and found[-1].stats.cached_tokens >= 180


def test_speculation_gives_the_same_tokens(folder, tokenizer):
    """A draft with a cache of its own in int8, and what followed earlier in the text."""
    requests = [Request(prompt(40, seed) * 2, GREEDY, 60) for seed in range(2)]
    plain = ids_of(run_rows(engine_of(folder, 2), tokenizer, requests))
    drafted = engine_of(folder, 2, draft=load_model(folder, cache_dtype=INT8), speculate_k=3)
    assert ids_of(run_rows(drafted, tokenizer, requests)) == plain
    assert drafted.stats.accepted > 0.8 * drafted.stats.proposed > 0
    looked_up = engine_of(folder, 2, prompt_lookup=True, speculate_k=4)
    assert ids_of(run_rows(looked_up, tokenizer, requests)) == plain


@torch.no_grad()
def test_beams_score_as_their_texts_alone(folder):
    """A beam goes on in the row of another one, whose keys and values are copied."""
    request, model = Request(prompt(20), GREEDY, 12), load_model(folder, cache_dtype=INT8)
    model.setup_caches(1, 512)
    for found in beam_search(engine_of(folder, 3), request, BeamParams(3, 1.0, True, 3)):
        ids = torch.tensor([[*request.prompt, *found.tokens]])
        logprobs = model(ids, torch.arange(ids.shape[1])[None])[0, 19:-1].log_softmax(-1)
        assert len(found.tokens) == 12
        assert found.score == pytest.approx(logprobs.gather(1, ids[0, 20:, None]).mean().item(), abs=1e-3)


def test_a_prompt_cache_goes_on_in_the_next_run(folder, tokenizer, tmp_path):
    path, request = tmp_path / "cache", Request(prompt(150), GREEDY, 20)
    engine = engine_of(folder)
    (first,) = ids_of(run_rows(engine, tokenizer, [request]))
    save_row(engine, 0, path, ["a"])
    fresh = engine_of(folder)
    assert load_row(fresh, 0, path, ["a"]) == 169
    (row,) = run_rows(fresh, tokenizer, [Request([*request.prompt, *first[:10]], GREEDY, 10)])
    assert [token.id for token in row] == first[10:] and row[-1].stats.cached_tokens >= 150
    floats = Engine(load_model(folder))
    floats.setup(1, 512)
    with pytest.raises(errors.UserError, match=r"another dtype \(float32 with a cache in int8, here float32\)"):
        load_row(floats, 0, path, ["a"])
    run_rows(floats, tokenizer, [request])
    save_row(floats, 0, path, ["a"])
    with pytest.raises(errors.UserError, match=r"another dtype \(float32, here float32 with a cache in int8\)"):
        load_row(fresh, 0, path, ["a"])


# ---------------------------------------------------------------------------------------------------------------------
# The command lines


def test_a_process_with_compiled_steps(script, base_folder):
    args = ("--checkpoint_path", base_folder, "--prompt", "def f(x):", "--max_new_tokens", 40, "--cache_dtype", "int8")
    result = finish(start(*args, "--compile", "--json"))
    assert result.code == 0, result.err
    assert parse(result)[0]["tokens"] == parse(script(*args, "--json"))[0]["tokens"]


def test_other_dtypes_are_refused(script):
    assert_refused(script("--cache_dtype", "float16"), "--cache_dtype")


def test_the_perplexity_of_the_demo(tmp_path, monkeypatch, capsys):
    """Within 0.1 % at 1,000 tokens, and not the same."""
    text, found = tmp_path / "text", []
    text.write_text((DEMO.parent / "heldout.txt").read_text()[:20_000])
    for more in ([], ["--cache_dtype", "int8"]):
        command = ["eval.py", "--perplexity", str(text), "--max_seq_length", "1000", "--json", *more]
        monkeypatch.setattr(sys, "argv", command)
        evaluate.main()
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert 0 < abs(math.log(found[1] / found[0])) < 0.001
