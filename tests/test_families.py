"""Every family against transformers: logits, greedy tokens, bfloat16, quantized, compiled, several ranks, bad files.

The models are those of families.py, and go all the way: saved as on the hub, converted, loaded.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, GREEDY, TEXT, ids_of, make_tokenizer, parse, run_rows, set_up
from family_models import ENTRIES, ORIGINAL, VOCAB, Made, make
from ranks_worker import run_tasks
from test_beam import check as check_beams

from beam import BeamParams, beam_search
from checkpoint import load_model
from compiled import OPTIONS, kernels_together
from convert_hf_checkpoint import convert
from engine import Engine, Request
from model import Transformer
from quantize import quantize

MOE = [name for name in ENTRIES if re.search("mo?e|mixtral|gpt-oss", name) and name != "smollm3"]
LONGROPE = ("phi3-longrope", "phi4-mini")
ROOT = Path(__file__).parent.parent
LIMIT = 1e-4  # of the largest logit


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(5, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def positions(rows: int, length: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + length).expand(rows, -1)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error, limit = (ours - theirs).abs().max().item(), LIMIT * theirs.abs().max().item()
    assert error <= limit, f"{error} is more than {limit}"


def convert_made(made: Made) -> Path:
    out = made.folder.parent / "ours"
    convert(made.folder, out)
    return out


@pytest.fixture(scope="module", params=ENTRIES, ids=str)
def both(request, tmp_path_factory):
    """The same weights in transformers and here -> made, the converted folder, the model."""
    made = make(request.param, tmp_path_factory.mktemp(request.param))
    folder = convert_made(made)
    return made, folder, load_model(folder)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """make and convert, once for each name."""
    found = {}

    def get(name: str) -> tuple[Made, Path]:
        if name not in found:
            made = make(name, tmp_path_factory.mktemp(name))
            found[name] = made, convert_made(made)
        return found[name]

    return get


# ---------------------------------------------------------------------------------------------------------------------
# Every entry, in float32


@torch.no_grad()
def test_logits(both):
    """Of a whole prompt; of one that is taken token by token from its 40th on; of rows of different lengths."""
    made, _, model = both
    model.setup_caches(max_batch_size=3, max_seq_length=128)
    text = torch.tensor([ids(50)])
    expected = made.logits(text)
    assert_close(model(text, positions(1, 50))[0], expected)

    text = torch.tensor([ids(50, seed=1)])
    expected = made.logits(text)
    assert_close(model(text[:, :40], positions(1, 40))[0], expected[:40])
    for i in range(40, 50):
        key_pos = model.key_pos[: i + 1]
        assert_close(model(text[:, i : i + 1], positions(1, 1, i), key_pos)[0, 0], expected[i])

    lengths = [5, 17, 30]
    rows = [ids(length + 8, seed=length) for length in lengths]
    expected = [made.logits(row) for row in rows]
    padded = torch.zeros(3, max(lengths), dtype=torch.long)
    for i, length in enumerate(lengths):
        padded[i, :length] = torch.tensor(rows[i][:length])
    logits = model(padded, positions(3, max(lengths)))
    for i, length in enumerate(lengths):
        assert_close(logits[i, :length], expected[i][:length])
    for step in range(8):
        at = torch.tensor([[length + step] for length in lengths])
        logits = model(torch.tensor([[rows[i][at[i, 0]]] for i in range(3)]), at)
        for i in range(3):
            assert_close(logits[i, 0], expected[i][at[i, 0]])


def test_greedy_tokens(both, tokenizer):
    """One row after another, the second with the prompt of the first, which is not computed again; then two at once."""
    made, _, model = both
    requests = [Request(ids(length, seed), GREEDY, 24) for length, seed in ((20, 3), (20, 3), (9, 4))]
    engine = set_up(Engine(model), requests, batch_size=1, max_seq_length=64)
    one_by_one = ids_of(run_rows(engine, tokenizer, requests))
    assert one_by_one[0] == one_by_one[1]
    for request, new in zip(requests, one_by_one, strict=True):
        assert len(new) == 24
        made.assert_greedy(request.prompt, new)
    set_up(engine, requests, batch_size=2, max_seq_length=64)
    assert ids_of(run_rows(engine, tokenizer, requests)) == one_by_one


# ---------------------------------------------------------------------------------------------------------------------
# Every entry, in bfloat16 and quantized


@torch.no_grad()
def test_bfloat16(both):
    """As far from float32 with the same weights as transformers in bfloat16 is."""
    made, folder, _ = both
    exact = copy.deepcopy(made.reference)
    for parameter in exact.parameters():
        parameter.copy_(parameter.bfloat16())
    theirs = copy.deepcopy(made.reference).to(torch.bfloat16)
    model = load_model(folder, dtype=torch.bfloat16)
    model.setup_caches(max_batch_size=1, max_seq_length=64)
    text = torch.tensor([ids(50)])
    expected = exact(text, use_cache=False).logits
    errors = [
        (logits.float() - expected)[0].square().mean(-1).sqrt().median()  # not moved by a token with other experts
        for logits in (model(text, positions(1, 50)), theirs(text, use_cache=False).logits)
    ]
    assert errors[1] > 0
    assert errors[0] <= 1.5 * errors[1] + 1e-3 * expected.std(), errors


@torch.no_grad()
@pytest.mark.parametrize(("mode", "least"), [("int8", 0.999), ("int4", 0.9)])
def test_quantized(both, mode, least):
    made, folder, _ = both
    assert_similar(made, quantize(folder, mode), least)


def assert_similar(made: Made, file: Path, least: float) -> None:
    """The logits of a quantized file point where the float ones do. Most of them: a token may get other experts."""
    model = load_model(file)
    model.setup_caches(max_batch_size=1, max_seq_length=64)
    text = torch.tensor([ids(50)])
    logits = model(text, positions(1, 50))[0].float()
    similarity = torch.nn.functional.cosine_similarity(logits, made.logits(text), dim=-1)
    assert similarity.median() > least, similarity


DIFFERENT = ["gemma2", "cohere2", "olmo3-hub", "gpt-neox-hub", "gpt2-hub", "qwen2-moe-some", "gpt-oss"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", *DIFFERENT])
def test_gptq(cached, tmp_path, name):
    made, folder = cached(name)
    (tmp_path / "calibration.txt").write_text((ROOT / "model.py").read_text()[:3000])
    file = quantize(folder, "int4-gptq", calibration=tmp_path / "calibration.txt")
    assert_similar(made, file, 0.85)


# ---------------------------------------------------------------------------------------------------------------------
# The ways to decode, for some

WINDOWED = ["mistral", "gemma2", "gemma3-hub", "cohere2", "ministral", "gpt-oss"]


@pytest.mark.parametrize("name", WINDOWED)
def test_a_prompt_of_several_chunks(cached, tokenizer, name):
    made, folder = cached(name)
    request = Request(ids(700), GREEDY, 8)
    engine = set_up(Engine(load_model(folder)), [request], max_seq_length=1024)
    made.assert_greedy(request.prompt, ids_of(run_rows(engine, tokenizer, [request]))[0])


@pytest.mark.parametrize("name", [*WINDOWED, "gpt2", "qwen2-moe-some", "smollm3"])
def test_prompt_lookup(cached, tokenizer, name):
    """Whatever is proposed, the tokens are those of plain decoding."""
    made, folder = cached(name)
    prompts = [ids(6, seed) * 5 for seed in (1, 2, 3)]  # so that there is something to propose
    requests = [Request(prompt, GREEDY, 30) for prompt in prompts]
    engine = Engine(load_model(folder), prompt_lookup=True, speculate_k=4)
    set_up(engine, requests, batch_size=2, max_seq_length=128)
    rows = run_rows(engine, tokenizer, requests)
    assert sum(row[-1].stats.proposed for row in rows) > 20
    for prompt, new in zip(prompts, ids_of(rows), strict=True):
        made.assert_greedy(prompt, new)


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "ministral"])
def test_beams(cached, name):
    made, folder = cached(name)
    engine, beams, prompt = Engine(load_model(folder)), BeamParams(3, num_return_sequences=3), ids(20, seed=6)
    engine.setup(3, 64, plain=True)
    found = beam_search(engine, Request(prompt, GREEDY, 12), beams)
    check_beams(made.reference, found, prompt, beams, 12)


@pytest.mark.parametrize("name", LONGROPE)
def test_longrope_beyond_the_trained_length(cached, tokenizer, name):
    """A prompt that is longer has its long factors from the first token on; one that grows longer gets them then, as
    transformers' generate does, which takes the text anew."""
    made, folder = cached(name)
    requests = [Request(ids(length, length), GREEDY, 24) for length in (ORIGINAL + 30, ORIGINAL - 10, 10)]
    engine = set_up(Engine(load_model(folder)), requests, batch_size=1, max_seq_length=256)
    for request, new in zip(requests, ids_of(run_rows(engine, tokenizer, requests)), strict=True):
        theirs = made.reference.generate(
            torch.tensor([request.prompt]), do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=2
        )
        assert new == theirs[0, len(request.prompt) :].tolist(), len(request.prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled, and several ranks


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", DIFFERENT)
def test_compiled_equals_eager(cached, name):
    torch._dynamo.reset()
    _, folder = cached(name)
    model: Transformer = load_model(folder)
    model.setup_caches(2, 128)
    step = torch.compile(
        lambda tokens, at, key_pos: model(tokens, at, key_pos), fullgraph=True, dynamic=False, options=OPTIONS
    )
    for rows in (1, 2):
        text = torch.tensor([ids(64, seed=row) for row in range(rows)])
        model(text[:, :60], positions(rows, 60))
        for i in range(60, 63):
            inputs = text[:, i : i + 1], positions(rows, 1, i), model.key_pos
            with kernels_together():
                ours = step(*inputs)
            assert_close(ours, model(*inputs))


@pytest.fixture(scope="module")
def ranks(cached, tmp_path_factory):
    """What two ranks say: name -> their logits, of one launch for all."""
    out = tmp_path_factory.mktemp("ranks")
    texts = [ids(40, seed) for seed in (1, 2)]
    tasks = [
        ("logits", [str(cached(name)[1]), texts, "float32", str(out / f"{name}.pt")]) for name in ("qwen3", *DIFFERENT)
    ]
    returned = run_tasks(2, out, tasks)
    for one, other in zip(*returned, strict=True):
        assert one == other and all(one[1:])
    return texts, {name: torch.load(out / f"{name}.pt") for name in ("qwen3", *DIFFERENT)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", *DIFFERENT])
def test_two_ranks(ranks, cached, name):
    texts, logits = ranks
    for text, row in zip(texts, logits[name], strict=True):
        assert_close(row, cached(name)[0].logits(text))


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("name", ["gemma2-hub", "gpt2-hub", "qwen3-moe", "gpt-oss-mxfp4"])
def test_command_line(cached, script, name):
    """A text, and a chat by the template, give the tokens of transformers."""
    made, folder = cached(name)
    make_tokenizer(folder, CHAT_TEMPLATE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = TEXT[:40]
    as_chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    for more, prompt in (
        ((), tokenizer(text).input_ids),
        (("--chat",), tokenizer(as_chat, add_special_tokens=False).input_ids),
    ):
        args = ("--prompt", text, "--max_new_tokens", 12, "--temperature", 0, "--json")
        (sample,) = parse(script("--checkpoint_path", folder, *args, *more))
        new = sample["tokens"]
        made.assert_greedy(prompt, new)
