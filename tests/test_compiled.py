"""Compiled functions that outlive the process: the same results as eager, in a process that never sees the compiler."""

import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import GREEDY, nothing_compiles
from torch import nn

import compiled
from compiled import CompiledFunction, describe, version_of
from engine import Engine, Request
from errors import UserError
from sampling import SamplingParams

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A cache of programs of this test's own. Kernels that Inductor has built before are found all the same."""
    monkeypatch.setattr(compiled, "programs_folder", lambda: tmp_path / "programs")
    return tmp_path / "programs"


class Counter(nn.Module):
    """Buffers that a step changes, and weights that it reads."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.arange(width * width).view(width, width) / 50, requires_grad=False)
        self.register_buffer("total", torch.zeros(width))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).tanh()


def step(module: Counter, other: Counter | None, x: torch.Tensor, times: int, name: str) -> tuple[torch.Tensor, ...]:
    for _ in range(times):
        x = module(x)
    module.total.add_(x.sum(0))
    module.steps.add_(1)
    if other is not None:
        other.total.copy_(module.total)
    return x, module.total * 2


def only_changes(module: Counter) -> None:
    module.total.mul_(0.5)


def uses() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Some calls, compiled and not -> what came of them."""
    both = []
    for compile in (CompiledFunction, lambda function: function):
        module, other, results = Counter(), Counter(), []
        function, change = compile(step), compile(only_changes)
        for rows, times, second in ((1, 1, None), (1, 1, None), (3, 2, other), (1, 2, other), (3, 2, other)):
            results += function(module, second, torch.linspace(-1, 1, rows * 8).view(rows, 8), times, "a")
            assert change(module) is None
        both.append([*results, *module.buffers(), *other.buffers()])
    return tuple(both)


@torch.no_grad()
def test_results_are_those_of_eager_when_recorded_and_when_loaded(empty_cache):
    for _ in range(2):
        for got, expected in zip(*uses(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert len(list(empty_cache.iterdir())) == 4  # kinds of calls: of step three, of only_changes one


@torch.no_grad()
def test_a_loaded_program_looks_up_tensors_that_are_arguments(empty_cache):
    module = Counter()
    expected = [step(Counter(), None, torch.full((2, 8), value), 1, "")[0] for value in (0.1, 0.2, 0.3)]
    for _ in range(2):
        function = CompiledFunction(step)
        got = [function(module, None, torch.full((2, 8), value), 1, "")[0] for value in (0.1, 0.2, 0.3)]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


OUTSIDE = torch.ones(8)


def reads_a_global(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x + OUTSIDE,)


def returns_a_view(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + 1, x[:1]


def returns_its_argument(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + 1, x


def returns_a_number(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    return x + 1, x.shape[0]


def has_a_constant(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x @ torch.tensor([[float(i * j) for i in range(8)] for j in range(8)]),)


@torch.no_grad()
@pytest.mark.parametrize(
    "function", [has_a_constant, reads_a_global, returns_a_view, returns_its_argument, returns_a_number]
)
def test_a_call_that_cannot_be_explained_is_right_all_the_same(function, empty_cache):
    for _ in range(2):
        compiled_function = CompiledFunction(function)
        for value in (1.0, 2.0):
            x = torch.full((2, 8), value)
            for got, expected in zip(compiled_function(x), function(x), strict=True):
                assert got == expected if isinstance(expected, int) else torch.equal(got, expected)
    assert not empty_cache.exists()


@torch.no_grad()
@pytest.mark.parametrize("damage", ["truncated", "no call", "no kernel", "empty"])
def test_a_damaged_program_is_made_anew(damage, empty_cache, monkeypatch):
    x = torch.linspace(0, 1, 8)[None]
    expected = CompiledFunction(step)(Counter(), None, x, 1, "")
    other = empty_cache.with_name("other")  # Python does not load a library again that it has loaded from its place
    shutil.copytree(empty_cache, other)
    monkeypatch.setattr(compiled, "programs_folder", lambda: other)
    (folder,) = other.iterdir()
    program, kernel = folder / "program.json", next(folder.glob("*.so"))
    if damage == "truncated":
        program.write_text(program.read_text()[:100])
    elif damage == "no call":
        program.write_text(program.read_text().replace("call", "cull"))
    else:
        kernel.unlink()
        if damage == "empty":
            kernel.touch()
    with pytest.raises(AssertionError, match="step is compiled"), nothing_compiles():
        CompiledFunction(step)(Counter(), None, x, 1, "")
    for mended in (False, True):
        with nothing_compiles() if mended else contextlib.nullcontext():
            got = CompiledFunction(step)(Counter(), None, x, 1, "")
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@torch.no_grad()
def test_nowhere_to_save(empty_cache):
    empty_cache.write_text("a file, where a folder would be needed")
    x = torch.linspace(0, 1, 8)[None]
    function, expected = CompiledFunction(step), step(Counter(), None, x, 1, "")
    for _ in range(2):
        for got, wanted in zip(function(Counter(), None, x, 1, ""), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_compiler_that_is_switched_off(empty_cache, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # as by TORCHDYNAMO_DISABLE=1
    x = torch.linspace(0, 1, 8)[None]
    expected = step(Counter(), None, x, 1, "")
    for got, wanted in zip(CompiledFunction(step)(Counter(), None, x, 1, ""), expected, strict=True):
        assert torch.equal(got, wanted)


@torch.no_grad()
def test_no_headers_of_python(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name, scheme: str(tmp_path / scheme / name))
    with pytest.raises(UserError, match=r"Python\.h; .*python3-dev"):
        compiled.check_compiler()


def test_a_model_that_is_gone_leaves_no_memory(empty_cache):
    module, function = Counter(), CompiledFunction(step)
    gone = weakref.ref(module.total)
    function(module, None, torch.ones(1, 8), 1, "")
    del module, function
    gc.collect()
    assert gone() is None


def test_the_version_depends_on_all_but_the_numbers_of_tensors():
    def version(module: Counter, x: torch.Tensor, times: int = 1) -> str:
        return version_of(step, (module, None, x, times, ""))

    first = version(Counter(), torch.zeros(1, 8))
    assert first == version(Counter(), torch.ones(1, 8))
    other = Counter()
    other.total.fill_(3)
    assert first == version(other, torch.ones(1, 8))
    other.width = 9
    assert first != version(other, torch.zeros(1, 8))
    assert first != version(Counter(), torch.zeros(2, 8))
    assert first != version(Counter(), torch.zeros(1, 8, dtype=torch.float64))
    assert first != version(Counter(), torch.zeros(8, 1).T)
    assert first != version(Counter(), torch.zeros(1, 8), 2)
    assert first != version(Counter(16), torch.zeros(1, 8))
    assert first != version_of(only_changes, (Counter(), None, torch.zeros(1, 8), 1, ""))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert first != version(Counter(), torch.zeros(1, 8))
    finally:
        torch.set_num_threads(threads)


def test_the_version_depends_on_what_a_function_holds():
    def scaled(by):
        return lambda x, more=by: (x * by * more,)

    assert version_of(scaled(2), ()) == version_of(scaled(2), ()) != version_of(scaled(3), ())


def test_code_of_no_file_is_never_the_same(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__file__", None)
    assert version_of(step, ()) != version_of(step, ())


def test_descriptions_are_the_same_in_every_process(engine):
    """What a hash is made of has no addresses in it, and sets have an order."""
    text = repr(describe(engine.model, {}))
    assert "0x" not in text and "object at" not in text
    assert describe({"b", "a", "c"}, {}) == ["'a'", "'b'", "'c'"]
    shared = torch.zeros(2)
    assert describe([shared, shared], {}) != describe([shared, torch.zeros(2)], {})


def test_tokens_of_a_loaded_step_are_those_of_eager(engine, empty_cache):
    texts = []
    for compile in (False, True, True):
        for params in (GREEDY, SamplingParams(temperature=0.9, top_p=0.8, seed=3, repetition_penalty=1.1)):
            mine = Engine(engine.model, compile=compile)
            mine.setup(batch_size=1, max_seq_length=64, plain=params.plain)
            tokens = mine.start(0, Request([5, 6, 7], params, 20))[0][0, 2:].tolist()
            tokens += [mine.step(0, 30)[0][0, 2].item() for _ in range(20)]
            texts.append(tokens)
    assert texts[:2] == texts[2:4] == texts[4:]
    folders = list(empty_cache.iterdir())
    assert len(folders) == 2
    for folder in folders:  # all kernels in one library
        assert len(json.loads((folder / "program.json").read_text())["kernels"]) > 5
        assert len(list(folder.glob("*.so"))) == 1


@pytest.mark.slow
def test_generate_starts_without_the_compiler_the_second_time(base_folder, script, tmp_path):
    code = "import sys, generate; generate.main(); print('torch._dynamo' in sys.modules, file=sys.stderr)"
    flags = f"--checkpoint_path {base_folder} --max_new_tokens 8 --prompt read --temperature 0.8 --seed 1 --json"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", code, "--compile", *flags.split()]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.stderr.split()[-1] for run in runs] == ["True", "False"], runs[1].stderr
    assert all(re.search(r"^warmed up in [\d.]+ s$", run.stderr, re.MULTILINE) for run in runs)
    outs = [run.stdout for run in runs] + [script(*flags.split()).out]
    first, second, eager = (json.loads(out)["tokens"] for out in outs)
    assert first == second == eager and len(eager) == 8
