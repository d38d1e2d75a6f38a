"""What is in the cache is used again, and changes no text: random traffic against one request at a time."""

import itertools
import random
from dataclasses import replace
from functools import partial

import pytest
from conftest import GREEDY, ids_of, run_rows
from family_models import make, two_layers

from checkpoint import load_model
from convert_hf_checkpoint import convert
from engine import Engine, Request
from prefix import LEAST_SHARED, Place
from sampling import SamplingParams
from scheduler import Scheduler

LENGTH = 256


def text(length, seed=0):
    return random.Random(seed).choices(range(5, 380), k=length)


def alone(engine, tokenizer, request):
    """Its tokens in an engine that remembers nothing."""
    engine.forget()
    return run_rows(engine, tokenizer, [request])[0]


@pytest.fixture
def two(base_folder):
    """An engine with rooms for two, and one that is asked what each text is alone."""
    engines = Engine(load_model(base_folder)), Engine(load_model(base_folder))
    for engine, rows in zip(engines, (2, 1), strict=True):
        engine.setup(rows, LENGTH)
    return engines


# ---------------------------------------------------------------------------------------------------------------------
# Random traffic


class Traffic:
    """Requests of all kinds: new ones, the same once more, the next turn of a conversation, one that was edited."""

    def __init__(self, draw, reference, tokenizer):
        self.draw, self.reference, self.tokenizer = draw, reference, tokenizer
        self.texts = [text(LENGTH // 8, seed) for seed in range(2)]
        self.known = {}

    def request(self):
        draw = self.draw
        seen, new = draw.choice(self.texts), text(draw.randint(1, 40), draw.random())
        kinds = new, seen, seen + new, seen[: draw.randint(1, len(seen))], seen[: draw.randint(1, len(seen))] + new
        prompt = draw.choice(kinds)[: LENGTH - 40]
        params = GREEDY if draw.random() < 0.6 else SamplingParams(1.1, seed=draw.randint(0, 3), repetition_penalty=1.1)
        request = Request(prompt, params, draw.choice((1, 5, 12, 30)))
        tokens = self.alone(request)
        ending = draw.choice(tokens)
        if draw.random() < 0.4:
            request = replace(request, eos_ids=frozenset((ending.id,)))
        elif draw.random() < 0.4 and ending.text:
            request = replace(request, stop=(ending.text,))
        self.texts = [*self.texts, prompt + [token.id for token in tokens]][-12:]
        return request

    def alone(self, request):
        key = repr(request)
        if key not in self.known:
            self.known[key] = alone(self.reference, self.tokenizer, request)
        return self.known[key]


def drive(engine, reference, tokenizer, seed, chunk, overlaps=False):
    """Adds, cancels, interrupts; each text that ends, and each beginning of one, is what it is alone."""
    draw = random.Random(seed)
    traffic = Traffic(draw, reference, tokenizer)
    run, counts = engine._run, dict(cached=0, ended=0, cancelled=0, interrupted=0)

    def interrupting(*args, **others):
        result = run(*args, **others)
        if draw.random() < min(chunk + 5, 30) / 200:
            raise KeyboardInterrupt
        return result

    engine._run = interrupting
    for _ in range(3):  # schedulers, one after the other, each of which leaves something behind
        scheduler = Scheduler(engine, tokenizer, prefill_chunk=chunk)
        scheduler._overlaps = overlaps
        requests, rows = {}, {}
        while len(requests) < 12 or not (scheduler.idle or draw.random() < 0.01):
            if len(requests) < 12 and draw.random() < 0.3:
                request = traffic.request()
                number = scheduler.add(request)
                requests[number], rows[number] = request, []
            if requests and draw.random() < 0.03:
                scheduler.cancel(draw.choice(sorted(requests)))
                counts["cancelled"] += 1
            try:
                tokens = scheduler.step()
            except KeyboardInterrupt:
                counts["interrupted"] += 1
                continue
            for token in tokens:
                rows[token.request].append(token)
        for number, row in rows.items():
            expected = traffic.alone(requests[number])
            ended = bool(row) and row[-1].finish_reason is not None
            assert [token.id for token in row] == [token.id for token in expected[: len(row)]], requests[number]
            assert "".join(token.text for token in row) == "".join(token.text for token in expected[: len(row)])
            if ended:
                assert row[-1].finish_reason == expected[-1].finish_reason and len(row) == len(expected)
                counts["ended"] += 1
                counts["cached"] += row[-1].stats.cached_tokens
    assert counts["ended"] > 12 and counts["cached"] > 40 and counts["interrupted"], counts


@pytest.mark.parametrize("rows, chunk", [(1, 64), (3, 13), (8, 1), (8, 40)])
@pytest.mark.parametrize("others", [{}, {"prompt_lookup": True, "speculate_k": 3}], ids=["plain", "lookup"])
def test_random_traffic(base_folder, tokenizer, rows, chunk, others):
    engine, reference = Engine(load_model(base_folder), **others), Engine(load_model(base_folder))
    engine.setup(rows, LENGTH)
    reference.setup(1, LENGTH)
    drive(engine, reference, tokenizer, f"{rows} {chunk}", chunk, overlaps=chunk == 13)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}

    def get(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            make(name, folder, **two_layers(name))
            convert(folder / "hf", folder / "ours")
            found[name] = folder / "ours"
        return found[name]

    return get


@pytest.mark.parametrize(
    "name, overlaps",
    [
        ("mistral", True),
        ("gemma2", False),
        ("gpt-oss", True),
        ("granite-moe", False),
        ("phi3-longrope", True),
        ("gpt2", False),
    ],
)
def test_random_traffic_of_other_families(folders, tokenizer, name, overlaps):
    """Windows, mixtures, RoPE that turns by the length of the text."""
    engine, reference = (Engine(load_model(folders(name))) for _ in range(2))
    engine.setup(4, LENGTH)
    reference.setup(1, LENGTH)
    drive(engine, reference, tokenizer, name, 24, overlaps)


@pytest.mark.parametrize(
    "name, draft_name, k", [("llama", "mistral", None), ("mistral", "llama", 3), ("gemma2", "mistral", None)]
)
def test_random_traffic_with_a_draft(folders, tokenizer, name, draft_name, k):
    """Which lags behind, and may have windows of its own."""
    model, draft = load_model(folders(name)), load_model(folders(draft_name))
    engine, reference = Engine(model, draft=draft, speculate_k=k), Engine(load_model(folders(name)))
    engine.setup(3, LENGTH)
    reference.setup(1, LENGTH)
    drive(engine, reference, tokenizer, name, 40, overlaps=k is None)
    assert k is None or engine.stats.proposed


def test_a_draft_accepts_as_much_where_the_cache_was_used(base_folder, tokenizer):
    """Its own keys and values are right as well: the model itself as a draft is right in all its proposals."""
    engine = Engine(load_model(base_folder), draft=load_model(base_folder), speculate_k=4)
    engine.setup(3, LENGTH)
    prompt = text(60)
    for _ in range(3):
        (row,) = run_rows(engine, tokenizer, [Request(prompt, GREEDY, 31)])
        assert engine.stats.accepted == engine.stats.proposed
        prompt = prompt + [token.id for token in row]
    assert row[-1].stats.cached_tokens == len(prompt) - 32
    for cut in (150, 100, 40):  # from the middle, and into another row
        run_rows(engine, tokenizer, [Request(prompt[:cut] + text(5, cut), GREEDY, 31)])
        assert engine.stats.accepted == engine.stats.proposed and engine.stats.cached_tokens == cut


def test_rows_that_fill_up_a_step_keep_what_they_hold(folders, tokenizer, monkeypatch):
    """In the rings of a draft as well, which catches up with the others meanwhile."""
    model, draft = (load_model(folders("mistral")) for _ in range(2))
    engine = Engine(model, draft=draft, speculate_k=4)
    engine.setup(5, LENGTH)
    run_rows(engine, tokenizer, [Request(text(81), GREEDY, 22)])
    caches = [layer.attention.kv_cache for each in (model, draft) for layer in each.layers]
    before = [(cache.k[0, :, :-1].clone(), cache.v[0, :, :-1].clone()) for cache in caches]  # the last slot is padding
    turns = itertools.cycle((0, 0, 4))
    monkeypatch.setattr(engine.pace, "choose", lambda rows: next(turns))
    run_rows(engine, tokenizer, [Request(text(50, seed), GREEDY, 40) for seed in range(1, 4)])
    assert len(engine.places[0].tokens) == 102 and engine.places[3].tokens and not engine.places[4].tokens
    for (k, v), cache in zip(before, caches, strict=True):
        assert k.equal(cache.k[0, :, :-1]) and v.equal(cache.v[0, :, :-1])


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of mistakes


def test_a_copy_that_was_interrupted(two, tokenizer, monkeypatch):
    """Ctrl-C when the keys of one layer are copied leaves a row of which nothing is used, and the request waiting."""
    engine, reference = two
    old, source = Request(text(60, 1), GREEDY, 9), Request(text(60, 2), GREEDY, 99)
    run_rows(engine, tokenizer, [old])
    scheduler = Scheduler(engine, tokenizer)
    scheduler.add(source)
    scheduler.step()
    assert engine.places[0].tokens[:60] == old.prompt and engine.places[1].tokens == source.prompt
    copied = Request(source.prompt + text(5), GREEDY, 9)
    number = scheduler.add(copied)

    def interrupted(row, at, begin, end):
        engine.model.layers[0].attention.kv_cache.copy_row(row, at, begin, end)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "copy_row", interrupted)
        scheduler.step()
    assert engine.places[0].tokens == []
    row = []
    while not scheduler.idle:
        row += [token for token in scheduler.step() if token.request == number]
    assert ids_of([row]) == ids_of([alone(reference, tokenizer, copied)]) and row[-1].stats.cached_tokens == 60


def test_the_same_request_again_says_the_same(two, tokenizer):
    """All of its prompt is in the cache but for the last token, which is run for what follows it."""
    engine, reference = two
    for length, count in ((1, 5), (2, 5), (50, 30), (LENGTH - 1, 1)):
        for params in (GREEDY, SamplingParams(seed=5)):
            request = Request(text(length, count), params, count)
            expected = ids_of([alone(reference, tokenizer, request)])
            engine.forget()
            assert ids_of(run_rows(engine, tokenizer, [request])) == expected
            rows = run_rows(engine, tokenizer, [request] * 5)
            assert ids_of(rows) == expected * 5
            assert [row[-1].stats.cached_tokens for row in rows] == [length - 1] * 5


@pytest.mark.parametrize("after", range(1, 12, 3))
def test_a_cancelled_text_is_a_prefix(two, tokenizer, after):
    """Of what it had: neither an end token nor what steps wrote beyond comes into the next turn."""
    engine, reference = two
    prompt = text(70)
    whole = alone(reference, tokenizer, Request(prompt, GREEDY, 20))
    for ending in (None, whole[after].id):
        engine.forget()
        scheduler = Scheduler(engine, tokenizer, prefill_chunk=32)
        number = scheduler.add(Request(prompt, GREEDY, 20, frozenset() if ending is None else frozenset((ending,))))
        said = []
        while len(said) <= after and not (said and said[-1].finish_reason):
            said += scheduler.step()
        scheduler.cancel(number)
        ids = prompt + [token.id for token in said]
        assert engine.places[0].tokens == ids[:-1]
        for turn in (ids[:-1] + text(9), ids + text(9), ids[:-4] + text(9)):
            (row,) = run_rows(engine, tokenizer, [Request(turn, GREEDY, 20)])
            assert ids_of([row]) == ids_of([alone(reference, tokenizer, Request(turn, GREEDY, 20))])
            assert row[-1].stats.cached_tokens >= len(ids) - 4


def test_a_cancelled_prefill_is_a_prefix(two, tokenizer):
    engine, reference = two
    scheduler, prompt = Scheduler(engine, tokenizer, prefill_chunk=32), text(200)
    scheduler.add(Request(text(9, 1), GREEDY, 99))
    scheduler.step()
    number = scheduler.add(Request(prompt, GREEDY, 20))
    for _ in range(4):
        scheduler.step()
    scheduler.cancel(number)
    assert engine.places[1].tokens == prompt[:64] and not scheduler.idle
    scheduler.add(Request(prompt, GREEDY, 20))
    tokens = []
    while not scheduler.idle:
        tokens += scheduler.step()
    row = [token for token in tokens if token.request == 2]
    assert ids_of([row]) == ids_of([alone(reference, tokenizer, Request(prompt, GREEDY, 20))])
    assert row[-1].stats.cached_tokens == 64


def test_requests_at_once_have_a_row_each(two, tokenizer):
    """Two that begin alike, and two that are the same: each has its own answer."""
    engine, reference = two
    shared = text(50)
    requests = [Request(shared + text(5, i // 2), SamplingParams(seed=i % 3), 30) for i in range(8)]
    expected = [alone(reference, tokenizer, request) for request in requests]
    rows = run_rows(engine, tokenizer, requests)
    assert ids_of(rows) == ids_of(expected)
    assert [row[-1].stats.cached_tokens for row in rows] == [0, 54, 50, 54, 50, 54, 50, 54]
    assert len({tuple(row) for row in ids_of(rows)}) > 4


def test_a_row_given_to_another_conversation_keeps_nothing_of_the_old(two, tokenizer):
    """Penalties count what a text has, and the cache what it holds: neither has anything of the text before."""
    engine, reference = two
    params = SamplingParams(0, repetition_penalty=1.8, frequency_penalty=1.0, bad_words=())
    long = [Request(text(150, seed), params, 60) for seed in range(2)]
    short = [Request(text(30, 9) + text(10, seed), params, 60) for seed in range(6)]
    expected = [alone(reference, tokenizer, request) for request in [*long, *short]]
    assert ids_of(run_rows(engine, tokenizer, [*long, *short])) == ids_of(expected)


def test_windows_go_on_where_their_rings_still_hold_what_is_seen(folders, tokenizer, monkeypatch):
    """And are run anew where they do not; whatever a row held before, a shorter text's ring is right as well."""
    engine, reference = (Engine(load_model(folders("mistral"))) for _ in range(2))
    engine.setup(2, LENGTH)
    reference.setup(1, LENGTH)
    for free in (0, 1):  # the row itself, or one that it is copied to
        for cut in (160, 112, 111, 20):
            monkeypatch.undo()
            engine.forget()
            ids = text(120)
            (row,) = run_rows(engine, tokenizer, [Request(ids, GREEDY, 40)])
            ids += [token.id for token in row]
            request = Request(ids[:cut] + text(3), GREEDY, 20)
            take = partial(Engine.take, engine)
            monkeypatch.setattr(engine, "take", lambda request, _, free=free, take=take: take(request, [free]))
            (row,) = run_rows(engine, tokenizer, [request])
            assert ids_of([row]) == ids_of([alone(reference, tokenizer, request)])
            # 159 positions were written, of which a ring holds 55; the first new token sees 6 before it.
            assert row[-1].stats.cached_tokens == (min(cut, 159) if cut > 110 else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Which row


def places_of(engine, *texts):
    engine.forget()
    for row, (tokens, used) in enumerate(texts):
        place = engine.places[row]
        place.tokens, place.used, place.prompt_length = list(tokens), used, len(tokens)
    return engine.places


def test_which_row_a_prompt_goes_to(base_folder):
    engine = Engine(load_model(base_folder))
    engine.setup(4, LENGTH)
    a, b, c, new = text(40, 1), text(60, 2), text(50, 3), text(20, 4)
    system = text(30, 5)
    choose = partial(places_of, engine)
    # Where it continues what a row holds, rather than an empty one.
    assert choose((a, 1), (b, 2), ([], 0), (c, 3)).choose(b + new, range(4)) == (1, 1, 60)
    # Another conversation goes to an empty row, with what it shares with one that goes on.
    places = choose((system + a, 1), ([], 0), (b, 2), (c, 3))
    assert places.choose(system + new, range(4)) == (1, 0, 30)
    assert places.choose(system + new, [2, 3]) == (2, 0, 30)  # no row is empty: the one that was used the longest ago
    # A conversation that was changed takes its own row, if none is empty.
    assert choose((a, 1), (b, 2), (c, 4), (system, 3)).choose(c[:40] + new, range(4)) == (2, 2, 40)
    assert choose((a, 1), (b, 2), (c, 4), ([], 0)).choose(c[:40] + new, range(4)) == (3, 2, 40)
    # The longer of two that it continues; a source that is busy; the least used of equals.
    assert choose((a, 1), (a + b, 2), ([], 0), (c, 3)).choose(a + b + new, range(4)) == (1, 1, 100)
    assert choose((a, 1), (a + b, 2), (new, 4), (c, 3)).choose(a + b + new, [0, 2, 3]) == (0, 1, 100)
    assert choose((a, 4), (a, 2), (b, 1), (c, 3)).choose(a + new, range(4))[0] == 1
    # Nothing is shared, or too little to matter.
    assert choose((a, 4), (b, 3), (c, 2), (new, 5)).choose(system, range(4)) == (2, 2, 0)
    few = LEAST_SHARED - 1
    assert places_of(engine, (a, 1)).choose(a[:few] + b, range(4))[2] == 0
    assert places_of(engine, (a, 1)).choose(a[: few + 1] + b, range(4))[2] == few + 1
    assert places_of(engine, (a, 1)).choose(a[:5], range(4))[2] == 4  # all but the last, however few


def test_a_conversation_survives_others_while_rows_are_empty(base_folder, tokenizer):
    engine = Engine(load_model(base_folder))
    engine.setup(4, LENGTH)
    first = Request(text(50), GREEDY, 10)
    (said,) = ids_of(run_rows(engine, tokenizer, [first]))
    for seed in range(1, 4):
        run_rows(engine, tokenizer, [Request(text(50, seed), GREEDY, 10)])
    (row,) = run_rows(engine, tokenizer, [Request(first.prompt + said + text(5), GREEDY, 10)])
    assert row[-1].stats.cached_tokens == 59
    for seed in range(4, 7):  # the others are older now
        run_rows(engine, tokenizer, [Request(text(50, seed), GREEDY, 10)])
    (row,) = run_rows(engine, tokenizer, [Request(first.prompt + said + text(5, 9), GREEDY, 10)])
    assert row[-1].stats.cached_tokens == 60


def test_how_much_of_a_prompt_is_usable(base_folder):
    engine = Engine(load_model(base_folder))
    engine.setup(1, LENGTH)
    usable, draw = engine.places.usable, random.Random(0)
    for _ in range(300):
        a = [draw.randint(0, 1) for _ in range(draw.randint(0, 30))]
        b = a[: draw.randint(0, 30)] + [draw.randint(0, 1) for _ in range(draw.randint(1, 10))]
        shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        shared = min(shared, len(b) - 1)
        assert usable(Place(a), b) == (shared if shared >= LEAST_SHARED or shared == len(b) - 1 else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def test_a_long_prompt_stops_nobody(two, tokenizer):
    """Between two tokens of a text that runs, no more of another prompt is run than a piece."""
    engine, reference = two
    scheduler = Scheduler(engine, tokenizer, prefill_chunk=40)
    running, coming = Request(text(30), GREEDY, 60), Request(text(190, 1), GREEDY, 5)
    scheduler.add(running)
    rows = [[], []]
    held, pieces = 0, []
    while not scheduler.idle:
        if len(rows[0]) == 5 and not rows[1] and scheduler._prefilling is None:
            scheduler.add(coming)
        before = len(engine.places[1].tokens)
        tokens = scheduler.step()
        if not rows[1] and len(engine.places[1].tokens) > before:
            held += len(engine.places[1].tokens) - before
        for token in tokens:
            rows[token.request].append(token)
            if token.request == 0:
                pieces.append(held)
                held = 0
    assert max(pieces) == 40 and sum(pieces) == 190
    assert ids_of(rows) == ids_of([alone(reference, tokenizer, request) for request in (running, coming)])


def test_short_prompts_share_a_piece(two, tokenizer):
    engine, _ = two
    engine.setup(8, LENGTH)
    scheduler = Scheduler(engine, tokenizer, prefill_chunk=100)
    for seed in range(7):
        scheduler.add(Request(text(10, seed), GREEDY, 50))
    told = [[token.request for token in scheduler.step()] for _ in range(10)]
    # At first as many as fit, three of them after a step: each costs as much as 32 tokens do.
    assert told == [[0], [1], [2], [0, 1, 2], [3], [4], [5], [0, 1, 2, 3, 4, 5], [6], [0, 1, 2, 3, 4, 5, 6]]


def test_an_echo_runs_the_whole_prompt_in_pieces(two, tokenizer):
    engine, reference = two
    engine.setup(2, LENGTH, logprobs=1)
    reference.setup(1, LENGTH, logprobs=1)
    request = Request(text(130), GREEDY, 5, echo=True)
    expected = alone(reference, tokenizer, request)
    scheduler = Scheduler(engine, tokenizer, prefill_chunk=50)
    scheduler.add(Request(text(130), GREEDY, 90))
    scheduler.step()
    scheduler.add(request)
    row = []
    while not scheduler.idle:
        row += [token for token in scheduler.step() if token.request == 1]
    assert [token.id for token in row] == [token.id for token in expected] and row[-1].stats.cached_tokens == 0
    assert [token.of_prompt for token in row] == [True] * 130 + [False] * 5
    for mine, theirs in zip(row[1:], expected[1:], strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
