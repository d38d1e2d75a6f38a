"""The C++ kernels: which instruction set this processor has, compiling them once, loading them.

    library = cpu_library()           # registers torch.ops.brisk for CPUs; None, after a warning, without a compiler

They are built at the first use, by g++ (11 or newer), clang++ (14 or newer) or what CXX names, and kept in
~/.cache/gpt-brisk (or TORCH_EXTENSIONS_DIR). GPT_BRISK_ISA=amx|avx512|avx2|portable chooses the instruction set. Many
rows are multiplied by tiles where there is AMX; with AVX512 by the GEMM that a measurement of some milliseconds, kept
there too, finds the fastest on this processor; or by the one that GPT_BRISK_GEMM=tiles|floats|onednn names.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from errors import UserError, log

ISAS = ("amx", "avx512", "avx2", "portable")  # the best first
FOLDER = Path(__file__).parent
HEADERS = ["cpu.h", "cpu_vector.h", "cpu_linear.h", "cpu_tiles.h", "cpu_ops.h", "cpu_rows.h"]
KERNELS = [f"cpu_{name}.cpp" for name in ("linear", "linear_tiles", "bf16", "gemm", "attention", "prefill", "lora")]
TABLES = ("brisk_linear", "brisk_bf16", "brisk_attention", "brisk_prefill", "brisk_lora")  # of functions, one a file
OPS = [f"cpu_{name}.cpp" for name in ("ops", "linear_ops", "lora_ops", "ranks", "replay")]
# What an instruction set needs, as Linux calls it.
AVX2 = ["avx2", "fma", "f16c"]
AVX512 = [*AVX2, *(f"avx512{x}" for x in ("f", "bw", "vl", "dq", "_vnni", "_bf16"))]
AMX = [*AVX512, "amx_tile", "amx_bf16", "amx_int8"]
COMPILERS = "g++ 11 or newer, or clang++ 14 or newer"
KEPT, KEPT_SECONDS = 100, 30 * 24 * 3600  # files that were compiled: how many, and for how long after their last use
ISA_FEATURES = {"amx": AMX, "avx512": AVX512, "avx2": AVX2, "portable": []}
# What may multiply many rows of bfloat16: oneDNN is PyTorch's own, which without products of bf16 is slow.
GEMMS = {"amx": ("tiles", "onednn"), "avx512": ("floats", "onednn"), "avx2": ("floats",), "portable": ("floats",)}


def processor_flags() -> list[str]:
    """What Linux says that this processor can do."""
    return processor_info("flags|Features").split()


def processor_info(names: str) -> str:
    """What stands in /proc/cpuinfo under one of the names, a pattern; nothing where there is none."""
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^(?:{names})\s*:(.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    return found[1] if found else ""


def available_isas() -> list[str]:
    """The instruction sets that this processor has, the best first."""
    have = set(processor_flags())
    return [isa for isa in ISAS if set(ISA_FEATURES[isa]) <= have and (isa != "amx" or amx_is_permitted())]


@functools.cache
def amx_is_permitted() -> bool:
    """Asks Linux for the tiles of AMX, which a process may not use before."""
    ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """The ops for CPUs, with the best instruction set, built if need be; None, after a warning, where they can't be."""
    isas = available_isas()
    wanted = os.environ.get("GPT_BRISK_ISA", isas[0])
    if wanted not in ISAS:
        raise UserError(f"GPT_BRISK_ISA={wanted} is unknown; set it to one of {', '.join(ISAS)}, or unset it")
    if wanted not in isas:
        raise UserError(f"GPT_BRISK_ISA={wanted}: this processor does not have it; unset it")
    try:
        ops, kernels = load("ops", wanted)
    except (OSError, subprocess.SubprocessError) as error:
        log(f"warning: the CPU kernels could not be built, so this will be slow: {error}")
        return None
    _use_fastest_gemm(ops, kernels, wanted)
    return ops


def open_channel(file: int, rank: int, size: int) -> None:
    """all_reduce then goes through the memory of this file, which all ranks have opened: a descriptor."""
    if not cpu_library().brisk_open_channel(file, rank, size):
        raise OSError(f"rank {rank} cannot map the memory that it shares with the other {size - 1}")


def use_isa(isa: str) -> None:
    """Goes on with the kernels of another instruction set, which this processor must have."""
    _use(cpu_library(), *load(isa), GEMMS[isa][0])


def _use(ops: ctypes.CDLL, kernels: ctypes.CDLL, gemm: str) -> None:
    tables = [ctypes.byref(ctypes.c_char.in_dll(kernels, name)) for name in TABLES]
    own = None if gemm == "onednn" else ctypes.byref(ctypes.c_char.in_dll(kernels, f"brisk_gemm_{gemm}"))
    ops.brisk_use(*tables, own)  # they stay: ctypes never unloads a library


def _use_fastest_gemm(ops: ctypes.CDLL, kernels: ctypes.CDLL, isa: str) -> None:
    """The first that is possible, but with AVX512 the one that was the fastest here before, or is now."""
    possible, wanted = GEMMS[isa], os.environ.get("GPT_BRISK_GEMM")
    if wanted is not None and wanted not in possible:
        names = " or ".join(possible)
        raise UserError(f"GPT_BRISK_GEMM={wanted}: with {isa} it may be {names}; set it so, or unset it")
    if wanted is not None or isa != "avx512":  # tiles are as fast as oneDNN, and take quantized weights as well
        return _use(ops, kernels, wanted or possible[0])
    folder = cache_folder("TORCH_EXTENSIONS_DIR")
    kept = folder / f"brisk_gemm_{digest((processor_info('model name') + commands(isa)[0]).encode())}"
    with contextlib.suppress(OSError):
        if (fastest := kept.read_text()) in possible:
            mark_used(kept)
            return _use(ops, kernels, fastest)
    seconds = dict.fromkeys(possible, float("inf"))
    x, weight = (torch.ones(n, 2048, dtype=torch.bfloat16) for n in (256, 2048))
    for _ in range(5):  # by turns: other processes may disturb some of them
        for gemm in possible:
            _use(ops, kernels, gemm)
            start = time.perf_counter()
            torch.ops.brisk.linear_bf16(x, weight)
            seconds[gemm] = min(seconds[gemm], time.perf_counter() - start)
    fastest = min(possible, key=seconds.get)
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write(fastest)
        os.replace(file.name, kept)
    _use(ops, kernels, fastest)


# ---------------------------------------------------------------------------------------------------------------------
# The folder of what was compiled. Files there may be damaged, and loading a damaged library can end the process; so a
# file is read only if its content has the hash that its name or its first line says.


def cache_folder(variable: str) -> Path:
    """Where what was compiled is kept: in the folder that an environment variable names, or in the user's cache."""
    home = os.path.expanduser("~")  # as it is where there is none
    cache = Path(home, ".cache") if os.path.isabs(home) else Path(tempfile.gettempdir())
    return Path(os.environ.get(variable) or cache / "gpt-brisk")


@contextlib.contextmanager
def writable(folder: Path, variable: str) -> Iterator[Path]:
    """The folder, made if need be; where nothing can be written to it, after a warning, a temporary one."""
    problem = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = error.strerror
    if problem is None:
        yield folder
        return
    log(f"warning: {folder} cannot be written ({problem}), so the next start compiles again; set {variable} to another")
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def mark_used(path: Path) -> None:
    with contextlib.suppress(OSError):  # in a folder that can only be read
        os.utime(path)


def prune(paths: Iterable[Path]) -> None:
    """Deletes files and folders that nobody has used for a month, and all but the 100 that were used last."""
    used = []
    for path in paths:
        with contextlib.suppress(OSError):  # another process has deleted it
            used.append((path.stat().st_mtime, path))
    used.sort(reverse=True)
    for i, (seconds, path) in enumerate(used):
        if i < KEPT and seconds > time.time() - KEPT_SECONDS:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Building


def load(*names: str) -> list[ctypes.CDLL]:
    """Libraries, each "ops" or the kernels for an instruction set, compiled unless that was done before.

    Raises OSError or SubprocessError.
    """
    folder = cache_folder("TORCH_EXTENSIONS_DIR")
    found = [find(folder, name) for name in names]
    if None not in found:
        return [ctypes.CDLL(str(path)) for path in found]
    with writable(folder, "TORCH_EXTENSIONS_DIR") as folder, ThreadPoolExecutor() as pool:
        paths = pool.map(functools.partial(build, folder), names)
        return [ctypes.CDLL(str(path)) for path in paths]


def find(folder: Path, name: str) -> Path | None:
    """The library in the folder, if it is there and undamaged."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{commands(name)[0]}_*.so"):
            if path.stem.endswith(digest(path.read_bytes())):
                mark_used(path)
                return path
    return None


def commands(name: str) -> tuple[str, list[str], list[str]]:
    """What the library is called, but for the hash of its content; arguments that compile and that link it."""
    sources = [FOLDER / source for source in (OPS if name == "ops" else KERNELS)]
    compile = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-c", *map(str, sources)]
    link = ["-shared", *(f"{source.stem}.o" for source in sources)]
    if name == "ops":
        torch_folder = Path(torch.__file__).parent
        # PyTorch's stable interface, as of 2.10: its headers compile in a third of the time of the others.
        compile += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", str(torch_folder / "include")]
        # OpenMP's functions are those of the library that PyTorch has loaded, whatever its name; `#pragma omp`, which
        # would be passed over without -fopenmp, is an error.
        compile += ["-Werror=unknown-pragmas"]
        link += ["-L", str(torch_folder / "lib"), "-ltorch_cpu", "-lc10"]
    else:
        flags = (feature.replace("amx_", "amx-").replace("_", "") for feature in ISA_FEATURES[name])
        compile += [f"-DBRISK_ISA={name}", *(f"-m{flag}" for flag in flags)]
        compile += ["-mprefer-vector-width=512"] * (name in ("amx", "avx512"))
    texts = [path.read_bytes() for path in (*(FOLDER / header for header in HEADERS), *sources)]
    version = digest(repr((texts, compile, link, torch.__version__, platform.machine())).encode())
    return f"brisk_{name}_{version[:16]}", compile, link


def find_compiler() -> list[str]:
    """The command that CXX names, or the first compiler there is. Raises FileNotFoundError."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    raise FileNotFoundError(f"no C++ compiler ({' '.join(named) or 'g++'}) was found; install {COMPILERS}")


def build(folder: Path, name: str) -> Path:
    """Compiles a library into the folder, unless another process just did. OSError if it can't be compiled."""
    stem, compile, link = commands(name)
    compiler = find_compiler()
    with open(folder / f"{stem}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one builds
        if library := find(folder, name):
            return library
        built = Path(temporary, f"{stem}.so")
        for arguments in (compile, [*link, "-o", built.name]):
            run(compiler, arguments, temporary)
        library = folder / f"{stem}_{digest(built.read_bytes())}.so"
        os.replace(built, library)
    prune(folder.glob("brisk_*"))
    return library


def run(compiler: list[str], arguments: list[str], folder: str) -> None:
    """Runs the compiler in a folder. OSError with its first message if it fails."""
    options = dict(cwd=folder, env=os.environ | {"LC_ALL": "C"}, text=True, errors="replace")
    result = subprocess.run([*compiler, *arguments], stderr=subprocess.PIPE, **options)
    if result.returncode:
        version = subprocess.run([*compiler, "--version"], capture_output=True, **options).stdout.partition("\n")[0]
        message = next((line for line in result.stderr.splitlines() if "error" in line), f"exit {result.returncode}")
        name = " ".join(compiler) + (f" ({version})" if version else "")
        raise OSError(f"{name} failed: {message.strip()}; install {COMPILERS}, or name another compiler with CXX")
