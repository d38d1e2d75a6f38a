"""The few ops PyTorch has no fast form of, as `torch.ops.brisk.*`: they compile, trace and can be checked.

    y = torch.ops.brisk.linear_bf16(x, weight, bias)                     # few rows, at the speed of memory
    layer = Int8Linear.from_canonical(weight, scales, bias)              # from the tensors on disk; y = layer(x)
    layer = Int4Linear.from_canonical(q, scales, zeros, in_features, groupsize, bias)
    y = torch.ops.brisk.decode_attention(q, k_cache, v_cache, input_pos, window)

Each op has a reference version in plain PyTorch, which runs on any device, and one in kernels_cpu_ops.cpp. That is
built at the first use, with the kernels for this processor's instruction set, and kept in ~/.cache/gpt-brisk (or
TORCH_EXTENSIONS_DIR). Without a compiler there is one warning, and the reference versions do the work.
GPT_BRISK_ISA=avx512|avx2|portable chooses the instruction set.
The versions for CUDA, in kernels_triton.py, are imported at the first use and bring weights into an order of their own.

On CPUs the quantized ops quantize activations to 8 bits on the fly: symmetric, a scale for each row and each group of
K, the group being the weight's own for int4 and 128 for int8. So products are of integers, which a CPU does four at a
time. On CUDA they don't.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import math
import mmap
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, log

ISAS = ("avx512", "avx2", "portable")  # the best first
CACHE_LINE = 64  # bytes
PANEL = 32  # rows of a packed weight that are interleaved
INT8_GROUP = 128  # activations that share a scale, where the weights have no groups
GROUPSIZES = (32, 64, 128)
ZERO_BYTES, ZERO_FLOATS = -1, -2  # how int4 zeros are packed, if they are not all the same integer

# ---------------------------------------------------------------------------------------------------------------------
# The ops

_library = torch.library.Library("brisk", "DEF")
_library.define("linear_bf16(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
_library.define("linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor? bias=None) -> Tensor")
_library.define(
    "linear_int4(Tensor x, Tensor packed, int out_features, int groupsize, ScalarType scale_dtype, int zero, "
    "Tensor? bias=None) -> Tensor"
)
_library.define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor input_pos, int? window=None) -> Tensor"
)
_library.define("reach(Tensor numbers, Tensor? weights, Tensor limit) -> Tensor")
_library.define("all_reduce(Tensor x) -> Tensor")


def _op(fake):
    """Registers the decorated reference version of an op, and `fake`, which makes an output of the right shape."""

    def register(reference):
        name = reference.__name__
        torch.library.register_fake(f"brisk::{name}")(fake)

        def first_use(*args):
            # The versions of a device come before this one, once they are loaded.
            device = args[0].device.type
            loaded = {"cpu": cpu_library, "cuda": cuda_kernels}.get(device, lambda: None)() is not None
            if loaded and torch._C._dispatch_has_kernel_for_dispatch_key(f"brisk::{name}", device.upper()):
                return getattr(torch.ops.brisk, name).default(*args)
            return reference(*args)

        _library.impl(name, first_use, "CompositeExplicitAutograd")
        return reference

    return register


@_op(lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], weight.shape[0]))
def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """bfloat16 x [..., K] times bfloat16 weight [N, K] -> [..., N]. Accumulates in float32."""
    return F.linear(x, weight, bias)


@_op(lambda x, packed, scales, bias=None: x.new_empty(*x.shape[:-1], scales.shape[0]))
def linear_int8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times an int8 weight from `pack_int8`, with a float32 scale for each of its N rows -> [..., N]."""
    weight = unpack_int8(packed, scales.shape[0], x.shape[-1]).float() * scales[:, None]
    return _reference_linear(x, weight, INT8_GROUP, bias)


@_op(lambda x, packed, out_features, *args: x.new_empty(*x.shape[:-1], out_features))
def linear_int4(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    groupsize: int,
    scale_dtype: torch.dtype,
    zero: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x [..., K] times an int4 weight from `pack_int4`, which also says what `zero` is -> [..., out_features]."""
    q, scales, zeros = unpack_int4(packed, out_features, x.shape[-1], groupsize, scale_dtype, zero)
    weight = dequantize_int4(q, scales, zeros, x.shape[-1], groupsize, torch.float32)
    return _reference_linear(x, weight, groupsize, bias)


@_op(lambda q, k_cache, v_cache, input_pos, window=None: torch.empty_like(q, memory_format=torch.contiguous_format))
def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int | None = None
) -> Tensor:
    """Queries [B, S, H, D] at positions int64 [B, S] over caches [max_B >= B, KV, T, D] -> [B, S, H, D].

    A query sees the keys up to its position, with `window` only so many of them. Its cost follows the position, and
    what the cache holds beyond does not matter, not even NaN. Query head h goes with the keys of head h // (H / KV).
    """
    B, _, H, D = q.shape
    kv_heads, T = k_cache.shape[1:3]
    distance = input_pos[:, :, None] - torch.arange(T, device=q.device)
    seen = (distance >= 0) & (distance < (T + 1 if window is None else window))  # [B, S, T]
    k, v = (
        cache[:B].float().masked_fill(~seen.any(1)[:, None, :, None], 0).repeat_interleave(H // kv_heads, 1)
        for cache in (k_cache, v_cache)
    )
    scores = (q.float().transpose(1, 2) @ k.transpose(2, 3)) * D**-0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).to(q.dtype).contiguous()


@_op(lambda numbers, weights, limit: torch.empty_like(limit))
def reach(numbers: Tensor, weights: Tensor | None, limit: Tensor) -> Tensor:
    """Where the smallest numbers first weigh as much as a limit: of numbers >= 0 and their weights (by default 1),
    both float32 [..., N], the least with which all up to it reach the limit [..., 1]; infinity where all don't."""
    order = numbers.sort(-1)
    ones = torch.ones_like(numbers) if weights is None else weights.gather(-1, order.indices)
    at = (ones.cumsum(-1) < limit).sum(-1, keepdim=True)
    found = order.values.gather(-1, at.clamp(max=numbers.shape[-1] - 1))
    return torch.where(at < numbers.shape[-1], found, torch.inf)


@_op(lambda x: torch.empty_like(x))
def all_reduce(x: Tensor) -> Tensor:
    """The sum of contiguous x over the ranks of one machine that `open_channel` was called for; only in C++."""
    raise RuntimeError("brisk::all_reduce needs the CPU kernels, which could not be built")


def _reference_linear(x: Tensor, weight: Tensor, group: int, bias: Tensor | None) -> Tensor:
    q, scale = quantize_activations(x.float(), group)
    y = F.linear((q * scale).flatten(-2)[..., : x.shape[-1]], weight)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def quantize_activations(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Float32 [..., K] -> whole numbers from -127 to 127 [..., groups, group] and scales [..., groups, 1]."""
    x = F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    amax = x.abs().amax(-1, keepdim=True)
    tiny = amax < 1e-36
    inverse = torch.full_like(amax, 127) / amax  # 127 / amax would be 127 * (1 / amax), rounded twice
    return (x * inverse.masked_fill(tiny, 0)).round(), (amax / 127).masked_fill(tiny, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Packing: from the layout on disk to the order in which the kernels read


def pack_int8(weight: Tensor) -> Tensor:
    """int8 [N, K] -> uint8 [N / 32, K / 4, 32, 4], both rounded up: for each 4 k, the bytes of 32 rows, plus 128."""
    if weight.device.type == "cuda" and cuda_kernels() is not None:
        return weight.contiguous()  # the Triton version takes it as it is
    N, K = weight.shape
    padded = weight if N % PANEL == K % 16 == 0 else F.pad(weight, (0, -K % 16, 0, -N % PANEL))
    words = padded.contiguous().view(torch.int32).unflatten(0, (-1, PANEL))  # [panels, 32, K / 4]
    words = words.transpose(1, 2)
    packed = allocate(words.shape, torch.int32, weight.device).copy_(words)
    return packed.bitwise_xor_(-0x7F7F7F80).view(torch.uint8).unflatten(-1, (PANEL, 4))


def unpack_int8(packed: Tensor, N: int, K: int) -> Tensor:
    """What pack_int8 packed."""
    if packed.dtype == torch.int8:
        return packed
    return (packed.transpose(1, 2).reshape(-1, packed.shape[1] * 4)[:N, :K] ^ 128).view(torch.int8)


def pack_int4(q: Tensor, scales: Tensor, zeros: Tensor, K: int, groupsize: int) -> tuple[Tensor, int]:
    """uint8 [N, ceil(K / 2)] (the low nibble is the even k), scales and zeros [N, groups] -> (packed, zero).

    `packed` is uint8 [N / 32, groups, bytes]: for each 8 k, 4 bytes of each of 32 rows as they are; then the 32 scales
    in their dtype; then the zeros as 32 bytes if `zero` is ZERO_BYTES, as 32 floats if it is ZERO_FLOATS; otherwise
    `zero` is the zero of all groups. Groups begin at cache lines: with every other load across two, it took twice as
    long.
    """
    if q.device.type == "cuda" and cuda_kernels() is not None:
        return cuda_kernels().pack_int4(q, scales, zeros, K, groupsize)
    N, groups = scales.shape
    missing = (0, groups * groupsize // 2 - q.shape[1], 0, -N % PANEL)
    padded = F.pad(q, missing) if any(missing) else q.contiguous()
    words = padded.view(torch.int32).view(-1, PANEL, groups, groupsize // 8)
    parts = [words.permute(0, 2, 3, 1), _by_panel(scales)]
    zero = kind_of_zeros(zeros)
    if zero < 0:
        parts.append(_by_panel(zeros.to(torch.uint8 if zero == ZERO_BYTES else torch.float32)))
    widths = [part[0, 0].numel() * part.element_size() for part in parts]
    group_bytes = sum(widths) + -sum(widths) % CACHE_LINE
    packed = allocate((words.shape[0], groups, group_bytes), torch.uint8, q.device)
    for part, slot in zip(parts, packed[..., : sum(widths)].split(widths, -1), strict=True):
        slot.view(part.dtype).view(part.shape).copy_(part)
    return packed, zero


def kind_of_zeros(zeros: Tensor) -> int:
    """The zero of all groups, if that is the same whole number from 0 to 16; ZERO_BYTES if there are several such;
    ZERO_FLOATS for others. Of zeros above 16, sums would not fit the 16 bits that AVX2 has for them."""
    low, high = zeros.aminmax()
    if low < 0 or high > 16 or bool((zeros != zeros.round()).any()):
        return ZERO_FLOATS
    return int(low) if low == high else ZERO_BYTES


def _by_panel(x: Tensor) -> Tensor:
    """[N, groups] -> [panels, groups, 32]."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2)


def unpack_int4(
    packed: Tensor, N: int, K: int, groupsize: int, scale_dtype: torch.dtype, zero: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What pack_int4 packed: q uint8 [N, ceil(K / 2)], scales and zeros [N, groups]."""
    if packed.ndim == 1:
        return cuda_kernels().unpack_int4(packed, N, K, groupsize, scale_dtype, zero)
    zero_dtype = {ZERO_BYTES: torch.uint8, ZERO_FLOATS: torch.float32}.get(zero)
    widths = [PANEL * groupsize // 2, PANEL * scale_dtype.itemsize, PANEL * zero_dtype.itemsize if zero_dtype else 0]
    words, scales, zeros = (part.contiguous() for part in packed[..., : sum(widths)].split(widths, -1))
    q = words.view(torch.int32).unflatten(-1, (-1, PANEL)).permute(0, 3, 1, 2).contiguous()  # [panels, 32, groups, ...]
    q = q.view(torch.uint8).flatten(0, 1).flatten(1)[:N, : (K + 1) // 2]
    scales = scales.view(scale_dtype).transpose(1, 2).flatten(0, 1)[:N]
    if zero_dtype is None:
        return q, scales, torch.full_like(scales, zero, dtype=torch.float32)
    return q, scales, zeros.view(zero_dtype).transpose(1, 2).flatten(0, 1)[:N].float()


def dequantize_int4(q: Tensor, scales: Tensor, zeros: Tensor, K: int, groupsize: int, dtype: torch.dtype) -> Tensor:
    """w = (q - zero) * scale, [N, K], from the layout on disk."""
    nibbles = torch.stack((q & 15, q >> 4), -1).flatten(1)[:, :K].float()
    zeros, scales = (x.float().repeat_interleave(groupsize, 1)[:, :K] for x in (zeros, scales))
    return ((nibbles - zeros) * scales).to(dtype)


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; many are in huge pages on Linux, and read 15 to 35 % faster than in pages of 4 KiB."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < 2**20 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class Int8Linear(nn.Module):
    """y = x W^T + b with W int8, a scale a row. Takes the place of model.Linear."""

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None, in_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, scales.shape[0]
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def from_canonical(cls, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> "Int8Linear":
        """From int8 [N, K], scales [N] and a bias [N] of any float dtype. ValueError for other shapes."""
        if weight.dtype != torch.int8 or weight.ndim != 2 or scales.shape != weight.shape[:1]:
            raise ValueError(f"expected int8 [N, K] and scales [N], got {_describe(weight)} and {_describe(scales)}")
        return cls(pack_int8(weight), scales.float().contiguous(), bias, weight.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.brisk.linear_int8(x, self.packed, self.scales, self.bias)

    @property
    def weight_bytes(self) -> int:
        """What one decode step reads."""
        return sum(buffer.nbytes for buffer in self.buffers())


class Int4Linear(nn.Module):
    """y = x W^T + b with W int4, w = (q - zero) * scale in groups of K. Takes the place of model.Linear."""

    def __init__(
        self,
        packed: Tensor,
        zero: int,
        out_features: int,
        in_features: int,
        groupsize: int,
        scale_dtype: torch.dtype,
        bias: Tensor | None,
        order: Tensor | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.groupsize = in_features, out_features, groupsize
        self.scale_dtype, self.zero = scale_dtype, zero
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("order", order, persistent=False)

    @classmethod
    def from_canonical(
        cls,
        q: Tensor,
        scales: Tensor,
        zeros: Tensor,
        in_features: int,
        groupsize: int,
        bias: Tensor | None = None,
        order: Tensor | None = None,
    ) -> "Int4Linear":
        """From uint8 [N, ceil(K / 2)], the low nibble the even k; scales (float16, bfloat16 or float32) and zeros (in
        units of q, any dtype) [N, ceil(K / groupsize)]; a bias [N] of any float dtype; an order of the inputs, int32
        [K], where x[..., order] is what the weight is for. ValueError for other shapes."""
        N, K = q.shape[0], in_features
        shape = (N, -(-K // groupsize))
        if groupsize not in GROUPSIZES or q.dtype != torch.uint8 or q.shape != (N, -(-K // 2)):
            raise ValueError(f"expected uint8 [N, {-(-K // 2)}] in groups of 32, 64 or 128, got {_describe(q)}")
        if scales.shape != shape or zeros.shape != shape or not scales.dtype.is_floating_point:
            raise ValueError(f"expected scales and zeros {shape}, got {_describe(scales)} and {_describe(zeros)}")
        if order is not None and order.shape != (K,):
            raise ValueError(f"expected an order of {K} inputs, got {_describe(order)}")
        packed, zero = pack_int4(q, scales, zeros, K, groupsize)
        return cls(packed, zero, N, K, groupsize, scales.dtype, bias, order)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x[..., self.order]
        return torch.ops.brisk.linear_int4(
            x, self.packed, self.out_features, self.groupsize, self.scale_dtype, self.zero, self.bias
        )

    @property
    def weight_bytes(self) -> int:
        """What one decode step reads."""
        return sum(buffer.nbytes for buffer in self.buffers())


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# ---------------------------------------------------------------------------------------------------------------------
# The versions for CUDA


@functools.cache
def cuda_kernels() -> ModuleType | None:
    """kernels_triton, which registers itself; None, after a warning, where Triton is missing."""
    try:
        import kernels_triton
    except ImportError as error:
        log(f"warning: no Triton, so quantized layers and attention will be slow: {error}")
        return None
    return kernels_triton


# ---------------------------------------------------------------------------------------------------------------------
# The library for CPUs

FOLDER = Path(__file__).parent
HEADERS = ["kernels_cpu.h", "kernels_cpu_vector.h"]
KERNELS = ["kernels_cpu_linear.cpp", "kernels_cpu_attention.cpp"]
OPS = ["kernels_cpu_ops.cpp", "kernels_cpu_ranks.cpp"]
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
