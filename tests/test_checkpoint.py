"""checkpoint.py against the safetensors library, and against files that are damaged on purpose or at random."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint import checksum, load_config, load_generation_config, load_model, weights_path
from config import ModelConfig
from errors import UserError
from files import check_disk, check_memory, free_memory, write_atomically
from layout import FORMAT
from model import Transformer, expected_shapes
from weights import read_header
from writer import write_safetensors

ROOT = Path(__file__).parent.parent
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 128, "hidden_act": "silu", "tie_word_embeddings": False,
    "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
CONFIGS = [
    LLAMA,
    LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 64}},
    LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}, "attention_bias": True},
    LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16, "head_dim": 16},
    LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True,
             "sliding_window": 16, "max_window_layers": 1},
    LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16,
             "layer_types": ["full_attention", "full_attention"]},
    LLAMA | {"architectures": ["MiniMindForCausalLM"], "model_type": "minimind", "use_moe": False},
]  # fmt: skip


def tensors_of(config: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = expected_shapes(ModelConfig.from_hf(config))
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict = LLAMA, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / name)
    return folder


def write_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


# -- reading headers


def test_header_as_the_library_reads_it(tmp_path):
    tensors = {
        "a.weight": torch.randn(3, 5).to(torch.bfloat16), "b": torch.arange(7), "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4), "half": torch.randn(2, 3, 4).half(), "bytes": torch.arange(5, dtype=torch.uint8),
        "é\n": torch.tensor([True, False]), "f8": torch.randn(4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"quantization": "none"})
    stored, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"quantization": "none"}
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(stored[name].read().reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert torch.equal(stored["a.weight"].read(1, 3), tensors["a.weight"][1:3])


def test_written_file_is_read_by_the_library(tmp_path):
    tensors = {"a": torch.randn(6, 4).to(torch.bfloat16), "b": torch.arange(3), "empty": torch.zeros(0, 2)}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, layout, lambda name: tensors[name].split(2), {"format": "test", "n": "1"})
    back = safetensors.torch.load_file(path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "test", "n": "1"}
        assert file.get_tensor("a").data_ptr() % 64 == 0


def test_pieces_that_do_not_add_up_leave_nothing(tmp_path):
    layout = {"a": (torch.float32, (4,))}
    for chunks in ([torch.zeros(3)], [torch.zeros(5)], [torch.zeros(4).half()], [torch.zeros(4, 2)[:, 0]]):
        with pytest.raises(ValueError, match="tensor 'a'"):
            write_safetensors(tmp_path / "x", layout, lambda name, chunks=chunks: chunks, {})
    assert list(tmp_path.iterdir()) == []


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", 10**18, "truncated"),
        (b"{}", b"", 3, "truncated"),
        ({"a": ENTRY}, b"\0" * 15, None, "tensor 'a' ends at byte 16 of 15, the file is truncated"),
        ({"a": ENTRY}, b"\0" * 17, None, "file not fully covered"),
        ({"a": ENTRY | {"shape": [2, 3]}}, b"\0" * 16, None, "tensor 'a': invalid shape"),
        ({"a": ENTRY | {"dtype": "F16"}}, b"\0" * 16, None, "tensor 'a': invalid shape, data type"),
        ({"a": ENTRY | {"dtype": "X9"}}, b"\0" * 16, None, "tensor 'a': invalid JSON in header: unknown variant `X9`"),
        ({"a": ENTRY | {"dtype": "U16", "shape": [8]}}, b"\0" * 16, None, "tensor 'a' has the dtype 'U16'"),
        ({"a": ENTRY | {"dtype": "F4", "shape": [2, 16]}}, b"\0" * 16, None, "tensor 'a' has the dtype 'F4'"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, b"\0" * 16, None, "tensor 'a'"),
        ({"a": ENTRY | {"shape": [-2, -2]}}, b"\0" * 16, None, "tensor 'a'"),
        ({"a": ENTRY | {"shape": [2.0, 2]}}, b"\0" * 16, None, "tensor 'a'"),
        ({"a": ENTRY | {"shape": [True, 4]}}, b"\0" * 16, None, "tensor 'a'"),
        ({"a": ENTRY | {"shape": 4}}, b"\0" * 16, None, "tensor 'a'"),
        (
            {"a": ENTRY | {"shape": [1] * 8 + [4]}},
            b"\0" * 16,
            None,
            "tensor 'a' has the shape [1, 1, 1, 1, 1, 1, 1, 1, 4]",
        ),
        ({"a": ENTRY | {"shape": [2**62] * 8}}, b"\0" * 16, None, "tensor 'a': overflow"),
        ({"a": ENTRY | {"shape": [2**63, 0], "data_offsets": [0, 0]}}, b"", None, "tensor 'a' has the shape [922"),
        ({"a": ENTRY | {"data_offsets": [16, 0]}}, b"\0" * 16, None, "tensor 'a': invalid offset"),
        ({"a": ENTRY | {"data_offsets": [0]}}, b"\0" * 16, None, "tensor 'a'"),
        ({"a": ENTRY, "b": ENTRY}, b"\0" * 16, None, "invalid offset for tensor `"),
        ({"a": ENTRY | {"data_offsets": [4, 20]}}, b"\0" * 20, None, "invalid offset for tensor `a`"),
        ({"a": 3}, b"", None, "tensor 'a'"),
        ({"a": None}, b"", None, "tensor 'a'"),
        ({"__metadata__": {"a": 1}}, b"", None, "expected a string"),
        ([], b"", None, "invalid JSON"),
        (b"{", b"", None, "invalid JSON"),
        (b"\xff\xfe{}", b"", None, "invalid UTF-8"),
        (b"[" * 100_000, b"", None, "invalid JSON"),
        (b'{"a":' * 100_000, b"", None, "recursion limit"),
    ],
)
def test_lying_header_is_refused(tmp_path, header, data, length, message):
    path = write_file(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(UserError, match="model.safetensors is not a valid safetensors file: .*" + re.escape(message)):
        read_header(path)


def test_short_files_and_huge_headers(tmp_path):
    for size in range(8):
        (tmp_path / "x").write_bytes(b"\1" * size)
        with pytest.raises(UserError, match="truncated: header too small"):
            read_header(tmp_path / "x")
    with open(tmp_path / "x", "wb") as file:  # sparse
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(UserError, match="header too large"):
        read_header(tmp_path / "x")
    with pytest.raises(UserError, match="missing"):
        read_header(tmp_path / "none")
    with pytest.raises(UserError, match="missing"):
        read_header(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400, 1e400, "F32", "BF16", "silu", "llama3", "yarn", "default"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def mutated(draw: st.DrawFn, value: object) -> object:
    """`value` with one to three places in it changed, removed or added to."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        here = value
        while isinstance(here, (dict, list)) and len(here):
            key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
            if isinstance(here[key], (dict, list)) and len(here[key]) and draw(st.booleans()):
                here = here[key]
                continue
            action = draw(st.sampled_from(["change", "change", "remove", "add"]))
            if action == "change":
                here[key] = draw(JSON)
            elif action == "remove":
                del here[key]
            elif isinstance(here, dict):
                here[draw(st.text(max_size=8))] = draw(JSON)
            else:
                here.append(draw(JSON))
            break
    return value


def agrees_with_the_library(path: Path) -> None:
    """Either a UserError, or what the library reads as well."""
    try:
        stored, _ = read_header(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(stored)
        for name in file.keys():  # noqa: SIM118
            assert tuple(file.get_slice(name).get_shape()) == stored[name].shape
            stored[name].read()


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [22, 23]},
}


@pytest.mark.parametrize("shape", [[0.0, 10**400], [10**400, 10**400], [-1, 2.5], ["1"], [None, True]])
def test_sizes_of_any_kind(tmp_path, shape):
    header = HEADER | {"c": HEADER["c"] | {"shape": shape}}
    with pytest.raises(UserError, match="not a valid safetensors file"):
        read_header(write_file(tmp_path / "sizes.safetensors", header, b"\0" * 23))


@FUZZ
@given(mutated(HEADER), st.integers(0, 64))
def test_fuzz_header(tmp_path_factory, header, size):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    agrees_with_the_library(write_file(path, header, b"\0" * size))
    agrees_with_the_library(write_file(path, header, b"\0" * 23))


@FUZZ
@given(st.data())
def test_fuzz_file(tmp_path_factory, data):
    path = write_file(tmp_path_factory.getbasetemp() / "fuzz.safetensors", HEADER, b"\0" * 23)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    agrees_with_the_library(path)


# -- config.json and generation_config.json


def test_configs_are_read():
    for config in CONFIGS:
        assert ModelConfig.from_hf(config).n_layers == 2


@FUZZ
@given(st.sampled_from(CONFIGS).flatmap(mutated))
def test_fuzz_config(tmp_path_factory, config):
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps(config))
    try:
        read = load_config(folder)
    except UserError as error:
        assert str(folder / "config.json") in str(error)
        return
    assert isinstance(read, ModelConfig)
    assert read.n_heads % read.n_kv_heads == 0 and read.head_dim % 2 == 0
    assert all(type(n) is int and n > 0 for n in (read.dim, read.n_layers, read.ffn_dim, read.vocab_size))
    assert 0 < read.rope.theta < math.inf and 0 < read.norm_eps < math.inf


@FUZZ
@given(st.data())
def test_fuzz_config_text(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    raw = bytearray(json.dumps(data.draw(st.sampled_from(CONFIGS))).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "config.json").write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    try:
        load_config(folder)
    except UserError as error:
        assert str(folder / "config.json") in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\xff", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"])
def test_config_that_is_not_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config.json (is not valid JSON|holds \w+, not a JSON object)"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -4}, "hidden_size"),
        ({"hidden_size": 33}, "hidden_size"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"model_type": "mamba"}, "model_type"),
        ({"architectures": ["MixtralForCausalLM"]}, "architectures"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ],
)
def test_config_field_is_named(tmp_path, change, field):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(UserError, match=f"config.json: {field}: "):
        load_config(tmp_path)


def test_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 7}))
    assert load_generation_config(tmp_path) == {"eos_token_ids": [7]}
    stored = {
        "eos_token_id": [5, 6],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "bos_token_id": 1,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    expected = {"eos_token_ids": [5, 6], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    assert load_generation_config(tmp_path) == expected
    for stored in ({}, {"eos_token_id": None}, {"eos_token_id": []}):
        (tmp_path / "generation_config.json").write_text(json.dumps(stored))
        assert load_generation_config(tmp_path) == {"eos_token_ids": [7]}
    nested = {name: value for name, value in LLAMA.items() if name != "eos_token_id"}
    (tmp_path / "config.json").write_text(json.dumps(nested | {"text_config": {"eos_token_id": [8, 9]}}))
    assert load_generation_config(tmp_path) == {"eos_token_ids": [8, 9]}
    for name, value in [("temperature", "hot"), ("top_k", -1), ("eos_token_id", ["</s>"]), ("top_p", math.nan)]:
        (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
        with pytest.raises(UserError, match=f"generation_config.json: {name}: "):
            load_generation_config(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").unlink()
    assert load_generation_config(tmp_path) == {"eos_token_ids": []}


@FUZZ
@given(mutated({"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1}))
def test_fuzz_generation_config(tmp_path_factory, stored):
    folder = tmp_path_factory.getbasetemp()
    (folder / "generation_config.json").write_text(json.dumps(stored))
    try:
        ids = load_generation_config(folder)["eos_token_ids"]
    except UserError:
        return
    finally:
        (folder / "generation_config.json").unlink()
    assert all(type(i) is int for i in ids)


# -- loading


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_load_model(tmp_path, config):
    tensors = tensors_of(config, torch.bfloat16)
    folder = save(tmp_path, tensors, config)
    for path in (folder, folder / "model.safetensors", str(folder)):
        model = load_model(path)
        assert isinstance(model, Transformer) and not model.training
        state = model.state_dict()
        assert state.keys() == tensors.keys()
        assert all(torch.equal(state[name], tensors[name]) for name in tensors)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    cast = load_model(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(cast[name], tensors[name].float()) for name in tensors)


def test_loaded_model_does_not_change_the_file(tmp_path):
    folder = save(tmp_path, tensors_of(LLAMA))
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    model.norm.weight.zero_()
    model.tok_embeddings.weight.zero_()  # which stays mapped
    read_header(folder / "model.safetensors")[0]["norm.weight"].read().zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_load_shards_and_misaligned_files(tmp_path):
    tensors = tensors_of(LLAMA)
    names = list(tensors)
    files = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in files.items():
        # Older writers did not align the header: one odd byte in the metadata shifts all tensors.
        path = save(tmp_path, {name: tensors[name] for name in part}, name=file) / file
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length].rstrip() + b" "
        header += b" " * ((len(header) + 1) % 2)
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    weight_map = {name: file for file, part in files.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    state = load_model(tmp_path).state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_what_cannot_be_loaded(tmp_path):
    def refused(match: str, path: Path) -> None:
        with pytest.raises(UserError, match=match) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)

    refused("none is not there; run `python convert_hf", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("holds no model.safetensors; run `python convert_hf", tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    refused("is not converted; run `python convert_hf_checkpoint.py --checkpoint_dir ", tmp_path / "empty")
    refused("no safetensors file", tmp_path / "empty" / "pytorch_model.bin")

    tensors = tensors_of(LLAMA)
    folder = save(tmp_path / "x", tensors)
    (folder / "config.json").unlink()
    refused("config.json is missing", folder)
    save(folder, {name: t for name, t in tensors.items() if name != "layers.1.ffn_norm.weight"})
    refused("tensor 'layers.1.ffn_norm.weight' is missing", folder)
    save(folder, tensors | {"layers.2.ffn_norm.weight": torch.ones(32)})
    refused("tensor 'layers.2.ffn_norm.weight' is unexpected", folder)
    save(folder, tensors | {"norm.weight": torch.ones(31)})
    refused(r"tensor 'norm.weight' has the shape \[31\], config.json means \[32\]", folder)
    save(folder, tensors | {"norm.weight": torch.ones(32, dtype=torch.int8)})
    refused("tensor 'norm.weight' is torch.int8, not a float", folder)
    save(folder, {"model.embed_tokens.weight": torch.ones(64, 32)})
    refused(r"names of Hugging Face; run `python convert_hf_checkpoint.py --checkpoint_dir \S+/x` first", folder)
    save(folder, tensors)
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    refused("model.safetensors is not a valid safetensors file: .*truncated", folder)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": FORMAT, "version": "99"})
    refused("has version '99', this program knows '1'", folder)

    folder = save(tmp_path / "sharded", tensors, name="a.safetensors")
    index = folder / "model.safetensors.index.json"
    outside = save(tmp_path / "outside", tensors) / "model.safetensors"
    for name in ("../outside/model.safetensors", str(outside), "..", "", 3, None, "a\0", "sub\\b"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        refused("which is no plain file name", folder)
    for content in ({}, {"weight_map": []}, {"weight_map": {}}):
        index.write_text(json.dumps(content))
        refused("has no weight_map", folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "b.safetensors")}))
    refused("b.safetensors is missing", folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "more"], "a.safetensors")}))
    refused("names tensor 'more', which no file holds", folder)
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors") | {"x": "b.safetensors"}}))
    refused("both hold tensor", folder)


def test_checkpoint_by_the_name_of_its_repo(tmp_path, monkeypatch):
    """ORG/NAME is found under checkpoints/; where it is not, the error has the command that makes it."""
    monkeypatch.chdir(tmp_path)
    command = "python convert_hf_checkpoint.py"
    for path in ("org/name-1.5B", "checkpoints/org/name-1.5B"):
        with pytest.raises(UserError, match=rf"{path} is not there; run `{command} --repo org/name-1\.5B` first$"):
            weights_path(path)
    for path in ("checkpoints/local/final", "name", "/tmp/x/y/z", "../name", "a/b/c"):
        with pytest.raises(
            UserError, match=rf"is not there; run `{command} --checkpoint_dir DIR` \(or --repo ORG/NAME\)"
        ):
            weights_path(path)
    folder = save(tmp_path / "made", tensors_of(LLAMA))
    (tmp_path / "checkpoints" / "org").mkdir(parents=True)
    os.rename(folder, tmp_path / "checkpoints" / "org" / "name")
    assert weights_path("org/name") == Path("checkpoints/org/name/model.safetensors")
    assert weights_path("org/name/model.safetensors") == Path("checkpoints/org/name/model.safetensors")
    load_model("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)  # a folder of that name comes first
    with pytest.raises(UserError, match=r"org/name holds no model\.safetensors"):
        weights_path("org/name")


def test_checksum_needs_no_numpy(tmp_path):
    """It tells apart every change of a file, and works where requirements.txt alone is installed, without a warning."""
    tensors = tensors_of(LLAMA, torch.bfloat16)
    folder = save(tmp_path / "a", tensors)
    code = "import sys; sys.modules['numpy'] = None; import errors, checkpoint; print(checkpoint.checksum(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, cwd=ROOT)
    first = checksum(folder)
    assert (done.stdout, done.stderr) == (first + "\n", "")
    assert checksum(save(tmp_path / "b", tensors)) == first
    (folder / "config.json").write_text(json.dumps(LLAMA | {"rope_theta": 20000.0}))
    assert checksum(folder) != first
    tensors["layers.1.ffn_norm.weight"][1] += 1
    assert checksum(save(tmp_path / "b", tensors)) != first


# -- memory and disk


def test_weights_larger_than_the_memory(tmp_path):
    """5 TB of weights that are not there: the file is sparse, and nothing is allocated before it is refused."""
    config = LLAMA | {
        "hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 600, "num_attention_heads": 128,
        "num_key_value_heads": 128,
    }  # fmt: skip
    header, end = {}, 0
    for name, shape in expected_shapes(ModelConfig.from_hf(config)).items():
        size = math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    path = write_file(tmp_path / "model.safetensors", header)
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        os.truncate(path, path.stat().st_size + end)
    except OSError as error:
        pytest.skip(f"this file system has no sparse file of 5 TB ({error})")
    with pytest.raises(UserError, match=r"the weights of \S+ needs? 5\d\d\d\.\d GB, [\d.]+ [GM]B are free on cpu"):
        load_model(tmp_path)
    norm = read_header(path)[0]["norm.weight"]
    assert torch.equal(norm.read(), torch.zeros(16384).bfloat16()) and norm.read(5, 9).shape == (4,)


def test_free_memory_respects_control_groups(tmp_path):
    def fake(files: dict[str, str]) -> int:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in ({"proc/meminfo": "MemFree: 10 kB\nMemAvailable:   8000000 kB\n"} | files).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return free_memory(root)

    stat = "anon 5\ninactive_file 100\nactive_file 20\n"
    assert fake({}) == 8_192_000_000
    v2 = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.stat": stat,
        "sys/fs/cgroup/a/memory.current": "900\n",
    }
    assert fake(v2 | {"sys/fs/cgroup/a/memory.max": "max\n"}) == 8_192_000_000
    assert fake(v2 | {"sys/fs/cgroup/a/memory.max": "2000\n"}) == 2000 - (900 - 120)
    assert fake(v2 | {"sys/fs/cgroup/a/memory.max": "500\n"}) == 0
    v1 = {
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/1\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 7\ntotal_active_file 3\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "100\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
    }
    assert fake(v1) == 1000 - 90
    assert free_memory() > 0


def test_check_memory_and_disk_speak_gigabytes(tmp_path):
    check_memory(1000, "a cache")
    with pytest.raises(UserError, match=r"^a cache needs 1000000\.0 GB, [\d.]+ GB are free on cpu; take a smaller one"):
        check_memory(10**15, "a cache")
    check_disk(1000, tmp_path / "a" / "b")
    with pytest.raises(UserError, match=r"b needs 1000000000\.0 GB, [\d.]+ [GM]B are free there"):
        check_disk(10**18, tmp_path / "a" / "b")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_after_loading(tmp_path):
    """Loaded and with every weight touched, at most 1.1x the weights are resident."""
    config = LLAMA | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
    folder = save(tmp_path, tensors_of(config, torch.bfloat16), config)
    code = """
import sys, checkpoint, layout, torch
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
layout.expected_shapes(checkpoint.load_config(sys.argv[1]))  # what torch imports on first use
start = resident()
model = checkpoint.load_model(sys.argv[1])
loaded = resident()
for weight in model.parameters(): weight.view(torch.int16).max()
print(start, loaded, resident(), sum(w.nbytes for w in model.parameters()))
"""
    answer = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True).stdout
    start, loaded, touched, weights = map(int, answer.split())
    assert weights > 200e6
    assert loaded - start < 1.1 * weights
    assert touched - start < 1.1 * weights


# -- writing


def test_write_atomically(tmp_path):
    path = tmp_path / "x"
    with write_atomically(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), write_atomically(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    (tmp_path / ".x.tmp").write_bytes(b"left by a killed run, and longer")
    with write_atomically(path) as file:
        file.write(b"new")
        with pytest.raises(UserError, match="another run is writing"), write_atomically(path):
            pass
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
