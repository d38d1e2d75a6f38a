"""The calls of a compiled program, recorded once and made again without Python in between, as CUDA graphs do on GPUs.

    call = Replay(source, scope, kernels, given)       # what compiled.py keeps of a program
    results = call(inputs)

Between two kernels Inductor's Python takes 4 us, and 13 where weights have gone through the caches meanwhile: of a step
of the 1.1 B shape in int4, 24 ms, that was 2. As all shapes of a program are fixed, its first call notes the addresses
that each kernel gets, in memory that is the program's own. Our ops note themselves (`perform` in kernels/cpu_ops.h).
What else a program calls, PyTorch's own ops, is called from here again. A profiler of PyTorch's sees these alone.
"""

import ast
import ctypes
import functools
import importlib.util
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from kernels.build import cpu_library

LAYERS = ("bf16", "int8", "int8_grouped", "int4", "experts", "int8_experts", "int8_grouped_experts", "int4_experts")
# Ops that note themselves. Those of layers with adapters would note the layer alone.
RECORDED = {"brisk::decode_attention", *(f"brisk::linear_{layer}" for layer in LAYERS)}
ALIGNMENT = 64


class Replay:
    """Takes the place of the function `call` of a module by Inductor: a list of tensors -> a sequence of tensors, which
    are new ones. One thread at a time. RuntimeError where an op fails."""

    def __init__(self, source: str, scope: dict[str, Any], kernels: dict[str, tuple[Path, str]], given: Iterable[int]):
        """scope: what the names in the source stand for; kernels: of those that are kernels the library, and the name
        in there; given: which of the inputs may be other tensors in another call."""
        self.source, self.scope, self.kernels, self.given = source, scope, kernels, given
        self.steps: list[Callable[[], Any]] = []
        self.fallback: Callable[[list[Any]], Any] | None = None

    def __call__(self, inputs: list[Any]) -> Any:
        if self.fallback is not None:
            return self.fallback(inputs)
        if not self.steps:
            return self.record(inputs)
        for i in self.given:
            self.inputs[i].copy_(inputs[i])
        for step in self.steps:
            step()
        return self.finish(inputs)

    def record(self, inputs: list[Any]) -> Any:
        """The first call. One that cannot be made again is made by Inductor's function, now and later."""
        tree = ast.parse(self.source)
        # A number that stands for many has no room for many results.
        expanded = any(0 in inputs[i].stride() and not inputs[i].is_contiguous() for i in self.given)
        if expanded or not is_straight(tree, self.kernels.keys()):
            self.fallback = self.scope["call"]
            return self.fallback(inputs)
        recorder = Recorder()
        scope = self.scope.copy()
        exec(compile(NamedOps().visit(tree), "<program>", "exec"), scope)
        scope |= {"call_op": recorder.call_op, "empty_strided_cpu": recorder.memory.empty}
        for name, (library, symbol) in self.kernels.items():
            address = ctypes.cast(ctypes.CDLL(str(library))[symbol], ctypes.c_void_p)
            scope[name] = functools.partial(recorder.call_kernel, self.scope[name], address)
        copy = recorder.memory.copy
        self.inputs = [copy(tensor) if i in self.given else tensor for i, tensor in enumerate(inputs)]
        self.outputs = scope["call"](self.inputs.copy())
        scope.clear()  # its functions refer to it, so it would stay, and the memory with it
        self.steps, self.memory = recorder.steps, recorder.memory
        return self.finish(inputs)

    def finish(self, inputs: list[Any]) -> tuple[Any, ...]:
        for i in self.given:  # it may be changed by the program
            inputs[i].copy_(self.inputs[i])
        return tuple(output.clone() if isinstance(output, Tensor) else output for output in self.outputs)


def import_library(path: Path, name: str) -> ModuleType:
    """One of the Python modules in a library."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """Makes the calls of a program, and notes them as steps."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.memory = OwnMemory()

    def recording(self) -> "Recording":
        """To which calls without Python are added."""
        if not self.steps or not isinstance(self.steps[-1], Recording):
            self.steps.append(Recording())
        return self.steps[-1]

    def call_kernel(self, kernel: Callable, address: ctypes.c_void_p, *args: Any) -> None:
        kernel(*args)
        numbers = [value.data_ptr() if isinstance(value, Tensor) else value for value in args]
        if not self.recording().add_kernel(address, numbers):
            self.steps.append(functools.partial(kernel, *args))

    def call_op(self, op: Callable, *args: Any, **options: Any) -> Any:
        results = op(*args, **options)
        if isinstance(op, OpOverload) and op.name() in RECORDED:
            kept = self.memory.like(results)
            if self.recording().add_op(kept, functools.partial(op, *args, **options)):
                return kept
        ours = {x.untyped_storage().data_ptr() for x in (*args, *options.values()) if isinstance(x, Tensor)}
        kept = tuple(x if x.untyped_storage().data_ptr() in ours else self.memory.copy(x) for x in tensors_of(results))

        def step() -> None:
            for to, value in zip(kept, tensors_of(op(*args, **options)), strict=True):
                if to.data_ptr() != value.data_ptr():
                    to.copy_(value)

        self.steps.append(step)
        return kept[0] if isinstance(results, Tensor) else kept


def tensors_of(results: Any) -> tuple[Tensor, ...]:
    """What an op has returned: a tensor, several or none."""
    return (results,) if isinstance(results, Tensor) else tuple(results or ())


class Recording:
    """Calls in the memory of the C++ library (kernels/cpu_replay.cpp)."""

    def __init__(self) -> None:
        library = cpu_library()
        library.brisk_new_recording.restype = ctypes.c_void_p
        library.brisk_replay.restype = ctypes.c_char_p
        library.brisk_end_op.restype = ctypes.c_int64
        library.brisk_record_kernel.restype = ctypes.c_bool
        self.handle = ctypes.c_void_p(library.brisk_new_recording())
        self.library, self.count = library, 0
        weakref.finalize(self, library.brisk_delete_recording, self.handle).atexit = False  # a thread may be in it

    def __call__(self) -> None:
        problem = self.library.brisk_replay(self.handle)
        if problem is not None:
            raise RuntimeError(problem.decode())

    def add_kernel(self, address: ctypes.c_void_p, numbers: list[Any]) -> bool:
        """Whether it could be added."""
        if not all(isinstance(number, int) for number in numbers):
            return False
        array = (ctypes.c_int64 * len(numbers))(*numbers)
        count = ctypes.c_int64(len(numbers))
        added = self.library.brisk_record_kernel(self.handle, address, array, count)
        self.count += added
        return added

    def add_op(self, result: Tensor, call: Callable[[], Any]) -> bool:
        """Calls an op for its result to be there -> whether it was added."""
        try:
            self.library.brisk_begin_op(self.handle, ctypes.c_void_p(result.data_ptr()))
            call()
        finally:
            count = self.library.brisk_end_op(self.handle)
        added, self.count = count > self.count, count
        return added


class OwnMemory:
    """Of one program: what a tensor leaves, a later one may get, but nobody else."""

    def __init__(self) -> None:
        self.storages: list[torch.UntypedStorage] = []

    def empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
        wanted = -(-(last + 1) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        free = (s for s in self.storages if torch._C._storage_Use_Count(s._cdata) == 1 and wanted <= len(s))
        storage = min(free, key=len, default=None)
        if storage is None:
            storage = torch.empty(wanted, dtype=torch.uint8).untyped_storage()
            self.storages.append(storage)
        return torch.empty(0, dtype=dtype).set_(storage, 0, size, stride)

    def like(self, tensor: Tensor) -> Tensor:
        return self.empty(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def copy(self, tensor: Tensor) -> Tensor:
        """With its strides, which kernels take for granted, and clone() would not always keep."""
        return self.like(tensor).copy_(tensor)


def is_straight(tree: ast.Module, kernels: Any) -> bool:
    """Whether the functions of a program are calls of kernels, of ops and of each other one after another, which depend
    on nothing but addresses. Collectives of torch.distributed end later than their calls."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    functions = [function for function in functions if function.name not in ("__init__", "recursively_apply_fns")]
    known = {"empty_strided_cpu", "reinterpret_tensor", "assert_size_stride", "assert_alignment", "args.clear"}
    known |= {*kernels, *(function.name for function in functions)}
    statements = ast.Assign, ast.Delete, ast.Expr, ast.Return
    for function in functions:
        if not all(isinstance(statement, statements) for statement in function.body):
            return False
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if "_c10d_functional" in name or (name not in known and not is_op(name)):
                    return False
    return True


def is_op(name: str) -> bool:
    return name.startswith(("torch.ops.", "aten.", "extern_kernels."))


class NamedOps(ast.NodeTransformer):
    """torch.ops.aten.topk.default(x, 5) -> call_op(torch.ops.aten.topk.default, x, 5)"""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if not is_op(ast.unparse(node.func)):
            return node
        call = ast.Call(ast.Name("call_op", ast.Load()), [node.func, *node.args], node.keywords)
        return ast.fix_missing_locations(ast.copy_location(call, node))
