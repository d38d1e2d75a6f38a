"""Speculative decoding gives the tokens of plain decoding, whatever proposes and whatever the settings are."""

import copy
import functools
import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import GREEDY, greedy, ids_of, nothing_compiles, run_rows, set_up
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.models import quantize_model
from checkpoint import load_model
from convert_hf_checkpoint import convert
from engine import Engine, Request
from errors import UserError
from model import Transformer
from sampling import SamplingParams
from speculate import AUTO, CATCH_UP, NGRAM, Pace, look_up


@functools.cache
def prompt(length, seed=0):
    return torch.randint(5, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def twin(model):
    """The same weights, caches of its own."""
    other = copy.deepcopy(model)
    other.setup_caches(1, 1)
    return other


@torch.no_grad()
def noisy(model, share):
    """A model that agrees often: its weights, with so much of others."""
    other, generator = twin(model), torch.Generator().manual_seed(5)
    for weight in other.parameters():
        weight += share * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


@torch.no_grad()
def random_draft(config, **changes):
    """A model that has nothing to do with any other."""
    draft = Transformer(replace(config, **changes)).requires_grad_(False).eval()
    for name, weight in draft.named_parameters():
        weight.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return draft


def padded(model, vocab_size):
    """A model whose embeddings have a few rows more, or less."""
    other = Transformer(replace(model.config, vocab_size=vocab_size)).requires_grad_(False).eval()
    weights = model.state_dict()
    for name, weight in other.state_dict().items():
        rows = min(len(weight), len(weights[name]))
        weight.zero_()
        weight[:rows] = weights[name][:rows]
    return other


@pytest.fixture(scope="module")
def drafts(engine):
    model = engine.model
    return {
        "copy": twin(model),
        "noisy": noisy(model, 0.1),
        "small": random_draft(model.config, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=48),
        "large vocabulary": padded(noisy(model, 0.05), 416),
        "small vocabulary": padded(noisy(model, 0.05), 390),
    }


@pytest.fixture(scope="module")
def speculating(engine, drafts):
    """An engine with the same model, as (who proposes, speculate_k)."""
    target = twin(engine.model)

    def make(proposer, k):
        lookup = proposer in ("lookup", "both")
        draft = {"lookup": None, "both": drafts["noisy"]}.get(proposer, drafts.get(proposer))
        return Engine(target, draft=draft, speculate_k=k, prompt_lookup=lookup)

    return make


def told(rows):
    return [[(token.id, token.text, token.finish_reason) for token in row] for row in rows]


# Texts of a few tokens, which repeat: proposals are right every now and then.
NARROW = SamplingParams(logit_bias=((20, 90.0), (21, 90.0), (22, 90.0)), seed=4)
ALL = SamplingParams(0.8, 40, 0.9, 0.01, 1.2, 0.5, -0.3, ((9, 2.0),), ((11,), (12, 13)), 3, seed=3)
PENALIZED = SamplingParams(0, 0, 1, 0, 1.3, 1.0, 0.5, bad_words=((20, 21), (21, 22, 20)), min_new_tokens=9)


@pytest.fixture(scope="module")
def wanted(engine, tokenizer):
    """Requests of all kinds, and what plain decoding tells of each."""
    requests = [
        Request(prompt(30), GREEDY, 25),
        Request(prompt(1, 1), SamplingParams(temperature=0.9, top_p=0.9, seed=1), 20),
        Request(prompt(200, 2), NARROW, 36),
        Request(prompt(30), ALL, 30),
        Request(prompt(30), SamplingParams(temperature=1.3, min_p=0.02, seed=2**50), 1),
        Request(prompt(50, 3), PENALIZED, 30),
        Request(prompt(7, 4), replace(NARROW, frequency_penalty=0.4, repetition_penalty=1.1, seed=9), 33),
        Request(prompt(9, 5), replace(NARROW, bad_words=((20, 20), (21, 22)), seed=10), 30),
        Request(prompt(30), GREEDY, 2),
    ]
    free = run_rows(set_up(engine, requests, 1), tokenizer, requests)
    requests.append(replace(requests[0], eos_ids=frozenset((free[0][12].id,))))
    requests.append(replace(requests[1], stop=("".join(token.text for token in free[1])[13:16],)))
    requests.append(replace(requests[5], eos_ids=frozenset(token.id for token in free[5][3:8])))
    return requests, told(run_rows(set_up(engine, requests, 1), tokenizer, requests))


# ---------------------------------------------------------------------------------------------------------------------
# The same tokens


@pytest.mark.parametrize(
    "proposer, k, batch_size",
    [
        *itertools.product(("noisy", "lookup"), (1, 4, 7, None), (3,)),
        *itertools.product(("both",), (4, None), (3,)),
        *itertools.product(("copy", "noisy", "lookup"), (4,), (1,)),
        *itertools.product(("small", "large vocabulary", "small vocabulary"), (4,), (3,)),
        ("copy", None, 3),
        ("small", 1, 3),
    ],
)
def test_tokens_are_those_of_plain_decoding(speculating, tokenizer, wanted, proposer, k, batch_size):
    requests, plain = wanted
    engine = set_up(speculating(proposer, k), requests, batch_size)
    if batch_size == 1:  # a part of them will do
        requests, plain = requests[2:6] + requests[-3:], plain[2:6] + plain[-3:]
    rows = run_rows(engine, tokenizer, requests)
    assert told(rows) == plain
    total, stats = engine.stats, [row[-1].stats for row in rows]
    for name in ("steps", "proposed", "accepted", "new_tokens"):
        assert getattr(total, name) == sum(getattr(each, name) for each in stats)
    assert 0 <= total.accepted <= total.proposed
    for row, each in zip(rows, stats, strict=True):
        assert len(row) == each.new_tokens
        # Of a text's last step some tokens may come after its end.
        assert 0 <= each.steps + each.accepted - (len(row) - 1) <= (k or max(AUTO["draft"] + AUTO["lookup"]))
        assert k is None or each.proposed == k * each.steps
    if k and proposer != "small":
        assert total.accepted > 0
    if proposer in ("copy", "noisy"):
        assert k is None or total.accepted > 0.3 * k


def test_plain_greedy_tokens_are_those_of_transformers(reference, speculating, tokenizer):
    """In the mode that has no sampling at all, to the last position of the cache."""
    requests = [Request(prompt(length), GREEDY, 90 - length) for length in (50, 60, 40, 89)]
    expected = [greedy(reference, request.prompt, request.max_new_tokens, eos_token_id=None) for request in requests]
    for proposer, k in (("noisy", 5), ("noisy", 7), ("lookup", 7), ("small", 5), ("small vocabulary", 5)):
        rows = run_rows(set_up(speculating(proposer, k), requests, 2, 90), tokenizer, requests)
        assert ids_of(rows) == expected


@pytest.mark.parametrize("sizes", [(400, 390), (390, 400)], ids=["smaller draft", "smaller target"])
def test_vocabularies_that_are_padded_differently(engine, tokenizer, sizes):
    """A prompt, a biased token, a conversation may have ids that the draft lacks."""
    model, draft = (padded(noisy(engine.model, share), size) for size, share in zip(sizes, (0, 0.05), strict=True))
    last = sizes[0] - 1
    params = SamplingParams(0.8, logit_bias=((last, 12.0), (20, 12.0)), seed=3)
    requests = [Request([last, 5, last, *prompt(9)], settings, 40) for settings in (GREEDY, params)]
    plain, speculating = Engine(model), Engine(model, draft=draft, speculate_k=4)
    expected = run_rows(set_up(plain, requests), tokenizer, requests)
    rows = run_rows(set_up(speculating, requests), tokenizer, requests)
    assert told(rows) == told(expected) and speculating.stats.accepted > 0
    ids = ids_of(rows)[1]
    assert ids.count(last) > 3
    text = requests[1].prompt + ids
    more = Request([*text, last], params, 20)
    after = []
    for runner in (plain, speculating):
        set_up(runner, requests, 1)
        run_rows(runner, tokenizer, [requests[1]])
        after.append(told(run_rows(runner, tokenizer, [more])))
    assert after[0] == after[1]


@pytest.mark.parametrize("proposer", ["copy", "noisy", "lookup"])
def test_sampled_tokens_to_the_end_of_the_cache(engine, speculating, tokenizer, proposer):
    requests = [Request(prompt(length), replace(NARROW, seed=length), 90 - length) for length in (50, 60, 40, 89)]
    expected = told(run_rows(set_up(engine, requests, 2, 90), tokenizer, requests))
    for k in (4, 7):
        assert told(run_rows(set_up(speculating(proposer, k), requests, 3, 90), tokenizer, requests)) == expected


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(0.9, top_k=50, seed=3)], ids=["greedy", "sampled"])
def test_all_proposals_of_the_model_itself_are_right(speculating, tokenizer, params):
    """So a text takes no more steps than it must."""
    for k in (1, 4, 7):
        engine = speculating("copy", k)
        requests = [Request(prompt(length), params, 1 + 6 * (k + 1)) for length in (5, 40)]
        run_rows(set_up(engine, requests), tokenizer, requests)
        assert (engine.stats.steps, engine.stats.proposed, engine.stats.accepted) == (2 * 6, 2 * 6 * k, 2 * 6 * k)
        assert engine.stats.report()["acceptance_rate"] == 1
        assert engine.stats.report()["mean_accepted_length"] == k


def test_a_text_ends_in_the_middle_of_what_was_accepted(engine, speculating, tokenizer):
    """At any token of a step: by an end token, a stop string, the number of tokens. The row's next text is right."""
    request = Request(prompt(12), GREEDY, 20)
    (free,) = run_rows(set_up(engine, [request]), tokenizer, [request])
    requests = []
    for i in range(1, 10):
        requests.append(replace(request, eos_ids=frozenset((free[i].id,))))
        requests.append(replace(request, max_new_tokens=i))
        requests.append(replace(request, stop=(free[i].text[-1:] + free[i + 1].text[:1] or "\0",)))
        requests.append(Request(prompt(i), GREEDY, 11))
    expected = told(run_rows(set_up(engine, requests, 1), tokenizer, requests))
    assert {row[-1][2] for row in expected} == {"stop", "length"}
    for batch_size in (1, 2):
        assert told(run_rows(set_up(speculating("copy", 7), requests, batch_size), tokenizer, requests)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode, draft_mode", [("int4", "int8"), ("int8", "int4")])
def test_quantized_models(engine, tokenizer, mode, draft_mode, dtype):
    """The kernels give a row the same numbers whatever the others are, so this is exact as well."""
    base = twin(engine.model).to(dtype)
    target, draft = (quantize_model(base, each, 32) for each in (mode, draft_mode))
    requests = [Request(prompt(20), GREEDY, 30), Request(prompt(5), SamplingParams(0.7, seed=2), 30)]
    expected = told(run_rows(set_up(Engine(target), requests), tokenizer, requests))
    for k in (2, 5):
        speculating = set_up(Engine(target, draft=draft, speculate_k=k), requests)
        assert told(run_rows(speculating, tokenizer, requests)) == expected
        assert speculating.stats.accepted > 10


@torch.inference_mode()
def test_logprobs_and_echo_are_those_of_plain_decoding(engine, speculating, tokenizer):
    requests = [Request(prompt(20), params, 15, echo=True) for params in (GREEDY, ALL, NARROW)]
    rows = run_rows(set_up(engine, requests, logprobs=2), tokenizer, requests)
    for proposer in ("noisy", "lookup"):
        ours = run_rows(set_up(speculating(proposer, 4), requests, logprobs=2), tokenizer, requests)
        assert told(ours) == told(rows)
        for mine, token in zip(itertools.chain(*ours), itertools.chain(*rows), strict=True):
            assert mine.of_prompt == token.of_prompt
            assert mine.logprob == pytest.approx(token.logprob, abs=1e-4)
            assert [i for i, _ in mine.top] == [i for i, _ in token.top]


def test_a_conversation_goes_on(engine, speculating, tokenizer):
    """From what the cache holds, where the text before has ended in the middle of a step."""
    requests = [Request(prompt(20), GREEDY, 9), Request(prompt(20), NARROW, 30)]
    for (proposer, k), first in itertools.product((("noisy", 4), ("noisy", 0), ("lookup", 4)), requests):
        expected, found = [], []
        for turns, runner in ((expected, engine), (found, speculating(proposer, k))):
            set_up(runner, requests, 1)
            turns.append(run_rows(runner, tokenizer, [first])[0])
            text = first.prompt + [token.id for token in turns[0]]
            more = Request([*text, *prompt(7, 9)], NARROW, 20)
            turns.append(run_rows(runner, tokenizer, [more])[0])
            assert turns[-1][-1].stats.cached_tokens == len(text) - 1
        assert told(found) == told(expected)
        if runner.draft is not None:
            ids = text + prompt(7, 9) + [token.id for token in found[1]]
            assert_cached(runner.draft, 0, torch.tensor(ids[:-CATCH_UP]))


@pytest.mark.parametrize("proposer", ["noisy", "lookup"])
def test_the_distribution_is_the_targets(tmp_path, tokenizer, proposer):
    """Of the second token with the first, and of the third with the second; the first is sampled by itself."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=8,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, weight in reference.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.25, generator=generator)
    reference.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    model = load_model(tmp_path / "ours")
    draft = None if proposer == "lookup" else noisy(model, 0.3)
    engine = Engine(model, draft=draft, speculate_k=2, prompt_lookup=proposer == "lookup")
    count, ids, params = 2500, [3, 5, 2, 3, 5], SamplingParams(1.4, 7, 0.95, 0.02, 1.1)
    requests = [Request(ids, replace(params, seed=seed), 3) for seed in range(count)]
    drawn = torch.tensor(ids_of(run_rows(set_up(engine, requests, 125, 8), tokenizer, requests)))
    assert 0.05 < engine.stats.accepted / engine.stats.proposed < 0.9

    warpers = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
            transformers.TemperatureLogitsWarper(params.temperature),
            transformers.TopKLogitsWarper(params.top_k),
            transformers.TopPLogitsWarper(params.top_p),
            transformers.MinPLogitsWarper(params.min_p),
        ]
    )

    @torch.no_grad()
    def after(texts):
        """Texts [N, S] -> the probabilities of the next token, float64 [N, 8]."""
        return warpers(texts, reference(texts).logits[:, -1].double()).softmax(-1)

    ids, vocab = torch.tensor([ids]), torch.arange(8)
    first = after(ids)[0]
    second = first[:, None] * after(torch.cat((ids.expand(8, -1), vocab[:, None]), 1))
    texts = torch.cat((ids.expand(64, -1), torch.cartesian_prod(vocab, vocab)), 1)
    third = (second[..., None] * after(texts).view(8, 8, 8)).sum(0)
    for a, b, expected in ((0, 1, second), (1, 2, third)):
        assert_distributed((drawn[:, a] * 8 + drawn[:, b]).bincount(minlength=64), count * expected.flatten())


def assert_distributed(counts, expected):
    """Pearson's chi-square, at about one in ten thousand; what can't come must not have come."""
    assert not counts[expected == 0].any()
    rare = (expected < 5) & (expected > 0)
    counts, expected = (
        torch.cat((part[expected >= 5], part[rare].sum()[None])).double() for part in (counts, expected)
    )
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert freedom > 10
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom) + 8


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def proposals(text, k):
    """Prompt lookup in plain Python: what follows the last place where most of the last tokens stand, repeated; and how
    many these are."""
    for n in range(min(NGRAM, len(text) - 1), -1, -1):
        for end in range(len(text) - 1, max(n, 1) - 1, -1):  # just behind the n tokens that are compared
            if text[end - n : end] == text[len(text) - n :]:
                return [text[end + i % (len(text) - end)] for i in range(k)], n
    raise ValueError(text)


@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=20), min_size=1, max_size=3),
    beyond=st.lists(st.integers(0, 3), max_size=5),
    k=st.integers(1, 9),
)
def test_look_up(texts, beyond, k):
    """In rows of different lengths, with anything behind their ends."""
    longest = max(map(len, texts)) + len(beyond)
    history = torch.tensor([(text + beyond + [0] * longest)[:longest] for text in texts])
    position = torch.tensor([[len(text) - 1] for text in texts])
    expected, alike = zip(*(proposals(text, k) for text in texts), strict=True)
    found = look_up(history, position, k)
    assert (found[0].tolist(), found[1][:, 0].tolist()) == ([*expected], [*alike])


def test_look_up_of_a_row_without_a_text():
    history = torch.zeros(2, 5, dtype=torch.long)
    assert look_up(history, torch.tensor([[0], [4]]), 3)[0].shape == (2, 3)


@pytest.mark.parametrize("steps", [1, 2, 5, 13, 14, 15, 16, 17, 28, 33])
def test_a_draft_that_was_not_asked_catches_up(speculating, drafts, steps):
    """Its keys and values are then those of a prefill of the text."""
    draft = drafts["noisy"]
    engine = speculating("noisy", 3)
    requests = [Request(prompt(length), NARROW, 1) for length in (1, 40)]
    set_up(engine, requests, 3)  # one row has no text
    for row, request in enumerate(requests):
        engine.start(row, request)
    for k in (3, *[0] * steps, 3, *[0] * (steps // 2), 3):
        position = engine.sampler.position.tolist()
        engine.step(k, 1400)
    for row in range(2):
        assert_cached(draft, row, engine.sampler.history[row, : position[row] + 1])


@torch.no_grad()
def assert_cached(model, row, text):
    """The row's cache holds what a prefill of the text leaves there."""
    other, length = twin(model), len(text)
    other.setup_caches(1, 1400)
    other.hidden(text[None], torch.arange(length)[None])
    for mine, theirs in zip(model.layers, other.layers, strict=True):
        for name in ("k", "v"):
            cache, expected = (getattr(layer.attention.kv_cache, name) for layer in (mine, theirs))
            torch.testing.assert_close(cache[row, :, :length], expected[0, :, :length], atol=1e-4, rtol=1e-4)


def test_dynamic_rope_is_refused(engine, drafts):
    """Several tokens at once turn by the length that the last of them reaches, in transformers as well."""
    config = engine.model.config
    model = Transformer(replace(config, rope=replace(config.rope, type="dynamic", original_length=64, factor=2.0)))
    Engine(model)
    for others in ({"draft": drafts["small"]}, {"prompt_lookup": True}):
        with pytest.raises(UserError, match="dynamic RoPE"):
            Engine(model, **others)


@pytest.mark.parametrize("rate", [0, 0.3, 0.6, 0.9, 1])
@pytest.mark.parametrize("dear", [0.02, 0.1, 0.5, 1.2])
def test_pace_tries_each_choice_and_takes_the_best(rate, dear):
    """It stays close to what the best choice alone would have given."""
    pace, tried, lucky = Pace((0, 2, 5)), [], random.Random(0)
    rights = [next((n for n in range(5) if lucky.random() >= rate), 5) for _ in range(1000)]
    for right in rights:
        tried.append(pace.choose())
        pace.saw(tried[-1], 1 + dear * tried[-1], [min(right, tried[-1])], tried[-1])
    assert tried[:3] == [0, 2, 5]

    def speed(chosen):
        tokens = sum(1 + min(right, k) for right, k in zip(rights, chosen, strict=True))
        return tokens / sum(1 + dear * k for k in chosen)

    assert speed(tried) > 0.94 * max(speed([k] * 1000) for k in pace.choices)


def test_pace_gives_a_draft_another_chance():
    pace, right = Pace((0, 4)), 0
    chosen = []
    for step in range(1000):
        right = 4 if step > 500 else 0  # the text has become easy
        k = pace.choose()
        chosen.append(k)
        pace.saw(k, 1 + 0.1 * k, [min(right, k)], k)
    assert chosen[100:500].count(0) > 350 and chosen[700:].count(4) > 290


def test_pace_of_prompt_lookup_sees_its_first_proposal_anyway():
    """Where no proposal is asked for, one is scored: it is free, and tells when to start again."""
    pace, chosen = Pace(AUTO["lookup"]), []
    for step in range(300):
        right = 99 if step > 150 else 0
        k = pace.choose()
        chosen.append(k)
        pace.saw(k, 1 + 0.05 * k, [min(right, max(k, 1))], max(k, 1))
    assert chosen[20:150] == [0] * 130 and chosen[200:] == [max(pace.choices)] * 100


def test_one_slow_step_does_not_change_the_pace():
    pace = Pace((0, 4))
    for _ in range(50):
        pace.saw(0, 1.0, [0], 0)
        pace.saw(4, 1.5, [4], 4)
    pace.saw(4, 100.0, [4], 4)
    assert pace.choose() == 4


def test_catch_up_reaches_far_enough():
    """The decode kernels take that many queries at most, as they do of the longest step."""
    assert max(AUTO["draft"] + AUTO["lookup"]) + 1 <= CATCH_UP == 16


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.slow
def test_compiled(engine, drafts, tokenizer, wanted, monkeypatch):
    """Nothing is compiled after warm_up, and the tokens are those of eager plain decoding."""
    requests, plain = wanted
    monkeypatch.setitem(AUTO, "draft", (0, 1))
    compiled = Engine(twin(engine.model), compile=True, draft=twin(drafts["noisy"]), prompt_lookup=True)
    set_up(compiled, requests, 2).warm_up()
    assert set(compiled.pace.seconds) == set(itertools.product((1, 2), (0, 1)))
    with nothing_compiles():
        assert told(run_rows(compiled, tokenizer, requests)) == plain
        turns = itertools.cycle(compiled.pace.choices)
        compiled.pace.choose = lambda rows: next(turns)
        assert told(run_rows(compiled, tokenizer, requests)) == plain
    assert compiled.stats.accepted > 0
