"""The scheduler: requests come and go at any time, and each gets the tokens that it gets alone."""

import functools
import random
from dataclasses import replace

import pytest
import torch
from conftest import GREEDY, ids_of, run_rows, set_up

from checkpoint import load_model
from engine import Engine, Request, Stats
from sampling import SamplingParams
from scheduler import Row, Scheduler
from stopping import StopStrings
from tokenizer import StreamingDetokenizer


@functools.cache
def prompt(length, seed=0):
    return torch.randint(5, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def requests():
    """Of all lengths; every other one is sampled."""
    draw = random.Random(0)
    sizes = [(draw.randint(1, 60), draw.randint(1, 25)) for _ in range(14)]
    params = [GREEDY, SamplingParams(0.9, top_p=0.9, repetition_penalty=1.1, seed=3)]
    return [Request(prompt(length, i), params[i % 2], count) for i, (length, count) in enumerate(sizes)]


@pytest.fixture(scope="module")
def alone(engine, tokenizer, requests):
    return ids_of(run_rows(set_up(engine, requests, 1), tokenizer, requests))


@pytest.mark.parametrize("overlaps", [False, True], ids=["in turn", "a step late"])
@pytest.mark.parametrize("lookup", [False, True], ids=["plain", "speculating"])
def test_requests_come_and_go(base_folder, tokenizer, requests, alone, lookup, overlaps):
    """Added and cancelled between any two steps. On CUDA a step's tokens are read while the next one runs."""
    engine = Engine(load_model(base_folder), prompt_lookup=lookup, speculate_k=3 if lookup else None)
    scheduler = Scheduler(set_up(engine, requests, 3), tokenizer)
    scheduler._overlaps = overlaps
    draw, later = random.Random(int(lookup)), list(range(len(requests)))
    numbers, rows, ended, cancelled = {}, {}, set(), set()
    while later or not scheduler.idle:
        if later and draw.random() < 0.3:
            number = scheduler.add(requests[later[0]])
            numbers[number], rows[number] = later.pop(0), []
        if numbers and draw.random() < 0.03:
            number = draw.choice(sorted(numbers))
            scheduler.cancel(number)
            cancelled |= {number} - ended
        for token in scheduler.step():
            assert token.request not in ended | cancelled
            rows[token.request].append(token.id)
            if token.finish_reason:
                ended.add(token.request)
    assert ended | cancelled == set(rows) and len(ended) > 8 and cancelled
    for number, row in rows.items():
        expected = alone[numbers[number]]
        assert row == (expected if number in ended else expected[: len(row)])
    assert scheduler.step() == [] and scheduler.stats.new_tokens == sum(map(len, rows.values()))


def test_a_waiting_request_is_cancelled(engine, tokenizer, requests):
    """And what is unknown, or has ended, does no harm."""
    scheduler = Scheduler(set_up(engine, requests, 1), tokenizer)
    first, second, third = (scheduler.add(request) for request in requests[:3])
    scheduler.step()
    for number in (second, second, 99):
        scheduler.cancel(number)
    seen = set()
    while not scheduler.idle:
        seen |= {token.request for token in scheduler.step()}
    scheduler.cancel(first)
    assert seen == {first, third} and scheduler.idle


def test_a_request_without_a_next_token_leaves_the_others_alone(engine, tokenizer, requests, alone):
    """It ends as an error; the others go on, and its row serves the next."""
    banned = replace(requests[1].params, bad_words=tuple((alone[1][0], token) for token in range(400)))
    wanted = [requests[0], replace(requests[1], params=banned, max_new_tokens=9), *requests[2:5]]
    scheduler = Scheduler(set_up(engine, wanted, 2), tokenizer)
    for request in wanted:
        scheduler.add(request)
    rows = [[] for _ in wanted]
    while not scheduler.idle:
        for token in scheduler.step():
            rows[token.request].append(token)
    *before, last = rows[1]
    assert (last.id, last.text, last.finish_reason, last.stats.new_tokens) == (-1, "", "error", len(before))
    assert [token.id for token in before] == alone[1][: len(before)] != []
    del rows[1]
    assert ids_of(rows) == [alone[0], *alone[2:5]]


def test_what_does_not_fit_is_refused_when_it_is_added(engine, tokenizer, requests):
    scheduler = Scheduler(set_up(engine, requests, 2, 100), tokenizer)
    with pytest.raises(ValueError, match="do not fit a cache of 100"):
        scheduler.add(Request(prompt(60), GREEDY, 41))
    assert scheduler.idle and scheduler.add(Request(prompt(60), GREEDY, 40)) == 0


def test_speculation_that_switched_itself_off_says_so():
    stats = Stats(speculates=True)
    assert str(stats).endswith(" GB")  # no step yet
    for k, right in ((2, [0]), (4, [0]), *[(0, [0])] * 98):
        stats.add_step(0.01, 1, k, right)
    assert str(stats).endswith("speculation switched itself off, as it did not pay, in 98 of 100 steps")
    assert stats.report()["speculated_share"] == 0.02 and stats.report()["acceptance_rate"] == 0
    stats.add_step(0.01, 1, 4, [4])
    assert str(stats).endswith("in 98 of 101 steps, accepted 40% in the others")
    never = Stats(speculates=True)
    never.add_step(0.01, 1, 0, [1])  # prompt lookup scores a proposal even so
    assert str(never).endswith("in 1 of 1 steps")
    assert never.report()["speculated_share"] == 0 and "acceptance_rate" not in never.report()
    assert "speculated_share" not in Stats(steps=5).report() and str(Stats(steps=5)).endswith(" GB")


@pytest.mark.parametrize("text, held", [("a", "a"), ("日", "\ufffd")], ids=["of a stop string", "of a character"])
def test_a_shown_mark_follows_what_was_held_back(tokenizer, text, held):
    mark, *first = tokenizer.encode("</s>" + text, add_special_tokens=False)[:2]
    request = Request([5], GREEDY, 10, stop=("ab",), shown_ids=frozenset({mark}))
    row = Row(0, request, 0, StreamingDetokenizer(tokenizer, request.shown_ids), StopStrings(request.stop), None)
    assert [row.put(token_id).text for token_id in (*first, mark, *first)] == ["", held + "</s>", ""]
