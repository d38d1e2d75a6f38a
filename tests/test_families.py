"""Every family against transformers: logits, greedy tokens, bfloat16, quantized, compiled, several ranks, bad files.

The models are those of family_models.py, and go all the way: saved as on the hub, converted, loaded.
"""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from conftest import CHAT_TEMPLATE, GREEDY, TEXT, ids_of, make_tokenizer, parse, run_rows, set_up
from family_models import E2M1, ENTRIES, ORIGINAL, PUBLISHED, VOCAB, Made, make, two_layers
from huggingface_hub.errors import StrictDataclassError
from ranks_worker import run_tasks
from test_beam import check as check_beams
from transformers import CONFIG_MAPPING

from beam import BeamParams, beam_search
from checkpoint import load_config, load_model
from compiled import OPTIONS, kernels_together
from config import ModelConfig
from config_fields import unknown_fields
from convert_hf_checkpoint import convert
from engine import Engine, Request
from errors import UserError
from model import Transformer
from prefix import Place
from quantize import quantize

MXFP4 = "gpt-oss-mxfp4"  # which stays quantized
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


@pytest.fixture(scope="module", params=[name for name in ENTRIES if name != MXFP4], ids=str)
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
    requests = [Request(ids(length, seed), GREEDY, 12) for length, seed in ((20, 3), (20, 3), (9, 4))]
    engine = set_up(Engine(model), requests, batch_size=1, max_seq_length=64)
    one_by_one = ids_of(run_rows(engine, tokenizer, requests))
    assert one_by_one[0] == one_by_one[1]
    for request, new in zip(requests, one_by_one, strict=True):
        assert len(new) == 12
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
@pytest.mark.parametrize(("mode", "least"), [("int8", 0.995), ("int4", 0.9)])
def test_quantized(both, mode, least):
    made, folder, _ = both
    file = quantize(folder, mode)
    assert_meant(file)
    # Of tiny random experts a rounding often makes others the best.
    assert_similar(made, file, least if load_config(folder).experts is None else 2 * least - 1)


@torch.no_grad()
def test_mxfp4(cached, tokenizer):
    """The blocks are kept as they are, and mean what transformers takes them to mean."""
    made, folder = cached(MXFP4)
    file = folder / "model.safetensors"
    weights = as_floats(file)
    theirs = dict(made.reference.named_parameters())
    for layer in range(4):
        gate_up = theirs[f"model.layers.{layer}.mlp.experts.gate_up_proj"].transpose(1, 2)
        down = theirs[f"model.layers.{layer}.mlp.experts.down_proj"].transpose(1, 2)
        ours = f"layers.{layer}.feed_forward.experts."
        assert torch.equal(weights[ours + "w13.weight"], torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), 1))
        assert torch.equal(weights[ours + "w2.weight"], down)
    assert_meant(file)
    assert_similar(made, file, 0.995)
    with pytest.raises(UserError, match="quantized already"):
        quantize(folder, "int8")
    requests = [Request(ids(length, seed), GREEDY, 24) for length, seed in ((20, 3), (20, 3), (9, 4))]
    engine = set_up(Engine(load_model(folder)), requests, batch_size=2, max_seq_length=64)
    rows = ids_of(run_rows(engine, tokenizer, requests))
    assert rows[0] == rows[1]
    for request, new in zip(requests, rows, strict=True):
        expected = made.logits(request.prompt + new)[len(request.prompt) - 1 : -1].argmax(-1)
        assert (expected == torch.tensor(new)).float().mean() > 0.8


def logits_of(model: Transformer, texts: torch.Tensor) -> torch.Tensor:
    model.setup_caches(max_batch_size=len(texts), max_seq_length=64)
    return model(texts, positions(*texts.shape)).flatten(0, 1).float()


def assert_similar(made: Made, file: Path, least: float) -> None:
    """The logits of a quantized file point where the float ones do, of most tokens."""
    text = torch.tensor([ids(50)])
    similarity = torch.nn.functional.cosine_similarity(logits_of(load_model(file), text), made.logits(text), dim=-1)
    assert similarity.median() > least, similarity


def assert_meant(file: Path) -> None:
    """The logits of a quantized file are those of the floats that it stands for, but for the rounding of inputs: of
    most tokens, since it may choose other experts. Short texts, so that few follow such a token."""
    weights = as_floats(file)
    config = load_config(file.parent)
    model = Transformer(replace(config, tied="output.weight" not in weights))
    model.load_state_dict(weights)
    model.requires_grad_(False)
    texts = torch.tensor(ids(60)).view(20, 3)
    found, expected = logits_of(load_model(file), texts), logits_of(model, texts)
    errors = (found - expected).square().mean(-1).sqrt()
    assert errors.median() < 0.05 * expected.std(), errors


def as_floats(file: Path) -> dict[str, torch.Tensor]:
    """Our tensors of a quantized file as floats, by the definition of its format."""
    tensors = safetensors.torch.load_file(file)
    floats = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith(("scales", "zeros"))}
    for name, scales in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind != "scales":
            continue
        levels = tensors[f"{layer}.weight"]
        if levels.dtype == torch.uint8:
            levels = torch.stack((levels % 16, levels // 16), -1).flatten(-2)
            if f"{layer}.zeros" not in tensors:  # of mxfp4
                levels = torch.where(levels < 8, 1, -1) * E2M1[(levels % 8).long()]
        scales = scales.float() if scales.dim() == levels.dim() else scales.float()[..., None]
        size = levels.shape[-1] // scales.shape[-1]
        zeros = tensors.get(f"{layer}.zeros", torch.zeros_like(scales)).float()
        weight = (levels.float() - zeros.repeat_interleave(size, -1)) * scales.repeat_interleave(size, -1)
        floats[f"{layer}.weight"] = weight
    return floats


DIFFERENT = ["gemma2", "cohere2", "olmo3-hub", "gpt-neox-hub", "gpt2-hub", "qwen2-moe-some", "gpt-oss"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", *DIFFERENT])
def test_gptq(cached, tmp_path, name):
    made, folder = cached(name)
    (tmp_path / "calibration.txt").write_text((ROOT / "model.py").read_text()[:3000])
    file = quantize(folder, "int4-gptq", calibration=tmp_path / "calibration.txt")
    assert_meant(file)
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


@pytest.mark.parametrize("k", [4, 12])  # 12 is more than a window
@pytest.mark.parametrize("name", [*WINDOWED, "gpt2", "qwen2-moe-some", "smollm3"])
def test_prompt_lookup(cached, tokenizer, name, k):
    """Whatever is proposed, the tokens are those of plain decoding."""
    made, folder = cached(name)
    prompts = [ids(6, seed) * 5 for seed in (1, 2, 3)]  # so that there is something to propose
    requests = [Request(prompt, GREEDY, 30) for prompt in prompts]
    engine = Engine(load_model(folder), prompt_lookup=True, speculate_k=k)
    set_up(engine, requests, batch_size=2, max_seq_length=128)
    rows = run_rows(engine, tokenizer, requests)
    assert sum(row[-1].stats.proposed for row in rows) > 20
    for prompt, new in zip(prompts, ids_of(rows), strict=True):
        made.assert_greedy(prompt, new)


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_a_draft(cached, tokenizer, name):
    """Of another family with a window; nearly all that it proposes is wrong."""
    made, folder = cached(name)
    requests = [Request(ids(length, length), GREEDY, 30) for length in (20, 40, 9)]
    engine = Engine(load_model(folder), draft=load_model(cached("mistral")[1]), speculate_k=3)
    set_up(engine, requests, batch_size=2, max_seq_length=128)
    for request, new in zip(requests, ids_of(run_rows(engine, tokenizer, requests)), strict=True):
        made.assert_greedy(request.prompt, new)


@pytest.mark.parametrize("name", [*WINDOWED, "gpt2", "granite-moe"])
def test_a_conversation(cached, tokenizer, name):
    """Turns whose texts before are in the cache, some longer than a window and some shorter."""
    made, folder = cached(name)
    engine = set_up(Engine(load_model(folder)), [Request([5], GREEDY, 1)], batch_size=1, max_seq_length=256)
    context: list[int] = []
    for turn, length in enumerate((30, 3, 12, 1, 40)):
        request = Request(context + ids(length, turn), GREEDY, 10)
        (row,) = run_rows(engine, tokenizer, [request])
        (new,) = ids_of([row])
        made.assert_greedy(request.prompt, new)
        assert row[-1].stats.cached_tokens == max(len(context) - 1, 0)  # the last one was never run
        context = request.prompt + new


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "ministral"])
def test_beams(cached, name):
    made, folder = cached(name)
    engine, beams, prompt = Engine(load_model(folder)), BeamParams(3, num_return_sequences=3), ids(20, seed=6)
    engine.setup(3, 64, plain=True)
    found = beam_search(engine, Request(prompt, GREEDY, 12), beams)
    check_beams(made.reference, found, prompt, beams, 12)


@torch.no_grad()
@pytest.mark.parametrize("name", LONGROPE)
def test_longrope_beyond_the_trained_length(cached, tokenizer, monkeypatch, name):
    """A prompt that is longer has its long factors from the first token on; one that grows longer gets them then, and
    the keys in the cache stay as they were rotated, as in transformers' forward. (Its generate takes the text anew.)"""
    made, folder = cached(name)
    monkeypatch.setattr("engine.PREFILL_LENGTHS", (32,))  # which cuts the first prompt in three
    requests = [Request(ids(length, length), GREEDY, 24) for length in (ORIGINAL + 30, ORIGINAL - 10, 10)]
    engine = set_up(Engine(load_model(folder)), requests, batch_size=1, max_seq_length=256)
    for request, new in zip(requests, ids_of(run_rows(engine, tokenizer, requests)), strict=True):
        theirs: list[int] = []
        output = made.reference(torch.tensor([request.prompt]), use_cache=True)
        while len(theirs) < 24:
            theirs.append(int(output.logits[0, -1].argmax()))
            output = made.reference(torch.tensor([theirs[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        assert new == theirs, len(request.prompt)


@pytest.mark.parametrize("name", ["phi3-longrope", "gemma2"])
def test_what_a_row_may_go_on_from(cached, name):
    """Not from keys that were rotated for a text of another length, and not from positions that a ring has lost."""
    _, folder = cached(name)
    engine = Engine(load_model(folder))
    engine.setup(1, 256)
    text = ids(256)

    def usable(held, shared, length, prompt_length=None, written=None):
        prompt = text[:shared] + [token + 1 for token in text[shared:length]]
        place = Place(text[:held], written=written or held + 1, prompt_length=prompt_length or held)
        return engine.places.usable(place, prompt)

    if name == "gemma2":  # with a window of 7: rings of 55 slots
        assert usable(held=50, shared=20, length=30) == 20 and usable(held=200, shared=190, length=210) == 190
        # Position 155 - 6 is the first that the first new token sees; 204 took the slot of 149.
        assert usable(held=200, shared=155, length=210, written=204) == 155
        assert usable(held=200, shared=155, length=210, written=205) == 0
    else:
        assert usable(held=40, shared=30, length=ORIGINAL) == 30
        assert usable(held=40, shared=40, length=ORIGINAL + 1) == 0
        assert usable(held=ORIGINAL + 20, shared=ORIGINAL - 5, length=ORIGINAL) == 0
        assert usable(held=200, shared=ORIGINAL + 1, length=210) == ORIGINAL + 1
        # What was generated beyond the trained length, after a prompt that was shorter.
        assert usable(held=200, shared=200, length=210, prompt_length=ORIGINAL) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Compiled, and several ranks


def made_small(name: str, folder: Path) -> tuple[Made, Path]:
    """Of the families that are compiled."""
    rope = {"rope_parameters": ENTRIES["olmo3-hub"].config().rope_parameters} if name == "olmo3" else {}
    made = make(name, folder, **two_layers(name), **rope)
    return made, convert_made(made)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["olmo3", "gpt-neox-hub"])  # test_compiled_steps has others
def test_compiled_equals_eager(tmp_path, compiler, name):
    _, folder = made_small(name, tmp_path)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "qwen2-moe-some", "gpt-oss"])
def test_compiled_steps(tmp_path, tokenizer, name):
    """The whole step that a user gets, of several rows, with proposals; of one family that of one row as well."""
    made, folder = made_small(name, tmp_path)
    requests = [Request(ids(5, seed) * 4, GREEDY, 20) for seed in (1, 2, 3)]
    engine = Engine(load_model(folder), compile=True, prompt_lookup=True, speculate_k=3)
    set_up(engine, requests, batch_size=2, max_seq_length=128)
    if name != "gpt-oss":
        engine.row_counts = [2]  # each takes a compilation
    engine.warm_up()
    for request, new in zip(requests, ids_of(run_rows(engine, tokenizer, requests)), strict=True):
        made.assert_greedy(request.prompt, new)


RANKED = ["qwen3", *DIFFERENT]
RANKED_QUANTIZED = [(MXFP4, ""), ("mixtral", "int4"), ("gpt-oss", "int8"), ("cohere2", "int4")]


@pytest.fixture(scope="module")
def ranks(cached, tmp_path_factory):
    """What two ranks say, of one launch for all: the texts, and (name, mode) -> the files and the logits."""
    out = tmp_path_factory.mktemp("ranks")
    texts = [ids(40, seed) for seed in (1, 2)]
    files = {(name, ""): cached(name)[1] for name in RANKED}
    for name, mode in RANKED_QUANTIZED:
        folder = cached(name)[1]
        files[name, mode] = quantize(folder, mode, out=folder / f"model_ranks-{mode}.safetensors") if mode else folder
    tasks = [
        ("logits", [str(file), texts, "float32", str(out / f"{name}{mode}.pt")]) for (name, mode), file in files.items()
    ]
    for one, other in zip(*run_tasks(2, out, tasks), strict=True):
        assert one == other and all(one[1:])
    return texts, {key: (file, torch.load(out / f"{key[0]}{key[1]}.pt")) for key, file in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKED)
def test_two_ranks(ranks, cached, name):
    texts, results = ranks
    for text, row in zip(texts, results[name, ""][1], strict=True):
        assert_close(row, cached(name)[0].logits(text))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("name", "mode"), RANKED_QUANTIZED)
def test_two_ranks_quantized(ranks, name, mode):
    """The logits of one process, but for the rounding of inputs."""
    texts, results = ranks
    file, logits = results[name, mode]
    expected = logits_of(load_model(file), torch.tensor(texts))
    errors = (logits.flatten(0, 1) - expected).square().mean(-1).sqrt()
    assert errors.median() < 0.05 * expected.std(), errors


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("name", ["gemma2-hub", "gpt2-hub", "qwen3-moe", "gpt-oss"])
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


# ---------------------------------------------------------------------------------------------------------------------
# Published configs


def written_out(config: transformers.PreTrainedConfig) -> dict:
    """What transformers writes, every field in today's spelling."""
    return json.loads(config.to_json_string(use_diff=False)) | {"architectures": None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    """Every field is known, and all of it means what transformers takes it to mean."""
    config = PUBLISHED[name]
    assert unknown_fields(config) == []
    ours = ModelConfig.from_hf(config)
    if config["model_type"] != "minimind":
        theirs = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
        expected = ModelConfig.from_hf(written_out(theirs) | {"quantization_config": None})
        assert replace(ours, tied=expected.tied) == expected  # for Mistral 3 the weights tell
        assert ours.tied == expected.tied or config["model_type"] == "mistral3"


def test_what_published_configs_mean():
    """What transformers' classes could be wrong about together with us, as the models' reports have it."""
    read = {name.partition("/")[2]: ModelConfig.from_hf(config) for name, config in PUBLISHED.items()}
    windows = {name: config.window_layers for name, config in read.items()}
    assert windows["gemma-2-9b"] == (True, False) * 21
    assert windows["gemma-3-4b-it"] == ((True,) * 5 + (False,)) * 5 + (True,) * 4
    assert windows["c4ai-command-r7b-12-2024"] == windows["Olmo-3-7B-Instruct"] == (True, True, True, False) * 8
    assert windows["gpt-oss-20b"] == (True, False) * 12
    assert read["gemma-3-1b-it"].sliding_window == 512 and read["gemma-3-4b-it"].vocab_size == 262208
    assert all(windows["Phi-3-mini-4k-instruct"]) and all(windows["starcoder2-3b"])
    assert not any(windows["Qwen3-30B-A3B"]) and not any(windows["Mistral-Nemo-Instruct-2407"])
    rotated = {"phi-2": 32, "Phi-4-mini-instruct": 96, "glm-4-9b-chat-hf": 64, "pythia-160m": 16, "gpt2": 0}
    assert {name: read[name].rotary_dim for name in rotated} == rotated
    tied = {name for name, config in read.items() if config.tied}
    assert {"gemma-2b", "gemma-3-27b-it", "starcoder2-3b", "gpt2", "SmolLM3-3B", "c4ai-command-r-v01"} <= tied
    assert not {"starcoder2-15b", "phi-4", "GLM-4-32B-0414", "gpt-oss-20b", "Qwen3-30B-A3B"} & tied
    heads = {"gemma-3-27b-it": 128, "Mistral-Nemo-Instruct-2407": 128, "phi-4": 128, "stablelm-2-12b": 160, "gpt2": 64}
    assert {name: read[name].head_dim for name in heads} == heads
    experts = {name: (config.experts.count, config.experts.chosen) for name, config in read.items() if config.experts}
    assert experts == {
        "Mixtral-8x7B-Instruct-v0.1": (8, 2), "Qwen1.5-MoE-A2.7B": (60, 4), "Qwen3-30B-A3B": (128, 8),
        "OLMoE-1B-7B-0924": (64, 8), "granite-3.0-1b-a400m-instruct": (32, 8), "gpt-oss-20b": (32, 4),
        "MiniMind2-MoE": (4, 2),
    }  # fmt: skip
    lengths = {"phi-4": 16384, "Phi-4-mini-instruct": 131072, "Olmo-3-7B-Instruct": 65536, "gpt-oss-20b": 131072}
    assert {name: read[name].context_length for name in lengths} == lengths


# Whose class is made with nothing but defaults; the others are those of nested configs, or MiniMind's.
TYPES = sorted({config["model_type"] for config in PUBLISHED.values()} - {"gemma3", "mistral3", "minimind"})
TYPES += ["mistral", "qwen2", "qwen3", "granitemoeshared"]


@pytest.mark.parametrize("kind", dict.fromkeys(TYPES))
def test_missing_fields_have_the_defaults_of_transformers(kind):
    assert ModelConfig.from_hf({"model_type": kind}) == ModelConfig.from_hf(written_out(CONFIG_MAPPING[kind]()))
    published = next((config for config in PUBLISHED.values() if config["model_type"] == kind), {"model_type": kind})
    for name in published:
        if name in ("architectures", "model_type", "quantization_config"):
            continue
        given = {field: value for field, value in published.items() if field not in (name, "quantization_config")}
        try:
            theirs = written_out(CONFIG_MAPPING[kind].from_dict(copy.deepcopy(given)))
            expected = ModelConfig.from_hf(theirs)
        except (ValueError, TypeError, AttributeError, UserError, StrictDataclassError):
            continue  # the others do not go together with this default
        assert ModelConfig.from_hf(given) == expected, name


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def refused_config(name: str, **fields: object) -> str:
    """The error of a published config with other fields; one of text_config is NAME__FIELD."""
    config = copy.deepcopy(PUBLISHED[name])
    for field, value in fields.items():
        outer, _, inner = field.rpartition("__")
        (config[outer] if outer else config)[inner] = value
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(config)
    return one_line(error)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    return message


GEMMA, GPT_OSS, QWEN = "google/gemma-2-9b", "openai/gpt-oss-20b", "Qwen/Qwen3-30B-A3B"


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        (GEMMA, dict(layer_types=["full_attention"] * 41), "layer_types"),
        (GEMMA, dict(layer_types=["full_attention"] * 41 + ["chunked_attention"]), "layer_types"),
        (GEMMA, dict(layer_types="full_attention"), "layer_types"),
        (GEMMA, dict(layer_types=[["full_attention"]] * 42), "layer_types"),
        (GEMMA, dict(sliding_window=0), "sliding_window"),
        (GEMMA, dict(sliding_window=-4), "sliding_window"),
        (GEMMA, dict(sliding_window=4.5), "sliding_window"),
        (GEMMA, dict(sliding_window=True), "sliding_window"),
        (GEMMA, dict(attn_logit_softcapping=-50.0), "attn_logit_softcapping"),
        (GEMMA, dict(attn_logit_softcapping="50"), "attn_logit_softcapping"),
        (GEMMA, dict(final_logit_softcapping=float("nan")), "final_logit_softcapping"),
        (GEMMA, dict(query_pre_attn_scalar=0), "query_pre_attn_scalar"),
        (GEMMA, dict(query_pre_attn_scalar=-1), "query_pre_attn_scalar"),
        (GEMMA, dict(hidden_activation="quick_gelu"), "hidden_activation"),
        (GEMMA, dict(hidden_activation=7), "hidden_activation"),
        (GEMMA, dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (GEMMA, dict(rms_norm_eps=0), "rms_norm_eps"),
        ("google/gemma-3-1b-it", dict(sliding_window_pattern=0), "sliding_window_pattern"),
        ("google/gemma-3-1b-it", dict(sliding_window_pattern="6"), "sliding_window_pattern"),
        ("google/gemma-3-1b-it", dict(rope_local_base_freq=-1), "rope_local_base_freq"),
        ("google/gemma-3-4b-it", dict(text_config=None), "text_config"),
        ("google/gemma-3-4b-it", dict(text_config__hidden_size=-1), "hidden_size"),
        ("google/gemma-3-4b-it", dict(text_config__model_type="mamba"), "mamba"),
        ("microsoft/phi-2", dict(partial_rotary_factor=0), "partial_rotary_factor"),
        ("microsoft/phi-2", dict(partial_rotary_factor=1.5), "partial_rotary_factor"),
        ("microsoft/phi-2", dict(partial_rotary_factor="half"), "partial_rotary_factor"),
        ("stabilityai/stablelm-2-12b", dict(qk_layernorm="yes"), "qk_layernorm"),
        ("EleutherAI/pythia-160m", dict(rotary_pct=-0.25), "rotary_pct"),
        ("EleutherAI/pythia-160m", dict(use_parallel_residual=1), "use_parallel_residual"),
        ("HuggingFaceTB/SmolLM3-3B", dict(no_rope_layers=[1] * 35), "no_rope_layers"),
        ("HuggingFaceTB/SmolLM3-3B", dict(no_rope_layers=["yes"] * 36), "no_rope_layers"),
        ("HuggingFaceTB/SmolLM3-3B", dict(no_rope_layers=None, no_rope_layer_interval=0), "no_rope_layer_interval"),
        ("allenai/OLMo-7B-0424-hf", dict(clip_qkv=-8), "clip_qkv"),
        ("ibm-granite/granite-3.1-2b-base", dict(logits_scaling=0), "logits_scaling"),
        ("ibm-granite/granite-3.1-2b-base", dict(residual_multiplier="big"), "residual_multiplier"),
        ("CohereForAI/c4ai-command-r-v01", dict(logit_scale=0), "logit_scale"),
        ("openai-community/gpt2", dict(n_embd=770), "n_embd"),
        ("openai-community/gpt2", dict(n_positions=0), "n_positions"),
        ("openai-community/gpt2", dict(activation_function="tanh"), "activation_function"),
        ("openai-community/gpt2", dict(add_cross_attention=True), "add_cross_attention"),
        ("bigcode/starcoder2-3b", dict(use_bias="both"), "use_bias"),
        (QWEN, dict(num_experts=0), "num_experts"),
        (QWEN, dict(num_experts=-3), "num_experts"),
        (QWEN, dict(num_experts=1.5), "num_experts"),
        (QWEN, dict(num_experts=10**9), "num_experts"),
        (QWEN, dict(num_experts_per_tok=129), "num_experts_per_tok"),
        (QWEN, dict(num_experts_per_tok=0), "num_experts_per_tok"),
        (QWEN, dict(moe_intermediate_size=-768), "moe_intermediate_size"),
        (QWEN, dict(norm_topk_prob="yes"), "norm_topk_prob"),
        (QWEN, dict(decoder_sparse_step=0), "decoder_sparse_step"),
        (QWEN, dict(decoder_sparse_step=-1), "decoder_sparse_step"),
        (QWEN, dict(mlp_only_layers=5), "mlp_only_layers"),
        (QWEN, dict(mlp_only_layers=["0"]), "mlp_only_layers"),
        (QWEN, dict(mlp_only_layers=[48]), "mlp_only_layers"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", dict(num_experts_per_tok=9), "num_experts_per_tok"),
        ("Qwen/Qwen1.5-MoE-A2.7B", dict(shared_expert_intermediate_size=-1), "shared_expert_intermediate_size"),
        ("jingyaogong/MiniMind2-MoE", dict(scoring_func="sigmoid"), "scoring_func"),
        ("jingyaogong/MiniMind2-MoE", dict(num_experts_per_tok=5), "num_experts_per_tok"),
        ("jingyaogong/MiniMind2-MoE", dict(n_shared_experts=-1), "n_shared_experts"),
        ("jingyaogong/MiniMind2-MoE", dict(n_shared_experts=2), "n_shared_experts"),
        (GPT_OSS, dict(swiglu_limit=-7.0), "swiglu_limit"),
        (GPT_OSS, dict(swiglu_limit="7"), "swiglu_limit"),
        (GPT_OSS, dict(hidden_act="gelu"), "hidden_act"),
        (GPT_OSS, dict(rope_scaling=dict(rope_type="yarn", truncate="no")), "truncate"),
    ],
)
def test_refused_fields_are_named(name, fields, named):
    assert named in refused_config(name, **fields)


@pytest.mark.parametrize(
    "change",
    [
        dict(long_factor=[1.0] * 47),
        dict(short_factor=[1.0] * 64),
        dict(short_factor=[]),
        dict(long_factor=None),
        dict(long_factor=2.0),
        dict(long_factor=["1"] * 48),
        dict(short_factor=[1.0] * 47 + [float("nan")]),
        dict(short_factor=[1.0] * 47 + [0.0]),
        dict(long_factor=[-1.0] * 48),
    ],
    ids=str,
)
def test_refused_factors_of_longrope(change):
    name = "microsoft/Phi-4-mini-instruct"
    (field,) = change
    assert field in refused_config(name, rope_scaling=PUBLISHED[name]["rope_scaling"] | change)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("qwen3_next", "linear attention"),
        ("falcon_h1", "state-space"),
        ("granitemoehybrid", "state-space"),
        ("jamba", "state-space"),
        ("bamba", "state-space"),
        ("mamba", "state-space"),
        ("deepseek_v3", "latent attention"),
        ("deepseek_v2", "latent attention"),
        ("recurrent_gemma", "recurren"),
    ],
)
def test_other_kinds_are_refused_by_name_with_the_reason(model_type, why):
    config = PUBLISHED["Qwen/Qwen3-30B-A3B"] | {"model_type": model_type, "architectures": None}
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(config)
    message = one_line(error)
    assert "model_type" in message and repr(model_type) in message and why.lower() in message.lower()


def rewrite(folder: Path, tensors=None, **fields) -> None:
    """Changes fields of a saved model's config.json, and its tensors by a function."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    if tensors:
        found = safetensors.torch.load_file(folder / "model.safetensors")
        safetensors.torch.save_file(tensors(found), folder / "model.safetensors")


def dropped(pattern: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}


def cut(pattern: str):
    """Without the last row."""
    return lambda tensors: {
        name: tensor[:-1].clone() if re.search(pattern, name) else tensor for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("name", "tensors", "fields", "named"),
    [
        ("mixtral", None, dict(num_local_experts=5), "layers.0."),
        ("mixtral", None, dict(num_local_experts=7), "layers.0."),
        ("qwen3-moe", None, dict(num_experts=5), "layers.0."),
        ("qwen3-moe", None, dict(num_experts=8), "layers.0."),
        ("granite-moe", None, dict(num_local_experts=5), "block_sparse_moe"),
        ("gpt-oss", None, dict(num_local_experts=7), "mlp."),
        ("gpt-oss-mxfp4", None, dict(num_local_experts=7), "mlp."),
        ("qwen3-moe", dropped("layers.2.mlp.experts.3.up_proj"), {}, "layers.2.mlp.experts.3.up_proj"),
        ("qwen3-moe", cut("layers.1.mlp.experts.4.gate_proj"), {}, "layers.1.mlp.experts.4.gate_proj"),
        ("qwen3-moe", dropped("layers.0.mlp.gate.weight"), {}, "layers.0.mlp.gate.weight"),
        ("qwen2-moe-some", None, dict(decoder_sparse_step=1), "layers.0.mlp"),
        ("qwen2-moe", dropped("shared_expert_gate"), {}, "shared_expert_gate"),
        ("gpt-oss", dropped("layers.1.self_attn.sinks"), {}, "layers.1.self_attn.sinks"),
        ("gpt-oss", cut("router.bias"), {}, "router.bias"),
        ("gpt-oss-mxfp4", dropped("gate_up_proj_scales"), {}, "gate_up_proj"),
        ("gpt-oss-mxfp4", cut("down_proj_blocks"), {}, "down_proj"),
        ("gpt-oss-mxfp4", lambda t: {n: x.float() if "_blocks" in n else x for n, x in t.items()}, {}, "_blocks"),
        ("gemma2", dropped("layers.3.pre_feedforward_layernorm"), {}, "layers.3.pre_feedforward_layernorm"),
        ("gemma3-eyes", dropped("language_model.model.layers.0.mlp.up_proj"), {}, "layers.0.mlp.up_proj"),
        ("phi3", cut("qkv_proj"), {}, "qkv_proj"),
        ("phi3", None, dict(num_key_value_heads=4), "qkv_proj"),
        ("stablelm-qk-norm", dropped("k_layernorm.norms.1"), {}, "k_layernorm.norms.1"),
        ("stablelm", None, dict(use_qkv_bias=False), "_proj.bias"),
        ("stablelm", None, dict(use_parallel_residual=True), "post_attention_layernorm"),
        ("gpt-neox-hub", cut("query_key_value.weight"), {}, "query_key_value"),
        ("gpt2", lambda t: {n: x[:, :-3].clone() if "c_attn" in n and x.dim() == 2 else x for n, x in t.items()}, {},
         "c_attn"),
        ("cohere", None, dict(use_qk_norm=True), "q_norm"),
        ("olmo2", cut("k_norm"), {}, "k_norm"),
        ("minimind-moe-2", None, dict(n_routed_experts=7), "layers.0."),
        ("minimind-moe-2", None, dict(n_shared_experts=0), "shared_experts"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, name, tensors, fields, named):
    made = make(name, tmp_path)
    rewrite(made.folder, tensors, **fields)
    with pytest.raises(UserError) as error:
        convert(made.folder, tmp_path / "ours")
    assert named in one_line(error) and not (tmp_path / "ours").exists()
