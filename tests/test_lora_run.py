"""Adapters at run time against peft's own forward: logits, greedy tokens, rows with different adapters, compiled steps,
quantized layers, several ranks, drafts, kept prefixes, the server. And the op against float64.

The adapters are peft's, with random weights that matter, saved as it saves them.
"""

import copy
import itertools
import json
import math
from pathlib import Path

import hypothesis.strategies as st
import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import GREEDY, assert_refused, ids_of, nothing_compiles, parse, run_rows, set_up
from family_models import make
from hypothesis import given
from ranks_worker import run_tasks
from serving import Server
from test_eval import requests as harness_requests
from test_families import assert_close, convert_made, ids, positions
from test_kernels import DTYPES, activations, few, library, op  # noqa: F401

import eval as evaluation
import kernels.lora as lora_op
from beam import BeamParams, beam_search
from benchmarks.models import quantize_model
from checkpoint import load_config, load_model
from engine import Engine, Request
from errors import UserError
from lora_layers import AdaptedLinear, Adapters, identity, read_adapters
from prompt_cache import load_row, save_row
from quantize import quantize
from tokenizer import load_tokenizer

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHI = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TARGETS = {"llama": LLAMA, "qwen2": LLAMA, "phi3": PHI}
KINDS = {  # what peft is asked for
    "wide": dict(r=8, lora_alpha=16),
    "narrow": dict(r=3, lora_alpha=4, use_rslora=True),
    "some": dict(r=5, lora_alpha=20, rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 7}),
}
NAMES = [*KINDS, None]
SMALL = dict(num_hidden_layers=2)


class Tuned:
    """A tiny model, and adapters for it: "wide" for all layers, "narrow" for all but the output, "some" for q and o."""

    def __init__(self, family: str, folder: Path, **changes):
        self.made = make(family, folder, **changes)
        self.folder = convert_made(self.made)
        self.config, self.tokenizer = load_config(self.folder), load_tokenizer(self.folder)
        self.paths: dict[str, Path] = {}
        self.model: peft.PeftModel | None = None
        for name, options in KINDS.items():
            targets = TARGETS[family] + ["lm_head"] * (name == "wide")
            if name == "some":
                targets = [target for target in targets if target[0] in "qo"]
            self.add(name, target_modules=targets, **options)

    @torch.no_grad()
    def add(self, name: str, seed: int = 0, **options):
        """Another one, as it is read from where peft has saved it."""
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        if self.model is None:
            self.model = peft.get_peft_model(copy.deepcopy(self.made.reference), config, adapter_name=name)
        else:
            self.model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(len(name) + seed)
        for key, weight in self.model.named_parameters():
            if f".{name}." in key:
                weight.normal_(0, 0.12, generator=generator)
        folder = self.made.folder.parent / "adapters"
        self.model.eval().save_pretrained(folder, selected_adapters=[name])
        self.paths[name] = folder / name
        return self.read(name)[name]

    def read(self, *names: str):
        """As lora.Adapter, by their names."""
        return read_adapters({name: self.paths[name] for name in names}, self.folder)

    def adapters(self, model, *names: str, **others) -> Adapters:
        return Adapters(model, self.config, self.read(*names), **others)

    def engine(self, *names: str, model=None, **options) -> Engine:
        """An engine with these adapters, by default all."""
        model = load_model(self.folder) if model is None else model
        return Engine(model, adapters=self.adapters(model, *(names or KINDS)), **options)

    @torch.no_grad()
    def logits(self, name: str | None, tokens: list[int]) -> torch.Tensor:
        """peft's, [S, V]."""
        if name is None:
            return self.made.logits(tokens)
        self.model.set_adapter(name)
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0]

    def check(self, requests: list[Request], rows: list[list[int]]) -> None:
        """Each new token is the most likely one by peft."""
        for request, new in zip(requests, rows, strict=True):
            expected = self.logits(request.adapter, request.prompt + new)[len(request.prompt) - 1 : -1].argmax(-1)
            assert new == expected.tolist(), request.adapter


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """By the family, made once."""
    found = {}

    def get(family: str, **changes) -> Tuned:
        key = family, *changes.items()
        if key not in found:
            found[key] = Tuned(family, tmp_path_factory.mktemp(family), **changes)
        return found[key]

    return get


@pytest.fixture(scope="module")
def llama(tuned):
    return tuned("llama", **SMALL)


def requests(*adapters: str | None, length: int = 12, new: int = 8) -> list[Request]:
    return [Request(ids(length + 3 * i, i), GREEDY, new, adapter=name) for i, name in enumerate(adapters)]


def tokens_of(tuned: Tuned, engine: Engine, wanted: list[Request], **others) -> list[list[int]]:
    return ids_of(run_rows(set_up(engine, wanted, max_seq_length=128, **others), tuned.tokenizer, wanted))


# ---------------------------------------------------------------------------------------------------------------------
# In float32, against peft


@pytest.mark.parametrize("family", TARGETS)
@torch.no_grad()
def test_logits(tuned, family):
    """Of a prompt, and of one that goes on token by token; of rows with an adapter each, and one with none."""
    made = tuned(family)
    model = load_model(made.folder)
    adapters = made.adapters(model, *KINDS)
    model.setup_caches(len(NAMES), 64)
    adapters.setup(len(NAMES))
    for row, name in enumerate(NAMES):
        adapters.give(row, name)
    text = ids(40)
    expected = torch.stack([made.logits(name, text) for name in NAMES])
    assert (expected[:-1] - expected[-1]).abs().amax((1, 2)).min() > 0.1 * expected.abs().max()
    adapters.use(range(len(NAMES)))
    tokens, at = torch.tensor([text] * len(NAMES)), positions(len(NAMES), 40)
    got = model(tokens[:, :30], at[:, :30])
    assert_close(got, expected[:, :30])
    for i in range(30, 40):
        assert_close(model(tokens[:, i : i + 1], at[:, i : i + 1])[:, 0], expected[:, i])


@pytest.mark.parametrize("family", TARGETS)
def test_rows_with_different_adapters(tuned, family):
    """More requests than rows: each goes on as it would alone, whatever the others have."""
    made = tuned(family)
    wanted = requests(*NAMES, *NAMES)
    rows = tokens_of(made, made.engine(), wanted, batch_size=3)
    made.check(wanted, rows)
    assert len({tuple(row) for row in rows}) == len(rows)


def test_in_plain_pytorch(llama):
    """As other devices than CPUs have it: the matrices are not packed."""
    engine, wanted = llama.engine(), requests(*NAMES)
    for layer in engine.adapters.layers.values():
        a, b, layer.scales, parts = lora_op.views(layer.packed)
        layer.a, layer.b, layer.packed = lora_op.unpack_a(a, layer.room.inputs), lora_op.unpack_b(b, parts), None
    llama.check(wanted, tokens_of(llama, engine, wanted))


def test_the_output_layer_of_a_tied_model(tuned):
    """Its low-rank part changes the logits, and not the embedding."""
    made = tuned("llama", tie_word_embeddings=True, **SMALL)
    wanted = requests("wide", None)
    engine = made.engine()
    made.check(wanted, tokens_of(made, engine, wanted))
    assert engine.model.output.linear.weight is engine.model.tok_embeddings.weight


def test_beams(llama):
    """Of one adapter among several as of it alone in the model."""
    [request] = requests("some")
    found = []
    for names in (["wide", "some"], ["some"]):
        engine = set_up(llama.engine(*names), [request], batch_size=3, max_seq_length=128)
        found.append([text.tokens for text in beam_search(engine, request, BeamParams(3, num_return_sequences=3))])
    assert found[0] == found[1]


def test_the_scale(llama):
    model = load_model(llama.folder)
    adapters = llama.adapters(model, "wide", scale=0.0)
    [request], [plain] = requests("wide"), requests(None)
    rows = tokens_of(llama, Engine(model, adapters=adapters), [request])
    llama.check([plain], rows)
    assert adapters.identity("wide") != llama.adapters(load_model(llama.folder), "wide").identity("wide")


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


def test_nothing_compiles_where_another_adapter_fits(llama):
    wanted = requests("wide", "narrow", None)
    engine = llama.engine("wide", "narrow", compile=True, compile_prefill=True)
    set_up(engine, wanted, batch_size=2, max_seq_length=128)
    engine.warm_up(max(len(request.prompt) for request in wanted))
    other = llama.add("wide2", 1, target_modules=LLAMA, r=6, lora_alpha=5)
    with nothing_compiles():
        llama.check(wanted, ids_of(run_rows(engine, llama.tokenizer, wanted)))
        again = requests(None, "wide", "wide")
        llama.check(again, ids_of(run_rows(engine, llama.tokenizer, again)))
        engine.adapters.load("wide", other)
        rows = ids_of(run_rows(engine, llama.tokenizer, again))
    llama.check([replace_adapter(request, "wide2") for request in again], rows)


def replace_adapter(request: Request, name: str) -> Request:
    return Request(request.prompt, GREEDY, request.max_new_tokens, adapter=request.adapter and name)


def test_what_does_not_fit_a_slot(llama):
    adapters = llama.adapters(load_model(llama.folder), "some")
    before = adapters.identity("some")
    with pytest.raises(UserError, match=r"layers\.0\.\S+, for which there is no room"):
        adapters.load("some", llama.read("narrow")["narrow"])
    larger = llama.add("larger", target_modules=["q_proj"], r=9)
    with pytest.raises(UserError, match="rank 9, and there is room for 8"):
        adapters.load("some", larger)
    assert adapters.identity("some") == before


def test_room_for_adapters_is_checked_first(llama, monkeypatch):
    model = load_model(llama.folder)
    monkeypatch.setattr("files.free_memory", lambda: 100_000)
    with pytest.raises(UserError, match=r"the room for the adapters needs 0\.\d MB, 0\.1 MB are free"):
        llama.adapters(model, *KINDS)


def test_an_identity_is_of_all_numbers(llama):
    adapter = llama.read("wide")["wide"]
    before = identity(adapter, 1.0)
    adapter.deltas["output"][0].b[-1, -1] += 1
    assert identity(adapter, 1.0) != before


def test_without_adapters_nothing_changes(llama):
    """The layers of a model are those that they were, so its graph is."""
    model = load_model(llama.folder)
    before = [type(module) for module in model.modules()]
    Engine(model, adapters=Adapters(model, llama.config, {}))
    assert [type(module) for module in model.modules()] == before


def test_a_draft_proposes_without_the_adapter(llama):
    wanted = requests("wide", "narrow", None, new=12)
    for options in (dict(draft=load_model(llama.folder)), dict(prompt_lookup=True)):
        engine = llama.engine(speculate_k=3, **options)
        llama.check(wanted, tokens_of(llama, engine, wanted))


# ---------------------------------------------------------------------------------------------------------------------
# Beside weights of other forms


@pytest.mark.parametrize("form", ["bf16", "int8", "int8-g32", "int4"])
@torch.no_grad()
def test_the_low_rank_part_is_added_to_the_layer(llama, form):
    """Of every layer: what the layer has without it, plus the low-rank part in floats, rounded once."""
    path = quantize(llama.folder, "int8", 32) if form == "int8-g32" else llama.folder
    model = load_model(path, dtype=torch.bfloat16)
    model = quantize_model(model, form, 32) if form in ("int8", "int4") else model
    adapters = llama.adapters(model, "wide", "narrow")
    found = {name: adapter.deltas for name, adapter in llama.read("wide", "narrow").items()}
    adapters.setup(3)
    adapters.give(0, "narrow")
    adapters.give(2, "wide")
    adapters.use(range(3))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    assert len(layers) == 4 * llama.config.n_layers + 1
    for name, layer in layers.items():
        x = torch.randn(3, 2, layer.low_rank.room.inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
        base = layer.linear(x)
        expected = base.double()
        for row, adapter in ((0, "narrow"), (2, "wide")):
            for delta in found[adapter].get(name, []):
                a, b = (matrix.bfloat16().double() for matrix in (delta.a, delta.b))
                expected[row, :, delta.start : delta.start + len(b)] += delta.scale * (x[row].double() @ a.T @ b.T)
        got = layer(x)
        assert torch.equal(got[1], base[1])
        assert (got.double() - expected).abs().max() <= 2**-8 * expected.abs().max(), name


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantized_models_generate_with_adapters(llama, form):
    """Rows of a batch as each alone: quantized layers have the same sums for any number of rows."""
    model = quantize_model(load_model(llama.folder, dtype=torch.bfloat16), form, 32)
    engine, wanted = llama.engine(model=model), requests(*NAMES)
    together = tokens_of(llama, engine, wanted)
    assert together == [tokens_of(llama, engine, [request])[0] for request in wanted]
    assert len({tuple(row) for row in together}) == len(wanted)


def packed_adapters(a, b, scales, parts):
    """A [slots, parts, r, K] and B [slots, columns of all parts, r] as the op takes them."""
    packed = lora_op.empty_slots(len(a), a.shape[-1], a.shape[-2], parts, a.dtype)
    views = lora_op.views(packed)
    for view, numbers in zip(views, (lora_op.pack_a(a), lora_op.pack_b(b, parts), scales), strict=False):
        view.copy_(numbers)
    return packed


shapes = st.fixed_dictionaries(
    {
        "rows": st.sampled_from([(1, 1), (1, 7), (3, 1), (2, 5), (9, 1), (1, 40)]),
        "K": st.one_of(st.integers(1, 200), st.sampled_from([512, 1030])),
        "parts": st.lists(st.integers(0, 150), min_size=1, max_size=6),
        "rank": st.integers(1, 20),
        "slots": st.integers(1, 3),
        "dtype": st.sampled_from(["bf16", "f16", "f32"]),
        "kind": st.sampled_from(["normal", "outlier", "tiny", "zero"]),
        "seed": st.integers(0, 2**31),
    }
)


@few
@given(shape=shapes)
def test_the_op(op, shape):  # noqa: F811
    """y + scale B A x in float64, within what float32 sums and one rounding may change; rows without one are as they
    were to the last bit."""
    run = torch.ops.brisk.lora if op is torch.ops.brisk else lora_op.lora
    generator, dtype = torch.Generator().manual_seed(shape["seed"]), DTYPES[shape["dtype"]]
    (B, S), K, slots = shape["rows"], shape["K"], shape["slots"]
    ends = list(itertools.accumulate(shape["parts"]))  # every other stretch of columns is a part
    parts = list(zip(ends[::2], ends[1::2], strict=False)) or [(0, ends[0])]
    N, rank = ends[-1] + 1, -(-shape["rank"] // 8) * 8

    def random(*size):
        return torch.randn(size, generator=generator)

    x = activations(generator, B * S, K, shape["kind"], dtype).view(B, S, K)
    y = random(B, S, N).to(dtype)
    a = F.pad(random(slots, len(parts), shape["rank"], K) / math.sqrt(K), (0, 0, 0, rank - shape["rank"])).to(dtype)
    b = random(slots, sum(end - begin for begin, end in parts), rank).to(dtype)
    scales = random(slots, len(parts)) * (random(slots, len(parts)) > -1)
    chosen = torch.randint(-1, slots, (B + 1,), generator=generator)
    packed = packed_adapters(a, b, scales, parts)
    views = lora_op.views(packed)
    assert torch.equal(lora_op.unpack_a(views.a, K), a) and torch.equal(lora_op.unpack_b(views.b, parts), b)
    got = run(y, x, packed, chosen)

    exact, size = y.double(), y.double().abs()
    for row, slot in enumerate(chosen[:B].tolist()):
        first = 0
        for i, (begin, end) in enumerate(parts):
            matrices = x[row].double(), a[slot, i].double(), b[slot, first : first + end - begin].double()
            first += end - begin
            if slot >= 0:
                scale = scales[slot, i].double()
                exact[row, :, begin:end] += scale * (matrices[0] @ matrices[1].T @ matrices[2].T)
                absolute = [matrix.abs() for matrix in matrices]
                size[row, :, begin:end] += scale.abs() * (absolute[0] @ absolute[1].T @ absolute[2].T)
    summed = size * 2**-23 * (16 + K / 4)
    bound = summed + (exact.abs() + summed) * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
    assert ((got.double() - exact).abs() <= bound).all()
    assert torch.equal(got[chosen[:B] < 0], y[chosen[:B] < 0])


def test_the_op_refuses_what_does_not_fit(library):  # noqa: F811
    packed = packed_adapters(torch.zeros(1, 1, 8, 32), torch.zeros(1, 10, 8), torch.ones(1, 1), [(0, 10)])
    x, y, slots = torch.zeros(2, 1, 32), torch.zeros(2, 1, 10), torch.zeros(2).long()
    good = [y, x, packed, slots]
    assert torch.equal(torch.ops.brisk.lora(*good), y)
    for at, bad in (
        (0, torch.zeros(3, 1, 10)), (0, torch.zeros(2, 1, 9)), (1, torch.zeros(2, 1, 64)), (2, packed[:-1]),
        (2, packed.float()), (2, packed[:8]), (3, torch.ones(2).long()), (3, torch.zeros(1).long()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="lora: "):
            torch.ops.brisk.lora(*good[:at], bad, *good[at + 1 :])


# ---------------------------------------------------------------------------------------------------------------------
# What a row holds


def test_prefixes_are_shared_by_requests_of_the_same_adapter_only(llama, prefills):
    wanted = [Request(ids(40), GREEDY, 4, adapter=name) for name in (None, "wide", "narrow", "wide", None, "narrow")]
    engine = set_up(llama.engine(), wanted, batch_size=3, max_seq_length=128)
    rows = [run_rows(engine, llama.tokenizer, [request])[0] for request in wanted]
    llama.check(wanted, ids_of(rows))
    assert [prefill.cached for prefill in prefills] == [0, 0, 0, 39, 39, 39]
    engine.adapters.load("wide", llama.read("some")["some"])
    run_rows(engine, llama.tokenizer, wanted[1:2])
    assert prefills[-1].cached == 0


def test_a_prompt_cache_says_which_adapter_it_is_of(llama, tmp_path):
    [request] = [Request(ids(40), GREEDY, 4, adapter="wide")]
    engine = set_up(llama.engine(), [request], max_seq_length=128)
    run_rows(engine, llama.tokenizer, [request])
    save_row(engine, 0, tmp_path / "cache", ["checksum"])
    wide = engine.adapters.identity("wide")
    engine.forget()
    assert load_row(engine, 0, tmp_path / "cache", ["checksum"], {wide}) == 43
    assert engine.places.choose(request.prompt, [0], wide)[2] == 39
    assert engine.places.choose(request.prompt, [0])[2] == 0
    for others in ({""}, {engine.adapters.identity("some")}):
        with pytest.raises(UserError, match=f"another adapter .{wide}, here"):
            load_row(engine, 0, tmp_path / "cache", ["checksum"], others)


# ---------------------------------------------------------------------------------------------------------------------
# The command lines


def run(script, made: Tuned, *args):
    return script("--checkpoint_path", made.folder, "--max_new_tokens", 8, "--json", *args)


def texts(made: Tuned, *names: str | None, model=None) -> list[list[int]]:
    """The tokens after a prompt by each of the adapters; by default by peft as well."""
    prompt = made.tokenizer.encode("def read")
    wanted = [Request(prompt, GREEDY, 8, frozenset({1}), adapter=name) for name in names]
    engine = set_up(made.engine(model=model), wanted, max_seq_length=1024)
    rows = ids_of(run_rows(engine, made.tokenizer, wanted))
    if model is None:
        made.check(wanted, rows)
    return rows


def test_generate(script, llama):
    wide, narrow, plain = texts(llama, "wide", "narrow", None)
    one = run(script, llama, "--prompt", "def read", "--adapter", llama.paths["wide"])
    assert [result["tokens"] for result in parse(one)] == [wide]
    none = run(script, llama, "--prompt", "def read", "--adapter", llama.paths["wide"], "--adapter_scale", 0)
    assert parse(none)[0]["tokens"] == plain

    lines = llama.folder.parent / "prompts.jsonl"
    choices = [{}, {"adapter": "n"}, {"adapter": ""}, {"adapter": "wide"}]
    lines.write_text("".join(json.dumps({"prompt": "def read"} | choice) + "\n" for choice in choices))
    adapters = ["--adapter", llama.paths["wide"], f"n={llama.paths['narrow']}"]
    several = run(script, llama, "--prompt_file", lines, "--batch_size", 3, *adapters)
    assert [result["tokens"] for result in parse(several)] == [wide, narrow, plain, wide]
    assert_refused(
        run(script, llama, "--prompt_file", lines, *adapters[:2]), "line 2", "adapter 'n' is unknown", "wide"
    )


def test_generate_refuses(script, llama):
    wide, narrow = llama.paths["wide"], llama.paths["narrow"]
    for args, words in (
        (["--adapter", f"w={wide}"], ["no prompt asks for", "'w'"]),
        (["--adapter", wide, narrow], ["one may be without a name", f"NAME={narrow}"]),
        (["--adapter", f"a={wide}", f"a={narrow}"], ["two adapters are called 'a'"]),
        (["--adapter_scale", "2"], ["--adapter_scale needs --adapter"]),
        (["--adapter", wide, "--adapter_scale", "nan"], ["'nan' is not a number"]),
    ):
        assert_refused(run(script, llama, "--prompt", "def read", *args), *words)


def test_a_chat_changes_its_adapter(script, llama):
    wide, plain = ([llama.tokenizer.decode(row)] for row in texts(llama, "wide", None))
    lines = ["def read", "/clear", "/set adapter w", "def read", "/set adapter x"]
    args = [
        "--checkpoint_path",
        llama.folder,
        "--interactive",
        "--max_new_tokens",
        8,
        "--adapter",
        f"w={llama.paths['wide']}",
    ]
    result = script(*args, stdin="".join(line + "\n" for line in lines).encode())
    assert result.code == 0 and result.out == f"{plain[0]}\n{wide[0]}\n"
    assert "error: adapter 'x' is unknown, there are w" in result.err


def test_eval(llama, monkeypatch, capsys):
    """The perplexity of a text by peft."""
    text = llama.folder.parent / "text.txt"
    text.write_text("def read_lines(path):\n    with open(path) as file:\n" * 3)
    ids = llama.tokenizer.encode(text.read_text())
    results = {}
    for name in ("wide", None):
        adapter = [] if name is None else ["--adapter", str(llama.paths[name])]
        monkeypatch.setattr(
            "sys.argv",
            ["eval.py", "--perplexity", str(text), "--checkpoint_path", str(llama.folder), "--json", *adapter],
        )
        evaluation.main()
        results[name] = json.loads(capsys.readouterr().out)["perplexity"]
        expected = F.cross_entropy(llama.logits(name, ids)[:-1], torch.tensor(ids[1:])).exp().item()
        assert results[name] == pytest.approx(expected, rel=1e-4)
    assert results["wide"] != results[None]


def test_tasks(llama):
    """lm-eval's requests, answered with the adapter, one after the other."""
    model = load_model(llama.folder)
    lm = evaluation.harness_class()(model, llama.tokenizer, 2, 64, frozenset(), llama.adapters(model, "wide"))
    context, continuation = llama.tokenizer.encode("def read"), ids(5)
    for _ in range(2):
        [(found, _)] = lm._loglikelihood_tokens([(None, context, continuation)])
        logits = llama.logits("wide", context + continuation)[len(context) - 1 : -1]
        assert found == pytest.approx(
            -F.cross_entropy(logits, torch.tensor(continuation), reduction="sum").item(), abs=1e-3
        )
        [text] = lm.generate_until(harness_requests("generate_until", [("def read", {"max_gen_toks": 8})]))
        assert text == llama.tokenizer.decode(texts(llama, "wide")[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(target_modules=["q_proj"], use_dora=True), "DoRA"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), "output"),
        (dict(target_modules=["q_proj"], trainable_token_indices=[7, 8]), "trained tokens"),
        (dict(target_modules=["q_proj", "embed_tokens"]), "embedding tok_embeddings"),
    ],
)
def test_what_can_only_be_merged(tmp_path, llama, options, words):
    model = peft.get_peft_model(copy.deepcopy(llama.made.reference), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():  # as if it had been trained
        for weight in model.parameters():
            weight += 0.1 * weight.requires_grad
    model.save_pretrained(tmp_path / "special")
    adapters = read_adapters({"special": tmp_path / "special"}, llama.folder)
    with pytest.raises(UserError, match=f"'special' .*{words}.*convert_hf_checkpoint.py --adapter"):
        Adapters(load_model(llama.folder), llama.config, adapters)


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks, several clients


def test_two_ranks(tuned, tmp_path):
    """Parts that are matrices of their own, and fused ones; widths that the ranks do not divide; quantized layers."""
    tasks, expected = [], []
    for family, width in (("phi3", 91), ("llama", 96)):
        made, lines = tuned(family, intermediate_size=width, **SMALL), tmp_path / f"{family}.jsonl"
        choices = [{"prompt": "def read", "adapter": name or ""} for name in NAMES]
        lines.write_text("".join(json.dumps(choice) + "\n" for choice in choices))
        args = ["--checkpoint_path", made.folder, "--prompt_file", lines, "--batch_size", 4, "--max_new_tokens", 8]
        args += ["--json", "--adapter", *(f"{name}={made.paths[name]}" for name in KINDS)]
        tasks.append(["cli", [list(map(str, args))]])
        expected.append(texts(made, *NAMES))
    quantized = load_model(quantize(made.folder, "int8", 32), dtype=torch.float32)
    args[1:2] = [made.folder / "model_int8-g32.safetensors", "--dtype", "float32"]
    tasks.append(["cli", [list(map(str, args))]])
    expected.append(texts(made, *NAMES, model=quantized))
    ranks = run_tasks(2, tmp_path, tasks)
    assert [[json.loads(line)["tokens"] for line in text.splitlines()] for text in ranks[0]] == expected


def test_the_server(llama):
    adapters = [f"{name}={llama.paths[name]}" for name in ("wide", "narrow")]
    wide, narrow, plain = texts(llama, "wide", "narrow", None)
    with Server("--checkpoint_path", llama.folder, "--batch_size", 3, "--adapters", *adapters) as server:
        client, name = server.client(), llama.folder.name
        assert [model.id for model in client.models.list()] == [name, f"{name}:wide", f"{name}:narrow"]
        assert client.models.retrieve(f"{name}:narrow").id == f"{name}:narrow"
        for model, new in ((f"{name}:wide", wide), ("x:narrow", narrow), (name, plain), ("anything", plain)):
            answer = client.completions.create(model=model, prompt="def read", max_tokens=8, temperature=0)
            assert answer.choices[0].text == llama.tokenizer.decode(new)
            assert answer.model == (f"{name}:{model.partition(':')[2]}" if ":" in model else name)
        for path, body in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            status, error = server.post(path, model=f"{name}:other", **body)
            assert status == 404 and error["error"]["code"] == "model_not_found"
            assert f"{name}:wide, {name}:narrow" in error["error"]["message"]
