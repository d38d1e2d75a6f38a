"""Compiled functions that outlive the process: the same results as eager, in a process that never sees the compiler."""

import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import GREEDY, nothing_compiles
from torch import nn
from torch._dynamo.testing import CompileCounter

import compiled
from checkpoint import load_model
from compiled import CompiledFunction, describe, version_of
from engine import Engine, Request
from errors import UserError
from kernels import build
from sampling import SamplingParams
from speculate import decode_step

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


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "partly zeroed": lambda data: data[:-4096] + bytes(4096),
    "empty": lambda data: b"",
    "null": lambda data: b"null",
    "not text": lambda data: b"\xff" + data,
    "other": lambda data: data.replace(b"call", b"cull").replace(b"kernel", b"kennel"),
}


@torch.no_grad()
def test_a_damaged_program_is_made_anew(empty_cache, monkeypatch):
    args = Counter(), None, torch.linspace(0, 1, 8)[None], 1, ""
    expected = CompiledFunction(step)(*args)
    (folder,) = empty_cache.iterdir()
    other = empty_cache.with_name("other") / folder.name  # a library that is loaded must not be written to
    shutil.copytree(folder, other)
    for file in other.iterdir():
        content = file.read_bytes()
        for damage in DAMAGE.values():
            file.write_bytes(damage(content))
            assert compiled.load(step, args, other) is None
        file.unlink()
        assert compiled.load(step, args, other) is None
        file.write_bytes(content)
    file.write_bytes(bytes(100))
    monkeypatch.setattr(compiled, "programs_folder", lambda: other.parent)
    for mended in (False, True):
        with nothing_compiles() if mended else contextlib.nullcontext():
            got = CompiledFunction(step)(Counter(), *args[1:])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_programs_that_are_not_used_are_deleted(empty_cache, monkeypatch):
    def call() -> None:
        CompiledFunction(only_changes)(Counter())

    def age(name: str, days: float) -> Path:
        folder = empty_cache / name
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder, (time.time() - days * 86400,) * 2)
        return folder

    call()
    (used,) = empty_cache.iterdir()
    age(used.name, 40)
    call()
    assert time.time() - used.stat().st_mtime < 60
    old, recent = age("old", 31), age("recent", 29)
    build.prune(empty_cache.iterdir())
    assert set(empty_cache.iterdir()) == {used, recent} and not old.exists()
    monkeypatch.setattr(build, "KEPT", 1)
    age(used.name, 40)
    monkeypatch.setattr(compiled, "version_of", lambda *args: "of another version")
    call()
    assert [path.name for path in empty_cache.iterdir()] == ["of another version"]


@torch.no_grad()
def test_nowhere_to_save(empty_cache):
    empty_cache.write_text("a file, where a folder would be needed")
    x = torch.linspace(0, 1, 8)[None]
    function, expected = CompiledFunction(step), step(Counter(), None, x, 1, "")
    for _ in range(2):
        for got, wanted in zip(function(Counter(), None, x, 1, ""), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(compiled, "CACHE", tmp_path / "file" / "cache")
    monkeypatch.setenv(compiled.VARIABLE, str(compiled.CACHE))
    monkeypatch.setattr(compiled.atexit, "register", lambda close: closers.append(close))
    closers = []
    compiled.check_cache.__wrapped__()
    temporary = Path(os.environ[compiled.VARIABLE])
    (temporary / "kernel").touch()
    (warning,) = capsys.readouterr().err.splitlines()
    assert re.match(r"warning: .*cache cannot be written .*TORCHINDUCTOR_CACHE_DIR", warning)
    closers[0]()
    assert not temporary.exists()


@torch.no_grad()
def test_a_compiler_that_is_switched_off(empty_cache, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # as by TORCHDYNAMO_DISABLE=1
    x = torch.linspace(0, 1, 8)[None]
    expected = step(Counter(), None, x, 1, "")
    for got, wanted in zip(CompiledFunction(step)(Counter(), None, x, 1, ""), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", ""])
def test_no_compiler(compiler, monkeypatch):
    monkeypatch.setattr(compiled, "COMPILER", compiler)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler.*install g\+\+"):
        compiled.check_compiler()


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


def test_the_version_depends_on_the_code_that_is_traced(monkeypatch, engine):
    engine.setup(batch_size=1, max_seq_length=64)
    args = engine.model, None, engine.sampler, engine.model.key_pos, 0, False, None

    def with_change_of(file: str) -> str:
        with monkeypatch.context() as patch:
            path = str(HERE.parent / file)
            name, text = compiled.SOURCES[path]
            patch.setitem(compiled.SOURCES, path, (name, text + b"# changed"))
            compiled.read_code.cache_clear()
            return version_of(decode_step, args)

    versions = {file: with_change_of(file) for file in ("generate.py", "bench.py", "prompts.py", "tests/conftest.py")}
    compiled.read_code.cache_clear()
    same = version_of(decode_step, args)
    assert set(versions.values()) == {same}
    traced = "speculate.py", "model.py", "sampling.py", "config.py", "kernels/__init__.py", "kernels/packing.py"
    versions = {file: with_change_of(file) for file in (*traced, "compiled.py")}
    compiled.read_code.cache_clear()
    assert len({same, *versions.values()}) == 1 + len(versions)


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
        assert len(json.loads((folder / "program").read_text().partition("\n")[2])["kernels"]) > 5
        assert len(list(folder.glob("*.so"))) == 1


@pytest.fixture
def traces(monkeypatch):
    """torch.compile traces, and compiles nothing -> how often it did."""
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **others: compile(*args, **others | {"backend": counter}))
    monkeypatch.setattr("engine.prepare_compiler", lambda: None)
    return counter


def first_token(engine: Engine, length: int) -> int:
    return engine.start(0, Request([5 + i % 7 for i in range(length)], GREEDY, 1))[0][0, 2].item()


@pytest.mark.slow
def test_an_engine_may_be_set_up_more_often_than_dynamo_compiles_one_function(engine, traces):
    engine.setup(1, 64, plain=True)
    expected = first_token(engine, 20)
    mine = Engine(engine.model, compile_prefill=True)
    with torch._dynamo.config.patch(recompile_limit=3):
        for i in range(1, 6):
            mine.setup(1, 64, plain=True)
            assert first_token(mine, 20) == expected
            assert traces.frame_count == i


def test_a_prefill_with_dynamic_rope_is_compiled_for_any_length(base_folder, tmp_path, traces):
    folder = tmp_path / "dynamic"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope, "max_position_embeddings": 32}))
    eager, mine = (Engine(load_model(folder), compile_prefill=compile) for compile in (False, True))
    for each in (eager, mine):
        each.setup(1, 128, plain=True)
    for length in (*range(20, 30), 1, 100, 2, 3, 60):
        assert first_token(mine, length) == first_token(eager, length)
    assert traces.frame_count <= 4  # one token, the few that decode_attention takes, and more of them


def test_a_failed_warm_up_leaves_garbage_collection_on(engine, monkeypatch):
    engine.setup(1, 64, plain=True)
    monkeypatch.setattr(engine, "start", lambda *args: [][0])
    with pytest.raises(IndexError):
        engine.warm_up()
    assert gc.isenabled()


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
