"""What several test files share: a tiny checkpoint, made by transformers and converted by us, and ways to run it."""

import contextlib
import io
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

import compiled
import errors
import generate as cli
from checkpoint import load_model
from convert_hf_checkpoint import convert
from engine import Engine, Request
from sampling import SamplingParams
from scheduler import generate
from tokenizer import load_tokenizer

GREEDY = SamplingParams(temperature=0)
CONTEXT = 2048
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = """
def read_lines(path):
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            yield number, line.rstrip()
A decoder reads every weight once for each token that it writes, so the speed of the memory is the speed of the text.
What was read before is kept in the cache; only what is new has to be computed. Naïve words, 日本語 and 🙂 are bytes.
"""
SPECIAL = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]  # ids 0 to 4


def make_tokenizer(folder: Path, chat_template: str | None = None, vocab_size: int = 400) -> None:
    """A byte-level BPE of about 400 tokens, learned from TEXT, that puts <s> before a text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory) -> Path:
    """A Llama of random weights in fp32, as transformers saves it: context 2048, vocabulary 400, eos 1."""
    folder = tmp_path_factory.mktemp("hf")
    make_tokenizer(folder)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=400,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # large enough that the greedy text does not just repeat
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.dim() == 1 else 0.2, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(hf_folder, tmp_path_factory) -> Path:
    """That model in our form. Not to be written to."""
    folder = tmp_path_factory.mktemp("checkpoints") / "base"
    convert(hf_folder, folder)
    return folder


@pytest.fixture(scope="session")
def windowed_folder(tmp_path_factory) -> Path:
    """A Gemma 2 in our form: windows of 7 in every other layer, a cap of the scores, heads in groups."""
    from family_models import make  # which imports this module

    folder = tmp_path_factory.mktemp("windowed")
    make("gemma2", folder)
    convert(folder / "hf", folder / "ours")
    return folder / "ours"


@pytest.fixture(scope="session")
def chat_folder(base_folder) -> Path:
    """The same with a chat template, and a generation config that names two ids that end a text."""
    folder = base_folder.parent / "chat"
    shutil.copytree(base_folder, folder)
    make_tokenizer(folder, CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return folder


@pytest.fixture(scope="session")
def reference(hf_folder):
    return transformers.LlamaForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer(base_folder):
    return load_tokenizer(base_folder)


@pytest.fixture(scope="session")
def engine(base_folder):
    return Engine(load_model(base_folder))


def set_up(engine, requests, batch_size=None, max_seq_length=1400, **others):
    """The engine with what these requests need; by default each has a row of its own."""
    words = [request.params.bad_words for request in requests]
    needed = dict(
        plain=all(request.params.plain for request in requests),
        eos_ids=frozenset().union(*(request.eos_ids for request in requests)),
        bad_words=(max(map(len, words)), max((len(word) for of_one in words for word in of_one), default=0)),
    )
    engine.setup(batch_size or len(requests), max_seq_length, **{**needed, **others})
    return engine


def run_rows(engine, tokenizer, requests):
    """All the Token objects of each request."""
    rows = [[] for _ in requests]
    for token in generate(engine, tokenizer, requests):
        rows[token.request].append(token)
    return rows


def ids_of(rows):
    return [[token.id for token in row] for row in rows]


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def script(monkeypatch):
    """Runs `generate.py ARGS...`, or another script's main, in this process -> Result. `terminals` names the streams
    that claim to be one."""

    def run(*args, stdin=b"", terminals=(), main=cli.main):
        streams = [io.TextIOWrapper(io.BytesIO(data), encoding="utf-8") for data in (stdin, b"", b"")]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["generate.py", *map(str, args)])
            for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
                stream.isatty = lambda name=name: name in terminals
                patch.setattr(sys, name, stream)
            real_stdout, code = os.dup(1), 0  # errors.run puts the null device there
            try:
                errors.run(main)
            except SystemExit as end:
                code = end.code
            finally:
                os.dup2(real_stdout, 1)
                os.close(real_stdout)
        texts = []
        for stream in streams[1:]:
            stream.flush()
            texts.append(stream.buffer.getvalue().decode("utf-8"))
        return Result(code, *texts)

    return run


@dataclass
class Prefill:
    request: Request
    cached: int  # tokens of the prompt that were in the cache

    @property
    def prompt(self):
        return self.request.prompt


@pytest.fixture
def prefills(monkeypatch):
    """A Prefill for every request that was given a row."""
    calls, take = [], Engine.take

    def recorded(self, request, free):
        row = take(self, request, free)
        calls.append(Prefill(request, len(self.places[row].tokens)))
        return row

    monkeypatch.setattr(Engine, "take", recorded)
    return calls


@pytest.fixture
def compiler():
    """For tests that call torch.compile themselves: what saves Inductor some seconds in each process."""
    torch._dynamo.reset()
    compiled.prepare_compiler()


@contextlib.contextmanager
def nothing_compiles():
    """What would compile something raises."""

    def record(function, args, folder):
        raise AssertionError(f"{function.__name__} is compiled for {args}")

    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(error_on_recompile=True):
        patch.setattr(compiled, "record", record)
        yield


def parse(result):
    """What --json printed."""
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def greedy(reference, prompt, count, **others):
    """The new tokens by transformers, from token ids."""
    others = {"eos_token_id": 1, "pad_token_id": 0} | others
    ids = torch.tensor([prompt])
    others["attention_mask"] = torch.ones_like(ids)  # <s> is no padding
    return reference.generate(ids, max_new_tokens=count, do_sample=False, **others)[0, len(prompt) :].tolist()


def converse(script, folder, *lines, args=()):
    """An interactive run in which these lines are typed."""
    return script(
        "--checkpoint_path", folder, "--interactive", *args, stdin="".join(line + "\n" for line in lines).encode()
    )


def assert_refused(result, *words):
    """One line on stderr that says so, and exit code 2."""
    assert result.code == 2 and result.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    assert all(word in result.err for word in words), result.err
