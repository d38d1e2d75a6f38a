"""The programs that bench.py times beside ours: transformers and llama.cpp, on the same weights.

    peers = transformers_peers(hf_config, model, max_length=544)        # {"transformers, eager": ..., ...}
    peer, path, kind = llama_cpp_peer(model, "int8", folder, max_length=544, threads=2)    # Q8_0, from a GGUF file

A contender, here or in bench.py, has two methods, both greedy, at batch 1:

    prefill(prompt)                -> the token after the prompt; what was in its cache is forgotten
    decode(token, position, steps) -> the `steps` tokens after `token`, which stands at `position`

and a peer keeps the logits its prefill ended in as `last_logits`, float32 [V], so that they can be compared with ours.
transformers runs on views of our tensors. llama.cpp reads a GGUF file, which is written here and kept for the next run.
Both llama-cpp-python and gguf bring NumPy, which nothing else here needs.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attention import rope_frequencies
from config import ModelConfig
from files import check_disk, lock_temporary
from model import Transformer

GGUF_KINDS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}
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
    for package in ("torch", "transformers", "llama-cpp-python"):
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
    try:
        config = transformers.AutoConfig.for_model(**hf_config)
        with torch.device("meta"):
            hf = transformers.AutoModelForCausalLM.from_config(config)
    except (KeyError, ValueError) as error:
        raise Unavailable(f"transformers has no model of type {hf_config.get('model_type')!r}") from error
    hf.load_state_dict(hf_state_dict(model), assign=True)
    # Made on the meta device, it has no frequencies, and a checkpoint does not store them.
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config=config).to(model.tok_embeddings.weight.device)
    hf.eval().requires_grad_(False)
    return {
        "transformers, eager": TransformersPeer(hf, max_length, compiled=False),
        "transformers, static cache, compiled": TransformersPeer(hf, max_length, compiled=True),
    }


def hf_state_dict(model: Transformer) -> dict[str, Tensor]:
    """The weights under the names of Hugging Face; q, k, v, gate and up are views of the fused tensors."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in (
            ("tok_embeddings.", "model.embed_tokens."),
            ("layers.", "model.layers."),
            ("attention_norm.", "input_layernorm."),
            ("ffn_norm.", "post_attention_layernorm."),
            ("attention.", "self_attn."),
            ("feed_forward.", "mlp."),
            (".wo.", ".o_proj."),
            (".w2.", ".down_proj."),
        ):
            name = name.replace(ours, theirs)
        name = {"norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}.get(name, name)
        if ".wqkv." in name:
            for part, rows in zip("qkv", split_qkv(model.config, tensor), strict=True):
                renamed[name.replace("wqkv", f"{part}_proj")] = rows
        elif ".w13." in name:
            for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                renamed[name.replace("w13", f"{part}_proj")] = rows
        else:
            renamed[name] = tensor
    if model.output is None:
        renamed["lm_head.weight"] = renamed["model.embed_tokens.weight"]
    return renamed


def split_qkv(config: ModelConfig, wqkv: Tensor) -> tuple[Tensor, ...]:
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return wqkv.split([queries, keys, keys])


# ---------------------------------------------------------------------------------------------------------------------
# llama.cpp


class LlamaCppPeer:
    """llama.cpp through the C API that llama-cpp-python wraps, without its sampler."""

    def __init__(self, llama: ModuleType, path: Path, vocab_size: int, max_length: int, threads: int, gpu: bool):
        self.llama, self.vocab_size = llama, vocab_size
        self.log = llama.llama_log_callback(lambda level, text, data: None)  # kept: C holds a pointer to it
        llama.llama_log_set(self.log, None)
        llama.llama_backend_init()
        model_params = llama.llama_model_default_params()
        model_params.n_gpu_layers = 999 if gpu else 0
        self.model = llama.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self.model:
            raise Unavailable(f"llama.cpp does not load {path}")
        params = llama.llama_context_default_params()
        params.n_ctx = -(-max_length // 256) * 256
        params.n_batch = max(512, max_length)  # tokens a call may take; it computes n_ubatch of them at a time
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise Unavailable(f"llama.cpp has no room for a context of {max_length} tokens")

    def prefill(self, prompt: list[int]) -> int:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        self.last_logits = self._step(prompt).clone()
        return int(self.last_logits.argmax())

    def decode(self, token: int, position: int, steps: int) -> list[int]:
        tokens = [token]
        for _ in range(steps):  # the cache knows the position
            tokens.append(int(self._step(tokens[-1:]).numpy().argmax()))  # numpy: its threads would spin beside theirs
        return tokens[1:]

    def _step(self, tokens: list[int]) -> Tensor:
        """The logits after the last token, float32 [V], in memory that the next step overwrites."""
        array = (self.llama.llama_token * len(tokens))(*tokens)
        if self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = self.llama.llama_get_logits_ith(self.context, -1)
        address = ctypes.addressof(logits.contents)
        return torch.frombuffer((ctypes.c_float * self.vocab_size).from_address(address), dtype=torch.float32)


def llama_cpp_peer(
    model: Transformer, mode: str, folder: Path, max_length: int, threads: int
) -> tuple[LlamaCppPeer, Path, str]:
    """llama.cpp on these unquantized weights in the format that `mode` is compared with; its file, and the format.

    `folder` keeps GGUF files of these weights, and of no others.
    """
    llama = require("llama-cpp-python", "llama_cpp")
    gpu = model.tok_embeddings.weight.device.type == "cuda"
    if gpu and not llama.llama_supports_gpu_offload():
        raise Unavailable("llama-cpp-python is built without CUDA (reinstall it with CMAKE_ARGS=-DGGML_CUDA=on)")
    kind = GGUF_KINDS[mode]
    path = write_gguf(model, folder, kind)
    return LlamaCppPeer(llama, path, model.config.vocab_size, max_length, threads, gpu), path, kind


def write_gguf(model: Transformer, folder: Path, kind: str) -> Path:
    """Writes the weights as a GGUF file of the architecture "llama", without a vocabulary, and returns its path; a file
    of that kind in the folder is kept.

    All matrices are of one kind: that of the weights, "Q8_0" or "Q4_0". Norms are float32.

    The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Its RoPE pairs neighbours where ours pairs an
    element with the one half a head away, so the rows of q and k are interleaved. Unavailable for models that
    "llama" in llama.cpp cannot express.
    """
    gguf = require("gguf", "gguf")
    config = model.config
    for unsupported, what in (
        (config.qkv_bias or config.wo_bias or config.mlp_bias, "biases"),
        (config.qk_norm, "qk-norm"),
        (config.sliding_window is not None, "a sliding window"),
        (config.rope.type not in ("default", "linear", "llama3"), f"{config.rope.type} RoPE"),
    ):
        if unsupported:
            raise Unavailable(f"models with {what} are not written as GGUF here")
    if kind.startswith("Q") and any(p.ndim == 2 and p.shape[1] % 32 for p in model.parameters()):
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
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_custom_alignment(GGUF_ALIGNMENT)
        writer.add_file_type(file_types.ALL_F32 if kind == "F32" else file_types[f"MOSTLY_{kind}"])
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.context_length)
        writer.add_embedding_length(config.dim)
        writer.add_block_count(config.n_layers)
        writer.add_feed_forward_length(config.ffn_dim)
        writer.add_head_count(config.n_heads)
        writer.add_head_count_kv(config.n_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope.theta)
        writer.add_tokenizer_model("no_vocab")
        for name, tensor in gguf_tensors(model).items():
            if tensor.dim() == 1:
                writer.add_tensor(name, tensor.float().cpu().numpy())
            elif kind.startswith("Q"):
                rows = (gguf.quants.quantize(part.float().cpu().numpy(), tensor_kind) for part in tensor.split(512))
                writer.add_tensor(name, torch.cat([*map(torch.from_numpy, rows)]).numpy(), raw_dtype=tensor_kind)
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


def gguf_bytes(path: Path) -> int:
    """Bytes of weights in a GGUF file that a decode step reads: all but an embedding that is not the output as well."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in require("gguf", "gguf").GGUFReader(path).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


def gguf_tensors(model: Transformer) -> dict[str, Tensor]:
    """The weights under the names of GGUF, q and k interleaved for its RoPE."""
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
        gate, up = state[layer + "feed_forward.w13.weight"].chunk(2)
        named = {
            "attn_norm": state[layer + "attention_norm.weight"],
            "attn_q": interleave(q, config.head_dim),
            "attn_k": interleave(k, config.head_dim),
            "attn_v": v,
            "attn_output": state[layer + "attention.wo.weight"],
            "ffn_norm": state[layer + "ffn_norm.weight"],
            "ffn_gate": gate,
            "ffn_up": up,
            "ffn_down": state[layer + "feed_forward.w2.weight"],
        }
        tensors |= {f"blk.{i}.{name}.weight": tensor for name, tensor in named.items()}
    return tensors


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from [x0 x1 ... y0 y1 ...] to [x0 y0 x1 y1 ...], where RoPE rotates the pairs (x, y)."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
