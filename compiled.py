"""torch.compile for CPUs whose result outlives the process: the next one loads it, and neither traces nor compiles.

    step = CompiledFunction(decode_step)
    step(model, None, sampler, model.key_pos, 0, False, None)

Inductor keeps the kernels that it has built, but to find out which of them a function needs, every process imports the
compiler and traces the function anew. PyTorch's own answer, torch.compile(...).aot_compile and
torch.compiler.load_compiled_function, saves the tracing but not the import: until its second token the 1.1 B shape in
int4 took 10.3 s of CPU time that way and takes 2.7 s this way, the demo 8.3 s and 1.3 s. Hence this file, and the
private names of Inductor in it. All that a call needs is: where in the arguments the tensors are, a Python function by
Inductor that calls the kernels, and which of its outputs are the result. The first call records these. They are saved
only if they explain all of the call: every tensor that went in was found in the arguments, and all that came out is the
result.

A program is kept under a hash of everything that tracing may depend on: the code of the function and of its arguments'
classes, with all that their modules import from this folder; PyTorch, the processor, the threads; and the arguments
but for the numbers in tensors. So a function may read whatever it likes of its arguments, of the world outside only
constants, and must change nothing but tensors. A program also runs faster than what torch.compile returns, which
checks at every call whether all of this is still so, and without Python between its kernels: see replay.py.
"""

import ast
import atexit
import builtins
import contextlib
import contextvars
import dataclasses
import functools
import gc
import inspect
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from kernels.build import cache_folder, cpu_library, digest, mark_used, processor_flags, prune, writable
from replay import Replay, import_library

# Sizes were checked at every call of every kernel: that took 10 us a layer. A norm of one row took 30 us on two threads
# that had to meet twice; on one it takes two. Inductor writes out an expression at each of its uses, and what that
# consists of at each of its own: hashing a position took it 4 s, until expressions of 8 operations got a name.
OPTIONS = {"size_asserts": False, "cpp.min_chunk_size": 8192, "realize_opcount_threshold": 8}
PROGRAM = "program"
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
CACHE = cache_folder(VARIABLE)  # Inductor sets the variable later
FOLDER = Path(__file__).parent
# Of each file the name of its module or package, and the text as this process found it: what it runs.
SOURCES = {str(path): (path.stem, path.read_bytes()) for path in FOLDER.glob("*.py")}
SOURCES |= {str(path): (path.parent.name, path.read_bytes()) for path in FOLDER.glob("*/*.py")}
IMPORT = re.compile(rb"^ *(?:from|import) (.+)", re.MULTILINE)
COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as Inductor has it
SETTINGS = [  # that change what is compiled
    f"{name}={value}"
    for name, value in sorted(os.environ.items())
    if name.startswith(("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE", "ATEN_CPU_CAPABILITY")) and name != VARIABLE
]


class CompiledFunction:
    """A function of modules, tensors and plain values -> a tuple of tensors or None, compiled for each kind of them.

    A module's tensors have to stay the same objects in the same memory; where they are replaced, make a new
    CompiledFunction. No tensor may be given twice.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.programs: dict[tuple, Callable] = {}

    def __call__(self, *args: Any) -> tuple[Tensor, ...] | None:
        kind = tuple(map(kind_of, args))
        if kind not in self.programs:
            folder = programs_folder() / version_of(self.function, args)
            program = load(self.function, args, folder)
            if program is None:
                self.programs[kind], result = record(self.function, args, folder)
                return result
            self.programs[kind] = program
        return self.programs[kind](*args)


def kind_of(value: Any) -> Any:
    """What must be equal for a program to be the right one, in this process."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return value  # of modules, that it is the same one


# ---------------------------------------------------------------------------------------------------------------------
# What a program depends on


def programs_folder() -> Path:
    """All programs. Where it exists, the compiler will probably not be needed."""
    return CACHE / "programs"


def version_of(function: Callable, args: tuple) -> str:
    """A hash of all that tracing depends on."""
    machine = platform.machine(), processor_flags(), sys.version, torch.__version__
    state = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    calls = describe(function, {}), describe(state, {}), describe(args, {})
    return digest(repr((hash_of_module(__name__), SETTINGS, machine, calls)).encode())


def describe(value: Any, seen: dict[int, int]) -> Any:
    """All of a value that is the same in another process, but not the numbers in tensors."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return repr(value)
    if inspect.isclass(value):
        return value.__module__, value.__qualname__, hash_of_module(value.__module__)
    if id(value) in seen:
        return "the same as", seen[id(value)]
    seen[id(value)] = len(seen)
    if inspect.isfunction(value):
        bound = value.__defaults__, [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, hash_of_module(value.__module__), describe(bound, seen)
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.stride(), str(value.device)
    if isinstance(value, Mapping):
        return [(describe(key, seen), describe(item, seen)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (tuple, list)):
        return [describe(item, seen) for item in value]
    if dataclasses.is_dataclass(value):
        content = [describe(getattr(value, field.name), seen) for field in dataclasses.fields(value)]
    else:
        content = describe(getattr(value, "__dict__", None), seen)
    return describe(type(value), seen), content


def hash_of_module(name: str) -> str:
    """Of its code and of what it imports from this folder. That of a notebook is never the same."""
    file = getattr(sys.modules[name], "__file__", None)
    return hash_of_code(file) if file else os.urandom(16).hex()


def hash_of_code(file: str) -> str:
    """Of a file and of all files of this folder that it imports, directly or not."""
    hashes: dict[str, str] = {}
    files = [file]
    while files:
        file = files.pop()
        if file not in hashes:
            hashes[file], imported = read_code(file)
            files += imported
    return digest(repr(sorted(hashes.values())).encode())


@functools.cache
def read_code(file: str) -> tuple[str, list[str]]:
    """The hash of a file, and the files of this folder that it may import: of a package every one. Each word of an
    import is taken for a module, because one too many does no harm, and one too few would."""
    text = SOURCES[file][1] if file in SOURCES else Path(file).read_bytes()
    words = set(re.findall(r"\w+", b" ".join(IMPORT.findall(text)).decode()))
    return digest(text), [path for path, (name, _) in SOURCES.items() if name in words]


# ---------------------------------------------------------------------------------------------------------------------
# The first time


def record(function: Callable, args: tuple, folder: Path) -> tuple[Callable, Any]:
    """Compiles and calls the function -> what to call from now on, and what it returned."""
    check_compiler()
    prepare_compiler()
    notes = Notes()
    compiled = torch.compile(fresh(function), backend=notes.backend, fullgraph=True, dynamic=False)
    with (
        # Where a program is damaged, what Inductor kept of the same compilation may be so as well.
        torch._inductor.utils.fresh_cache() if folder.exists() else contextlib.nullcontext(),
        kernels_together(),
        torch._functorch.config.patch(enable_autograd_cache=False),  # it would pass over `inner`
        torch._dynamo.config.patch(run_gc_after_compile=False),  # takes half a second and finds nothing
    ):
        result = compiled(*args)
        program = notes.explain(function, args, result)
        notes.end()
        if program is None:
            return compiled, result
        with contextlib.suppress(OSError):  # nowhere to write, as check_compiler has said
            save(folder, program)
    return load(function, args, folder) or compiled, result


def fresh(function: Callable) -> Callable:
    """The function or method with a code object of its own: Dynamo compiles only a few times for each, and keeps and
    tries all that it compiled."""
    if inspect.ismethod(function):
        return MethodType(fresh(function.__func__), function.__self__)
    parts = function.__globals__, function.__name__, function.__defaults__, function.__closure__
    return FunctionType(function.__code__.replace(), *parts)


class Notes:
    """What goes by while a function is compiled and called for the first time."""

    def __init__(self) -> None:
        self.open = True
        self.names: list[str] = []  # where Dynamo found them: "L['model']._modules['norm']._parameters['weight']"
        self.tensors: tuple[Any, ...] = ()  # these
        self.source = ""  # Inductor's module, and
        self.call: Callable | None = None  # the function in it
        self.inputs: list[Any] = []
        self.outputs: tuple[Any, ...] = ()

    def end(self) -> None:
        """Dynamo keeps its backends, which shall not keep a model's tensors."""
        self.open, self.tensors, self.inputs, self.outputs = False, (), [], ()

    def backend(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        sources = [node.meta["grapharg"].source.name for node in graph.graph.find_nodes(op="placeholder")]
        self.names = [name() if callable(name) else name for name in sources]  # a method until PyTorch 2.11
        compiled = compile_fx(graph, examples, inner_compile=self.inner, config_patches=OPTIONS)

        def call(*tensors: Any) -> Any:
            if self.open:
                self.tensors = tensors
            return compiled(*tensors)

        return call

    def inner(self, graph: torch.fx.GraphModule, examples: list[Any], **options: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        compiled = compile_fx_inner(graph, examples, **options)
        self.source, self.call = compiled.source_code, compiled.current_callable

        def call(inputs: list[Any]) -> Any:
            if not self.open:
                return self.call(inputs)
            self.inputs = inputs.copy()  # Inductor's function empties the list
            self.outputs = self.call(inputs)
            return self.outputs

        compiled.current_callable = call
        return compiled

    def explain(self, function: Callable, args: tuple, result: Any) -> dict[str, Any] | None:
        """The program; None where something else than what was noted had a part in the call."""
        if self.call is None:  # nothing was compiled: torch.compile is switched off
            return None
        places = {id(tensor): name for tensor, name in zip(self.tensors, self.names, strict=True)}
        inputs = [places.get(id(tensor), "") for tensor in self.inputs]
        if not all(name.startswith("L[") for name in inputs):  # L: the arguments
            return None
        found = find(inputs, function, args)
        order = {id(tensor): i for i, tensor in enumerate(self.outputs)}
        outputs = None if result is None else [order.get(id(tensor)) for tensor in result]
        if any(a is not b for a, b in zip(found, self.inputs, strict=True)) or None in (outputs or ()):
            return None
        source, scope = without_compiler(self.source), self.call.__globals__
        needed = names_in(source)
        kernels = {name: place for name in needed if (place := place_of(scope.get(name)))}
        if not all(is_given(name, scope.get(name), source) for name in needed - kernels.keys()):
            return None
        return {"source": source, "kernels": kernels, "inputs": inputs, "outputs": outputs}


def find(names: list[str], function: Callable, args: tuple) -> list[Any]:
    """The tensors that Dynamo calls by these names."""
    scope = {"L": dict(zip(inspect.signature(function).parameters, args, strict=True))}
    return eval(f"[{', '.join(names)}]", scope)


# Inductor's function stands in a module that imports the compiler and has the kernels built. It needs little of that:
GIVEN = {"torch": torch, "extern_kernels": torch, "math": math, "inf": math.inf, "nan": math.nan}


def without_compiler(source: str) -> str:
    """A module by Inductor: its functions and short names, without its kernels, without what imports anything, and
    without places for constants, which Inductor fills in later."""
    module = ast.parse(source)
    kinds = ast.Assign, ast.FunctionDef, ast.ClassDef
    parts = [part for part in module.body if isinstance(part, kinds) and "async_compile" not in ast.unparse(part)]
    parts = [part for part in parts if not isinstance(getattr(part, "value", None), ast.Constant)]
    imports = ast.Import, ast.ImportFrom
    module.body = [part for part in parts if not any(isinstance(node, imports) for node in ast.walk(part))]
    return ast.unparse(module)


def names_in(source: str) -> set[str]:
    """What it takes from elsewhere."""
    nodes = list(ast.walk(ast.parse(source)))
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)} | vars(builtins).keys()
    defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {node.id for node in nodes if isinstance(node, ast.Name)} - defined


def is_given(name: str, value: Any, source: str) -> bool:
    """Whether GIVEN has for this name what Inductor has, as far as the source uses it."""
    if name != "extern_kernels":
        return name in GIVEN and GIVEN[name] is value
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == name}
    return all(getattr(value, attribute) is getattr(torch, attribute, None) for attribute in used)


def place_of(kernel: Any) -> tuple[str, str] | None:
    """Of a kernel that Inductor has built: the library, and the module's name in there."""
    module = getattr(kernel, "__self__", None)
    if not isinstance(module, ModuleType) or not getattr(module, "__file__", None):
        return None
    return module.__file__, module.__spec__.name.rpartition(".")[2]


# ---------------------------------------------------------------------------------------------------------------------
# On the disk


def save(folder: Path, program: dict[str, Any]) -> None:
    """Writes the program and copies of its kernels, all or nothing, and deletes programs that are no longer used. The
    first line of a program is the hash of what follows, the name of its library that of the library."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made, kernels = Path(temporary) / folder.name, {}
        made.mkdir()
        for name, (file, module) in sorted(program["kernels"].items()):
            library = Path(file).read_bytes()
            kernels[name] = f"{digest(library)}.so", module
            (made / kernels[name][0]).write_bytes(library)
        text = json.dumps(program | {"kernels": kernels})
        (made / PROGRAM).write_text(f"{digest(text.encode())}\n{text}")
        shutil.rmtree(folder, ignore_errors=True)  # where there is one, it could not be loaded
        made.rename(folder)
    prune(folder.parent.iterdir())


def load(function: Callable, args: tuple, folder: Path) -> Callable | None:
    """The program as a function of args like these; None if it has not been saved, or is damaged."""
    scope = dict(GIVEN)
    address = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # how a kernel finds a tensor's address
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    try:
        hash_of_text, _, text = (folder / PROGRAM).read_bytes().partition(b"\n")
        if hash_of_text.decode() != digest(text):
            return None
        program = json.loads(text)
        if any(digest((folder / file).read_bytes()) not in file for file in dict(program["kernels"].values())):
            return None
        kernels = {name: (folder / file, module) for name, (file, module) in program["kernels"].items()}
        scope |= {name: import_library(*place).kernel for name, place in kernels.items()}
        exec(compile(program["source"], str(folder / PROGRAM), "exec"), scope)
        outputs = program["outputs"]
        found = find(program["inputs"], function, args)
    except (OSError, ValueError, ImportError):
        return None
    mark_used(folder)
    places = {id(value): at for at, value in enumerate(args) if isinstance(value, Tensor)}
    given = {i: places[id(tensor)] for i, tensor in enumerate(found) if id(tensor) in places}  # the others are modules'
    call = Replay(program["source"], scope, kernels, given.keys()) if cpu_library() else scope["call"]

    def run(*args: Any) -> tuple[Tensor, ...] | None:
        inputs = found.copy()
        for i, at in given.items():
            inputs[i] = args[at]
        results = call(inputs)
        return None if outputs is None else tuple(results[i] for i in outputs)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The compiler


def check_compiler() -> None:
    """Imports what torch.compile would at its first call. UserError where it would not find a C++ compiler or Python.h,
    which distributions have in a package of its own."""
    if shutil.which(COMPILER) is None:
        problem = f"--compile needs a C++ compiler, and '{COMPILER}' was not found"
        raise UserError(f"{problem}; install g++ (apt install g++) or leave it out")
    schemes = sysconfig.get_default_scheme(), "posix_prefix"  # Debian's own Python has its headers in the second
    if not any(Path(sysconfig.get_path("include", scheme), "Python.h").exists() for scheme in schemes):
        raise UserError("--compile needs Python.h; install Python's headers (apt install python3-dev) or leave it out")
    check_cache()
    import torch._inductor.compile_fx  # noqa: F401


@functools.cache
def check_cache() -> None:
    """Gives Inductor a temporary folder, with a warning, where it could not write to its own."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(writable(CACHE, VARIABLE))
    if folder != CACHE:
        os.environ[VARIABLE] = str(folder)


@functools.cache
def prepare_compiler() -> None:
    """What makes the first compilation for a CPU shorter."""
    from torch._inductor import config
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    if cpu_library() is not None:
        # A compiler that has built our kernels knows the instruction sets. Inductor would try out each, for 5 s.
        config.cpp.vec_isa_ok = True

    def build_header() -> None:
        with contextlib.suppress(Exception):  # it will happen again to a kernel that is needed
            CppPythonBindingsCodeCache.load_pybinding(["float*"], EMPTY_KERNEL)

    # Kernels share a header, which takes g++ 8 s the first time. They wait for it only after all has been traced.
    # Settings are each thread's own, so this one gets ours.
    threading.Thread(target=contextvars.copy_context().run, args=(build_header,), daemon=True).start()


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection meanwhile: a compilation makes millions of objects, and hardly any garbage."""
    gc.disable()
    try:
        yield
        gc.freeze()  # what a compilation leaves behind stays, and would be searched at every collection and at the end
    finally:
        gc.enable()


@contextlib.contextmanager
def kernels_together() -> Iterator[None]:
    """Has Inductor build the kernels of a graph as one library. Of the second that g++ takes for one, most is for the
    header that they share: a decode step has a dozen, which took two cores 8 s and take one 3 s. UserError where the
    compiler fails, as clang++ does without a package of OpenMP's headers."""
    from torch._inductor import async_compile, exc
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    sources: list[str] = []  # of all kernels, and the modules of those that are built
    modules: list[ModuleType] = []

    class Together(CppPythonBindingsCodeCache):
        @classmethod
        def load_async(cls, source: str, *args: Any, **options: Any) -> Callable[[], ModuleType]:
            number = len(sources)
            sources.append(source)

            def load() -> ModuleType:
                if number >= len(modules):
                    new = sources[len(modules) :]
                    library = CppPythonBindingsCodeCache.load(join(new), *args, **options)
                    others = [import_library(Path(library.__file__), f"kernel_{i}") for i in range(1, len(new))]
                    modules.extend([library, *others])
                return modules[number]

            return load

    async_compile.CppPythonBindingsCodeCache = Together
    try:
        yield
    except exc.InductorError as error:
        messages = [line.strip() for line in str(error).splitlines() if " error: " in line]
        if not messages:
            raise
        problem = f"{COMPILER} failed: {messages[0]}"
        raise UserError(f"--compile: {problem}; install g++, name another compiler with CXX or leave it out") from error
    finally:
        async_compile.CppPythonBindingsCodeCache = CppPythonBindingsCodeCache


def join(sources: list[str]) -> str:
    """C++ of Python modules that are all called `kernel` -> one file with the modules kernel, kernel_1, kernel_2 ..."""
    includes = (line for source in sources for line in source.splitlines() if line.startswith("#include"))
    parts = list(dict.fromkeys(includes))  # which do nothing when they come again, in a namespace
    for i, source in enumerate(sources):
        names = ("kernel", "PyInit_kernel") if i else ()
        parts += [f"#define {name} {name}_{i}" for name in names]
        parts += [f"namespace module_{i} {{", source, "}"]
        parts += [f"#undef {name}" for name in names]
    return "\n".join(parts)


EMPTY_KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* x) { at::vec::Vectorized<float>(0).store(x); }
"""
