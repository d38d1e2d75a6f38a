"""The engine against transformers: greedy tokens, log-probabilities, refilled batches, what the cache keeps."""

import functools
import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import GREEDY, greedy, ids_of, nothing_compiles, run_rows, set_up

from checkpoint import load_model
from convert_hf_checkpoint import convert
from engine import Engine, Request
from errors import UserError
from sampling import SamplingParams
from scheduler import generate

SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=1)
HOT = SamplingParams(temperature=1.5, seed=7)


@functools.cache
def prompt(length, seed=0):
    return torch.randint(5, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(engine, tokenizer, requests, *shape, **others):
    return run_rows(set_up(engine, requests, *shape, **others), tokenizer, requests)


def theirs(reference, ids, count, **others):
    return greedy(reference, ids, count, eos_token_id=None, **others)


def told(rows):
    """What was said, without how long it took."""
    return [[replace(token, request=0, stats=None) for token in row] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("length", [1, 7, 511, 512, 513, 600, 1100])
def test_greedy_tokens_are_those_of_transformers(reference, engine, tokenizer, length):
    """The prefill chunk is 512 tokens."""
    (ours,) = ids_of(run(engine, tokenizer, [Request(prompt(length), GREEDY, 64)]))
    assert ours == theirs(reference, prompt(length), 64)
    assert len(set(ours)) > 10  # or it would show little


def test_settings_apply_as_in_transformers(reference, engine, tokenizer):
    """In a batch with a request that has none of them."""
    (free,) = ids_of(run(engine, tokenizer, [Request(prompt(20), GREEDY, 30)]))
    params = SamplingParams(
        temperature=0,
        repetition_penalty=1.2,
        logit_bias=((free[3], -2.0), (77, 1.5)),
        bad_words=((free[0],), (free[1], free[2])),
        min_new_tokens=12,
    )
    eos = [free[4], free[7], free[9]]
    requests = [Request(prompt(20), params, 30, frozenset(eos)), Request(prompt(20), GREEDY, 30)]
    ours = ids_of(run(engine, tokenizer, requests))
    expected = greedy(
        reference,
        prompt(20),
        30,
        eos_token_id=eos,
        sequence_bias={(token,): bias for token, bias in params.logit_bias},
        repetition_penalty=params.repetition_penalty,
        bad_words_ids=[list(word) for word in params.bad_words],
        min_new_tokens=params.min_new_tokens,
    )
    assert ours == [expected, free] and expected != free and len(expected) > 12


RAGGED = [(1100, GREEDY), (1, SAMPLED), (600, SamplingParams(0.5, min_p=0.05, seed=2**40)), (37, GREEDY)]


def test_ragged_rows_are_each_row_alone(engine, tokenizer):
    requests = [Request(prompt(length), params, 40) for length, params in RAGGED]
    together = ids_of(run(engine, tokenizer, requests))
    for request, row in zip(requests, together, strict=True):
        assert [row] == ids_of(run(engine, tokenizer, [request]))
    assert len(set(map(tuple, together))) == len(RAGGED)


@pytest.fixture(scope="module")
def mixed(engine, tokenizer):
    """Requests that end at different times and for different reasons, with the tokens that each gives alone."""
    penalized = SamplingParams(0.8, 40, 0.9, 0.01, 1.2, 0.5, -0.3, ((9, 2.0),), ((11,), (12, 13)), 3, seed=3)
    requests = [
        Request(prompt(30), GREEDY, 25),
        Request(prompt(30), SAMPLED, 9),  # the same prompt, now and later
        Request(prompt(530, 1), HOT, 1),
        Request(prompt(1, 2), penalized, 31),
        Request(prompt(30), replace(HOT, seed=8), 17),
        Request(prompt(200, 3), GREEDY, 2),
        Request(prompt(5, 4), penalized, 12),
        Request(prompt(64, 5), SAMPLED, 40),
        Request(prompt(64, 5), GREEDY, 3),
    ]
    free = run(engine, tokenizer, [requests[0]])[0], run(engine, tokenizer, [requests[7]])[0]
    requests.append(replace(requests[0], eos_ids=frozenset((free[0][6].id, 399))))
    requests.append(replace(requests[7], stop=("".join(token.text for token in free[1])[20:23],)))
    return requests, [told(run(engine, tokenizer, [request]))[0] for request in requests]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 16])
def test_finished_rows_are_refilled(engine, tokenizer, mixed, batch_size):
    """Whatever else was or is in the batch, a request yields what it yields alone."""
    requests, alone = mixed
    assert told(run(engine, tokenizer, requests, batch_size)) == alone
    assert told(run_rows(engine, tokenizer, requests[::-1])) == alone[::-1]
    assert {row[-1].finish_reason for row in alone} == {"stop", "length"}


def test_requests_are_taken_when_a_row_is_free(engine, tokenizer):
    """Not before: a file of prompts may be longer than memory."""
    taken = 0

    def requests():
        nonlocal taken
        for count in (5, 3, 4, 2):
            taken += 1
            yield Request(prompt(4), GREEDY, count)

    set_up(engine, [Request(prompt(4), GREEDY, 5)], 2)
    seen = []
    for token in generate(engine, tokenizer, requests()):
        seen.append((token.request, taken))
    assert seen[0] == (0, 1)  # the first text has begun before the second is asked for
    assert [dict(seen[::-1])[number] for number in range(4)] == [1, 2, 3, 4]
    assert len(seen) == 14


def test_what_was_left_in_the_middle_does_no_harm(engine, tokenizer, mixed):
    requests, alone = mixed
    set_up(engine, requests, 3)
    for last in (2, 20, 50):
        list(itertools.islice(generate(engine, tokenizer, requests), last))
        assert told(run_rows(engine, tokenizer, requests[3:5])) == alone[3:5]


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_ragged_rows_with_a_stretched_context(kind, hf_folder, tokenizer, tmp_path):
    """Dynamic NTK turns a row by the length that this row has reached, not by the longest row's."""
    folder = tmp_path / "hf"
    shutil.copytree(hf_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": 64, "rope_parameters": {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}}
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "ours")
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = Engine(load_model(tmp_path / "ours"))
    requests = [Request(prompt(length), GREEDY, 40) for length in (10, 70, 150)]
    rows = ids_of(run(engine, tokenizer, requests, 3, 240))
    assert rows == ids_of(run(engine, tokenizer, requests, 2, 240))
    for request, row in zip(requests, rows, strict=True):  # in this order transformers' state does no harm
        assert row == theirs(reference, request.prompt, 40)


def test_a_prompt_goes_on_from_the_cache(reference, engine, tokenizer):
    """As a conversation does, whatever lies in the cache behind its context."""
    ids = prompt(700, 3)
    set_up(engine, [Request(ids, GREEDY, 1)])
    for start in (8, 560, 699):
        engine.forget()
        run_rows(engine, tokenizer, [Request(ids[:start], GREEDY, 30)])
        (row,) = run_rows(engine, tokenizer, [Request(ids, GREEDY, 20)])
        assert ids_of([row]) == [theirs(reference, ids, 20)] and row[-1].stats.cached_tokens == start
    # The text before counts as such.
    params = SamplingParams(0, repetition_penalty=1.5)
    set_up(engine, [Request(ids, params, 1)])
    run_rows(engine, tokenizer, [Request(ids[:500], params, 30)])
    (row,) = ids_of(run_rows(engine, tokenizer, [Request(ids, params, 20)]))
    assert row == theirs(reference, ids, 20, repetition_penalty=1.5) != theirs(reference, ids, 20)


@pytest.mark.parametrize("length, count", [(600, 20), (100, 28), (513, 1), (30, 98)])
def test_padding_beyond_the_end_of_the_cache(reference, base_folder, tokenizer, monkeypatch, length, count):
    """The chunks of a compiled prefill are padded to 32, 128 or 512, here past what the cache holds."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # which takes half a minute
    engine = Engine(load_model(base_folder), compile_prefill=True)
    requests = [Request(ids, GREEDY, count) for ids in (prompt(length), prompt(3))]
    rows = ids_of(run(engine, tokenizer, requests, 2, length + count))
    assert rows == [theirs(reference, request.prompt, count) for request in requests]


def test_rows_that_were_never_used_stay_untouched(engine, tokenizer):
    """Their memory is taken when they are: a step that moves them along with others writes nothing to them."""
    set_up(engine, [Request(prompt(30), GREEDY, 5)], 8)
    run_rows(engine, tokenizer, [Request(prompt(30, seed), GREEDY, 5) for seed in range(3)])  # a step of four rows
    for layer in engine.model.layers:
        caches = layer.attention.kv_cache
        for cache in (caches.k, caches.v):
            assert cache[:3].any(dim=(1, 2, 3)).all() and not cache[3:].any()
            assert not cache[1:, :, -1].any()


def test_a_seed_gives_its_text_in_any_company(engine, tokenizer):
    def sample(*seeds):
        params = [SamplingParams(temperature=1.0, seed=seed) for seed in seeds]
        return ids_of(run(engine, tokenizer, [Request(prompt(5), each, 20) for each in params]))

    one, two = sample(1, 2)
    assert one != two
    assert sample(2, 1, 1) == [two, one, one]


def test_samples_of_one_prompt_prefill_it_once(engine, tokenizer, monkeypatch):
    """Copied to the rows of the others, it gives what prefills of their own give."""
    ids, other = prompt(600), Request(prompt(3, 1), GREEDY, 1)
    requests = [Request(ids, SamplingParams(seed=seed), 10 + seed) for seed in range(5)]
    apart = [request for each in requests for request in (each, other)]
    calls, hidden = [], engine.model.hidden
    monkeypatch.setitem(
        engine._hidden, engine.model, lambda tokens, *rest: calls.append(len(tokens[0])) or hidden(tokens, *rest)
    )
    set_up(engine, apart, 3)
    expected = ids_of(run_rows(engine, tokenizer, apart))[::2]
    assert calls[:2] == [512, 88] and max(calls[2:]) <= 3
    calls.clear()
    engine.forget()
    assert ids_of(run_rows(engine, tokenizer, requests)) == expected
    assert calls == [512, 88, 1, 1, 1, 1]
    assert len(set(map(tuple, expected))) == 5


def test_a_prefill_that_was_interrupted_leaves_nothing_that_is_taken_for_whole(engine, tokenizer, monkeypatch):
    """Ctrl-C in the second chunk of a prompt, in the row that held another."""
    first, second = (Request(prompt(length, seed), GREEDY, 10) for length, seed in ((600, 0), (700, 1)))
    (wanted,) = ids_of(run(engine, tokenizer, [second]))
    (expected,) = ids_of(run(engine, tokenizer, [first]))
    hidden, calls = engine.model.hidden, []

    def interrupted(*inputs):
        calls.append(inputs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return hidden(*inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(engine._hidden, engine.model, interrupted)
        run_rows(engine, tokenizer, [second])
    assert engine.places[0].tokens == second.prompt[:512]
    assert ids_of(run_rows(engine, tokenizer, [first])) == [expected]
    assert ids_of(run_rows(engine, tokenizer, [second])) == [wanted]


# ---------------------------------------------------------------------------------------------------------------------
# Where a text ends


def test_end_tokens(engine, tokenizer):
    """Each row ends at the first of several ids, the others go on; the last token says why."""
    requests = [Request(prompt(20, seed), GREEDY, 30) for seed in range(4)]
    free = ids_of(run(engine, tokenizer, requests))
    eos_ids = frozenset((free[0][4], free[2][11], 10**6))
    rows = run(engine, tokenizer, [replace(request, eos_ids=eos_ids) for request in requests])
    for row, all_ids in zip(rows, free, strict=True):
        end = next((i for i, token in enumerate(all_ids) if token in eos_ids), None)
        ids = [token.id for token in row]
        assert ids == (all_ids if end is None else all_ids[: end + 1])
        assert [token.finish_reason for token in row] == [None] * (len(row) - 1) + ["length" if end is None else "stop"]
        said = ids if end is None else ids[:-1]
        assert "".join(token.text for token in row) == tokenizer.decode(said)
    assert {rows[0][-1].finish_reason, rows[2][-1].finish_reason} == {"stop"}


def test_an_end_token_may_be_the_first_or_the_last_one_allowed(engine, tokenizer):
    request = Request(prompt(20), GREEDY, 10)
    (free,) = ids_of(run(engine, tokenizer, [request]))
    first = free.index(free[9])  # the last token, unless it came before
    for eos, count, expected in ((free[0], 10, 1), (free[0], 1, 1), (free[9], first + 1, first + 1)):
        (row,) = run(engine, tokenizer, [replace(request, max_new_tokens=count, eos_ids=frozenset((eos,)))])
        assert len(row) == expected and row[-1].finish_reason == "stop"
    assert run(engine, tokenizer, [replace(request, max_new_tokens=1)])[0][0].finish_reason == "length"


def test_pieces_of_text_join_to_the_decoded_tokens(engine, tokenizer):
    """The tokens of random weights are pieces of characters more often than not."""
    requests = [Request(prompt(5), SamplingParams(temperature=1.5, seed=seed), 40) for seed in range(20)]
    for row in run(engine, tokenizer, requests, 4):
        assert "".join(token.text for token in row) == tokenizer.decode([token.id for token in row])
        assert len(row) == 40


def test_stop_strings(engine, tokenizer):
    """The text is that of a run without them, cut where str.find finds one; no token is drawn in vain."""
    requests = [Request(prompt(5), SamplingParams(temperature=1.5, seed=seed), 40) for seed in range(12)]
    free = run(engine, tokenizer, requests, 4)
    wanted, across = [], 0
    for request, row in zip(requests, free, strict=True):
        text, seed = "".join(token.text for token in row), request.params.seed
        start = 3 * seed + 2
        stop = text[start : start + 1 + seed % 5]
        across += not any(stop in token.text for token in row)
        wanted.append(replace(request, stop=(stop, "never to be seen")))
    assert across > 4  # most begin in one token and end in another
    for request, row, whole in zip(wanted, run(engine, tokenizer, wanted, 3), free, strict=True):
        stop, text = request.stop[0], "".join(token.text for token in whole)
        assert "".join(token.text for token in row) == text[: text.find(stop)]
        assert row[-1].finish_reason == "stop" and [token.finish_reason for token in row[:-1]] == [None] * (
            len(row) - 1
        )
        assert [token.id for token in row] == [token.id for token in whole[: len(row)]]
        shown = ["".join(token.text for token in whole[:n]) for n in (len(row) - 1, len(row))]
        assert stop not in shown[0] and (stop in shown[1] or len(row) == 40)


def test_what_a_stop_string_held_back_is_shown_at_the_end(engine, tokenizer):
    request = Request(prompt(5), SAMPLED, 20)
    (free,) = run(engine, tokenizer, [request])
    text = "".join(token.text for token in free)
    (row,) = run(engine, tokenizer, [replace(request, stop=(text[-3:] + "!",))])
    assert "".join(token.text for token in row) == text and row[-1].finish_reason == "length"


def test_the_last_token_may_fill_the_cache(reference, engine, tokenizer):
    (row,) = ids_of(run(engine, tokenizer, [Request(prompt(1390), GREEDY, 10)]))
    assert row == theirs(reference, prompt(1390), 10)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities and statistics


@pytest.mark.parametrize("top", [0, 3])
@torch.inference_mode()
def test_logprobs_and_echo(reference, engine, tokenizer, top):
    """The model's own, before anything that the settings do to them; of a prompt from its second token on."""
    params = SamplingParams(0.7, top_k=5, repetition_penalty=1.3, seed=5)
    requests = [
        Request(prompt(130), params, 6, echo=True),
        Request(prompt(130), GREEDY, 4),  # the same prompt, but its hidden states were not kept for an echo
        Request(prompt(130), params, 3, echo=True),
        Request(prompt(600), GREEDY, 2, echo=True),
        Request(prompt(1), params, 5, echo=True),
        Request(prompt(65), params, 5, echo=True, stop=("\0",)),
    ]
    for request, row in zip(requests, run(engine, tokenizer, requests, 2, logprobs=top), strict=True):
        new = [token for token in row if not token.of_prompt]
        echoed = row[: -len(new)]
        assert [token.of_prompt for token in echoed] == [True] * (len(request.prompt) if request.echo else 0)
        assert len(new) == request.max_new_tokens
        ids = request.prompt + [token.id for token in new]
        expected = reference(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        if request.echo:
            assert [token.id for token in echoed] == request.prompt
            assert "".join(token.text for token in echoed) == tokenizer.decode(request.prompt)
            assert (echoed[0].logprob, echoed[0].top) == (None, ())
        for at, token in enumerate([*echoed[1:], *new], start=len(ids) - len(new) - len(echoed[1:])):
            assert token.id == ids[at] and len(token.top) == top
            assert token.logprob == pytest.approx(float(expected[at - 1, token.id]), abs=1e-4)
            values, _ = expected[at - 1].topk(top)
            assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
            for other, value in token.top:
                assert value == pytest.approx(float(expected[at - 1, other]), abs=1e-4)


def test_echo_without_logprobs(engine, tokenizer):
    (row,) = run(engine, tokenizer, [Request(prompt(70), GREEDY, 3, echo=True)])
    assert [token.id for token in row[:70]] == prompt(70) and len(row) == 73
    assert {(token.logprob, token.top) for token in row} == {(None, ())}


def test_statistics(engine, tokenizer, mixed):
    requests, _ = mixed
    rows = run(engine, tokenizer, requests, 3)
    total, stats = engine.stats, [row[-1].stats for row in rows]
    assert [token.stats for row in rows for token in row[:-1]] == [None] * (total.new_tokens - len(rows))
    for request, row, each in zip(requests, rows, stats, strict=True):
        assert (each.prompt_tokens, each.new_tokens, each.requests) == (len(request.prompt), len(row), 1)
        assert each.steps == len(row) - 1 and each.proposed == each.accepted == 0
        assert 0 < each.prefill_seconds <= total.prefill_seconds and each.prefill_seconds <= each.time_to_first_token
        assert (each.decode_seconds > 0) == (len(row) > 1) and each.decode_seconds <= total.decode_seconds
    for name in ("prompt_tokens", "cached_tokens", "new_tokens", "steps", "requests"):
        assert getattr(total, name) == sum(getattr(each, name) for each in stats)
    figures = total.report()
    assert figures["decode_rate"] == pytest.approx((total.new_tokens - len(rows)) / total.decode_seconds)
    assert figures["prefill_rate"] == pytest.approx((total.prompt_tokens - total.cached_tokens) / total.prefill_seconds)
    assert figures["peak_memory_gb"] > 0.01 and "acceptance_rate" not in figures
    assert f"decode {total.new_tokens} tokens" in str(total)


def test_bytes_read(engine, tokenizer):
    """Every weight once a step but the embedding, of which it reads a row, and the keys and values so far."""
    run(engine, tokenizer, [Request(prompt(10), GREEDY, 4)])
    model = engine.model
    weights = sum(tensor.nbytes for tensor in model.parameters()) - model.tok_embeddings.weight.nbytes
    position = 2 * 2 * 2 * 16 * 4  # K and V, layers, heads of 16 float32
    assert engine.stats.bytes_read == 3 * weights + (11 + 12 + 13) * position


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("ids, count", [([], 5), ([7], 0), ([7] * 1396, 5)])
def test_what_does_not_fit_is_a_value_error(engine, tokenizer, ids, count):
    set_up(engine, [Request([7], GREEDY, 1)])
    with pytest.raises(ValueError, match="do not fit"):
        list(generate(engine, tokenizer, [Request(ids, GREEDY, count)]))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_broken_weight_is_told(engine, base_folder, tokenizer, params):
    """Which prompt it concerns, and when; the others have what they have."""
    requests = [Request(prompt(5, seed), params, 10) for seed in range(3)]
    free = ids_of(run(engine, tokenizer, requests))
    seen = {*prompt(5, 0), *prompt(5, 2), *free[0], *free[2]}
    at = next(i for i, token in enumerate(free[1]) if token not in seen)
    broken = Engine(load_model(base_folder))
    broken.model.tok_embeddings.weight[free[1][at]] = torch.nan
    shown = []
    with pytest.raises(UserError, match=f"prompt 2: after {at + 1} new tokens? no token is possible.*NaN"):
        for token in generate(set_up(broken, requests), tokenizer, requests):
            shown.append((token.request, token.id))
    assert [i for request, i in shown if request == 1] == free[1][: at + 1]
    assert [i for request, i in shown if request == 0] == free[0][: at + 2]
    broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="prompt 1: after 0 new tokens"):
        run(broken, tokenizer, requests)


def test_when_everything_is_banned(engine, tokenizer):
    """No id alone is, but each that may follow a certain one."""
    (free,) = ids_of(run(engine, tokenizer, [Request(prompt(5), GREEDY, 6)]))
    last = free[2]
    words = tuple((last, token) for token in range(400))
    requests = [Request(prompt(4), GREEDY, 3), Request(prompt(5), SamplingParams(0, bad_words=words), 6)]
    with pytest.raises(UserError, match=f"prompt 2: after {free.index(last) + 1} new tokens?.*everything is banned"):
        run(engine, tokenizer, requests, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.slow
def test_compiled_tokens_are_the_eager_ones(base_folder, engine, tokenizer, mixed):
    """One compilation serves all positions, parameters and prompts: after warm_up nothing is compiled again."""
    plain = [Request(prompt(length), GREEDY, 40) for length in (100, 600, 1)]
    for batch_size, requests, others in ((1, plain, {}), (3, mixed[0], dict(logprobs=2))):
        compiled = set_up(Engine(load_model(base_folder), compile=True), requests, batch_size, **others)
        compiled.warm_up()
        with nothing_compiles():
            ours = run_rows(compiled, tokenizer, requests)
        rows = run(engine, tokenizer, requests, batch_size, **others)
        assert ids_of(ours) == ids_of(rows)
        for mine, token in zip(itertools.chain(*ours), itertools.chain(*rows), strict=True):
            assert (mine.text, mine.finish_reason) == (token.text, token.finish_reason)
            assert mine.logprob == pytest.approx(token.logprob, abs=1e-4)


@pytest.mark.slow
def test_a_compiled_prefill_gives_the_eager_tokens(base_folder, engine, tokenizer):
    """A prompt, or what goes on from a cache, in chunks of 32, 128 and 512: all compiled by warm_up."""
    torch._dynamo.reset()
    compiled = set_up(Engine(load_model(base_folder), compile_prefill=True), [Request([0], GREEDY, 1)])
    compiled.warm_up(600)
    compiled.warm_up(20)
    for start, end in ((0, 600), (0, 1024), (0, 590), (560, 600), (0, 20), (600, 620), (100, 101)):
        ids = prompt(end)
        compiled.forget()
        with nothing_compiles():
            if start:
                list(generate(compiled, tokenizer, [Request(ids[:start], GREEDY, 1)]))
            ours = run_rows(compiled, tokenizer, [Request(ids, GREEDY, 8)])
        assert ids_of(ours) == ids_of(run(engine, tokenizer, [Request(ids, GREEDY, 8)]))
