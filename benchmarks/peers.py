"""The programs that bench.py times beside ours: transformers, llama.cpp and ik_llama.cpp, on the same weights.

    peers = transformers_peers(hf_config, model, max_length=544)        # {"transformers, eager": ..., ...}
    peers, path = llama_cpp_peers("llama.cpp", model, "int8", folder, max_length=544, threads=2)    # a GGUF of Q8_0

A contender, here or in bench.py, has two methods, both greedy, at batch 1:

    prefill(prompt)                -> the token after the prompt; what was in its cache is forgotten
    decode(token, position, steps) -> the `steps` tokens after `token`, which stands at `position`

and a peer keeps the logits its prefill ended in as `last_logits`, float32 [V], so that they can be compared with ours.
transformers runs on views of our tensors. llama.cpp and its fork ik_llama.cpp read a GGUF file, which is written here
and kept for the next run. Their packages and gguf bring NumPy, which nothing else here needs.
"""

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
import warnings
from collections.abc import Container
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attention import rope_frequencies
from config import ExpertsConfig, ModelConfig, RopeConfig
from families import FAMILIES, Names
from files import check_disk, lock_temporary
from model import Transformer

HF_EXPERTS = {  # a mixture of experts in the memory of transformers
    "feed_forward.router": "mlp.gate.weight",
    "feed_forward.experts.w13": "mlp.experts.gate_up_proj",
    "feed_forward.experts.w2": "mlp.experts.down_proj",
}
GGUF_KINDS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}
# The options that a GGUF file says, or unsupported_options looks at.
WRITTEN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "context_length", "norm_eps",
    "qk_norm", "rope", "rotary_dim", "sliding_window", "window_layers", "experts", "expert_layers", "tied",
}  # fmt: skip
ROPE_WRITTEN = {"type", "theta", "factor", "original_length", "low_freq_factor", "high_freq_factor"}
EXPERTS_WRITTEN = {"count", "chosen", "width"}
GGUF_ALIGNMENT = 64  # bytes; the default of 32 would put rows of AVX512 loads across cache lines


class Unavailable(Exception):
    """Why a peer takes no part in this run."""


def require(package: str, module: str) -> ModuleType:
    """An optional module. Unavailable says how to install it."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{package} is not installed (pip install {package})")
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a build for another machine
        raise Unavailable(f"{package} is installed but does not load: {error}") from error


def versions() -> dict[str, str]:
    """The installed versions of everything that is timed."""
    found = {}
    for package in ("torch", "transformers", *(settings.package for settings in LLAMA_CPPS.values())):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---------------------------------------------------------------------------------------------------------------------
# transformers


class TransformersPeer:
    """transformers' forward: eager with a cache that grows, or compiled with a static one."""

    def __init__(self, hf, max_length: int, compiled: bool):
        cache_utils = importlib.import_module("transformers.cache_utils")
        self.device = hf.device
        self.compiled = compiled
        self.cache = None
        if compiled:
            config = hf.config
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self.static_cache = cache_utils.StaticCache(config=config, max_cache_len=max_length)
            self.static_cache.early_initialization(
                batch_size=1, num_heads=config.num_key_value_heads, head_dim=head_dim, dtype=hf.dtype, device=hf.device
            )
            # As its generate() does, but for dynamic=False: prefill and decode each get code of their exact shape.
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            warnings.filterwarnings("ignore", ".*functools.lru_cache", module="torch._dynamo")  # in its experts
            self.forward = torch.compile(hf.__call__, mode=mode, dynamic=False)
        else:
            self.new_cache = lambda: cache_utils.DynamicCache(config=hf.config)
            self.forward = hf.__call__

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> int:
        if self.compiled:
            self.cache = self.static_cache
            self.cache.reset()
        else:
            self.cache = self.new_cache()
        self.last_logits = self._step(torch.tensor([prompt], device=self.device)).float()
        return int(self.last_logits.argmax())

    @torch.inference_mode()
    def decode(self, token: int, position: int, steps: int) -> list[int]:
        tokens = [torch.tensor([[token]], device=self.device)]
        for _ in range(steps):  # the cache knows the position
            tokens.append(self._step(tokens[-1]).argmax().view(1, 1))
        return torch.cat(tokens[1:], 1)[0].tolist()

    def _step(self, tokens: Tensor) -> Tensor:
        """Tokens [1, S] -> the logits after the last of them, [V]."""
        if self.compiled and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        logits = self.forward(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1].clone() if self.compiled else logits[0, -1]


def transformers_peers(hf_config: dict[str, Any], model: Transformer, max_length: int) -> dict[str, TransformersPeer]:
    """transformers' model of the same config.json, on the same tensors, eager and compiled."""
    transformers = require("transformers", "transformers")
    transformers.logging.set_verbosity_error()
    kind = hf_config["model_type"]
    try:
        with tempfile.TemporaryDirectory() as folder:  # only from a file it reads older spellings
            Path(folder, "config.json").write_text(json.dumps(hf_config))
            config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            hf = transformers.AutoModelForCausalLM.from_config(config)
    except (KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise Unavailable(f"transformers makes no {kind} of this config.json: {reason}") from error
    if kind not in FAMILIES:  # a model with eyes
        raise Unavailable(f"a {kind} of transformers needs more than these weights")
    named = hf_state_dict(model, FAMILIES[kind].names)
    theirs = {name: tensor.shape for name, tensor in hf.state_dict().items()}
    if {name: tensor.shape for name, tensor in named.items()} != theirs:
        raise Unavailable(f"the weights of a {kind} are not renamed for transformers here")
    hf.load_state_dict(named, assign=True)
    # Made on the meta device, it has no frequencies, and a checkpoint does not store them.
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config=config).to(model.tok_embeddings.weight.device)
    if any(buffer.is_meta for buffer in hf.buffers()):
        raise Unavailable(f"a {kind} of transformers needs more than these weights")
    hf.eval().requires_grad_(False)
    return {
        "transformers, eager": TransformersPeer(hf, max_length, compiled=False),
        "transformers, static cache, compiled": TransformersPeer(hf, max_length, compiled=True),
    }


def hf_state_dict(model: Transformer, names: Names) -> dict[str, Tensor]:
    """The weights under the names of transformers' modules, as views: q, k, v, gate and up of the fused tensors.

    Unavailable for a family whose rows have another order there."""
    if names.interleaved or names.transforms:
        raise Unavailable("transformers orders the rows of these weights in another way")
    config, renamed = model.config, {}
    one_by_one = "{}" in names.parts.get("feed_forward.experts.w2", [""])[0]  # on disk; in memory they are stacked
    for name, tensor in model.state_dict().items():
        layer, part, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
        if one_by_one and part in HF_EXPERTS:
            theirs, rows = [HF_EXPERTS[part]], [tensor]
        else:
            theirs = [f"{stem}.{kind}" for stem in names.parts[part]]
            fused = part == "attention.wqkv" and len(theirs) == 3
            rows = split_qkv(config, tensor) if fused else tensor.chunk(len(theirs))
        prefix = names.layer.format(layer) if layer else ""
        renamed |= {prefix + their: some for their, some in zip(theirs, rows, strict=True)}
    if model.output is None:
        head, embedding = (f"{names.parts[part][0]}.weight" for part in ("output", "tok_embeddings"))
        renamed[head] = renamed[embedding]
    return renamed


def split_qkv(config: ModelConfig, wqkv: Tensor) -> tuple[Tensor, ...]:
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return wqkv.split([queries, keys, keys])


# ---------------------------------------------------------------------------------------------------------------------
# llama.cpp and ik_llama.cpp


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp or a fork: what wraps its C API, and the parameters that make it fastest."""

    package: str
    module: str
    api: str  # in the module, where the functions of C are
    model_options: dict[str, Any]
    context_options: dict[str, dict[str, Any]]  # of each variant, by what it adds to the name


LLAMA_CPPS = {
    "ik_llama.cpp": LlamaCpp(
        "ik-llama-cpp-python",
        "ik_llama_cpp",
        "_ctypes_api",
        {"repack_tensors": True, "use_mmap": False},  # it repacks nothing that is mapped
        {"": {"flash_attn": True}},
    ),
    "llama.cpp": LlamaCpp(
        "llama-cpp-python",
        "llama_cpp",
        "llama_cpp",
        {},
        # On CPUs flash attention, which is its default, makes prefill a sixth faster and decoding at position 4096
        # three times slower.
        {"": {"flash_attn_type": 0}, ", flash attention": {"flash_attn_type": 1}},
    ),
}


class LlamaCppPeer:
    """A context of llama.cpp or ik_llama.cpp, through the C API that its package wraps and without its sampler."""

    def __init__(self, api: ModuleType, model: int, vocab_size: int, max_length: int, threads: int, options: dict):
        self.api, self.vocab_size = api, vocab_size
        params = api.llama_context_default_params()
        params.n_ctx = -(-max_length // 256) * 256
        params.n_batch = max(512, max_length)  # tokens a call may take; it computes n_ubatch of them at a time
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        for name, value in options.items():
            setattr(params, name, value)
        self.context = api.llama_init_from_model(model, params)
        if not self.context:
            raise Unavailable(f"it has no room for a context of {max_length} tokens")
        self.batch = api.llama_batch_init(params.n_batch, 0, 1)  # token ids, each of one sequence
        for i in range(params.n_batch):
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0

    def prefill(self, prompt: list[int]) -> int:
        if hasattr(self.api, "llama_memory_clear"):
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        else:  # the older name, which ik_llama.cpp has kept
            self.api.llama_kv_cache_clear(self.context)
        self.last_logits = self._step(prompt, 0).clone()
        return int(self.last_logits.argmax())

    def decode(self, token: int, position: int, steps: int) -> list[int]:
        tokens = [token]
        for step in range(steps):
            logits = self._step(tokens[-1:], position + step)
            tokens.append(int(logits.numpy().argmax()))  # numpy: torch's threads would spin beside theirs
        return tokens[1:]

    def _step(self, tokens: list[int], position: int) -> Tensor:
        """The logits after the last token, float32 [V], in memory that the next step overwrites."""
        self.batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position + i, i == len(tokens) - 1
        if self.api.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        address = ctypes.addressof(logits.contents)
        return torch.frombuffer((ctypes.c_float * self.vocab_size).from_address(address), dtype=torch.float32)


def llama_cpp_api(program: str) -> ModuleType:
    """The functions of the C API. Unavailable says how to install them."""
    # llama-cpp-python makes its symbols global, and ik_llama.cpp, loaded after it, would be linked to those.
    first, settings = LLAMA_CPPS["ik_llama.cpp"], LLAMA_CPPS[program]
    with contextlib.suppress(Unavailable):
        require(first.package, first.module)
    return getattr(require(settings.package, settings.module), settings.api)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def no_log(level, text, data):
    pass


def llama_cpp_peers(
    program: str, model: Transformer, mode: str, folder: Path, max_length: int, threads: int
) -> tuple[dict[str, LlamaCppPeer], Path]:
    """llama.cpp or ik_llama.cpp on these unquantized weights in the format that `mode` is compared with, each variant
    by its name: {"llama.cpp Q8_0": ..., ...}; and their file. Unavailable where it does not run.

    `folder` keeps GGUF files of these weights, and of no others.
    """
    settings, api, kind = LLAMA_CPPS[program], llama_cpp_api(program), GGUF_KINDS[mode]
    gpu = model.tok_embeddings.weight.device.type == "cuda"
    if gpu and not ctypes.c_bool(api._lib.llama_supports_gpu_offload()):
        raise Unavailable(f"{settings.package} is built without CUDA (reinstall it with CMAKE_ARGS=-DGGML_CUDA=on)")
    path = write_gguf(model, folder, kind)
    api._lib.llama_log_set(no_log, None)
    api.llama_backend_init()
    params = api.llama_model_default_params()
    params.n_gpu_layers = 999 if gpu else 0
    for name, value in settings.model_options.items():
        setattr(params, name, value)
    loaded = api.llama_model_load_from_file(os.fsencode(path), params)
    if not loaded:
        raise Unavailable(f"it does not load {path}")
    sizes = model.config.vocab_size, max_length, threads
    variants = settings.context_options.items()
    return {f"{program} {kind}{name}": LlamaCppPeer(api, loaded, *sizes, options) for name, options in variants}, path


def write_gguf(model: Transformer, folder: Path, kind: str) -> Path:
    """Writes the weights as a GGUF file, without a vocabulary, and returns its path; a file of that kind in the folder
    is kept. Unavailable for models that none of these architectures expresses: "llama", which may have experts, and
    those with norms of queries and keys, "qwen3" and "qwen3moe".

    All matrices are of one kind: that of the weights, "Q8_0" or "Q4_0". Norms are float32, and so is what chooses among
    experts, as where llama.cpp converts.

    The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    gguf = require("gguf", "gguf")
    config = model.config
    if unwritten := unsupported_options(config):
        raise Unavailable(f"models with {', '.join(unwritten)} are not written as GGUF here")
    if kind.startswith("Q") and any(p.ndim > 1 and p.shape[-1] % 32 for p in model.parameters()):
        raise Unavailable(f"{kind} needs widths that are multiples of 32")
    tensor_kind, file_types = gguf.GGMLQuantizationType[kind], gguf.LlamaFileType
    path = folder / f"{kind}.gguf"
    if path.exists():
        return path
    check_disk(sum(tensor.nbytes for tensor in model.parameters()), path)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = lock_temporary(temporary)
    try:
        writer = gguf.GGUFWriter(temporary, architecture(config))
        writer.add_custom_alignment(GGUF_ALIGNMENT)
        writer.add_file_type(file_types.ALL_F32 if kind == "F32" else file_types[f"MOSTLY_{kind}"])
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.context_length)
        writer.add_embedding_length(config.dim)
        writer.add_block_count(config.n_layers)
        if config.experts is None:
            writer.add_feed_forward_length(config.ffn_dim)
        else:  # "llama" reads the first of these, "qwen3moe" the second
            writer.add_feed_forward_length(config.experts.width)
            writer.add_expert_feed_forward_length(config.experts.width)
            writer.add_expert_count(config.experts.count)
            writer.add_expert_used_count(config.experts.chosen)
        writer.add_head_count(config.n_heads)
        writer.add_head_count_kv(config.n_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope.theta)
        writer.add_tokenizer_model("no_vocab")
        for name, tensor in gguf_tensors(model).items():
            if tensor.dim() == 1 or "ffn_gate_inp" in name:
                writer.add_tensor(name, tensor.float().cpu().numpy())
            elif kind.startswith("Q"):
                parts = (part.float().cpu().numpy() for part in tensor.flatten(0, -2).split(512))
                rows = torch.cat([torch.from_numpy(gguf.quants.quantize(part, tensor_kind)) for part in parts])
                writer.add_tensor(name, rows.unflatten(0, tensor.shape[:-1]).numpy(), raw_dtype=tensor_kind)
            else:
                data = tensor.contiguous().cpu().view(torch.uint8).numpy()
                writer.add_tensor(name, data, raw_dtype=tensor_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.fsync(descriptor)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return path


def unsupported_options(config: ModelConfig) -> list[str]:
    """What of a config `write_gguf` does not write, or not so that llama.cpp computes it."""
    found = unusual(config, WRITTEN)
    rope_types = ("default",) if config.qk_norm else ("default", "linear", "llama3")
    if config.rope.type in rope_types:
        found += unusual(config.rope, ROPE_WRITTEN)
    else:
        found.append(f"{config.rope.type} RoPE")
    if config.rotary_dim != config.head_dim:
        found.append("RoPE of a part of each head")
    if config.qk_norm not in ("", "head"):
        found.append(f"qk_norm={config.qk_norm!r}")
    if any(config.window_layers):
        found.append("a sliding window")
    if config.experts is not None:
        found += unusual(config.experts, EXPERTS_WRITTEN)
        if not all(config.expert_layers):
            found.append("layers without experts")
    return found


def unusual(options: ModelConfig | RopeConfig | ExpertsConfig, known: Container[str]) -> list[str]:
    """The options that are not at their defaults, but for those that are known: ["qkv_bias=True", ...]."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    defaults = {field.name: field.default for field in fields(options)}
    return [f"{name}={value!r}" for name, value in values.items() if name not in known and value != defaults[name]]


def architecture(config: ModelConfig) -> str:
    """What llama.cpp calls such a model."""
    if not config.qk_norm:
        return "llama"
    return "qwen3" if config.experts is None else "qwen3moe"


def gguf_bytes(path: Path, config: ModelConfig) -> int:
    """Bytes of weights in a GGUF file that a decode step reads: of experts the chosen ones, of an embedding that is not
    the output as well none."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in require("gguf", "gguf").GGUFReader(path).tensors}
    unread = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    if config.experts is not None:
        stacked = sum(size for name, size in sizes.items() if "_exps." in name)
        unread += stacked - stacked * config.experts.chosen // config.experts.count
    return sum(sizes.values()) - unread


def gguf_tensors(model: Transformer) -> dict[str, Tensor]:
    """The weights under the names of GGUF. The RoPE of "llama" pairs neighbours where ours pairs an element with the
    one half a head away, so its rows of q and k are interleaved."""
    config, state = model.config, model.state_dict()
    tensors = {"token_embd.weight": state["tok_embeddings.weight"], "output_norm.weight": state["norm.weight"]}
    if "output.weight" in state:
        tensors["output.weight"] = state["output.weight"]
    if config.rope.type != "default":  # each frequency is divided by its factor
        plain = config.rope.theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        tensors["rope_freqs.weight"] = plain / rope_frequencies(config.rope, config.head_dim)
    for i in range(config.n_layers):
        layer = f"layers.{i}."
        q, k, v = split_qkv(config, state[layer + "attention.wqkv.weight"])
        named = {
            "attn_norm": state[layer + "attention_norm.weight"],
            "attn_q": q if config.qk_norm else interleave(q, config.head_dim),
            "attn_k": k if config.qk_norm else interleave(k, config.head_dim),
            "attn_v": v,
            "attn_output": state[layer + "attention.wo.weight"],
            "ffn_norm": state[layer + "ffn_norm.weight"],
        }
        if config.qk_norm:
            named["attn_q_norm"] = state[layer + "attention.q_norm.weight"]
            named["attn_k_norm"] = state[layer + "attention.k_norm.weight"]
        if config.experts is None:
            named["ffn_gate"], named["ffn_up"] = state[layer + "feed_forward.w13.weight"].chunk(2)
            named["ffn_down"] = state[layer + "feed_forward.w2.weight"]
        else:
            named["ffn_gate_inp"] = state[layer + "feed_forward.router.weight"]
            gate, up = state[layer + "feed_forward.experts.w13.weight"].chunk(2, dim=1)
            named["ffn_gate_exps"], named["ffn_up_exps"] = gate, up
            named["ffn_down_exps"] = state[layer + "feed_forward.experts.w2.weight"]
        tensors |= {f"blk.{i}.{name}.weight": tensor for name, tensor in named.items()}
    return tensors


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from [x0 x1 ... y0 y1 ...] to [x0 y0 x1 y1 ...], where RoPE rotates the pairs (x, y)."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
