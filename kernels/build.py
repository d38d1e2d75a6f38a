"""The C++ kernels: which instruction set this processor has, compiling them once, loading them.

    library = cpu_library()           # registers torch.ops.brisk for CPUs; None, after a warning, without a compiler

They are built at the first use and kept in ~/.cache/gpt-brisk (or TORCH_EXTENSIONS_DIR).
GPT_BRISK_ISA=avx512|avx2|portable chooses the instruction set.
"""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from errors import UserError, log

ISAS = ("avx512", "avx2", "portable")  # the best first
FOLDER = Path(__file__).parent
HEADERS = ["cpu.h", "cpu_vector.h"]
KERNELS = ["cpu_linear.cpp", "cpu_attention.cpp"]
OPS = ["cpu_ops.cpp", "cpu_ranks.cpp"]
# What an instruction set needs, as Linux calls it; the compiler's flags have no underscores.
AVX2 = ["avx2", "fma", "f16c"]
AVX512 = [*AVX2, *(f"avx512{x}" for x in ("f", "bw", "vl", "dq", "_vnni", "_bf16"))]
ISA_FEATURES = {"avx512": AVX512, "avx2": AVX2, "portable": []}


def processor_flags() -> list[str]:
    """What Linux says that this processor can do."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    return flags[1].split() if flags else []


def available_isas() -> list[str]:
    """The instruction sets that this processor has, the best first."""
    have = set(processor_flags())
    return [isa for isa in ISAS if set(ISA_FEATURES[isa]) <= have]


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
        with ThreadPoolExecutor() as pool:
            ops, kernels = (ctypes.CDLL(str(path)) for path in pool.map(build, ("ops", wanted)))
    except (OSError, subprocess.SubprocessError) as error:
        log(f"warning: the CPU kernels could not be built, so this will be slow: {error}")
        return None
    _use(ops, kernels)
    return ops


def open_channel(file: int, rank: int, size: int) -> None:
    """all_reduce then goes through the memory of this file, which all ranks have opened: a descriptor."""
    if not cpu_library().brisk_open_channel(file, rank, size):
        raise OSError(f"rank {rank} cannot map the memory that it shares with the other {size - 1}")


def use_isa(isa: str) -> None:
    """Goes on with the kernels of another instruction set, which this processor must have."""
    _use(cpu_library(), ctypes.CDLL(str(build(isa))))


def _use(ops: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    tables = (ctypes.c_char.in_dll(kernels, name) for name in ("brisk_linear", "brisk_attention"))
    ops.brisk_use(*map(ctypes.byref, tables))  # they stay: ctypes never unloads a library


def cache_folder(variable: str) -> Path:
    """Where what was compiled is kept: in the folder that an environment variable names, or in the user's cache."""
    home = os.path.expanduser("~")  # as it is where there is none
    cache = Path(home, ".cache") if os.path.isabs(home) else Path(tempfile.gettempdir())
    return Path(os.environ.get(variable) or cache / "gpt-brisk")


def build(name: str) -> Path:
    """Compiles "ops", or the kernels for an instruction set, unless that was done before -> the library.

    Raises OSError or SubprocessError.
    """
    sources = [FOLDER / source for source in (OPS if name == "ops" else KERNELS)]
    compile = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-c", *map(str, sources)]
    link = ["-shared", *(f"{source.stem}.o" for source in sources)]
    if name == "ops":
        torch_folder = Path(torch.__file__).parent
        # PyTorch's stable interface, as of 2.10: its headers compile in a third of the time of the others.
        compile += ["-fopenmp", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", str(torch_folder / "include")]
        # Without -fopenmp: its symbols are then found in the OpenMP library that PyTorch has loaded, whatever its name.
        link += ["-L", str(torch_folder / "lib"), "-ltorch_cpu", "-lc10"]
    else:
        compile += [f"-DBRISK_ISA={name}", *(f"-m{feature.replace('_', '')}" for feature in ISA_FEATURES[name])]
        compile += ["-mprefer-vector-width=512"] * (name == "avx512")
    texts = [path.read_bytes() for path in (*(FOLDER / header for header in HEADERS), *sources)]
    version = hashlib.sha256(repr((texts, compile, link, torch.__version__, platform.machine())).encode()).hexdigest()
    folder = cache_folder("TORCH_EXTENSIONS_DIR")
    library = folder / f"brisk_{name}_{version[:16]}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++) was found")
    folder.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock, tempfile.TemporaryDirectory(dir=folder) as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one builds
        if library.exists():
            return library
        for arguments in (compile, [*link, "-o", library.name]):
            result = subprocess.run(
                [*shlex.split(compiler), *arguments], cwd=temporary, stderr=subprocess.PIPE, text=True
            )
            if result.returncode:
                lines = [line for line in result.stderr.splitlines() if "error" in line] or [f"{compiler} failed"]
                raise OSError(lines[0])
        os.replace(f"{temporary}/{library.name}", library)
    return library
