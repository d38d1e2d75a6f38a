"""The model against transformers: logits over a prompt, from the cache, in a ragged batch, and greedy tokens."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from attention import LOOKBACK, rope_angles, rope_frequencies
from checkpoint import load_model
from compiled import OPTIONS, kernels_together
from config import ModelConfig
from convert_hf_checkpoint import convert
from engine import cache_bytes
from errors import UserError
from model import Transformer

SIZES = dict(
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)


def llama(**fields):
    return transformers.LlamaConfig(**{**SIZES, **fields})


FAMILIES = {
    "llama": llama(),
    "llama-1-mha": llama(num_key_value_heads=4, rms_norm_eps=1e-6),
    "llama-tied": llama(tie_word_embeddings=True),
    "llama-biased": llama(attention_bias=True, mlp_bias=True),
    "llama-head-dim": llama(head_dim=24),
    "llama-3": llama(rope_parameters=dict(rope_type="default", rope_theta=500000.0)),
    "llama-3.1": llama(rope_parameters=dict(LLAMA3, rope_theta=500000.0)),
    "llama-linear": llama(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    "llama-dynamic": llama(
        rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0), max_position_embeddings=32
    ),
    "llama-yarn": llama(rope_parameters=dict(YARN, rope_theta=10000.0)),
    "llama-yarn-mscale": llama(
        rope_parameters=dict(YARN, rope_theta=1e6, mscale=1.0, mscale_all_dim=0.7, beta_fast=16.0, truncate=False)
    ),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=32),
    "mistral-window": transformers.MistralConfig(**SIZES, sliding_window=9),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-window": transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen2.5-yarn": transformers.Qwen2Config(**SIZES, rope_parameters=dict(YARN, rope_theta=1e6)),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=48),
    "qwen3-biased-window": transformers.Qwen3Config(
        **SIZES, head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
}


def randomize(model):
    """Weights large enough that a mistake shows in the logits; transformers starts norms at 1 and biases at 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 0.12, generator=generator)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def both(request, tmp_path_factory):
    """The same weights in transformers and here, the latter by way of the converter."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = transformers.AutoModelForCausalLM.from_config(FAMILIES[request.param], dtype=torch.float32).eval()
    randomize(reference)
    reference.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "ours")
    model = load_model(folder / "ours")
    model.setup_caches(max_batch_size=3, max_seq_length=128)
    return reference, model


@pytest.fixture
def pair(both):
    reference, _ = both
    with torch.no_grad():
        reference(prompt(4))  # transformers' dynamic RoPE remembers the longest length until a short one comes
    return both


def prompt(length, seed=0):
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def positions(rows, length, start=0):
    return torch.arange(start, start + length).expand(rows, -1)


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-4


@torch.no_grad()
def test_logits_of_a_prompt(pair):
    reference, model = pair
    tokens = prompt(50)
    assert_close(model(tokens, positions(1, 50)), reference(tokens).logits)


@torch.no_grad()
def test_logits_one_token_at_a_time(pair):
    """Past the trained length too, where dynamic RoPE turns the keys by what the length was when they came."""
    reference, model = pair
    tokens = prompt(50, seed=1)
    theirs = reference(tokens[:, :40], use_cache=True)
    assert_close(model(tokens[:, :40], positions(1, 40)), theirs.logits)
    for i in range(40, 50):
        theirs = reference(tokens[:, i : i + 1], past_key_values=theirs.past_key_values, use_cache=True)
        key_pos = model.key_pos[: i + 1]
        assert_close(model(tokens[:, i : i + 1], positions(1, 1, i), key_pos), theirs.logits)


@torch.no_grad()
def test_logits_of_a_ragged_batch(pair):
    """Three rows of different lengths prefilled together, then decoded together, each at its own position."""
    reference, model = pair
    # Dynamic RoPE turns a row by the length it has reached, and padding must not count: stay within the trained length.
    lengths = [5, 11, 20] if model.config.rope.type == "dynamic" else [5, 17, 30]
    rows = [prompt(length + 8, seed=length) for length in lengths]
    expected = [reference(row).logits for row in rows]
    padded = torch.zeros(3, max(lengths), dtype=torch.long)
    for i, length in enumerate(lengths):
        padded[i, :length] = rows[i][0, :length]
    logits = model(padded, positions(3, max(lengths)))
    for i, length in enumerate(lengths):
        assert_close(logits[i, :length], expected[i][0, :length])
    for step in range(8):
        at = torch.tensor([[length + step] for length in lengths])
        logits = model(torch.stack([rows[i][0, at[i]] for i in range(3)]), at)
        for i in range(3):
            assert_close(logits[i, 0], expected[i][0, at[i, 0]])


@torch.no_grad()
def test_greedy_tokens(pair):
    reference, model = pair
    tokens = prompt(12, seed=3)
    theirs = reference.generate(tokens, do_sample=False, max_new_tokens=64, min_new_tokens=64, pad_token_id=0)
    ours = [tokens]
    logits = model(tokens, positions(1, 12))
    for i in range(12, 76):
        logits[:, -1, 2] = -torch.inf  # min_new_tokens holds back the end token
        ours.append(logits[:, -1:].argmax(-1))
        logits = model(ours[-1], positions(1, 1, i))
    assert torch.cat(ours, dim=1).tolist() == theirs.tolist()


@torch.no_grad()
def test_rollback_is_a_smaller_position(pair):
    """What lies beyond a position is never seen: a continuation after a detour equals one without."""
    _, model = pair
    tokens = prompt(20, seed=4)
    straight = model(tokens, positions(1, 20))
    model(prompt(60, seed=5), positions(1, 60))
    model(tokens[:, :10], positions(1, 10))
    again = model(tokens[:, 10:], positions(1, 10, 10))
    if model.config.rope.type != "dynamic":
        assert_close(again, straight[:, 10:])


def test_old_and_new_spelling_of_rope_mean_the_same():
    base = {**SIZES, "model_type": "llama"}
    for scaling in (LLAMA3, YARN, dict(rope_type="linear", factor=2.0)):
        older = {"type" if name == "rope_type" else name: value for name, value in scaling.items()}
        old = ModelConfig.from_hf({**base, "rope_theta": 5e5, "rope_scaling": older})
        new = ModelConfig.from_hf({**base, "rope_parameters": {**scaling, "rope_theta": 5e5}})
        assert old == new and old.rope.theta == 5e5 and old.rope.type == scaling["rope_type"]


@pytest.mark.parametrize("name", ["llama-3.1", "llama-yarn", "llama-yarn-mscale", "llama-linear", "llama-dynamic"])
def test_rope_table(name):
    """cos and sin at far positions against transformers' own rotary module."""
    config = FAMILIES[name]
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    rope = ModelConfig.from_hf(json.loads(config.to_json_string(use_diff=False)) | {"architectures": None}).rope
    at = torch.tensor([[0, 1, 17, 100, 255]])
    theirs = rotary(torch.zeros(1), at)
    ours = rope_angles(rope, rope_frequencies(rope, 16), at)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[:, :, 0], b[..., :8], atol=1e-5, rtol=1e-5)


def valid(**fields):
    return {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], **fields}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(model_type="mamba"), "model_type"),
        (dict(model_type=None), "model_type"),
        (dict(architectures=["LlamaForSequenceClassification"]), "architectures"),
        (dict(hidden_act="quick_gelu"), "hidden_act"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), "short_factor"),
        (dict(rope_scaling=dict(rope_type="linear")), "factor"),
        (dict(rope_scaling=dict(rope_type="linear", factor=2.0, spiral=3)), "spiral"),
        (dict(rope_scaling="linear"), "rope_scaling"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (dict(num_local_experts=8), "num_local_experts"),
        (dict(hidden_size=None), "hidden_size"),
        (dict(hidden_size=0), "hidden_size"),
        (dict(hidden_size=-64), "hidden_size"),
        (dict(hidden_size=66), "hidden_size"),
        (dict(hidden_size=64.5), "hidden_size"),
        (dict(hidden_size="64"), "hidden_size"),
        (dict(hidden_size=True), "hidden_size"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers"),
        (dict(vocab_size=10**12), "vocab_size"),
        (dict(num_key_value_heads=3), "num_key_value_heads"),
        (dict(head_dim=15), "head_dim"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps"),
        (dict(rope_theta=float("inf")), "rope_theta"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
        (dict(model_type="qwen2", architectures=None, layer_types=["full_attention"]), "layer_types"),
        (dict(model_type="qwen2", architectures=None, layer_types=["linear_attention"] * 3), "layer_types"),
    ],
)
def test_refused_configs_name_the_field(fields, named):
    with pytest.raises(UserError, match=named):
        ModelConfig.from_hf(valid(**fields))


def test_a_layer_with_a_window_keeps_what_that_needs():
    config = replace(ModelConfig.from_hf(valid()), sliding_window=7, window_layers=(True, False, True))
    model = Transformer(config)
    for length, slots in ((512, 7 + LOOKBACK), (20, 20)):
        model.setup_caches(2, length)
        caches = [layer.attention.kv_cache for layer in model.layers]
        assert [cache.k.shape for cache in caches] == [(2, 2, count + 1, 16) for count in (slots, length, slots)]
        assert [cache.is_ring for cache in caches] == [slots < length, False, slots < length]
        assert cache_bytes(model, 2, length) == 2 * 2 * (2 * slots + length) * 2 * 16 * 4


@pytest.mark.slow
@torch.no_grad()
def test_compiled_equals_eager(compiler):
    """The compiled step of Qwen's windows, biases and norms of q and k, one row and two, at several cache lengths
    without a compilation for each."""
    torch.manual_seed(0)
    hf_config = json.loads(FAMILIES["qwen2-window"].to_json_string(use_diff=False)) | {"architectures": None}
    config = replace(ModelConfig.from_hf(hf_config), qk_norm="head")
    assert config.sliding_window and config.qkv_bias
    model = Transformer(config)
    randomize(model)
    model.requires_grad_(False)
    model.setup_caches(2, 128)
    step = torch.compile(
        lambda tokens, at, key_pos: model(tokens, at, key_pos), fullgraph=True, dynamic=False, options=OPTIONS
    )
    for rows in (1, 2):
        tokens = torch.cat([prompt(60, seed=row) for row in range(rows)])
        model(tokens, positions(rows, 60))
        for i, length in ((60, 64), (61, 80), (62, 96), (63, 128)):
            key_pos = model.key_pos[:length]
            torch._dynamo.maybe_mark_dynamic(key_pos, 0)
            inputs = tokens[:, i - 60 : i - 59], positions(rows, 1, i), key_pos
            with kernels_together():
                ours = step(*inputs)
            assert_close(ours, model(*inputs))
            if length == 80:
                before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
