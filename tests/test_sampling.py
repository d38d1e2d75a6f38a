"""Sampling against transformers' logits warpers, and the draws against the distribution they should have."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import sampling
from errors import UserError
from sampling import SamplingParams, probabilities, sample, sampling_tensors, uniform

examples = settings(deadline=None, derandomize=True, max_examples=60)


def random_logits(rows, vocab, seed=0, scale=3.0):
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def theirs(logits, params):
    """What transformers' generate makes of the logits, in float64."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain(torch.zeros(len(logits), 1, dtype=torch.long), logits.double()).softmax(-1)


def ours(logits, params):
    return probabilities(logits, sampling_tensors([params] * len(logits), "cpu"))


def draw(logits, params, seeds, positions):
    """One token for each row of seeds [B] and positions [B], all from the same logits [V]."""
    tensors = sampling_tensors([params], "cpu")
    tensors = tensors._replace(**{name: value.expand(len(seeds)) for name, value in tensors._asdict().items()})
    return sample(logits.expand(len(seeds), -1), tensors._replace(seed=seeds), positions)


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


some_params = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 400),
    top_p=st.floats(0.01, 1),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1)),
    seed=st.integers(0, 2**63 - 1),
)


@examples
@given(some_params, st.integers(1, 300), st.integers(0, 1000))
def test_probabilities_are_those_of_transformers(params, vocab, seed):
    logits = random_logits(2, vocab, seed)
    expected = theirs(logits, params)
    # Where a cut falls so close to a token that float32 can't tell the sides, either answer is right.
    before_top_p = theirs(logits, SamplingParams(params.temperature, params.top_k)).sort(descending=True).values
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
    torch.testing.assert_close(ours(logits, params).double(), theirs(logits, params), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("top_k, top_p", [(10, 1.0), (0, 0.7), (25, 0.5)])
def test_ties(top_k, top_p):
    """bfloat16 logits tie often. Top-k keeps those that tie with the last as transformers does; top-p keeps them too,
    where transformers takes whichever its sort put first."""
    params = SamplingParams(top_k=top_k, top_p=top_p)
    logits = random_logits(8, 200).round()
    probs, reference = ours(logits, params), theirs(logits, params)
    for row in range(8):
        last = logits[row][reference[row] > 0].min()
        assert ((probs[row] > 0) == (logits[row] >= last)).all()
    if top_p == 1:
        torch.testing.assert_close(probs.double(), reference, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_in_float32(dtype):
    logits = random_logits(4, 1000).to(dtype)
    params = SamplingParams(temperature=0.8, top_k=50, min_p=0.02)
    assert ours(logits, params).dtype == torch.float32
    torch.testing.assert_close(ours(logits, params).double(), theirs(logits, params), atol=2e-6, rtol=1e-4)


def test_impossible_tokens_stay_impossible():
    """Logits of -inf, as masks make them."""
    logits = random_logits(4, 50).index_fill(1, torch.arange(0, 50, 3), -math.inf)
    for params in (
        SamplingParams(),
        SamplingParams(top_k=45),
        SamplingParams(top_p=0.999),
        SamplingParams(min_p=0.001),
    ):
        torch.testing.assert_close(ours(logits, params).double(), theirs(logits, params), atol=2e-6, rtol=1e-4)


@examples
@given(st.lists(some_params, min_size=2, max_size=6), st.integers(0, 1000))
def test_a_mixed_batch_is_each_row_alone(rows, seed):
    rows[0] = SamplingParams(temperature=0)
    logits, positions = random_logits(len(rows), 120, seed), torch.arange(len(rows)) * 7
    tensors = sampling_tensors(rows, "cpu")
    probs, tokens = probabilities(logits, tensors), sample(logits, tensors, positions)
    assert tokens.shape == (len(rows),) and tokens.dtype == torch.int64
    for i, params in enumerate(rows):
        alone = sampling_tensors([params], "cpu")
        torch.testing.assert_close(probs[i], probabilities(logits[i : i + 1], alone)[0], atol=0, rtol=1e-6)
        assert tokens[i] == sample(logits[i : i + 1], alone, positions[i : i + 1])[0]


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
    """Over seeds at one position, over positions of one seed, and over both."""
    count = 20_000
    logits = random_logits(1, 60, scale=1.5)[0]
    expected = count * theirs(logits[None], params)[0]
    seeds, ones = torch.arange(count), torch.ones(count, dtype=torch.long)
    for seed, position in ((seeds, 17 * ones), (1234 * ones, seeds), (seeds, seeds), (seeds << 31, seeds % 100)):
        tokens = draw(logits, params, seed, position)
        assert_distributed(tokens.bincount(minlength=60), expected)


def test_greedy_is_the_argmax():
    logits = random_logits(64, 500)
    params = [SamplingParams(temperature=0, top_k=i, top_p=0.5, min_p=0.1, seed=i) for i in range(64)]
    assert sample(logits, sampling_tensors(params, "cpu"), torch.arange(64)).equal(logits.argmax(-1))
    assert sample(logits, sampling_tensors([SamplingParams(top_k=1)] * 64, "cpu"), torch.arange(64)).equal(
        logits.argmax(-1)
    )


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-39, 1e-38, 1e-30, 1e-4])
def test_the_lower_the_temperature_the_greedier(temperature):
    logits = random_logits(64, 500)
    params = sampling_tensors([SamplingParams(temperature=temperature)] * 64, "cpu")
    assert sample(logits, params, torch.arange(64)).equal(logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
def test_the_higher_the_temperature_the_flatter(temperature):
    torch.testing.assert_close(
        ours(random_logits(2, 100), SamplingParams(temperature=temperature)),
        torch.full((2, 100), 0.01),
        atol=1e-4,
        rtol=0,
    )


def test_the_same_seed_and_position_give_the_same_token():
    logits = random_logits(1, 1000, scale=1.0)[0]
    seeds, positions = torch.arange(50) * 977, torch.arange(50)
    first = draw(logits, SamplingParams(), seeds, positions)
    assert first.equal(draw(logits, SamplingParams(), seeds, positions))
    assert (first != draw(logits, SamplingParams(), seeds + 1, positions)).sum() > 40
    assert (first != draw(logits, SamplingParams(), seeds, positions + 1)).sum() > 40


@examples
@given(st.integers(1, 50), st.integers(0, 10_000), st.sampled_from([0.0, 1e-9, 0.5, 1 - 2**-24]), st.data())
def test_a_token_of_probability_zero_is_never_drawn(vocab, seed, u, data):
    """Not even by the smallest and the largest number that `uniform` can return."""
    logits = random_logits(1, vocab, seed, scale=8.0)
    possible = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=vocab))
    masked = torch.full_like(logits, -math.inf)
    masked[0, possible] = logits[0, possible]
    params = sampling_tensors([SamplingParams(top_p=data.draw(st.floats(0.1, 1)))], "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "uniform", lambda seed, position: torch.tensor([u]))
        token = sample(masked, params, torch.tensor([0]))
    assert probabilities(masked, params)[0, token] > 0


def test_a_large_vocabulary_keeps_its_last_token_in_reach():
    """A float32 sum over 128k tokens is off by a little; the draw is scaled by it."""
    logits = torch.zeros(1, 128_256)
    params = sampling_tensors([SamplingParams()], "cpu")
    for u, expected in ((0.0, 0), (0.5, 64_128), (1 - 2**-24, 128_255)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "uniform", lambda seed, position, u=u: torch.tensor([u]))
            assert abs(int(sample(logits, params, torch.tensor([0]))) - expected) < 128


SEQUENCES = {  # how seeds and positions come in practice, and at the ends of their range
    "positions": lambda n: (torch.full((n,), 42), torch.arange(n)),
    "seeds": lambda n: (torch.arange(n), torch.full((n,), 5)),
    "large seeds": lambda n: (2**63 - 1 - torch.arange(n), torch.full((n,), 5)),
    "high words": lambda n: (torch.arange(n) << 32, torch.zeros(n, dtype=torch.long)),
    "diagonal": lambda n: (torch.arange(n), n - torch.arange(n)),
    "even": lambda n: (torch.arange(n) * 2, torch.arange(n) * 1024),
}


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_uniform_is_uniform(sequence):
    n = 2**17
    seeds, positions = SEQUENCES[sequence](n)
    numbers = uniform(seeds, positions)
    assert numbers.dtype == torch.float32 and numbers.min() >= 0 and numbers.max() < 1
    values = numbers.double()
    sigma = 1 / math.sqrt(n)
    assert abs(values.mean() - 0.5) < 4.5 * sigma / math.sqrt(12)
    assert abs(values.var() - 1 / 12) < 4.5 * sigma / math.sqrt(180)
    for lag in (1, 2, 3, 512, 1024):
        assert abs(torch.corrcoef(torch.stack((values[:-lag], values[lag:])))[0, 1]) < 4.5 * sigma
    assert_distributed((values * 256).long().bincount(minlength=256), torch.full((256,), n / 256))
    low = (values * 2**24).long() % 256  # the last bits are as random as the first
    assert_distributed(low.bincount(minlength=256), torch.full((256,), n / 256))
    pairs = (values[0::2] * 32).long() * 32 + (values[1::2] * 32).long()
    assert_distributed(pairs.bincount(minlength=1024), torch.full((1024,), n / 2048))


def test_seeds_do_not_share_their_streams():
    """A seed's numbers are not another's, shifted or mirrored: the rows of a grid and columns are uncorrelated."""
    grid = uniform(torch.arange(200).repeat_interleave(200), torch.arange(200).repeat(200)).double().view(200, 200)
    correlation = torch.corrcoef(torch.cat((grid, grid.T))).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(200)
    numbers = grid.flatten()
    assert len(numbers.unique()) > len(numbers) - 150  # 40,000 of 2^24: about 48 pairs meet by chance


@pytest.mark.parametrize(
    "name, values",
    {
        "temperature": (-0.1, math.nan, math.inf),
        "top_k": (-1, 2**31),
        "top_p": (0.0, -0.5, 1.5, math.nan),
        "min_p": (-0.1, 1.1, math.nan),
        "seed": (-1, 2**63),
    }.items(),
)
def test_values_out_of_range_are_named(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} .* is out of range; it must"):
            SamplingParams(**{name: value})


def mixed_params(rows):
    return [SamplingParams(0.1 * i, i % 7, 1 - 0.01 * i, 0.003 * i, seed=2**40 + i) for i in range(rows)]


def test_changing_parameters_does_not_recompile():
    torch._dynamo.reset()
    compiled = torch.compile(sample, backend="eager", fullgraph=True, dynamic=False)
    logits = random_logits(3, 100)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for params in (
            [SamplingParams()] * 3,
            [SamplingParams(0.5, 10, 0.9, 0.05, 7)] * 3,
            mixed_params(3),
            [SamplingParams(temperature=0), SamplingParams(temperature=1), SamplingParams(top_k=5, seed=2**62)],
            [SamplingParams(temperature=2, top_p=1, min_p=0)] * 3,  # whole numbers, as JSON has them
        ):
            compiled(logits, sampling_tensors(params, "cpu"), torch.arange(3))


@pytest.mark.slow
def test_compiled_sampling_is_eager_sampling():
    torch._dynamo.reset()
    compiled = torch.compile(sample, fullgraph=True, dynamic=False)
    params = sampling_tensors(mixed_params(30), "cpu")
    for seed in range(20):
        logits, positions = random_logits(30, 300, seed), torch.arange(30) + seed
        assert compiled(logits, params, positions).equal(sample(logits, params, positions))
