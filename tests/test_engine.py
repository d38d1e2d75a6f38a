"""The engine against transformers' generate: greedy tokens, ragged batches, what the cache keeps, compilation."""

import functools
import json
import shutil

import pytest
import torch
import transformers
from conftest import GREEDY, ids_of, run_rows

from checkpoint import load_model
from convert_hf_checkpoint import convert
from engine import Engine, generate
from sampling import SamplingParams

SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=1)


@functools.cache
def prompt(length, seed=0):
    return torch.randint(5, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def theirs(reference, ids, count):
    """Greedy tokens of transformers."""
    with torch.no_grad():
        output = reference.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("length", [1, 7, 511, 512, 513, 600, 1100])
def test_greedy_tokens_are_those_of_transformers(reference, engine, tokenizer, length):
    """The prefill chunk is 512 tokens."""
    (ours,) = ids_of(run_rows(engine, tokenizer, [prompt(length)], [GREEDY], 64))
    assert ours == theirs(reference, prompt(length), 64)
    assert len(set(ours)) > 10  # or it would show little


RAGGED = [(1100, GREEDY), (1, SAMPLED), (600, SamplingParams(0.5, min_p=0.05, seed=2**40)), (37, GREEDY)]


def test_ragged_rows_are_each_row_alone(engine, tokenizer):
    prompts, params = [prompt(length) for length, _ in RAGGED], [params for _, params in RAGGED]
    together = ids_of(run_rows(engine, tokenizer, prompts, params, 40))
    for row in range(len(RAGGED)):
        alone = ids_of(run_rows(engine, tokenizer, [prompts[row]], [params[row]], 40))
        assert together[row] == alone[0]
    assert len(set(map(tuple, together))) == len(RAGGED)


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
    engine.model.setup_caches(3, 240)
    prompts = [prompt(length) for length in (10, 70, 150)]  # in this order transformers' state does no harm
    rows = ids_of(run_rows(engine, tokenizer, prompts, [GREEDY] * 3, 40))
    for ids, row in zip(prompts, rows, strict=True):
        assert row == theirs(reference, ids, 40)


def test_starts_continue_from_the_cache(reference, engine, tokenizer):
    """Rows that stand at different places of what the cache holds go on as if they had come in one piece."""
    prompts = [prompt(700, 3), prompt(50, 4), prompt(20, 5)]
    starts = [560, 0, 19]
    before = [ids[:start] or [9] for ids, start in zip(prompts, starts, strict=True)]
    run_rows(engine, tokenizer, before, [SAMPLED] * 3, 30)  # leaves other tokens behind the prompts
    rest = [ids[start:] for ids, start in zip(prompts, starts, strict=True)]
    rows = ids_of(run_rows(engine, tokenizer, rest, [GREEDY] * 3, 40, starts=starts))
    assert rows == [theirs(reference, ids, 40) for ids in prompts]


@pytest.mark.parametrize("length, count", [(600, 20), (100, 28), (513, 1), (30, 98)])
def test_padding_beyond_the_end_of_the_cache(reference, base_folder, tokenizer, length, count):
    """The chunks of a compiled prefill are padded to 32, 128 or 512, here past what the cache holds."""
    engine = Engine(load_model(base_folder))
    engine.fixed_lengths = True  # what compile_prefill does, without the compiler
    engine.model.setup_caches(2, length + count)
    rows = ids_of(run_rows(engine, tokenizer, [prompt(length), prompt(3)], [GREEDY] * 2, count))
    assert rows == [theirs(reference, ids, count) for ids in (prompt(length), prompt(3))]


def test_end_tokens(engine, tokenizer):
    """Each row ends at the first of several ids, the others go on; the last token says why."""
    prompts = [prompt(20, seed) for seed in range(4)]
    free = ids_of(run_rows(engine, tokenizer, prompts, [GREEDY] * 4, 30))
    eos_ids = {free[0][4], free[2][11], 10**6}
    rows = run_rows(engine, tokenizer, prompts, [GREEDY] * 4, 30, eos_ids=eos_ids)
    for row, all_ids in zip(rows, free, strict=True):
        end = next((i for i, token in enumerate(all_ids) if token in eos_ids), None)
        ids = [token.id for token in row]
        assert ids == (all_ids if end is None else all_ids[: end + 1])
        assert [token.finish_reason for token in row] == [None] * (len(row) - 1) + ["length" if end is None else "stop"]
        said = ids if end is None else ids[:-1]
        assert "".join(token.text for token in row) == tokenizer.decode(said)
    assert {rows[0][-1].finish_reason, rows[2][-1].finish_reason} == {"stop"}


def test_an_end_token_may_be_the_first_or_the_last_one_allowed(engine, tokenizer):
    (free,) = ids_of(run_rows(engine, tokenizer, [prompt(20)], [GREEDY], 10))
    first = free.index(free[9])  # the last token, unless it came before
    for eos, count, expected in ((free[0], 10, 1), (free[0], 1, 1), (free[9], first + 1, first + 1)):
        (row,) = run_rows(engine, tokenizer, [prompt(20)], [GREEDY], count, eos_ids={eos})
        assert len(row) == expected and row[-1].finish_reason == "stop"
    assert run_rows(engine, tokenizer, [prompt(20)], [GREEDY], 1)[0][0].finish_reason == "length"


def test_pieces_of_text_join_to_the_decoded_tokens(engine, tokenizer):
    """The tokens of random weights are pieces of characters more often than not."""
    for seed in range(20):
        params = SamplingParams(temperature=1.5, seed=seed)
        (row,) = run_rows(engine, tokenizer, [prompt(5)], [params], 40)
        assert "".join(token.text for token in row) == tokenizer.decode([token.id for token in row])
        assert len(row) == 40


def test_a_seed_gives_its_text_in_any_company(engine, tokenizer):
    def sample(*seeds):
        params = [SamplingParams(temperature=1.0, seed=seed) for seed in seeds]
        return ids_of(run_rows(engine, tokenizer, [prompt(5)] * len(seeds), params, 20))

    one, two = sample(1, 2)
    assert one != two
    assert sample(2, 1, 1) == [two, one, one]


@pytest.mark.parametrize(
    "prompts, count, starts",
    [([[]], 5, None), ([[7], []], 5, None), ([[7]], 0, None), ([[7] * 1396], 5, None), ([[7] * 6], 5, [1390])],
)
def test_what_does_not_fit_is_a_value_error(engine, tokenizer, prompts, count, starts):
    with pytest.raises(ValueError, match="do not fit"):
        list(generate(engine, tokenizer, prompts, [GREEDY] * len(prompts), count, starts=starts))


def test_the_last_token_may_fill_the_cache(reference, engine, tokenizer):
    (row,) = ids_of(run_rows(engine, tokenizer, [prompt(1390)], [GREEDY], 10))
    assert row == theirs(reference, prompt(1390), 10)


@pytest.mark.slow
def test_compiled_tokens_are_the_eager_ones(base_folder, engine, tokenizer):
    """One compilation serves all positions, parameters and prompts: after warm_up nothing is compiled again."""
    torch._dynamo.reset()
    hot = SamplingParams(2.0, min_p=0.1, seed=5)
    for batch, runs in (
        (1, ((GREEDY, 100), (GREEDY, 600), (GREEDY, 1))),
        (3, ((SAMPLED, 100), (hot, 600), (SAMPLED, 1))),
    ):
        compiled = Engine(load_model(base_folder), compile=True)
        compiled.model.setup_caches(batch, 1400)
        compiled.warm_up([runs[0][0]] * batch)
        for params, length in runs:
            prompts = [prompt(length + 50 * row) for row in range(batch)]
            with torch._dynamo.config.patch(error_on_recompile=True):
                ours = ids_of(run_rows(compiled, tokenizer, prompts, [params] * batch, 64))
            assert ours == ids_of(run_rows(engine, tokenizer, prompts, [params] * batch, 64))


@pytest.mark.slow
def test_a_compiled_prefill_gives_the_eager_tokens(base_folder, engine, tokenizer):
    """A prompt, or what goes on from a cache, in chunks of 32, 128 and 512: all compiled by warm_up."""
    torch._dynamo.reset()
    compiled = Engine(load_model(base_folder), compile_prefill=True)
    compiled.model.setup_caches(1, 1400)
    compiled.warm_up([GREEDY], 600)
    compiled.warm_up([GREEDY], 20)
    for start, end in ((0, 600), (0, 1024), (0, 590), (560, 600), (0, 20), (600, 620), (100, 101)):
        ids = prompt(end)
        with torch._dynamo.config.patch(error_on_recompile=True):
            if start:
                list(generate(compiled, tokenizer, [ids[:start]], [GREEDY], 1))
            ours = run_rows(compiled, tokenizer, [ids[start:]], [GREEDY], 8, starts=[start])
        assert ids_of(ours) == ids_of(run_rows(engine, tokenizer, [ids], [GREEDY], 8))
