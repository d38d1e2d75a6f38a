"""Grammars: masks against another matcher over whole vocabularies, texts against what they are held to."""

import ast
import functools
import json
import math
import pickle
import random
import re
import shutil
import time

import numpy
import pytest
import regex
import tokenizers
import torch
from conftest import (
    GREEDY,
    assert_refused,
    converse,
    ids_of,
    make_tokenizer,
    nothing_compiles,
    parse,
    run_rows,
    set_up,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import DEMO, load_model
from engine import Engine, Request
from errors import UserError
from grammar import Grammars, packed
from grammar_trial import Trial
from sampling import Sampler, SamplingParams, unpacked
from scheduler import Scheduler, generate
from tokenizer import StreamingDetokenizer, load_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -20, "maximum": 120}, "maxItems": 3},
        "kind": {"enum": ["file", "folder", 'link\n"é']},
        "parent": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"id": {"type": "string", "pattern": "^[a-f0-9]{2,4}$"}, "hidden": {"type": "boolean"}},
            "required": ["hidden"],
            "additionalProperties": False,
        }
    },
}
ARITHMETIC = r"""
// a sum of products
start: term (("+" | "-") term)~0..3
term: factor ("*" factor)~0..2
factor: NUMBER | "(" start ")"
NUMBER: /0|[1-9][0-9]{0,2}/
%ignore " "
"""
CALL = r"[a-z_]{1,8}\((?:[0-9]{1,3}(?:, [0-9]{1,3}){0,2})?\) -> (?:日本|naïve|🙂)"


def fits_schema(text):
    """SCHEMA, by hand."""
    value = json.loads(text)
    assert set(value) <= set(SCHEMA["properties"]) and set(value) >= set(SCHEMA["required"])
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert isinstance(value["sizes"], list) and len(value["sizes"]) <= 3
    assert all(type(size) is int and -20 <= size <= 120 for size in value["sizes"])
    assert value["kind"] in SCHEMA["properties"]["kind"]["enum"]
    if value.get("parent") is not None:
        parent = value["parent"]
        assert set(parent) <= {"id", "hidden"} and isinstance(parent["hidden"], bool)
        assert re.fullmatch("[a-f0-9]{2,4}", parent.get("id", "ab"))


def fits_arithmetic(text):
    tree = ast.parse(text.strip(), mode="eval")
    allowed = (ast.Expression, ast.BinOp, ast.Constant, ast.Add, ast.Sub, ast.Mult)
    assert all(isinstance(node, allowed) for node in ast.walk(tree))
    assert all(int(number) < 1000 for number in re.findall("[0-9]+", text))


def fits_call(text):
    assert re.fullmatch(CALL, text)


def fits_object(text):
    assert isinstance(json.loads(text), dict)


KINDS = {  # how to ask for it, and what a finished text has to pass
    "json_schema": (lambda grammars: grammars.json_schema(SCHEMA), fits_schema),
    "json_object": (lambda grammars: grammars.json_object(), fits_object),
    "regex": (lambda grammars: grammars.regex(CALL), fits_call),
    "lark": (lambda grammars: grammars.lark(ARITHMETIC), fits_arithmetic),
}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers of all kinds

TOKENIZERS = ("byte-level", "sentencepiece", "llama", "metaspace")


@functools.cache
def tokenizer_of(kind, tmp):
    folder = tmp / kind
    folder.mkdir()
    if kind == "byte-level":
        make_tokenizer(folder)
    elif kind == "metaspace":
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=[*map(chr, range(33, 127)), *"日本ïé🙂\n\t"],
        )
        lines = (DEMO.parent / "heldout.txt").read_text().splitlines()[:300]
        backend.train_from_iterator([*lines, "    a", "\u2581\u2581b"], trainer)
        backend.save(str(folder / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        shutil.copy(DEMO / "tokenizer.model", folder)
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": kind == "llama"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module", params=TOKENIZERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def their_tokenizer(kind, tmp):
    return tokenizer_of(kind, tmp)


@functools.cache
def grammars_of(tokenizer):
    """For a model whose vocabulary is larger than the tokenizer's, with a second end token beyond it."""
    return Grammars(tokenizer, tokenizer.vocab_size + 37, [*tokenizer.eos_ids, tokenizer.vocab_size + 3])


def allowed_by(matcher, size):
    mask = torch.empty(-(-size // 32), dtype=torch.int32)
    matcher.fill(mask)
    return unpacked(mask)[:size]


def walk(constraint, tokenizer, seed, limit=400):
    """A random text -> the ids before the end, whether it has ended, and the matcher."""
    size, draw, matcher, ids = constraint.grammars.vocab_size, random.Random(seed), constraint.start(), []
    while not matcher.finished and len(ids) < limit:
        possible = allowed_by(matcher, size).nonzero().flatten().tolist()
        token = draw.choice(possible)
        matcher.accept(token)
        if token not in constraint.grammars.eos_ids:
            ids.append(token)
    return ids, matcher.finished, matcher


def test_tokenizers_differ_where_a_text_begins(tmp):
    first = {kind: grammars_of(tokenizer_of(kind, tmp)).vocabulary.first for kind in TOKENIZERS}
    assert [bool(first[kind]) for kind in TOKENIZERS] == [False, False, True, True]
    for kind in ("llama", "metaspace"):
        space = tokenizer_of(kind, tmp).backend.token_to_id("▁")
        assert first[kind][space] is None


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(TOKENIZERS), data=st.data())
def test_the_bytes_of_tokens_are_what_is_decoded(kind, data, tmp):
    tokenizer = tokenizer_of(kind, tmp)
    grammars, vocab = grammars_of(tokenizer), tokenizer.backend.get_vocab()
    no_text = {*tokenizer.special_ids, vocab.get("<0xFF>"), vocab.get("ÿ") if kind == "byte-level" else None}
    ordinary = sorted(i for i in vocab.values() if i not in no_text)
    ids = data.draw(st.lists(st.sampled_from(ordinary), min_size=1, max_size=8))
    decode = grammars.vocabulary.lltokenizer.decode_bytes
    first = grammars.vocabulary.first.get(ids[0], ids[0])
    spelled = b"" if first is None else decode([first])
    spelled += b"".join(decode([token]) for token in ids[1:])
    try:
        text = spelled.decode()
    except UnicodeDecodeError:  # where the decoders differ in what they put in its place
        return
    assert tokenizer.decode(ids) == text


PATTERNS = [  # ASCII: a token that is part of a character fits nowhere
    r" ?[a-z]{2,6}( [a-z]+)*",
    r"[ \t\n]*def [0-9A-Za-z_]+\((self|path)?\):\n    return [0-9.]+",
    r"(if|for|in) ?",
    r"  a",
    r"[\x00-`b-~]*",
    r"<s>[<>|/a-z]*|</s>|<0x41>",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_exact(their_tokenizer, pattern):
    """Every token of the vocabulary, against the partial matches of the package `regex`, at every step of a text."""
    tokenizer, grammars = their_tokenizer, grammars_of(their_tokenizer)
    constraint, reference = grammars.regex(pattern), regex.compile(pattern)
    for seed in range(2):
        ids, _, _ = walk(constraint, tokenizer, seed, limit=6)
        for count in range(len(ids) + 1):
            matcher = constraint.start()
            for token in ids[:count]:
                matcher.accept(token)
            allowed = allowed_by(matcher, grammars.vocab_size).tolist()
            text = tokenizer.decode(ids[:count])
            for token, is_allowed in enumerate(allowed):
                if token in grammars.eos_ids:
                    expected = reference.fullmatch(text) is not None
                elif token >= tokenizer.vocab_size or token in tokenizer.special_ids:
                    expected = False
                else:
                    longer = tokenizer.decode([*ids[:count], token])
                    expected = reference.fullmatch(longer, partial=True) is not None
                assert is_allowed == expected, (text, token, tokenizer.backend.id_to_token(token))


SPACE = r"(?:\n?[ \t]{0,64})"
SCHEMAS = [  # and the regular expression that says the same
    ({"enum": ["abc", "abd", 12]}, r'"ab[cd]"|12'),
    ({"type": "integer", "minimum": 0, "maximum": 99}, r"[1-9]?[0-9]"),
    ({"type": "array", "items": {"const": True}, "maxItems": 2}, rf"\[{SPACE}(true{SPACE}(,{SPACE}true{SPACE})?)?\]"),
    (
        {
            "type": "object",
            "properties": {"a": {"type": "null"}},
            "required": ["a"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None},
        },
        r'\{"a":null\}',
    ),
]


@pytest.mark.parametrize("schema, pattern", SCHEMAS, ids=lambda value: str(value)[:30])
def test_masks_of_schemas_are_exact(tmp, schema, pattern):
    tokenizer = tokenizer_of("llama", tmp)
    grammars = grammars_of(tokenizer)
    constraint, reference = grammars.json_schema(schema), regex.compile(pattern)
    for seed in range(3):
        ids, _, _ = walk(constraint, tokenizer, seed, limit=12)
        for count in range(len(ids) + 1):
            matcher = constraint.start()
            for token in ids[:count]:
                matcher.accept(token)
            allowed = allowed_by(matcher, grammars.vocab_size)
            for token in range(tokenizer.vocab_size):
                if token not in tokenizer.special_ids:
                    longer = tokenizer.decode([*ids[:count], token])
                    if "\r" not in longer:
                        assert allowed[token] == bool(reference.fullmatch(longer, partial=True)), (longer, token)


def test_a_byte_that_is_in_no_text(tmp):
    """0xFF: llguidance begins the names of special tokens with it."""
    for kind, name in ("byte-level", "ÿ"), ("llama", "<0xFF>"):
        tokenizer = tokenizer_of(kind, tmp)
        grammars, token = grammars_of(tokenizer), tokenizer.backend.token_to_id(name)
        for constraint in (grammars.regex("(?s:.)*"), grammars.lark("start: <s>")):
            assert not allowed_by(constraint.start(), grammars.vocab_size)[token]


def test_a_character_of_several_tokens(tmp):
    """Its bytes one by one, and nothing else between them."""
    tokenizer = tokenizer_of("byte-level", tmp)
    grammars = grammars_of(tokenizer)
    single = {grammars.vocabulary.lltokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size)}
    matcher = grammars.regex("[日本🙂]").start()
    for byte in "本".encode():
        possible = {"日": 0xE6, "本": 0xE6, "🙂": 0xF0}.values()
        allowed = set(allowed_by(matcher, grammars.vocab_size).nonzero().flatten().tolist())
        assert single[bytes([byte])] in allowed
        if byte == 0xE6:
            assert {single[bytes([value])] for value in possible} <= allowed
        else:
            assert allowed <= {i for spelled, i in single.items() if spelled[:1] >= b"\x80"}
        matcher.accept(single[bytes([byte])])
    assert matcher.finished


@pytest.mark.parametrize("name", KINDS)
def test_random_texts_are_what_they_are_held_to(their_tokenizer, name):
    """Any token that is allowed, at each step; read token by token as well as at once."""
    make, check = KINDS[name]
    constraint = make(grammars_of(their_tokenizer))
    ended = 0
    for seed in range(25):
        ids, finished, _ = walk(constraint, their_tokenizer, seed)
        text = their_tokenizer.decode(ids)
        stream = StreamingDetokenizer(their_tokenizer)
        assert "".join(map(stream.put, ids)) + stream.finish() == text
        if finished:
            check(text)
            ended += 1
    assert ended >= (5 if name == "json_object" else 20)


# ---------------------------------------------------------------------------------------------------------------------
# Where a text may end


def test_end_tokens_where_the_text_may_end(their_tokenizer):
    tokenizer, grammars = their_tokenizer, grammars_of(their_tokenizer)
    eos, size = grammars.eos_ids, grammars.vocab_size
    assert len(eos) == 2 and eos[1] >= tokenizer.vocab_size
    matcher = grammars.regex("ab*c?").start()
    tokens = {name: tokenizer.backend.token_to_id(name) for name in "abc"}
    for name, may_end in ("a", False), ("b", True), ("b", True):
        assert allowed_by(matcher, size)[eos].tolist() == [may_end] * 2
        matcher.accept(tokens[name])
        assert not matcher.finished
    ended = grammars.regex("ab*c?").start()
    for token in (tokens["a"], eos[1]):
        assert not ended.finished and allowed_by(ended, size)[token]
        ended.accept(token)
    matcher.accept(tokens["c"])
    for done in (ended, matcher):
        assert done.finished and allowed_by(done, size).nonzero().flatten().tolist() == eos


def test_the_empty_text(their_tokenizer):
    grammars = grammars_of(their_tokenizer)
    matcher = grammars.regex("").start()
    assert allowed_by(matcher, grammars.vocab_size)[grammars.eos_ids].all()
    allowed = allowed_by(matcher, grammars.vocab_size).nonzero().flatten().tolist()
    assert not any(their_tokenizer.decode([token]) for token in allowed)
    matcher.accept(grammars.eos_ids[0])
    assert matcher.finished


def test_without_end_tokens_the_grammar_ends_it(their_tokenizer):
    grammars = Grammars(their_tokenizer, their_tokenizer.vocab_size, [])
    ids, finished, matcher = walk(grammars.regex("[ab]{3}"), their_tokenizer, 0)
    assert finished and re.fullmatch("[ab]{3}", their_tokenizer.decode(ids))
    assert not allowed_by(matcher, grammars.vocab_size).any()


def test_end_tokens_are_no_text(tmp):
    """A model may end its texts with an ordinary token, a line break for instance."""
    tokenizer = tokenizer_of("byte-level", tmp)
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [newline])
    constraint = grammars.regex("a\n*b|a")
    matcher = constraint.start()
    a, b = (tokenizer.encode(name, add_special_tokens=False)[-1] for name in "ab")
    assert not allowed_by(matcher, grammars.vocab_size)[newline]
    matcher.accept(a)
    assert allowed_by(matcher, grammars.vocab_size)[[newline, b]].all()
    matcher.accept(newline)
    assert matcher.finished


def test_special_tokens_that_a_grammar_names(their_tokenizer):
    """They are no text, but a grammar may ask for them."""
    tokenizer, grammars = their_tokenizer, grammars_of(their_tokenizer)
    special, a = (tokenizer.backend.token_to_id(token) for token in ("<s>", "a"))
    for source in ('start: "a" <s> "b"', f'start: "a" <[{special}]> "b"'):
        matcher = grammars.lark(source).start()
        assert allowed_by(matcher, grammars.vocab_size)[a]
        matcher.accept(a)
        assert allowed_by(matcher, grammars.vocab_size).nonzero().flatten().tolist() == [special]
        matcher.accept(special)
        matcher.accept(tokenizer.backend.token_to_id("b"))
        assert matcher.finished and tokenizer.decode([a, special]) == "a"


# ---------------------------------------------------------------------------------------------------------------------
# The mask in the sampler

some_masks = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(some_masks, st.integers(0, 31), st.integers(0, 999), st.integers(1, 3))
def test_the_mask_is_applied_bit_by_bit(words, unused, seed, S):
    """Against numpy's unpackbits; a row without a grammar beside it is as if there were none."""
    vocab = 32 * len(words) - unused
    bits = numpy.unpackbits(numpy.array(words, dtype="<u4").view(numpy.uint8), bitorder="little").astype(bool)[:vocab]
    params = SamplingParams(0.9, 7, 0.8, 0.05, 1.3, 0.5, -0.5, ((0, 3.0),), seed=seed)
    masked, free = (Sampler(2, vocab, 16, (), "cpu") for _ in range(2))
    for sampler in (masked, free):
        for row in range(2):
            sampler.set_row(row, params, [0])
            sampler.counts[row, seed % vocab] = 2
    mask = torch.from_numpy(numpy.array(words, dtype="<u4").view("<i4").copy())
    masked.set_mask(1, lambda row: row.copy_(mask))
    assert unpacked(mask)[:vocab].numpy().tolist() == bits.tolist() and packed(unpacked(mask)).equal(mask)
    logits = torch.randn(2, S, vocab, generator=torch.Generator().manual_seed(seed))
    tokens, at = torch.zeros(2, S, dtype=torch.long), torch.arange(S).expand(2, S)
    ours, theirs = (sampler.penalize(logits, tokens, at) for sampler in (masked, free))
    assert ours[0].equal(theirs[0])
    expected = numpy.where(bits, theirs[1].numpy(), -numpy.inf)
    assert (ours[1].numpy() == expected).all()
    # What is drawn is what filters that know nothing of masks leave of such logits.
    drawn = masked(logits, tokens, at)
    assert drawn[0].equal(free(logits, tokens, at)[0])
    filtered = free.filtered(torch.from_numpy(expected)[None]) if bits.any() else None
    for i, token in enumerate(drawn[1].tolist()):
        assert token == -1 if filtered is None else filtered[0, i, token] > -math.inf
    masked.set_mask(1, None)
    assert masked.penalize(logits, tokens, at).equal(theirs)


def test_masks_that_do_not_fit(tmp):
    tokenizer = tokenizer_of("byte-level", tmp)
    grammars = grammars_of(tokenizer)
    words = -(-grammars.vocab_size // 32)
    matcher = grammars.regex("a").start()
    for bad in (
        torch.zeros(words + 1, dtype=torch.int32),
        torch.zeros(words),
        torch.zeros(2 * words, dtype=torch.int32)[::2],
    ):
        with pytest.raises(ValueError, match="mask"):
            matcher.fill(bad)
    plain = Sampler(1, 100, 8, (), "cpu", plain=True)
    plain.set_mask(0, None)
    with pytest.raises(ValueError, match="plain"):
        plain.set_mask(0, matcher.fill)


# ---------------------------------------------------------------------------------------------------------------------
# With a model


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, 400, {1, 2})


def make_requests(grammars, tokenizer, count=80):
    """Constrained and free ones in turn, greedy and at temperature 1."""
    requests = []
    for seed, (make, _) in enumerate(list(KINDS.values()) * 2):
        params = SamplingParams(1.0, seed=seed)
        prompt = tokenizer.encode("def read_lines" * (1 + seed % 3))
        requests.append(Request(prompt, params, count, frozenset({1, 2}), grammar=make(grammars)))
        requests.append(Request(prompt, GREEDY if seed % 2 else params, 8 + 2 * seed, frozenset({1, 2})))
    requests += [Request(prompt, GREEDY, 150)] * 2  # that are the last to run
    return requests


@pytest.fixture(scope="module")
def requests(grammars, tokenizer):
    return make_requests(grammars, tokenizer)


@pytest.fixture(scope="module")
def alone(engine, tokenizer, requests):
    return [run_rows(set_up(engine, [request], plain=False), tokenizer, [request])[0] for request in requests]


def test_what_a_model_writes_is_what_it_is_held_to(engine, tokenizer, grammars):
    """Random weights at temperature 1."""
    for name, (make, check) in KINDS.items():
        many = [
            Request([5, 6, 7], SamplingParams(1.0, seed=seed), 300, frozenset({1, 2}), grammar=make(grammars))
            for seed in range(8)
        ]
        ended = 0
        for tokens in run_rows(set_up(engine, many, 4, plain=False), tokenizer, many):
            text = "".join(token.text for token in tokens)
            if tokens[-1].finish_reason == "stop":
                check(text)
                ended += 1
            else:
                assert tokens[-1].finish_reason == "length" and len(tokens) == 300
        assert ended >= (2 if name == "json_object" else 6), name


def test_greedy_takes_the_likeliest_that_is_allowed(engine, tokenizer, grammars):
    constraint = grammars.regex("[a-z]{5}")
    request = Request([5, 6, 7], GREEDY, 50, frozenset({1, 2}), grammar=constraint)
    (tokens,) = run_rows(set_up(engine, [request], plain=False), tokenizer, [request])
    matcher, ids = constraint.start(), list(request.prompt)
    for token in tokens:
        with torch.no_grad():
            engine.setup(1, 64)
            at = torch.arange(len(ids))[None]
            logits = engine.model(torch.tensor([ids]), at, engine.model.key_pos)[0, -1]
        expected = logits.masked_fill(~allowed_by(matcher, 400), -math.inf).argmax().item()
        assert token.id == expected
        matcher.accept(token.id)
        ids.append(token.id)
    assert matcher.finished and tokens[-1].finish_reason == "stop"


@pytest.mark.parametrize("overlaps", [False, True], ids=["in turn", "a step late"])
@pytest.mark.parametrize("lookup", [False, True], ids=["plain", "speculating"])
def test_a_row_is_what_it_is_alone(base_folder, tokenizer, requests, alone, lookup, overlaps):
    """Free rows beside constrained ones and the other way round; steps with a constrained row propose nothing."""
    engine = Engine(load_model(base_folder), prompt_lookup=lookup, speculate_k=3 if lookup else None)
    set_up(engine, requests, 3, plain=False)
    scheduler = Scheduler(engine, tokenizer)
    scheduler._overlaps = overlaps
    steps, step = [], engine.step

    def recording(k, *others):
        running = [row for row in scheduler.rows if row is not None and row.stats.new_tokens]
        steps.append((k, any(row.request.grammar for row in running)))
        return step(k, *others)

    engine.step = recording
    rows = {scheduler.add(request): [] for request in requests}
    while not scheduler.idle:
        for token in scheduler.step():
            rows[token.request].append(token)
    assert ids_of(rows.values()) == ids_of(alone)
    assert [row[-1].finish_reason for row in rows.values()] == [row[-1].finish_reason for row in alone]
    assert not any(k for k, constrained in steps if constrained) and any(not constrained for _, constrained in steps)
    assert any(k for k, _ in steps) == lookup


def test_cancelled_rows_leave_nothing_behind(engine, tokenizer, grammars, alone, requests):
    scheduler = Scheduler(set_up(engine, requests, 1, plain=False), tokenizer)
    number = scheduler.add(requests[0])
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(number)
    number, tokens = scheduler.add(requests[1]), []
    while not scheduler.idle:
        tokens += scheduler.step()
    assert [token.id for token in tokens if token.request == number] == [token.id for token in alone[1]]


def test_the_length_may_cut_a_text_and_a_stop_string_too(engine, tokenizer, grammars):
    request = Request([5, 6, 7], GREEDY, 4, frozenset({1, 2}), grammar=grammars.regex("[a-c]{20}"))
    (tokens,) = run_rows(set_up(engine, [request], plain=False), tokenizer, [request])
    assert tokens[-1].finish_reason == "length" and re.fullmatch("[a-c]{4,}", "".join(t.text for t in tokens))
    request = Request([5], GREEDY, 60, frozenset({1, 2}), (":",), grammar=grammars.regex("[a-c]{3}:[a-c]{4}"))
    (tokens,) = run_rows(set_up(engine, [request], plain=False), tokenizer, [request])
    assert tokens[-1].finish_reason == "stop" and re.fullmatch("[a-c]{3}", "".join(t.text for t in tokens))


def test_a_text_that_gets_too_complex_is_an_error(engine, tokenizer, grammars):
    """Legal, but beyond llguidance's limits once the object has begun: no token is possible then."""
    properties = {f"p{i}": {"type": "string"} for i in range(2000)}
    constraint = grammars.json_schema({"type": "object", "properties": properties})
    request = Request([5], GREEDY, 60, frozenset({1, 2}), grammar=constraint)
    with pytest.raises(UserError, match="no token is possible"):
        list(generate(set_up(engine, [request], plain=False), tokenizer, [request]))


@pytest.mark.slow
def test_grammars_compile_nothing(base_folder, tokenizer, requests, alone):
    """Neither the steps that propose tokens, nor those of rows that a grammar holds, which propose none."""
    torch._dynamo.reset()
    engine = Engine(load_model(base_folder), compile=True, prompt_lookup=True, speculate_k=2)
    compiled = set_up(engine, requests, 2, plain=False)
    compiled.row_counts = [2]  # each takes two compilations
    compiled.warm_up(constrained=True)
    with nothing_compiles():
        rows = run_rows(compiled, tokenizer, requests)
    assert ids_of(rows) == ids_of(alone)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what it costs

REFUSED = {
    "json_schema": [
        ({"type": "object", "uniqueItems": True}, "uniqueItems"),
        ({"type": "strnig"}, "strnig"),
        ({"type": "string", "pattern": "a(?=b)"}, "look"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"$ref": "https://example.com/schema.json"}, "https://example.com/schema.json"),
        ({"$ref": "file:///etc/passwd"}, "etc/passwd"),
        ({"$ref": "#"}, "no text matches"),
        ({"const": math.nan}, "JSON"),
        ({"const": "\ud800"}, "escape"),
        ({"x-guidance": 5}, "x-guidance"),
        ("[1", "delimiter"),
        ("[]", "object"),
        ("", "Expecting"),
    ],
    "regex": [
        ("(a", "unclosed group"),
        ("a{2", "unclosed counted repetition"),
        (r"(a)\1", "backreferences"),
        ("a(?!b)", "look-around"),
        ("\ud800", "UTF-8"),
        ("(" * 300 + ")" * 300, "nested"),
    ],
    "lark": [
        ("", "start"),
        ('begin: "a"', "start"),
        ("start: word", 'line 1, column 8: unknown name: "word"'),
        ('start: "a" | (', "line 1"),
        ("start: <|nothing|>", "<|nothing|>"),
        ('%import "/etc/passwd"\nstart: "a"', "line 1"),
        ("start: /(/", "unclosed group"),
    ],
}


@pytest.mark.parametrize("kind, source, said", [(kind, *case) for kind, cases in REFUSED.items() for case in cases])
def test_what_llguidance_refuses_is_one_line(grammars, kind, source, said):
    with pytest.raises(UserError) as error:
        getattr(grammars, kind)(source)
    words = str(error.value)
    name = "grammar" if kind == "lark" else kind
    assert words.startswith(name) and said in words and "\n" not in words and len(words) < 300


def chained(form, last, count):
    links = {f"d{i}": form(f"#/$defs/d{i + 1}") for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{count}": last}}


HOSTILE = {
    "deep": functools.reduce(lambda inner, _: {"properties": {"a": inner}}, range(900), {}),
    "exponential refs": chained(lambda ref: {"allOf": [{"$ref": ref}, {"$ref": ref}]}, {"type": "string"}, 40),
    "product of choices": {
        "allOf": [
            {"anyOf": [{"properties": {f"k{i}_{j}": {"const": j}}, "required": [f"k{i}_{j}"]} for j in range(10)]}
            for i in range(20)
        ]
    },
    "a chain that overflows a stack": chained(lambda ref: {"properties": {"a": {"$ref": ref}}}, {}, 5000),
    "a large divisor": {"type": "integer", "multipleOf": 999_999_937},
    "a long optional pattern": {"type": "string", "pattern": "(a|b)?" * 20_000},
    "many properties": {"type": "object", "properties": {f"p{i}": {} for i in range(5000)}},
    "nothing but a length": {"type": "string", "minLength": 10**9},
    "ambiguous": 'start: s\ns: s s s | "a" | "aa" |',
    "many rules": "start: r0\n" + "".join(f'r{i}: r{i + 1} r{i + 1} | "x"\n' for i in range(9000)) + 'r9000: "q"',
    "all of many": "start: A\nA: " + " & ".join(f"/.*{c}.{{20}}/" for c in "abcdefgh"),
    "nested counts": "start: /((((a{1,50}){1,50}){1,50}){1,50}){1,50}/",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_cost_little(tmp, name):
    """Each is refused, or its masks are quick: nobody waits for minutes, and the process lives."""
    grammars, source = grammars_of(tokenizer_of("sentencepiece", tmp)), HOSTILE[name]
    begun = time.process_time()
    try:
        constraint = grammars.json_schema(source) if isinstance(source, dict) else grammars.lark(source)
    except UserError:
        pass
    else:
        walk(constraint, grammars.tokenizer, 0, limit=100) if allowed_everywhere(constraint) else None
    assert time.process_time() - begun < 5


def allowed_everywhere(constraint):
    """Whether a random text of it gets on; one that gets too complex has an empty mask."""
    matcher, draw = constraint.start(), random.Random(0)
    for _ in range(100):
        possible = allowed_by(matcher, constraint.grammars.vocab_size).nonzero().flatten().tolist()
        if matcher.finished or not possible:
            return not matcher.finished and bool(possible)
        matcher.accept(draw.choice(possible))
    return True


def test_the_process_that_tries_grammars_may_be_killed():
    trial = Trial(10, {3: "<|end|>"})
    assert trial.compiles('start: "a" <|end|>')
    trial._process.kill()
    trial._process.wait()
    assert trial.compiles("start: /a/")
    process = trial._process
    del trial
    assert process.wait(10) == 0


def test_a_grammar_is_compiled_once(grammars, monkeypatch):
    first = grammars.json_schema(SCHEMA)
    before = grammars.compile.cache_info().misses
    again = grammars.json_schema(json.dumps(SCHEMA))
    assert again == first
    for _ in range(3):
        again.start()
    assert grammars.compile.cache_info().misses == before


def test_constraints_travel_between_processes(grammars, tokenizer):
    request = Request([1], GREEDY, 5, grammar=grammars.regex("ab"))
    sent = pickle.dumps(request)
    assert len(sent) < 2000
    received = pickle.loads(sent).grammar
    with pytest.raises(ValueError, match="bind"):
        received.start()
    other = Grammars(tokenizer, 400, {1, 2})
    bound = other.bind(received)
    assert allowed_by(bound.start(), 400).equal(allowed_by(request.grammar.start(), 400))
    assert other.bind(bound) is bound


def test_tokenizers_that_rewrite_spaces_are_refused(tmp):
    tokenizer = load_tokenizer(tmp / "metaspace") if (tmp / "metaspace").exists() else None
    tokenizer = tokenizer or tokenizer_of("metaspace", tmp)
    tokenizer.clean_up = True
    with pytest.raises(UserError, match="rewrites spaces"):
        Grammars(tokenizer, tokenizer.vocab_size, []).regex("a")
    tokenizer.clean_up = False


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_flags(script, base_folder, tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text(ARITHMETIC)
    args = ("--checkpoint_path", base_folder, "--json", "--max_new_tokens", 400, "--temperature", 1, "--seed", 3)
    args += ("--prompt", "x", "--num_samples", 4, "--batch_size", 3)
    for flag, value, check in (
        ("--json_schema", schema, fits_schema),
        ("--regex", CALL, fits_call),
        ("--grammar", grammar, fits_arithmetic),
    ):
        samples = parse(script(*args, flag, value))
        ended = [sample["text"] for sample in samples if sample["finish_reason"] == "stop"]
        assert len(ended) >= 3
        for text in ended:
            check(text)
    # Greedy text is held to it as well.
    result = script("--checkpoint_path", base_folder, "--prompt", "x", "--regex", "[0-9]{4}")
    assert result.code == 0 and re.fullmatch("[0-9]{4}\n", result.out)


def test_json_lines_bring_their_own(script, base_folder):
    lines = [
        {"prompt": "x", "json_schema": {"enum": ["a", "b"]}},
        {"prompt": "x", "grammar": 'start: "x"~3'},
        {"prompt": "x"},
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    args = ("--checkpoint_path", base_folder, "--json", "--batch_size", 2, "--prompt_file", "-")
    texts = [sample["text"] for sample in parse(script(*args, "--regex", "[ab]{3}", stdin=data))]
    assert texts[0] in ('"a"', '"b"') and texts[1] == "xxx" and re.fullmatch("[ab]{3}", texts[2])
    free = parse(script(*args, "--max_new_tokens", 5, stdin=data))[2]
    assert free["tokens"] == parse(script(*args[:3], "--max_new_tokens", 5, "--prompt", "x"))[0]["tokens"]


def test_flags_that_are_refused(script, base_folder, tmp_path):
    args = ("--checkpoint_path", base_folder, "--prompt", "x")
    schema, bad = tmp_path / "schema.json", tmp_path / "bad"
    schema.write_text("{}")
    assert_refused(script(*args, "--regex", "(a"), "regex", "unclosed group")
    assert_refused(script(*args, "--json_schema", tmp_path / "missing"), "--json_schema", "missing")
    assert_refused(script(*args, "--regex", "a", "--json_schema", schema), "json_schema and regex", "leave one out")
    assert_refused(script(*args, "--regex", "a", "--ignore_eos"), "regex and ignore_eos")
    assert_refused(script(*args, "--regex", "a", "--min_new_tokens", 2), "regex and min_new_tokens")
    assert_refused(script(*args, "--regex", "a", "--num_beams", 2), "--num_beams does not go with --regex")
    for text, said in (b"[1", "not JSON"), (b"[]", "object"), (b"\xff", "UTF-8"), (b'{"type": "x"}', "Invalid type"):
        bad.write_bytes(text)
        assert_refused(script(*args, "--json_schema", bad), "json_schema", said)
    bad.write_text("start: (")
    assert_refused(script(*args, "--grammar", bad), "grammar", "line 1")
    line = json.dumps({"prompt": "x", "json_schema": "{}"}).encode()
    assert_refused(script(*args[:2], "--prompt_file", "-", stdin=line), "line 1", "json_schema", "not an object")
    line = json.dumps({"prompt": "x", "regex": "[", "max_new_tokens": 3}).encode()
    result = script(*args[:2], "--prompt_file", "-", "--skip_bad_lines", stdin=line + b'\n{"prompt": "y"}')
    assert result.code == 0 and "warning: --prompt_file -, line 1: regex cannot be used" in result.err


def test_a_chat_is_held_to_what_is_set(script, chat_folder):
    result = converse(
        script,
        chat_folder,
        "/set regex (",
        "/set regex [ab]{4}",
        "Hello",
        "/show",
        '/set json_schema {"enum": [7]}',
        "/set regex null",
        '/set json_schema {"enum": [7]}',
        "Hello",
    )
    assert result.code == 0 and re.search(r"^[ab]{4}$", result.out, re.M) and re.search("^7$", result.out, re.M)
    assert "unclosed group" in result.err and "json_schema and regex do not go together" in result.err
    assert "regex: [ab]{4}" in result.err + result.out or '"[ab]{4}"' in result.err + result.out
