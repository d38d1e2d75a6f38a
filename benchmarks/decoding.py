"""What ways to decode gain or cost, beside plain decoding in the same rounds: for bench.py.

measure_speculation(models, draft, tokenizer, new_tokens=128, rounds=3)   # draft model, prompt lookup
measure_ragged(models, tokenizer, rows=16, rounds=3)                      # a batch whose rows are refilled
measure_sampling(models, new_tokens=32, rounds=5)                         # filters, penalties, log-probabilities
"""

import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.models import rebuild
from checkpoint import DEMO
from engine import Engine, Request
from errors import UserError, log
from model import Transformer
from sampling import SamplingParams
from scheduler import generate
from tokenizer import Tokenizer

LENGTH = 1024  # of the KV caches
GREEDY = SamplingParams(temperature=0.0)
EVERYTHING = SamplingParams(
    temperature=0.8,
    top_k=50,
    top_p=0.95,
    min_p=0.02,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    logit_bias=((5, 1.0), (9, -2.0)),
    bad_words=tuple(tuple(range(i, i + 4)) for i in range(16)),
    min_new_tokens=8,
    seed=1,
)
# Classes of the held-out text and other names for them.
RENAMED = {"_localized_month": "_local_month", "unix_dialect": "unix_format", "DictReader": "MapReader",
           "different_locale": "other_locale"}  # fmt: skip


def make_engine(
    model: Transformer,
    rows: int = 1,
    draft: Transformer | None = None,
    prompt_lookup: bool = False,
    plain: bool = True,
    logprobs: int | None = None,
) -> Engine:
    """An engine with caches and compiled code of its own."""
    draft = None if draft is None else rebuild(draft)
    engine = Engine(rebuild(model), compile=True, draft=draft, prompt_lookup=prompt_lookup)
    engine.setup(rows, LENGTH, plain=plain, logprobs=logprobs, bad_words=(0, 0) if plain else (16, 4))
    engine.warm_up()
    return engine


def held_out_prompts(tokenizer: Tokenizer, count: int = 10, length: int = 96) -> list[list[int]]:
    """Pieces of the demo's held-out text, evenly spread, each from the start of a line."""
    lines = (DEMO.parent / "heldout.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    firsts = (i * len(lines) // count for i in range(count))
    return [tokenizer.encode("".join(lines[first : first + 60]))[:length] for first in firsts]


def editing_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """A class of the held-out text each, and the first lines of a copy under another name."""
    text, prompts = (DEMO.parent / "heldout.txt").read_text(encoding="utf-8"), []
    for name, other in RENAMED.items():
        begin = text.index(f"class {name}")
        original = text[begin : text.index("\n\n\n", begin)]
        copy = original.replace(name, other)
        prompts.append(tokenizer.encode(f"{original}\n\n\n{copy[: copy.index(chr(10), 60) + 1]}"))
    return prompts


def measure_speculation(
    models: Mapping[str, Transformer], draft: Transformer, tokenizer: Tokenizer, new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Greedy tokens a second of one row, each way to speculate, and how many times plain decoding that is."""
    tasks = {"held-out text": held_out_prompts(tokenizer), "editing": editing_prompts(tokenizer)}
    longest = max(len(prompt) for prompts in tasks.values() for prompt in prompts)
    if longest + new_tokens > LENGTH:
        raise UserError(f"--new_tokens {new_tokens} after prompts of up to {longest} exceed {LENGTH}; give fewer")
    found = []
    for mode, model in models.items():
        ways = {
            "plain": make_engine(model),
            "draft": make_engine(model, draft=draft),
            "prompt lookup": make_engine(model, prompt_lookup=True),
            "both": make_engine(model, draft=draft, prompt_lookup=True),
        }
        for task, prompts in tasks.items():
            rates: dict[str, list[float]] = {way: [] for way in ways}
            accepted, steps = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
            texts: dict[str, list[list[int]]] = {way: [] for way in ways}
            draw = random.Random(0)
            for number in range(rounds):
                seconds = dict.fromkeys(ways, 0.0)
                for prompt in prompts:  # each by all ways in turn: the machine changes within seconds
                    for way, engine in draw.sample(sorted(ways.items()), len(ways)):
                        request = Request(prompt, GREEDY, new_tokens)
                        texts[way].append([token.id for token in generate(engine, tokenizer, [request])])
                        seconds[way] += engine.stats.decode_seconds
                        accepted[way] += engine.stats.accepted
                        steps[way] += engine.stats.steps
                for way in ways:
                    rates[way].append(len(prompts) * (new_tokens - 1) / seconds[way])
                told = ", ".join(f"{way} {rates[way][-1]:.1f}" for way in ways)
                log(f"{mode}, {task}, round {number + 1} of {rounds}, tok/s: {told}")
            for way in ways:
                ratios = [one / plain for one, plain in zip(rates[way], rates["plain"], strict=True)]
                found.append({
                    "mode": mode, "task": task, "way": way, "tok_s": rates[way],
                    "decode_tok_s": statistics.median(rates[way]), "times_plain": statistics.median(ratios),
                    "same_text": texts[way] == texts["plain"], "tokens_a_step": 1 + accepted[way] / steps[way],
                })  # fmt: skip
    return found


def measure_ragged(
    models: Mapping[str, Transformer], tokenizer: Tokenizer, rows: int, rounds: int
) -> list[dict[str, Any]]:
    """Tokens a second, prefills included, of twice as many prompts as there are rows, against one after another."""
    draw = random.Random(0)
    vocabulary = min(model.config.vocab_size for model in models.values())
    requests = [
        Request([draw.randrange(vocabulary) for _ in range(draw.randint(8, 64))], GREEDY, draw.randint(32, 128))
        for _ in range(2 * rows)
    ]
    total = sum(request.max_new_tokens for request in requests)
    found = []
    for mode, model in models.items():
        rates: dict[int, list[float]] = {1: [], rows: []}
        engines = {count: make_engine(model, count) for count in rates}
        for number in range(rounds):
            for count, engine in engines.items():
                engine.forget()
                for _ in generate(engine, tokenizer, requests):
                    pass
                rates[count].append(total / (engine.stats.prefill_seconds + engine.stats.decode_seconds))
                log(f"{mode}, round {number + 1} of {rounds}: {count} at a time {rates[count][-1]:.1f} tok/s")
        one, many = (statistics.median(values) for values in rates.values())
        found.append({"mode": mode, "prompts": len(requests), "rows": rows, "tok_s": rates[rows],
                      "single_tok_s": one, "decode_tok_s": many, "times_one": many / one})  # fmt: skip
    return found


def seconds_of_step(engine: Engine) -> float:
    begun = time.perf_counter()
    engine.step(0, engine.model.max_seq_length)[0].tolist()
    return time.perf_counter() - begun


def measure_sampling(models: Mapping[str, Transformer], new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """What sampling adds to a decode step, in milliseconds: all filters and penalties, and five log-probabilities."""
    found = []
    for mode, model in models.items():
        ways = {
            "greedy": (make_engine(model), GREEDY),
            "all filters and penalties": (make_engine(model, plain=False), EVERYTHING),
            "greedy, 5 logprobs": (make_engine(model, logprobs=5), GREEDY),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for engine, params in ways.values():
            engine.start(0, Request(list(range(64)), params, 1))
        for number in range(rounds * new_tokens):  # a step in turn: the machine changes within seconds
            for way, (engine, _) in random.Random(number).sample(sorted(ways.items()), len(ways)):
                engine.sampler.position.fill_(100)
                times[way].append(seconds_of_step(engine))
        base = statistics.median(times["greedy"])
        for way, values in times.items():
            step = statistics.median(values)
            found.append({"mode": mode, "vocab_size": model.config.vocab_size, "way": way, "step_ms": step * 1e3,
                          "added_ms": (step - base) * 1e3, "added_share": step / base - 1})  # fmt: skip
    return found
