"""replay.py: a program does the same in every call, whoever makes its calls."""

import ctypes
import subprocess
import textwrap

import pytest
import torch
from torch import nn

import kernels
from compiled import CompiledFunction
from kernels import Int8Linear, packing
from replay import OwnMemory, Recording, Replay


@pytest.fixture(autouse=True)
def library():
    if kernels.cpu_library() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture
def replays(monkeypatch):
    """All that are made."""
    made = []

    class Noted(Replay):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("compiled.Replay", Noted)
    return made


def python_steps(made: Replay) -> int:
    return sum(not isinstance(step, Recording) for step in made.steps)


class Layers(nn.Module):
    """Of our kernels, of PyTorch's GEMM and of what it has no kernels for, with a state."""

    def __init__(self, dim: int = 64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        q = torch.randint(-127, 128, (dim, dim), dtype=torch.int8, generator=generator)
        self.quantized = Int8Linear.from_canonical(q, torch.rand(dim, 1, generator=generator) / 1000)
        self.weight = nn.Parameter(torch.randn(dim, dim, generator=generator) / 8, requires_grad=False)
        self.register_buffer("state", torch.zeros(dim))

    def quantized_only(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.quantized(x).relu()
        self.state += y.sum(0)
        return self.quantized(y) + self.state, y

    def everything(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.quantized(x) @ self.weight
        values, indices = y.topk(5)
        self.state[indices[0]] += values[0].cumprod(0)
        return self.quantized(y) + self.state, indices


def call(layers: Layers, name: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return getattr(layers, name)(x)


@pytest.mark.parametrize(("name", "of_python"), [("quantized_only", False), ("everything", True)])
def test_calls_are_those_of_the_function(replays, name, of_python):
    """The first one, which is recorded, and later ones: with other arguments, and what the state has become."""
    layers, others = Layers(), Layers()
    step = CompiledFunction(call)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(3, 64, generator=generator)
        results, expected = step(layers, name, x), call(others, name, x)
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted)
        torch.testing.assert_close(layers.state, others.state)
    (made,) = replays
    assert made.steps and bool(python_steps(made)) == of_python


def test_results_are_new_tensors(replays):
    layers, step = Layers(), CompiledFunction(call)
    xs = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(2))
    kept = [step(layers, "quantized_only", x)[1] for x in xs]
    assert all(torch.equal(y, layers.quantized(x).relu()) for x, y in zip(xs, kept, strict=True))
    assert replays[0].steps


def add_one(model: nn.Module, x: torch.Tensor) -> None:
    x += 1


def test_arguments_may_be_changed(replays):
    step = CompiledFunction(add_one)
    xs = [torch.zeros(5), torch.ones(5), torch.full((5,), 2.0)]
    for i, x in enumerate(xs):
        assert not step(None, x)
        assert x.tolist() == [i + 1] * 5
    assert replays[0].steps


def test_arguments_keep_their_strides(replays):
    """Such as a part of a tensor, or the same number many times, which has no room for a result."""
    layers = Layers()
    for cut in (lambda x: x[:, 64:], lambda x: x[:, :1].expand(3, 64)):
        step = CompiledFunction(call)
        for i in range(3):
            x = cut(torch.full((3, 128), i / 8))
            assert torch.equal(step(layers, "quantized_only", x)[1], layers.quantized(x).relu())
    assert [bool(made.steps) for made in replays] == [True, False]


def choose(layer: nn.Module, x: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.ops.brisk.linear_experts(x, layer.weight, chosen, None),)


def test_an_op_may_fail(replays):
    layer, step = nn.Module(), CompiledFunction(choose)
    layer.weight = torch.randn(2, 4, 8)
    x = torch.randn(1, 1, 8)
    for _ in range(2):
        (y,) = step(layer, x, torch.tensor([[1]]))
        torch.testing.assert_close(y[0, 0], layer.weight[1] @ x[0, 0])
    assert not python_steps(replays[0])
    with pytest.raises(RuntimeError, match="expected experts from 0 to 1, got 2"):
        step(layer, x, torch.tensor([[2]]))
    assert torch.equal(step(layer, x, torch.tensor([[1]]))[0], y)


# ---------------------------------------------------------------------------------------------------------------------
# Programs as Inductor writes them


def program(body: str) -> str:
    return f"def call(args):\n    x, = args\n    args.clear()\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"


def make(source: str, **names) -> Replay:
    scope = {"torch": torch, "empty_strided_cpu": torch._C._dynamo.guards._empty_strided_cpu} | names
    exec(source, scope)
    return Replay(source, scope, {}, set())


@pytest.mark.parametrize(
    "body",
    [
        "n = x.item()\nreturn (torch.ops.aten.mul.Tensor(x, n),)",
        "if x.dim():\n    x = torch.ops.aten.neg.default(x)\nreturn (torch.ops.aten.mul.Tensor(x, x),)",
        "return (torch.ops.aten.mul.Tensor(x, float(x)),)",
    ],
)
def test_what_depends_on_numbers_is_left_to_inductor(body):
    made = make(program(body))
    for number in (2.0, 3.0):
        assert made([torch.tensor(number)])[0].item() == number**2
    assert not made.steps


def test_a_view_stays_one():
    """What an op returns may lie in the memory of its arguments, and be changed there."""
    made = make(
        program("""
            buf = empty_strided_cpu((2, 3), (3, 1), torch.float32)
            torch.ops.aten.copy_.default(buf, x)
            part = torch.ops.aten.select.int(buf, 0, 1)
            torch.ops.aten.neg_.default(part)
            return (buf,)
        """)
    )
    x = torch.arange(6.0).view(2, 3)
    for i in range(3):
        x += i
        assert made([x])[0].tolist() == [x[0].tolist(), (-x[1]).tolist()]
    assert made.steps


def test_memory_of_buffers_is_used_again_by_the_program_alone():
    memory = OwnMemory()
    first = memory.empty((4, 8), (8, 1), torch.float32)
    address = first.data_ptr()
    view = first[1:]
    del first
    second = memory.empty((4, 8), (8, 1), torch.float32)
    assert second.data_ptr() != address, "the view still needs it"
    del view
    third = memory.empty((3, 5), (1, 3), torch.int64)
    assert third.data_ptr() == address and third.shape == (3, 5) and third.stride() == (1, 3)
    del second, third
    assert len({torch.empty(32).data_ptr() for _ in range(10)} & {s.data_ptr() for s in memory.storages}) == 0
    assert memory.empty((0, 3), (3, 1), torch.float32).shape == (0, 3)


SUM = """
#include <cstdint>
extern "C" void sum(%s, int64_t* y) { *y = %s; }
"""


@pytest.mark.parametrize("count", [0, 1, 6, 7, 30, 127, 128])
def test_kernels_of_any_number_of_arguments(tmp_path, count):
    """Of more than 128 they are called from Python."""
    names = [f"a{i}" for i in range(count)]
    code = SUM % (", ".join(f"int64_t {name}" for name in names), " + ".join(f"{i + 1} * a{i}" for i in range(count)))
    code = code if count else 'extern "C" void sum(long* y) { *y = -1; }'
    (tmp_path / "sum.cpp").write_text(code)
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "sum.cpp", "-o", tmp_path / "sum.so"], check=True)
    address = ctypes.cast(ctypes.CDLL(str(tmp_path / "sum.so")).sum, ctypes.c_void_p)
    y, numbers, recording = torch.zeros((), dtype=torch.int64), [2**40 + i for i in range(count)], Recording()
    assert recording.add_kernel(address, [*numbers, y.data_ptr()]) == (count < 128)
    recording()
    if count < 128:
        assert y.item() == (sum((i + 1) * number for i, number in enumerate(numbers)) if count else -1)


def test_a_kernel_with_a_float_is_called_from_python():
    assert not Recording().add_kernel(ctypes.c_void_p(0), [1.5])


def test_ops_that_copy_their_arguments_are_called_from_python():
    """As for memory that is not contiguous."""
    q = torch.randint(-127, 128, (32, 32), dtype=torch.int8)
    packed, scales = packing.pack_int8(q), torch.rand(32)
    made = make(
        program("return (torch.ops.brisk.linear_int8.default(x, packed, scales, None),)"), packed=packed, scales=scales
    )
    x = torch.randn(32, 4).T
    for _ in range(3):
        x += 1
        assert torch.equal(made([x])[0], torch.ops.brisk.linear_int8(x, packed, scales, None))
    assert len(made.steps) == 2 and python_steps(made) == 1
