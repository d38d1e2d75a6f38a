"""Beam search against transformers' generate: sequences and scores, and that nothing is compiled twice."""

import contextlib
import functools
import math

import pytest
import torch
from conftest import nothing_compiles

from beam import BeamParams, beam_search
from checkpoint import load_model
from engine import Engine, Request
from errors import UserError
from sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
PAD = 399
CACHE = 700


@functools.cache
def prompt(length, seed=0):
    return torch.randint(5, 399, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def ours(base_folder):
    """beam_search with an engine set up for what it is asked."""
    engine = Engine(load_model(base_folder))

    def run(ids, beams, count, eos=(), params=GREEDY, engine=engine):
        eos = frozenset(eos)
        words = params.bad_words
        room = len(words), max(map(len, words), default=0)
        engine.setup(beams.num_beams, CACHE, plain=params.plain, eos_ids=eos, bad_words=room)
        return beam_search(engine, Request(ids, params, count, eos), beams)

    return run


def check(reference, hypotheses, ids, beams, count, eos=(), **others):
    """They are what transformers finds, in its order."""
    output = reference.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=beams.num_beams,
        do_sample=False,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        num_return_sequences=beams.num_return_sequences,
        max_new_tokens=count,
        eos_token_id=sorted(eos) or None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **others,
    )
    assert len(hypotheses) == beams.num_return_sequences
    rows = output.sequences[:, len(ids) :].tolist()
    for hypothesis, row, score in zip(hypotheses, rows, output.sequences_scores.tolist(), strict=True):
        tokens = hypothesis.tokens
        assert tokens + [PAD] * (len(row) - len(tokens)) == row
        scale = len(tokens) ** beams.length_penalty  # the sum of log-probabilities is what float32 rounds
        assert hypothesis.score * scale == pytest.approx(score * scale, abs=1e-4, rel=0)
        assert not eos or not set(tokens[:-1]) & set(eos)
        assert hypothesis.finish_reason == ("stop" if tokens[-1] in eos else "length")
        assert len(tokens) == count or hypothesis.finish_reason == "stop"


def ends(hypotheses):
    """Three tokens that end texts early, at various places."""
    return {hypotheses[0].tokens[3], hypotheses[-1].tokens[8], hypotheses[0].tokens[14]}


@pytest.mark.parametrize("length_penalty", [0.0, 0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_sequences_and_scores(reference, ours, num_beams, length_penalty, early_stopping):
    ids = prompt(30, num_beams)
    eos = ends(ours(ids, BeamParams(num_beams, num_return_sequences=2), 20))
    beams = BeamParams(num_beams, length_penalty, early_stopping, num_beams)
    hypotheses = ours(ids, beams, 20, eos)
    check(reference, hypotheses, ids, beams, 20, eos)
    assert length_penalty > 1 or any(hypothesis.finish_reason == "stop" for hypothesis in hypotheses)


def test_many_beams_and_a_prompt_of_several_chunks(reference, ours):
    """Rows that were copied whole, and then share long beginnings."""
    ids, beams = prompt(600), BeamParams(12, 1.0, "never", 12)
    eos = ends(ours(ids, beams, 20))
    hypotheses = ours(ids, beams, 60, eos)
    check(reference, hypotheses, ids, beams, 60, eos)
    assert len({tuple(hypothesis.tokens) for hypothesis in hypotheses}) == 12


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("eos", [False, True])
def test_one_new_token(reference, ours, length, eos):
    ids, beams = prompt(length), BeamParams(4, num_return_sequences=4)
    eos = {hypothesis.tokens[0] for hypothesis in ours(ids, beams, 1)[1:3]} if eos else set()
    hypotheses = ours(ids, beams, 1, eos)
    check(reference, hypotheses, ids, beams, 1, eos)
    assert [hypothesis.finish_reason for hypothesis in hypotheses].count("stop") == len(eos)


def test_fewer_sequences_than_beams(reference, ours):
    ids = prompt(20, 7)
    for count in (1, 3):
        beams = BeamParams(4, num_return_sequences=count)
        check(reference, ours(ids, beams, 12), ids, beams, 12)


def test_min_new_tokens(reference, ours):
    ids, beams = prompt(20, 8), BeamParams(3, -1.0, num_return_sequences=3)
    eos = ends(ours(ids, beams, 20))
    assert len(ours(ids, beams, 20, eos)[0].tokens) < 9
    params = SamplingParams(temperature=0, min_new_tokens=9)
    hypotheses = ours(ids, beams, 20, eos, params)
    check(reference, hypotheses, ids, beams, 20, eos, min_new_tokens=9)
    assert all(len(hypothesis.tokens) > 9 for hypothesis in hypotheses)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty(reference, ours, penalty):
    """Of log-probabilities, and by the tokens of each beam, which move from row to row."""
    ids, beams = prompt(40, 9), BeamParams(4, num_return_sequences=4)
    free = ours(ids, beams, 25)
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    hypotheses = ours(ids, beams, 25, params=params)
    assert hypotheses[0].tokens != free[0].tokens
    check(reference, hypotheses, ids, beams, 25, repetition_penalty=penalty)


def test_bad_words(reference, ours):
    """Of one, two and three tokens, all of which would have come."""
    ids, beams = prompt(25, 10), BeamParams(4, num_return_sequences=4)
    first, second = (ours(ids, beams, 25)[i].tokens for i in (0, 2))
    words = [[first[12]], first[4:6], second[8:11], [ids[-1], first[0]]]
    params = SamplingParams(temperature=0, bad_words=tuple(map(tuple, words)))
    hypotheses = ours(ids, beams, 25, params=params)
    check(reference, hypotheses, ids, beams, 25, bad_words_ids=words)


def test_what_repetition_and_bans_leave_is_searched_together(reference, ours):
    ids, beams = prompt(25, 11), BeamParams(5, 0.5, True, 5)
    free = ours(ids, beams, 20)
    eos, words = ends(free), [free[0].tokens[:2], [free[1].tokens[2]]]
    params = SamplingParams(temperature=0, repetition_penalty=1.1, min_new_tokens=5, bad_words=tuple(map(tuple, words)))
    hypotheses = ours(ids, beams, 20, eos, params)
    others = {"repetition_penalty": 1.1, "min_new_tokens": 5, "bad_words_ids": words}
    check(reference, hypotheses, ids, beams, 20, eos, **others)


def test_a_search_leaves_nothing_behind(ours, base_folder):
    """The next one, with the same prompt (which is still in the cache) or another, is as if it were the first."""
    engine, beams = Engine(load_model(base_folder)), BeamParams(4, num_return_sequences=4)
    params = SamplingParams(temperature=0, repetition_penalty=1.2)
    engine.setup(4, CACHE)
    for ids in (prompt(50), prompt(50), prompt(8), prompt(50)):
        assert beam_search(engine, Request(ids, params, 20), beams) == ours(ids, beams, 20, params=params)


def test_the_last_token_may_fill_the_cache(reference, ours):
    ids, beams = prompt(CACHE - 10), BeamParams(2, num_return_sequences=2)
    check(reference, ours(ids, beams, 10), ids, beams, 10)
    for request in (prompt(CACHE - 9), []):
        with pytest.raises(ValueError, match="do not fit"):
            ours(request, beams, 10)


def test_other_rows_than_beams_are_a_value_error(base_folder):
    engine = Engine(load_model(base_folder))
    engine.setup(3, CACHE)
    with pytest.raises(ValueError, match=r"4 beams .* 3 rows"):
        beam_search(engine, Request(prompt(5), GREEDY, 5), BeamParams(4))


def test_no_next_token_is_an_error(base_folder, ours):
    engine = Engine(load_model(base_folder))
    engine.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="not numbers"):
        ours(prompt(5), BeamParams(2), 5, engine=engine)
    every = tuple((token,) for token in range(400))
    with pytest.raises(UserError, match="banned"):
        ours(prompt(5), BeamParams(2), 5, params=SamplingParams(temperature=0, bad_words=every))


@pytest.mark.parametrize(
    "field, values",
    [
        ("num_beams", (1, 0, -1, 65)),
        ("length_penalty", (math.nan, math.inf, -11.0)),
        ("early_stopping", ("always", None, "False")),
        ("num_return_sequences", (0, 5)),
    ],
)
def test_ranges(field, values):
    for value in values:
        with pytest.raises(UserError, match=f"{field} {value!r} is "):
            BeamParams(**({"num_beams": 4} | {field: value}))


def test_more_beams_than_tokens(ours):
    with pytest.raises(UserError, match=r"num_beams 60 .* vocabulary of 400"):
        ours(prompt(5), BeamParams(60), 5, range(350))


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0, repetition_penalty=1.2)])
def test_compiled_is_eager(base_folder, ours, params):
    """One compilation serves all positions, prompts, length penalties and penalties."""
    compiled, beams = Engine(load_model(base_folder), compile=True), BeamParams(4, num_return_sequences=4)
    eos = ends(ours(prompt(50), beams, 20, params=params))
    compiled.setup(4, CACHE, plain=params.plain, eos_ids=frozenset(eos))
    for i, (length, penalty) in enumerate(((1, 0.0), (50, 1.0), (600, 2.0))):
        beams = BeamParams(4, penalty, "never", 4)
        request = Request(prompt(length), params, 30, frozenset(eos))
        with nothing_compiles() if i else contextlib.nullcontext():
            found = beam_search(compiled, request, beams)
        expected = ours(prompt(length), beams, 30, eos, params)
        assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4, rel=0)
