"""The demo's two models: a Llama with Hugging Face's parameter names, so that its state_dict is the checkpoint.

model = Llama(SHARED | TARGET)          # or DRAFT
logits = model(tokens)                  # [B, S] -> [B, S, V]
save_hf(model, folder, tokenizer)       # writes an ordinary Hugging Face folder
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from demo.corpus import BOS, CONTEXT, EOS, VOCAB_SIZE

TARGET = {"hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 8, "num_key_value_heads": 4,
          "intermediate_size": 768}  # fmt: skip
# As wide as the target, whose embedding and layers it starts from. It has few layers, because a step of a draft is
# mostly overhead, which grows with the number of layers.
DRAFT = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 640}  # fmt: skip
# What both models share, in the fields of HF's config.json. Heads, KV heads and feed-forward width are divisible by 4
# (ranks of tensor parallelism), and the inputs of every matrix by 32 (int4 groups), even on one of 4 ranks.
SHARED = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "head_dim": 32,
    "max_position_embeddings": CONTEXT, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
    "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "bfloat16",
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        dim, hd = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads, self.hd = config["num_attention_heads"], config["num_key_value_heads"], hd
        self.q_proj = nn.Linear(dim, self.heads * hd, bias=False)
        self.k_proj = nn.Linear(dim, self.kv_heads * hd, bias=False)
        self.v_proj = nn.Linear(dim, self.kv_heads * hd, bias=False)
        self.o_proj = nn.Linear(self.heads * hd, dim, bias=False)

    def forward(self, x: torch.Tensor, start: int, rope: tuple, cache: torch.Tensor | None) -> torch.Tensor:
        B, S, _ = x.shape
        q = rotate(self.q_proj(x).view(B, S, self.heads, self.hd).transpose(1, 2), *rope)
        k = rotate(self.k_proj(x).view(B, S, self.kv_heads, self.hd).transpose(1, 2), *rope)
        v = self.v_proj(x).view(B, S, self.kv_heads, self.hd).transpose(1, 2)
        if cache is not None:
            cache[:, :, :, start] = torch.stack((k, v))[:, :, :, 0]
            k, v = cache[:, :, :, : start + 1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, S, -1))


class MLP(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        dim, hidden = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x: torch.Tensor, *where) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *where)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Tokens [B, S <= CONTEXT] -> logits [B, S, V]. The output projection is tied to the embedding."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(VOCAB_SIZE, config["hidden_size"]),
                "layers": nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"])),
                "norm": nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"]),
            }
        )
        hd = config["head_dim"]
        frequencies = config["rope_theta"] ** (-torch.arange(0, hd, 2) / hd)
        angles = torch.outer(torch.arange(CONTEXT), frequencies).repeat(1, 2)  # [CONTEXT, hd], its two halves are equal
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # Each layer adds twice to the residual stream: small initial weights keep the sum from growing.
                outward = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config["num_hidden_layers"]) if outward else 0.02)

    def forward(self, tokens: torch.Tensor, cache: torch.Tensor | None = None, start: int = 0) -> torch.Tensor:
        """With a cache [layers, 2, B, kv_heads, T, head_dim], S is 1: the token of each row at position `start`."""
        rope = tuple(table[start : start + tokens.shape[1]] for table in (self.cos, self.sin))
        x = self.model["embed_tokens"](tokens)
        for i, block in enumerate(self.model["layers"]):
            x = block(x, start, rope, None if cache is None else cache[i])
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in HF's rotate-half form: x [B, H, S, hd], cos and sin [S, hd] -> [B, H, S, hd]."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def save_hf(model: Llama, folder: Path, tokenizer: Path) -> None:
    """Writes an ordinary Hugging Face Llama folder with bfloat16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": model.config,
        "generation_config.json": {
            "bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.8, "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "add_bos_token": True, "add_eos_token": False, "legacy": False, "add_prefix_space": False,
            "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT,
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    tensors = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
