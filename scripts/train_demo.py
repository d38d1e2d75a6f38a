"""Trains the demo checkpoint: a small Llama on the source of the Python standard library, and a smaller draft of it.

    python scripts/train_demo.py --out build/demo_hf --minutes 45 --draft_minutes 12

Needs nothing but the running interpreter's own library: its source is the corpus, a byte-fallback sentencepiece
tokenizer is trained on the same text, and the files named in HELD_OUT are seen by neither. Writes two ordinary Hugging
Face folders, OUT/target and OUT/draft (config.json, model.safetensors, tokenizer.model, ...), and beside them
OUT/heldout.txt, OUT/calibration.txt and OUT/report.json (what was reached). The learning rate follows the wall clock,
so any number of minutes ends annealed. Killed and started again with the same --out, it goes on from its last save.
"""

import argparse
import hashlib
import io
import json
import math
import os
import random
import socket
import sys
import sysconfig
import time
import tokenize
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repo's own errors.py, from any folder

from errors import UserError, run

HELD_OUT = [
    "bisect.py", "calendar.py", "cmd.py", "csv.py", "fractions.py", "getopt.py",
    "graphlib.py", "heapq.py", "queue.py", "sched.py", "shlex.py", "textwrap.py",
]  # fmt: skip
# Tests are another language of their own, and the rest is tables rather than code.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
SKIPPED_FILES = ("html/entities.py", "_sysconfigdata")

VOCAB_SIZE, CONTEXT, UNK, BOS, EOS = 4096, 1024, 0, 1, 2
TARGET = {"hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 8, "num_key_value_heads": 4,
          "intermediate_size": 768}  # fmt: skip
DRAFT = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 384}  # fmt: skip
# What both models share, in the words of HF's config.json. Heads, kv heads and ffn divide by 4 (tensor parallelism),
# and every matrix's input by 32 even then (int4 groups).
SHARED = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "head_dim": 32,
    "max_position_embeddings": CONTEXT, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
    "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "bfloat16",
}  # fmt: skip

BATCH = 8  # windows of CONTEXT tokens a step: small, because on a CPU steps are scarcer than data
LEARNING_RATE = 4e-3
WARMUP = 0.02  # of the time


# ---- the corpus ----


def read_corpus() -> tuple[dict[str, str], dict[str, str]]:
    """The standard library's source as {path: text}: what is trained on, and what is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training, held_out, seen = {}, {}, set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts) or name.startswith(SKIPPED_FILES):
            continue
        try:
            with tokenize.open(path) as file:  # obeys the file's own coding line
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            (held_out if name in HELD_OUT else training)[name] = text
    if len(held_out) < len(HELD_OUT) or len(training) < 100:
        raise UserError(f"{root} does not hold the standard library's source; use a Python that has its .py files")
    return training, held_out


def train_tokenizer(texts: dict[str, str], path: Path) -> None:
    """Sentencepiece BPE that changes no character of the text (but U+2581, its own mark for a space)."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts.values() for line in text.split("\n") if line.strip()),
        model_writer=(model := io.BytesIO()),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.9995,
        required_chars="".join(map(chr, range(33, 127))),
        # Nothing is normalised, and runs of spaces may become tokens: indentation is part of the language.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_by_unicode_script=False,  # else `__init__` and `self.` could never be pieces
        split_digits=True,
        # A newline is always a token of its own, so the tokens of a prompt do not depend on what follows its line.
        user_defined_symbols=["\n"],
        unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_id=-1,
        num_threads=os.cpu_count(),
        minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def windows(documents: list[list[int]], generator: random.Random) -> torch.Tensor:
    """One epoch: the documents in a new order, end to end, cut into shuffled windows [N, CONTEXT + 1]."""
    order = generator.sample(documents, len(documents))
    stream = torch.tensor([token for document in order for token in document], dtype=torch.int64)
    stream = stream[generator.randrange(CONTEXT) :]
    # Windows overlap by one token: the last target of one is the first input of the next.
    count = (len(stream) - 1) // CONTEXT
    cut = stream[: count * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    return cut[torch.tensor(generator.sample(range(count), count))]


def batches(documents: list[list[int]], seed: int):
    """Endless batches [BATCH, CONTEXT + 1], epoch after epoch."""
    generator = random.Random(seed)
    while True:
        epoch = windows(documents, generator)
        yield from epoch[: len(epoch) // BATCH * BATCH].split(BATCH)


# ---- the model: Llama under HF's names, so that its state_dict is the checkpoint ----


class Attention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        dim, hd = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads, self.hd = config["num_attention_heads"], config["num_key_value_heads"], hd
        self.q_proj = nn.Linear(dim, self.heads * hd, bias=False)
        self.k_proj = nn.Linear(dim, self.kv_heads * hd, bias=False)
        self.v_proj = nn.Linear(dim, self.kv_heads * hd, bias=False)
        self.o_proj = nn.Linear(self.heads * hd, dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        B, S, _ = x.shape
        q = rotate(self.q_proj(x).view(B, S, self.heads, self.hd).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(B, S, self.kv_heads, self.hd).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(B, S, self.kv_heads, self.hd).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
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

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """tokens [B, S <= CONTEXT] -> logits [B, S, V]. The embedding is the output matrix too."""

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
        angles = torch.outer(torch.arange(CONTEXT), frequencies).repeat(1, 2)  # [CONTEXT, hd], both halves alike
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # Each layer adds twice to the residual stream: starting small keeps the sum from growing.
                outward = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config["num_hidden_layers"]) if outward else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        S = tokens.shape[1]
        cos, sin = self.cos[:S], self.sin[:S]
        x = self.model["embed_tokens"](tokens)
        for block in self.model["layers"]:
            x = block(x, cos, sin)
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE, HF's rotate-half form: x [B, H, S, hd], cos and sin [S, hd]."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


# ---- training ----


def autocast(device: str):
    return torch.autocast(device, torch.bfloat16)


@torch.no_grad()
def held_out_loss(model: Llama, ids: list[int], device: str, limit: int | None = None) -> float:
    """Mean negative log-likelihood (nats a token) of bos + ids in windows of CONTEXT, every id predicted once."""
    stream = torch.tensor([BOS, *ids[:limit]])
    total = 0.0
    for start in range(0, len(stream) - 1, CONTEXT):
        window = stream[start : start + CONTEXT + 1].to(device)
        with autocast(device):
            logits = model(window[None, :-1])
        total += F.cross_entropy(logits[0].float(), window[1:], reduction="sum").item()
    return total / (len(stream) - 1)


@torch.no_grad()
def greedy_agreement(draft: Llama, target: Llama, ids: list[int], device: str) -> float:
    """Share of positions of the text at which draft and target would both say the same next token."""
    stream, agreed = torch.tensor([BOS, *ids]), 0
    for start in range(0, len(ids), CONTEXT):
        window = stream[start : start + CONTEXT][: len(ids) - start].to(device)
        with autocast(device):
            agreed += (draft(window[None]).argmax(-1) == target(window[None]).argmax(-1)).sum().item()
    return agreed / len(ids)


def train(
    name: str, model: Llama, documents: list[list[int]], held_out: list[int], minutes: float, device: str, seed: int,
    state_path: Path, teacher: Llama | None = None,
) -> dict:  # fmt: skip
    """Trains in place for so many minutes; with a teacher, mostly towards its distribution. Returns what was done.

    Runs in every process of the group at once: each takes its share of a batch, and all make the same step.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = list(model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    # Muon (Jordan 2024) for the matrices, scaled to AdamW's step size (Liu et al. 2025) so that one rate fits both.
    optimizers = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    step, elapsed = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, elapsed = state["step"], state["elapsed"]

    def loss_of(tokens: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            logits = model(tokens)
        logits = logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, answers.flatten())
        if teacher is None:
            return loss
        with torch.no_grad(), autocast(device):
            wanted = teacher(tokens).flatten(0, 1)
        divergence = F.kl_div(
            logits.log_softmax(-1), wanted.float().log_softmax(-1), log_target=True, reduction="batchmean"
        )
        return 0.2 * loss + 0.8 * divergence

    compiled = torch.compile(loss_of, dynamic=False)
    source = batches(documents, seed + step)
    seconds, began, last_eval, last_save = minutes * 60, time.monotonic() - elapsed, elapsed, elapsed
    while elapsed < seconds:
        done = elapsed / seconds
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (done + 1e-3) / WARMUP) * (1 - done)
        # Half windows first: attention costs half as much, and the rest of the time is enough to learn whole ones.
        length = CONTEXT // 2 if done < 0.6 else CONTEXT
        batch = next(source)[rank::world].to(device)
        loss = compiled(batch[:, :-1].reshape(-1, length), batch[:, 1:].reshape(-1, length))
        loss.backward()
        # One message a step: the gradients, and the clock, on which all have to agree.
        shared = [p.grad for p in parameters] + [torch.tensor([time.monotonic() - began, loss.item()], device=device)]
        flat = torch.cat([t.flatten() for t in shared])
        dist.all_reduce(flat)
        for own, mean in zip(shared, (flat / world).split([t.numel() for t in shared]), strict=True):
            own.copy_(mean.view_as(own))
        elapsed, mean_loss = shared[-1].tolist()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0 and rank == 0:
            tokens = step * BATCH * CONTEXT
            line = f"{name}: {elapsed / 60:5.1f} min  step {step}  {tokens / 1e6:.2f}M tokens  "
            line += f"{tokens / elapsed:.0f} tok/s  loss {mean_loss:.3f}"
            if elapsed - last_eval > min(120, seconds / 8):
                line += f"  held out {held_out_loss(model, held_out, device, limit=8 * CONTEXT):.4f}"
                last_eval = elapsed
            print(line, flush=True)
        if elapsed - last_save > 120 and rank == 0:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                     "step": step, "elapsed": elapsed}  # fmt: skip
            torch.save(state, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)
            last_save = elapsed
    return {"steps": step, "tokens_seen": step * BATCH * CONTEXT, "minutes": round(elapsed / 60, 1)}


# ---- what is written ----


def save_hf(model: Llama, folder: Path, tokenizer: Path) -> None:
    """An ordinary Hugging Face Llama folder with bfloat16 weights."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo_hf"), help="where target/ and draft/ are written")
    parser.add_argument("--minutes", type=float, default=45, help="wall-clock minutes for the target")
    parser.add_argument("--draft_minutes", type=float, default=12, help="wall-clock minutes for the draft")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.minutes <= 0 or args.draft_minutes <= 0 or args.threads <= 0:
        raise UserError("--minutes, --draft_minutes and --threads must be above zero")
    args.out.mkdir(parents=True, exist_ok=True)

    training, held_out = read_corpus()
    text = "".join(held_out.values())[:250_000]
    (args.out / "heldout.txt").write_text(text, encoding="utf-8")
    sample = random.Random(args.seed).sample(sorted(training), len(training))
    (args.out / "calibration.txt").write_text("".join(training[n][:8000] for n in sample)[:128_000], encoding="utf-8")
    tokenizer_path = args.out / "tokenizer.model"
    if not tokenizer_path.exists():
        train_tokenizer(training, tokenizer_path)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    documents = [[BOS, *tokenizer.encode(document), EOS] for document in training.values()]
    characters, tokens = sum(map(len, training.values())), sum(map(len, documents))
    print(f"{len(documents)} files, {characters / 1e6:.2f}M characters, {tokens / 1e6:.2f}M tokens", flush=True)

    # A process a core, each with a thread: the matrices are so small that threads would mostly wait for each other.
    # glibc is told to keep freed memory: mapping the activations anew each step costs as much as computing them.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    processes = 1 if torch.cuda.is_available() else args.threads
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    torch.multiprocessing.spawn(train_both, (processes, address, args, documents, text), nprocs=processes)


def train_both(rank: int, processes: int, address: str, args: argparse.Namespace, documents: list, text: str) -> None:
    """One process of the training: the target, then the draft that learns from it. Rank 0 writes and reports."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    # One process may evaluate and save while the other waits.
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    tokenizer_path = args.out / "tokenizer.model"
    ids = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path)).encode(text)
    target = Llama(SHARED | TARGET).to(device)
    draft = Llama(SHARED | DRAFT).to(device)
    report = {"python": sys.version.split()[0], "torch": torch.__version__, "corpus_tokens": sum(map(len, documents))}
    for name, model, minutes, teacher in (
        ("target", target, args.minutes, None),
        ("draft", draft, args.draft_minutes, target),
    ):
        state_path = args.out / f"{name}.state.pt"
        figures = train(name, model, documents, ids, minutes, device, args.seed, state_path, teacher)
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16).float()  # the figures are of the weights as saved
        if rank == 0:
            save_hf(model, args.out / name, tokenizer_path)
            loss = held_out_loss(model, ids, device)
            figures["parameters"] = sum(p.numel() for p in model.parameters())
            figures["held_out_perplexity"] = round(math.exp(loss), 3)
            figures["held_out_bits_per_byte"] = round(loss * len(ids) / len(text.encode()) / math.log(2), 4)
            report[name] = figures
            print(name, figures, flush=True)
    if rank == 0:
        report["greedy_agreement"] = round(greedy_agreement(draft, target, ids, device), 4)
        (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
