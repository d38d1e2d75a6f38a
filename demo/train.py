"""Trains the demo's two models on the source of the Python standard library: a small Llama, and a smaller draft for it.

    python demo/train.py --out build/demo_hf --minutes 45 --draft_minutes 12

Needs requirements-dev.txt and no other data: the corpus is the source of the running interpreter's own library
(corpus.py). A sentencepiece tokenizer with byte fallback is trained on the same text. The files named in HELD_OUT are
kept from both. Writes two ordinary Hugging Face folders, OUT/target and OUT/draft (config.json, model.safetensors,
tokenizer.model; the models are in model.py), and beside them OUT/heldout.txt, OUT/calibration.txt and OUT/report.json
(the results). The learning rate falls to zero over the given minutes, however many there are. A run that was killed
continues from its last save when it is started again with the same --out.
"""

import argparse
import json
import math
import os
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repo's own modules, from any folder

import errors  # first, since torch warns where there is no NumPy

# isort: split
import sentencepiece
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

from demo.corpus import BATCH, BOS, CONTEXT, EOS, corpus_batches, read_corpus, train_tokenizer
from demo.model import DRAFT, SHARED, TARGET, Llama, save_hf
from errors import UserError

LEARNING_RATE = 4e-3
WARMUP = 0.02  # share of the training time

WRITTEN = 512  # length in tokens of a text that the target writes for the draft, prompt included
WRITTEN_ROWS = 64  # texts written at a time
LIKELIEST = 16  # the draft learns from this many of the target's most likely tokens at each position


# ---- training ----

# On a CPU without bfloat16 instructions, bfloat16 takes ten times as long as float32.
CPU_HAS_BFLOAT16 = torch.cpu.get_capabilities().get("avx512_bf16", False)


def autocast(device: str):
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or CPU_HAS_BFLOAT16)


@torch.no_grad()
def held_out_loss(model: Llama, ids: list[int], device: str, limit: int | None = None) -> float:
    """Mean negative log-likelihood (nats per token) of `ids` after bos, each predicted once, in windows of CONTEXT."""
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
    """Share of the text's positions at which draft and target predict the same next token."""
    stream, agreed = torch.tensor([BOS, *ids]), 0
    for start in range(0, len(ids), CONTEXT):
        window = stream[start : start + CONTEXT][: len(ids) - start].to(device)
        with autocast(device):
            agreed += (draft(window[None]).argmax(-1) == target(window[None]).argmax(-1)).sum().item()
    return agreed / len(ids)


@torch.no_grad()
def accepted_lengths(draft: Llama, target: Llama, ids: list[int], device: str) -> dict[str, float]:
    """Greedy speculation on 20 prompts of 64 tokens, each continued by 256 -> agreement and mean accepted tokens."""
    starts = range(0, len(ids) - 64, (len(ids) - 64) // 19)
    prompts = [[BOS, *ids[start : start + 63]] for start in starts]
    tokens, _, _ = write(target, prompts, 320, torch.zeros(len(prompts), 1), device)
    with autocast(device):
        proposed = draft(tokens[:, :-1].to(device)).argmax(-1).cpu()
    same = (proposed == tokens[:, 1:])[:, 63:].tolist()  # for the 256 new tokens
    figures = {"agreement_written": sum(map(sum, same)) / 256 / len(prompts)}
    for k in (4, 8):
        rounds = 0
        for row in same:
            position = 0
            while position < len(row):
                proposals = row[position : position + k]
                position += (proposals.index(False) if False in proposals else k) + 1
                rounds += 1
        # A round yields the accepted tokens of the draft and one token of the target.
        figures[f"accepted_of_{k}"] = 256 * len(prompts) / rounds - 1
    return {name: round(value, 4) for name, value in figures.items()}


# ---- texts that the target writes, for the draft to learn from ----


@torch.no_grad()
def write(
    target: Llama, prompts: list[list[int]], length: int, temperatures: torch.Tensor, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Continues prompts to `length` tokens at temperatures [B, 1], where 0 is greedy.

    Returns the tokens, int64 [B, length], and for each position but the last the target's most likely next tokens and
    their log-probabilities, int16 and float16 [B, length - 1, LIKELIEST].
    """
    B = len(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.zeros(B, length, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    tokens, temperatures = tokens.to(device), temperatures.to(device)
    shape = target.config["num_key_value_heads"], length, target.config["head_dim"]
    cache = torch.zeros(len(target.model["layers"]), 2, B, *shape, device=device)
    likeliest = torch.empty(B, length - 1, LIKELIEST, dtype=torch.int16)
    logprobs = torch.empty(B, length - 1, LIKELIEST, dtype=torch.float16)
    for t in range(length - 1):
        logits = target(tokens[:, t : t + 1], cache, t)[:, 0]
        top, ids = logits.topk(LIKELIEST)
        likeliest[:, t], logprobs[:, t] = ids, top - logits.logsumexp(-1, keepdim=True)
        # Gumbel noise on the most likely tokens only: at low temperatures no other is ever drawn.
        drawn = (top - temperatures * torch.empty_like(top).exponential_().log()).argmax(-1, keepdim=True)
        tokens[:, t + 1] = torch.where(lengths > t + 1, tokens[:, t + 1], ids.gather(1, drawn)[:, 0])
    return tokens.cpu(), likeliest, logprobs


def write_texts(
    target: Llama, documents: list[list[int]], newline: int, minutes: float, device: str, seed: int, path: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `write` returns, for many texts: the target continues prompts of 8 to 160 tokens for `minutes` minutes.

    The prompts are taken from the documents. Three of four texts are greedy, the others sampled at a low temperature.
    The result is kept in `path`; if that exists, it is read instead.
    """
    if path.exists():
        return torch.load(path)
    generator, clock, elapsed, texts = random.Random(seed), Clock(), 0.0, []
    sizes = [len(document) for document in documents]
    while elapsed < minutes * 60:
        prompts = []
        for document in generator.choices(documents, sizes, k=WRITTEN_ROWS):
            start = generator.randrange(len(document))
            while start and document[start - 1] not in (newline, BOS):
                start -= 1
            prompts.append([BOS, *document[max(start, 1) :][: generator.randrange(8, 160)]])
        temperatures = torch.rand(WRITTEN_ROWS, 1) * 0.5 + 0.3
        temperatures[: WRITTEN_ROWS * 3 // 4] = 0
        texts.append(write(target, prompts, WRITTEN + 1, temperatures, device))
        elapsed += clock.tick()
    texts = tuple(map(torch.cat, zip(*texts, strict=True)))
    torch.save(texts, path)
    return texts


def written_batches(texts: tuple[torch.Tensor, ...], rows: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless batches of `rows` texts from write_texts: the tokens without the last, ids and log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    tokens, likeliest, logprobs = texts
    while True:
        for chosen in torch.randperm(len(tokens), generator=generator).split(rows):
            if len(chosen) == rows:
                yield tokens[chosen, :-1], likeliest[chosen].long(), logprobs[chosen].float()


def next_token_loss(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten())


def draft_loss(logits: torch.Tensor, likeliest: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Mean of two cross-entropies: with the target's first choice, on which greedy speculation depends, and with its
    distribution."""
    draft_logprobs = logits.log_softmax(-1).gather(-1, likeliest)
    # All other tokens count as one.
    p = logprobs.exp()
    rest, draft_rest = (1 - x.sum(-1).clamp(max=1 - 1e-4) for x in (p, draft_logprobs.exp()))
    cross_entropy = -(p * draft_logprobs).sum(-1) - rest * draft_rest.log()
    return 0.5 * (cross_entropy - draft_logprobs[..., 0]).mean()


def start_from(draft: Llama, target: Llama) -> None:
    """Copies the target's embedding, first layer and last layer but one into the draft, cut to the draft's shapes."""
    source = {name.replace(f"layers.{TARGET['num_hidden_layers'] - 2}.", "layers.1."): p
              for name, p in target.named_parameters() if ".layers.1." not in name}  # fmt: skip
    with torch.no_grad():
        for name, p in draft.named_parameters():
            p.copy_(source[name][tuple(map(slice, p.shape))])


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024), scaled to AdamW's step size (Liu et al. 2025) so that one learning rate fits both.

    torch.optim.Muon does the same in bfloat16, which takes 15 times as long on a CPU without bfloat16 instructions.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)
                update = update / update.norm().clamp(min=1e-7)
                # Newton-Schulz: towards the nearest matrix whose singular values are all one.
                for _ in range(5):
                    gram = update @ update.T if update.shape[0] < update.shape[1] else update.T @ update
                    gram = 2.0315 * gram @ gram - 4.775 * gram
                    update = 3.4445 * update + (gram @ update if update.shape[0] < update.shape[1] else update @ gram)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(p.shape)))


class Clock:
    """Counts seconds of work, without the first step, which compiles, and without interruptions of later steps."""

    def __init__(self):
        self.last, self.steps = time.monotonic(), []

    def tick(self) -> float:
        """Ends a step and begins the next -> the seconds that are counted for the step."""
        last, self.last = self.last, time.monotonic()
        self.steps = [*self.steps[-20:], self.last - last]
        usual = statistics.median(self.steps[:-1]) if len(self.steps) > 1 else 0.0
        return min(self.steps[-1], 3 * usual)


def train(
    name: str, model: Llama, source: Callable[[int], Iterator], loss_fn: Callable[..., torch.Tensor], first_length: int,
    learning_rate: float, minutes: float, held_out: list[int], device: str, seed: int, state_path: Path,
) -> dict:  # fmt: skip
    """Trains in place for `minutes` minutes on the batches of source(seed): tokens [B, S], then what loss_fn takes.

    For the first 60 % of the time the texts are cut to first_length. Runs in every process of the group at once: each
    has batches of its own, and all take the same step. Returns the numbers of steps and tokens, and the minutes.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = list(model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, {"lr": learning_rate, "weight_decay": 0.05}),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    step, seen, elapsed = 0, 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seen, elapsed = state["step"], state["seen"], state["elapsed"]

    def loss_of(tokens: torch.Tensor, *wanted: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            logits = model(tokens)
        return loss_fn(logits.float(), *wanted)

    compiled = torch.compile(loss_of, dynamic=False)
    batches = source(seed + step)
    seconds, clock, last_eval, last_save = minutes * 60, Clock(), elapsed, elapsed
    while elapsed < seconds:
        done = elapsed / seconds
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (done + 1e-3) / WARMUP) * (1 - done)
        batch = [t.to(device) for t in next(batches)]
        if done < 0.6:  # short texts make attention cheaper, and the remaining time is enough to learn long ones
            batch = [t.unflatten(1, (-1, first_length)).flatten(0, 1) for t in batch]
        loss = compiled(*batch)
        loss.backward()
        # One message per step: the gradients, and the time, on which all processes have to agree.
        shared = [p.grad for p in parameters] + [torch.tensor([clock.tick(), loss.item()], device=device)]
        flat = torch.cat([t.flatten() for t in shared])
        dist.all_reduce(flat)
        for own, mean in zip(shared, (flat / world).split([t.numel() for t in shared]), strict=True):
            own.copy_(mean.view_as(own))
        counted, mean_loss = shared[-1].tolist()
        elapsed += counted
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + world * batch[0].numel()
        if step % 20 == 0 and rank == 0:
            line = f"{name}: {elapsed / 60:5.1f} min  step {step}  {seen / 1e6:.2f}M tokens  "
            line += f"{seen / elapsed:.0f} tok/s  loss {mean_loss:.3f}"
            if elapsed - last_eval > min(120, seconds / 8):
                line += f"  held out {held_out_loss(model, held_out, device, limit=8 * CONTEXT):.4f}"
                last_eval = elapsed
            print(line, flush=True)
        if elapsed - last_save > 120 and rank == 0:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                     "step": step, "seen": seen, "elapsed": elapsed}  # fmt: skip
            torch.save(state, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)
            last_save = elapsed
    return {"steps": step, "tokens_seen": seen, "minutes": round(elapsed / 60, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo_hf"), help="where target/ and draft/ are written")
    parser.add_argument("--minutes", type=float, default=45, help="training time of the target")
    parser.add_argument("--draft_minutes", type=float, default=12, help="of the draft; a third is for its texts")
    parser.add_argument("--threads", type=int, default=2, help="processes, with one thread each")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the texts")
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

    # One process per core, with one thread each: the matrices are so small that threads would mostly wait for each
    # other. glibc is told to keep freed memory: mapping the activations again in each step costs as much as computing
    # them.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    processes = 1 if torch.cuda.is_available() else args.threads
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    torch.multiprocessing.spawn(train_both, (processes, address, args, documents, text), nprocs=processes)


def train_both(rank: int, processes: int, address: str, args: argparse.Namespace, documents: list, text: str) -> None:
    """One process: trains the target, then the draft that learns from it. Rank 0 writes the files and the report."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    # Rank 0 evaluates and saves while the others wait.
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    tokenizer_path = args.out / "tokenizer.model"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    ids = tokenizer.encode(text)
    target = Llama(SHARED | TARGET).to(device)
    draft = Llama(SHARED | DRAFT).to(device)
    report = {"python": sys.version.split()[0], "torch": torch.__version__, "corpus_tokens": sum(map(len, documents))}

    def fit(name: str, model: Llama, *how) -> None:
        figures = train(name, model, *how, ids, device, args.seed, args.out / f"{name}.state.pt")
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16).float()  # the figures are those of the saved weights
        if rank == 0:
            save_hf(model, args.out / name, tokenizer_path)
            loss = held_out_loss(model, ids, device)
            figures["parameters"] = sum(p.numel() for p in model.parameters())
            figures["held_out_perplexity"] = round(math.exp(loss), 3)
            figures["held_out_bits_per_byte"] = round(loss * len(ids) / len(text.encode()) / math.log(2), 4)
            report[name] = figures
            print(name, figures, flush=True)

    source = partial(corpus_batches, documents, rank, processes)
    fit("target", target, source, next_token_loss, CONTEXT // 2, LEARNING_RATE, args.minutes)
    path, newline = args.out / f"written.{rank}.pt", tokenizer.piece_to_id("\n")
    texts = write_texts(target, documents, newline, args.draft_minutes / 3, device, args.seed + rank, path)
    start_from(draft, target)
    source = partial(written_batches, texts, BATCH // processes)
    fit("draft", draft, source, draft_loss, WRITTEN, LEARNING_RATE / 2, args.draft_minutes * 2 / 3)
    if rank == 0:
        report["greedy_agreement"] = round(greedy_agreement(draft, target, ids, device), 4)
        report |= accepted_lengths(draft, target, ids, device)
        (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    errors.run(main)
