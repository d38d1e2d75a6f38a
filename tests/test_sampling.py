"""Sampling against transformers' logits processors, and the draws against the distribution they should have."""

import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from errors import UserError
from sampling import Sampler, SamplingParams, largest, logprobs

examples = settings(deadline=None, derandomize=True, max_examples=40)
NO_TEXT = torch.zeros(1, 1, dtype=torch.long)


def random_logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def their_penalties(scores, params, prompt, output, eos_ids):
    """What transformers' generate makes of one row's logits [V] before it samples; OpenAI's penalties between."""
    text = torch.tensor([[*prompt, *output]])
    chain = LogitsProcessorList()
    if params.logit_bias:
        chain.append(SequenceBiasLogitsProcessor({(token,): float(bias) for token, bias in params.logit_bias}))
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    scores = chain(text, scores[None].double())[0].tolist()
    # https://developers.openai.com/api/docs/guides/text-generation: mu[j] -> mu[j] - c[j] * alpha_frequency - ...
    for j in set(output):
        c = output.count(j)
        scores[j] = scores[j] - c * params.frequency_penalty - float(c > 0) * params.presence_penalty
    chain = LogitsProcessorList()
    words = [list(word) for word in params.bad_words]
    if any(word not in [[i] for i in eos_ids] for word in words):
        chain.append(NoBadWordsLogitsProcessor(words, list(eos_ids)))
    if params.min_new_tokens:
        chain.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_new_tokens, list(eos_ids)))
    return chain(text, torch.tensor([scores], dtype=torch.float64))[0]


def their_filters(scores, params):
    """What it draws from, of scores [N, V], in float64."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain(NO_TEXT.expand(len(scores), 1), scores.double()).softmax(-1)


def sampler_of(rows, vocab, prompts=None, eos_ids=(), length=64, room=(4, 4)):
    sampler = Sampler(len(rows), vocab, length, eos_ids, "cpu", bad_words=room)
    for row, params in enumerate(rows):
        sampler.set_row(row, params, prompts[row] if prompts else [0])
    return sampler


def put(sampler, row, prompt, output):
    """The row has written so much already."""
    for at, token in enumerate(output):
        sampler.history[row, len(prompt) + at] = token
        sampler.counts[row, token] += 1


def ours(scores, params):
    """What we draw from, of scores [N, V]."""
    return sampler_of([params] * len(scores), scores.shape[-1]).filtered(scores.float()[:, None]).softmax(-1)[:, 0]


def draw(logits, params, seeds, positions):
    """One token for each of the seeds and positions, all from the same logits [V]."""
    sampler = sampler_of([params], len(logits), room=(0, 0))
    tokens = []
    for seed in seeds.unique().tolist():
        at = positions[seeds == seed]
        sampler.set_row(0, SamplingParams(**{**vars(params), "seed": seed}), [0])
        at = at[:, None]
        drawn = sampler(logits.expand(len(at), 1, -1), 0 * at, at - 1, 0 * at[:, 0])
        tokens.append((seeds == seed, drawn[:, 0]))
    drawn = torch.empty_like(seeds)
    for where, what in tokens:
        drawn[where] = what
    return drawn


def greedy(logits, params):
    """The tokens after logits [N, V] by rows of the same params."""
    zeros = torch.zeros(len(logits), 1, dtype=torch.long)
    return sampler_of([params] * len(logits), logits.shape[-1])(logits[:, None], zeros, zeros)[:, 0]


def assert_distributed(counts, expected):
    """Pearson's chi-square, at about one in ten thousand; what can't come must not have come."""
    counts, expected = counts.double(), expected.double()
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    rare = expected < 5
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom) + 8


some_filters = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 400),
    top_p=st.floats(0.01, 1),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1)),
    seed=st.integers(0, 2**63 - 1),
)
TOKENS = st.integers(0, 11)  # few, so that words complete
some_params = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 5)),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.5)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.3, 3)),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=3).map(lambda bias: tuple(bias.items())),
    bad_words=st.lists(st.lists(TOKENS, min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
    min_new_tokens=st.integers(0, 5),
    seed=st.integers(0, 2**63 - 1),
)
some_rows = st.lists(
    st.tuples(some_params, st.lists(TOKENS, min_size=1, max_size=5), st.lists(TOKENS, max_size=6)),
    min_size=1,
    max_size=4,
)
some_eos = st.frozensets(TOKENS, min_size=1, max_size=2)


# ---------------------------------------------------------------------------------------------------------------------
# Penalties and bans


@examples
@given(some_rows, some_eos, st.integers(0, 1000), st.integers(1, 4))
def test_penalties_are_those_of_transformers_and_openai(rows, eos_ids, seed, S):
    """Rows of all kinds together, each after a prompt and an output, the last tokens of which may be drafts."""
    rows = [(params, prompt, [*output, 3, 1, 4, 1][: max(len(output), S)]) for params, prompt, output in rows]
    sampler = sampler_of([params for params, _, _ in rows], 12, [prompt for _, prompt, _ in rows], eos_ids)
    logits = random_logits(len(rows), S, 12, seed=seed)
    tokens, input_pos = [], []
    for row, (_, prompt, output) in enumerate(rows):
        text, counted = prompt + output, len(output) - (S - 1)
        put(sampler, row, prompt, output)
        for token in output[counted:]:
            sampler.counts[row, token] -= 1
        tokens.append(text[len(text) - S :])
        input_pos.append(range(len(text) - S, len(text)))
    tokens, input_pos = torch.tensor(tokens), torch.tensor([list(at) for at in input_pos])
    scores = sampler.penalize(logits, tokens, input_pos)
    assert scores.dtype == torch.float32
    for row, (params, prompt, output) in enumerate(rows):
        for j in range(S):
            before = output[: len(output) - (S - 1) + j]
            expected = their_penalties(logits[row, j], params, prompt, before, eos_ids)
            torch.testing.assert_close(scores[row, j].double(), expected, atol=1e-4, rtol=1e-5)
    # Greedy rows, and a subset of the rows in another order.
    drawn = sampler(logits, tokens, input_pos)
    for row, (params, _, _) in enumerate(rows):
        if params.temperature == 0:
            impossible = scores[row].isneginf().all(-1)
            assert drawn[row].equal(torch.where(impossible, -1, scores[row].argmax(-1)))
    order = torch.arange(len(rows)).flip(0)
    assert sampler(logits.flip(0), tokens.flip(0), input_pos.flip(0), order).equal(drawn.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_penalized_and_sampled_in_float32(dtype):
    logits = random_logits(4, 1000).to(dtype)
    params = SamplingParams(0.8, 50, min_p=0.02, repetition_penalty=1.3, logit_bias=((7, 0.1),))
    sampler = sampler_of([params] * 4, 1000, [[1, 2, 3]] * 4)
    scores = sampler.penalize(logits[:, None], torch.full((4, 1), 3), torch.full((4, 1), 2))
    assert scores.dtype == torch.float32
    expected = torch.stack([their_penalties(row.float(), params, [1, 2, 3], [], ()) for row in logits])
    torch.testing.assert_close(scores[:, 0].double(), expected, atol=1e-6, rtol=1e-6)
    probs = sampler.filtered(scores).softmax(-1)[:, 0]
    torch.testing.assert_close(probs.double(), their_filters(expected, params), atol=2e-6, rtol=1e-4)


def generate(params, logits, prompt, steps, eos_ids=(), room=(4, 4)):
    """Tokens from the same logits [V] at every step."""
    sampler = sampler_of([params], len(logits), [prompt], eos_ids, room=room)
    output, last = [], prompt[-1]
    for at in range(len(prompt) - 1, len(prompt) - 1 + steps):
        drawn = sampler(logits[None, None], torch.tensor([[last]]), torch.tensor([[at]]))
        sampler.count(drawn, torch.ones(1, dtype=torch.long))
        last = drawn.item()
        sampler.history[0, at + 1] = last
        output.append(last)
    return output


def test_bad_words_end_where_they_would_be_completed():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    only = functools.partial(generate, logits=logits, steps=4)
    assert only(SamplingParams(0), prompt=[0]) == [3, 3, 3, 3]
    assert only(SamplingParams(0, bad_words=((3,),)), prompt=[0]) == [2, 2, 2, 2]
    assert only(SamplingParams(0, bad_words=((3, 3),)), prompt=[0]) == [3, 2, 3, 2]
    # The word began in the prompt; the prompt is shorter than the word; the word is as long as there is room for.
    assert only(SamplingParams(0, bad_words=((1, 2, 3),)), prompt=[1, 2]) == [2, 3, 3, 3]
    assert only(SamplingParams(0, bad_words=((3, 3, 3),)), prompt=[3]) == [3, 2, 3, 3]
    assert only(SamplingParams(0, bad_words=((3, 3, 3, 3), (2, 3))), prompt=[0]) == [3, 3, 3, 2]
    assert only(SamplingParams(0, bad_words=((3,), (2,))), prompt=[0], room=(2, 1)) == [1, 1, 1, 1]


def test_no_end_token_before_min_new_tokens():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    for fewest in range(4):
        params = SamplingParams(0, min_new_tokens=fewest, bad_words=((3,),))  # an end token can't be banned for good
        assert generate(params, logits, [0, 1], 4, eos_ids={3}) == [2] * fewest + [3] * (4 - fewest)
    assert generate(SamplingParams(0, min_new_tokens=2**31 - 1), logits, [0], 2, eos_ids={3, 2}) == [1, 1]


def test_counts_of_the_first_so_many_are_added():
    sampler = sampler_of([SamplingParams()] * 3, 5)
    tokens = torch.tensor([[1, 1, 2], [3, -1, 3], [4, 4, 4]])
    sampler.count(tokens, torch.tensor([3, 3, 1]))
    expected = [[0, 2, 1, 0, 0], [0, 0, 0, 2, 0], [0, 0, 0, 0, 1]]
    assert sampler.counts.tolist() == expected
    sampler.count(tokens, torch.tensor([0, 0, 0]))
    assert sampler.counts.tolist() == expected


def test_a_new_row_knows_nothing_of_the_last():
    wild = SamplingParams(0.5, 3, 0.5, 0.2, 1.5, 1, 1, ((1, 5.0),), ((2,), (1, 3)), 9, 77)
    used, fresh = (sampler_of([wild if i == 0 else SamplingParams()], 12, [[1, 2, 3]], {4}) for i in range(2))
    put(used, 0, [1, 2, 3], [5, 6])
    for sampler in (used, fresh):
        sampler.set_row(0, SamplingParams(seed=3), [7, 8, 9])
    logits, at = random_logits(1, 1, 12), torch.tensor([[2]])
    for sampler in (used, fresh):
        assert sampler.penalize(logits, torch.tensor([[9]]), at).equal(logits)
    assert used(logits, torch.tensor([[9]]), at).equal(fresh(logits, torch.tensor([[9]]), at))


# ---------------------------------------------------------------------------------------------------------------------
# Filters


@examples
@given(some_filters, st.integers(1, 300), st.integers(0, 1000))
def test_filters_are_those_of_transformers(params, vocab, seed):
    logits = random_logits(2, vocab, seed=seed)
    expected = their_filters(logits, params)
    # Where a cut falls so close to a token that float32 can't tell the sides, either answer is right.
    before_top_p = their_filters(logits, SamplingParams(params.temperature, params.top_k)).sort(descending=True).values
    assume(((before_top_p.cumsum(-1) - before_top_p - params.top_p).abs() > 1e-5).all() or params.top_p == 1)
    ratio = before_top_p / before_top_p[:, :1]
    assume((ratio / max(params.min_p, 1e-9) - 1).abs().min() > 1e-5 or params.min_p == 1)
    torch.testing.assert_close(ours(logits, params).double(), expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=1),
        SamplingParams(top_k=40),
        SamplingParams(top_k=10**9),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=1e-6),
        SamplingParams(min_p=0.05),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=0.6, top_k=20, top_p=0.95, min_p=0.01),
        SamplingParams(temperature=2, top_k=5, top_p=1, min_p=0),  # whole numbers, as JSON has them
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [1, 7, 32000])
def test_common_settings(params, vocab):
    logits = random_logits(3, vocab)
    torch.testing.assert_close(ours(logits, params).double(), their_filters(logits, params), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("top_k, top_p", [(10, 1.0), (0, 0.7), (25, 0.5)])
def test_ties(top_k, top_p):
    """bfloat16 logits tie often. Top-k keeps those that tie with the last as transformers does; top-p keeps them too,
    where transformers takes whichever its sort put first."""
    params = SamplingParams(top_k=top_k, top_p=top_p)
    logits = random_logits(8, 200).round()
    probs, reference = ours(logits, params), their_filters(logits, params)
    for row in range(8):
        last = logits[row][reference[row] > 0].min()
        assert ((probs[row] > 0) == (logits[row] >= last)).all()
    if top_p == 1:
        torch.testing.assert_close(probs.double(), reference, atol=1e-6, rtol=1e-5)


def test_impossible_tokens_stay_impossible():
    """Logits of -inf, as masks make them."""
    logits = random_logits(4, 50).index_fill(1, torch.arange(0, 50, 3), -math.inf)
    for params in (
        SamplingParams(),
        SamplingParams(top_k=45),
        SamplingParams(top_p=0.999),
        SamplingParams(min_p=0.001),
    ):
        torch.testing.assert_close(ours(logits, params).double(), their_filters(logits, params), atol=2e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Draws


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=30),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.5, min_p=0.1),
    ],
    ids=str,
)
def test_draws_follow_the_probabilities(params):
    """Over positions of one seed, over seeds at one position, and over both."""
    count = 4000
    logits = random_logits(1, 60, scale=1.5)[0]
    expected = their_filters(logits[None], params)[0]
    at = torch.arange(count)
    for seed in (1234, 2**63 - 1):
        tokens = draw(logits, params, torch.full((count,), seed), at)
        assert_distributed(tokens.bincount(minlength=60), count * expected)
    for shift in (0, 40):
        seeds = torch.arange(2000) << shift
        many = [SamplingParams(**{**vars(params), "seed": seed}) for seed in seeds.tolist()]
        sampler, where = sampler_of(many, 60, room=(0, 0)), torch.full((2000, 1), 17)
        tokens = torch.cat([sampler(logits.expand(2000, 1, -1), where, where + 1000 * i) for i in range(2)])[:, 0]
        assert_distributed(tokens.bincount(minlength=60), 4000 * expected)


def test_draws_from_a_large_vocabulary():
    """A rare token must not win more or less often than it should: 24 random bits would not do for so many."""
    vocab, count = 150_000, 500
    logits = torch.zeros(vocab)
    logits[: vocab // 2] = -3.0
    logits[-1] = math.log(vocab)  # about 2/3 of all
    p = logits.double().softmax(-1)
    sampler = sampler_of([SamplingParams(seed=5)], vocab)
    tokens = torch.cat([(logits.exp() / sampler.times(at[None])[0]).argmax(-1) for at in torch.arange(count).split(50)])
    groups = [
        (tokens < vocab // 2).sum(),
        ((tokens >= vocab // 2) & (tokens < vocab - 1)).sum(),
        (tokens == vocab - 1).sum(),
    ]
    assert_distributed(
        torch.stack(groups), count * torch.stack((p[: vocab // 2].sum(), p[vocab // 2 : -1].sum(), p[-1]))
    )
    middle = tokens[(tokens >= vocab // 2) & (tokens < vocab - 1)]
    sixteenths = ((middle - vocab // 2) * 16 // (vocab // 2)).bincount(minlength=16)
    assert_distributed(sixteenths, torch.full((16,), len(middle) / 16))


def test_the_clocks_are_exponential_and_independent():
    """Of all tokens, positions and seeds; the smallest of many as well, for they are what wins."""
    sampler = sampler_of([SamplingParams(seed=seed) for seed in (0, 1, 2, 3, 2**32, 2**33, 2**62, 2**63 - 1)], 2000)
    times = sampler.times(torch.arange(20).expand(8, 20)).double()  # [8, 20, 2000]
    assert times.min() > 0 and times.max() < math.inf
    uniform = -torch.expm1(-times)
    n = uniform.numel()
    assert_distributed((uniform * 256).long().flatten().bincount(minlength=256), torch.full((256,), n / 256))
    low = (uniform * 2**16 * 256).long().flatten() % 256
    assert_distributed(low.bincount(minlength=256), torch.full((256,), n / 256))
    smallest = -torch.expm1(-2000 * times.amin(-1)).flatten()  # exponential with 2000 times the rate
    assert_distributed((smallest * 16).long().bincount(minlength=16), torch.full((16,), len(smallest) / 16))
    correlation = torch.corrcoef(uniform.flatten(0, 1)).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(2000)
    correlation = torch.corrcoef(uniform.flatten(0, 1).T[:300]).fill_diagonal_(0)
    assert correlation.abs().max() < 5.8 / math.sqrt(160)
    for dim, lag in ((0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (2, 1024)):
        a, b = (uniform.narrow(dim, start, uniform.shape[dim] - lag).flatten() for start in (0, lag))
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 4.5 / math.sqrt(len(a))


@examples
@given(st.integers(1, 50), st.integers(0, 10_000), st.data())
def test_a_token_of_probability_zero_is_never_drawn(vocab, seed, data):
    logits = random_logits(vocab, seed=seed, scale=8.0)
    possible = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=vocab))
    masked = torch.full_like(logits, -math.inf)
    masked[possible] = logits[possible]
    params = SamplingParams(top_p=data.draw(st.floats(0.1, 1)))
    tokens = draw(masked, params, torch.full((64,), seed), torch.arange(64))
    assert (ours(masked[None], params)[0, tokens] > 0).all()


def test_greedy_is_the_argmax():
    logits = random_logits(64, 500)
    logits[:, 7] = logits[:, 400] = logits.amax(-1)  # ties: the first
    params = [SamplingParams(temperature=0, top_k=i, top_p=0.5, min_p=0.1, seed=i) for i in range(64)]
    zeros = torch.zeros(64, 1, dtype=torch.long)
    assert sampler_of(params, 500)(logits[:, None], zeros, zeros)[:, 0].equal(logits.argmax(-1))
    plain = Sampler(64, 500, 8, (), "cpu", plain=True)
    assert plain(logits[:, None], zeros, zeros)[:, 0].equal(logits.argmax(-1))
    logits = random_logits(64, 500, seed=1)
    assert greedy(logits, SamplingParams(top_k=1)).equal(logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-39, 1e-38, 1e-30, 1e-4])
def test_the_lower_the_temperature_the_greedier(temperature):
    logits = random_logits(64, 500)
    assert greedy(logits, SamplingParams(temperature=temperature)).equal(logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
def test_the_higher_the_temperature_the_flatter(temperature):
    probs = ours(random_logits(2, 100), SamplingParams(temperature=temperature))
    torch.testing.assert_close(probs, torch.full((2, 100), 0.01), atol=1e-4, rtol=0)
    masked = random_logits(2, 100).index_fill(1, torch.arange(50), -math.inf)
    assert not ours(masked, SamplingParams(temperature=temperature))[:, :50].any()


def test_the_same_seed_and_position_give_the_same_token():
    logits = random_logits(1000, scale=1.0)
    seeds, positions = torch.arange(50) * 977, torch.arange(50)
    first = draw(logits, SamplingParams(), seeds, positions)
    assert first.equal(draw(logits, SamplingParams(), seeds, positions))
    assert (first != draw(logits, SamplingParams(), seeds + 1, positions)).sum() > 40
    assert (first != draw(logits, SamplingParams(), seeds, positions + 1)).sum() > 40


@examples
@given(some_rows, some_eos, st.integers(0, 1000))
def test_a_mixed_batch_is_each_row_alone(rows, eos_ids, seed):
    logits = random_logits(len(rows), 2, 12, seed=seed)
    batch = sampler_of([params for params, _, _ in rows], 12, [prompt for _, prompt, _ in rows], eos_ids)
    tokens, input_pos = [], []
    for row, (_, prompt, output) in enumerate(rows):
        put(batch, row, prompt, output)
        batch.history[row, len(prompt + output)] = 5  # a draft
        tokens.append([(prompt + output)[-1], 5])
        input_pos.append([len(prompt + output) - 1, len(prompt + output)])
    tokens, input_pos = torch.tensor(tokens), torch.tensor(input_pos)
    drawn = batch(logits, tokens, input_pos)
    assert drawn.shape == tokens.shape and drawn.dtype == torch.int64
    for row, (params, prompt, output) in enumerate(rows):
        alone = sampler_of([params], 12, [prompt], eos_ids)
        put(alone, 0, prompt, output)
        alone.history[0, len(prompt + output)] = 5
        one = slice(row, row + 1)
        assert alone(logits[one], tokens[one], input_pos[one]).equal(drawn[one])
        # With a draft after it is as without, and the step after that draft.
        assert alone(logits[one, :1], tokens[one, :1], input_pos[one, :1]).equal(drawn[one, :1])
        put(alone, 0, prompt + output, [5])
        assert alone(logits[one, 1:], tokens[one, 1:], input_pos[one, 1:]).equal(drawn[one, 1:])


@pytest.mark.parametrize("params", [SamplingParams(0), SamplingParams(), SamplingParams(0, min_new_tokens=1)], ids=str)
def test_no_possible_token_is_minus_one(params):
    sampler = Sampler(1, 9, 8, (3,), "cpu", plain=params.plain)
    sampler.set_row(0, params, [0])
    logits = random_logits(1, 4, 9)
    logits[0, 0] = -math.inf
    logits[0, 1, 5] = math.nan
    logits[0, 2] = math.nan
    zeros = torch.zeros(1, 4, dtype=torch.long)
    drawn = sampler(logits, zeros, zeros)[0].tolist()
    assert drawn[:3] == [-1, -1, -1] and drawn[3] >= 0


def test_plain_rows_need_no_more_than_a_history():
    sampler = Sampler(2, 100, 8, (3,), "cpu", plain=True)
    sampler.set_row(1, SamplingParams(temperature=0, seed=5), [7, 8])
    assert sampler.history[1, :2].tolist() == [7, 8]
    assert max(buffer.numel() for buffer in sampler.buffers()) == 2 * 9
    sampler.count(torch.tensor([[1], [2]]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="plain"):
        sampler.set_row(0, SamplingParams(), [1])


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities, and what the user may say


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_models_own(dtype):
    logits = random_logits(2, 3, 500).to(dtype)
    tokens = torch.randint(500, (2, 3), generator=torch.Generator().manual_seed(1))
    chosen, top, ids = logprobs(logits, tokens, 5)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), expected.gather(-1, tokens[..., None])[..., 0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(top.double(), expected.topk(5).values, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(top.double(), expected.gather(-1, ids), atol=1e-5, rtol=1e-6)
    assert chosen.dtype == top.dtype == torch.float32 and logprobs(logits, tokens, 0)[1].shape == (2, 3, 0)


@settings(max_examples=100, deadline=None)
@given(V=st.integers(20, 1500), k=st.integers(0, 20), seed=st.integers(0, 9999), block=st.sampled_from([1, 7, 256]))
def test_the_largest_are_those_of_topk(V, k, seed, block):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-50, 50, (2, 3, V), generator=generator).float()  # many are equal
    values, ids = largest(x, k, block)
    assert torch.equal(values, x.topk(k).values) and torch.equal(x.gather(-1, ids), values)
    assert all(len(set(row)) == k for row in ids.flatten(0, 1).tolist())


@settings(max_examples=100, deadline=None)
@given(V=st.integers(1, 40), k=st.integers(0, 50), seed=st.integers(0, 9999), block=st.sampled_from([1, 7, 256]))
def test_more_logprobs_than_tokens(V, k, seed, block):
    """All tokens once, the impossible ones too, and the chosen one's own value; JSON has no infinity."""
    logits = random_logits(2, 3, V, seed=seed)
    logits[torch.rand(2, 3, V, generator=torch.Generator().manual_seed(seed)) < 0.4] = -math.inf
    logits[..., seed % V] = 1.0  # one is possible
    values, ids = largest(logits, k, block)
    assert values.equal(logits.topk(min(k, V)).values) and values.equal(logits.gather(-1, ids))
    assert all(len(set(row)) == min(k, V) for row in ids.flatten(0, 1).tolist())
    tokens = torch.randint(V, (2, 3), generator=torch.Generator().manual_seed(seed))
    chosen, top, ids = logprobs(logits, tokens, k)
    lowest = torch.finfo(torch.float32).min
    expected = logits.double().log_softmax(-1).clamp(min=lowest)
    torch.testing.assert_close(chosen.double(), expected.gather(-1, tokens[..., None])[..., 0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(top.double(), expected.gather(-1, ids), atol=1e-5, rtol=1e-6)
    assert top.shape[-1] == min(k, V) and top.isfinite().all() and chosen.isfinite().all()


@pytest.mark.parametrize("bias", [1e30, -1e30])
@pytest.mark.parametrize("penalty", [1e-6, 1, 1e6])
@pytest.mark.parametrize("temperature", [0, 1e-300, 1.0, 1e300])
def test_the_largest_settings_stay_finite_in_float32(bias, penalty, temperature):
    params = SamplingParams(temperature, repetition_penalty=penalty, logit_bias=((1, bias), (2, bias)))
    logits, zero = random_logits(1, 1, 12), torch.zeros(1, 1, dtype=torch.long)
    sampler = sampler_of([params], 12, [[1, 3]])
    scores = sampler.penalize(logits, zero, zero)
    expected = their_penalties(logits[0, 0], params, [1, 3], [], ())
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[0, 0].double(), expected, atol=1e-4, rtol=1e-5)
    assert 0 <= sampler(logits, zero, zero).item() < 12


@pytest.mark.parametrize(
    "name, values",
    {
        "temperature": (-0.1, math.nan, math.inf),
        "top_k": (-1, 2**31),
        "top_p": (0.0, -0.5, 1.5, math.nan),
        "min_p": (-0.1, 1.1, math.nan),
        "repetition_penalty": (0, -1.0, math.nan, math.inf, 1e300, 1e-300),
        "presence_penalty": (-2.1, 2.1, math.nan, math.inf),
        "frequency_penalty": (-2.1, 2.1, math.nan, -math.inf),
        "logit_bias": (((1, math.nan),), ((1, math.inf),), ((1, -1e308),), ((1, 1e308),), ((-1, 1.0),)),
        "bad_words": (((),), ((1, -1),)),
        "min_new_tokens": (-1, 2**31),
        "seed": (-1, 2**63),
    }.items(),
)
def test_values_out_of_range_are_named(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} .* is out of range; it must"):
            SamplingParams(**{name: value})


def test_check_knows_the_vocabulary():
    SamplingParams(logit_bias=((9, 1.0),), bad_words=((9, 0),)).check(10, {2})
    for params in (SamplingParams(logit_bias=((10, 1.0),)), SamplingParams(bad_words=((3, 10),))):
        with pytest.raises(UserError, match="no token 10; the model's ids end at 9"):
            params.check(10, {2})
    every = tuple((token,) for token in range(10))
    SamplingParams(bad_words=every).check(10, {2})  # the end token is left
    SamplingParams(bad_words=every[:2] + every[3:9], min_new_tokens=3).check(10, {2})
    for params in (SamplingParams(bad_words=every), SamplingParams(bad_words=every, min_new_tokens=3)):
        with pytest.raises(UserError, match="ban every token"):
            params.check(10, {2} if params.min_new_tokens else ())


def test_plain_is_greedy_with_nothing_else():
    assert SamplingParams(temperature=0).plain and SamplingParams(0, 5, 0.5, 0.1, seed=3).plain
    for change in (
        {"temperature": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": -1},
        {"frequency_penalty": 0.1},
        {"logit_bias": ((1, 1.0),)},
        {"bad_words": ((1,),)},
        {"min_new_tokens": 1},
    ):
        assert not SamplingParams(**{"temperature": 0, **change}).plain


def step(sampler, logits, tokens, input_pos):
    """What the engine compiles, the sampler's part of it."""
    drawn = sampler(logits, tokens, input_pos)
    sampler.count(drawn, (drawn >= 0).sum(1))
    sampler.history.scatter_(1, input_pos + 1, drawn.clamp(min=0))
    return drawn


def mixed_params(rows):
    return [
        SamplingParams(
            *(0.1 * i, i % 7, 1 - 0.01 * i, 0.003 * i, 1 + 0.1 * (i % 4), 0.2, -0.1 * (i % 5)),
            *(((i, 1.0),), ((5,), (i, 1, 2)) if i % 2 else (), i % 3, 2**40 + i),
        )
        for i in range(rows)
    ]


@pytest.mark.slow
def test_compiled_sampling_is_eager_sampling_and_never_recompiles(compiler):
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    ours, theirs = (sampler_of([SamplingParams()] * 4, 300, [[1, 2]] * 4, {9}, room=(2, 3)) for _ in range(2))
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for first in range(0, 24, 4):
            for row, params in enumerate(mixed_params(24)[first : first + 4]):
                for sampler in (ours, theirs):
                    sampler.set_row(row, params, [1, 2, 3 + row])
            for at in range(2, 12):
                logits = random_logits(4, 1, 300, seed=first + at)
                last, input_pos = theirs.history[:, at : at + 1], torch.full((4, 1), at)
                assert compiled(ours, logits, last.clone(), input_pos).equal(step(theirs, logits, last, input_pos))
            assert ours.counts.equal(theirs.counts) and ours.history.equal(theirs.history)
            assert theirs.counts.sum() == 40
