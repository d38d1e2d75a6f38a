"""How good a checkpoint is: perplexity on a text, or the tasks of EleutherAI's lm-evaluation-harness.

    python eval.py --perplexity demo/heldout.txt                                    # the embedded demo model
    python eval.py --perplexity FILE --checkpoint_path checkpoints/ORG/NAME/model_int8.safetensors [--stride S]
    python eval.py --tasks arc_easy,hellaswag --limit 100 --batch_size 8            # pip install lm-eval==0.4.13
    torchrun --standalone --nproc_per_node 2 eval.py ...
    ... [--max_seq_length T] [--device auto|cpu|cuda|mps] [--dtype bfloat16|float16|float32]
    ... [--cache_dtype int8] [--json]

The result goes to stdout, everything else to stderr. Perplexity is exp of the mean negative log-likelihood of a token.
The text is read in windows of T tokens that begin S apart, and a window scores what no earlier one has: every token but
the first exactly once, with at least T - S tokens before it where there are as many.
"""

import errors  # first, so that Ctrl-C is quiet while torch is imported

# isort: split
import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from arguments import add_adapters, add_device, add_model, dtype_named, model_path, named_adapters
from checkpoint import checksum, load_config, load_generation_config, load_model, weights_path
from engine import Engine, Request, cache_bytes
from errors import ArgumentParser, UserError
from files import check_memory, read_text
from lora_layers import Adapters, read_adapters
from model import Transformer
from sampling import SamplingParams
from scheduler import generate
from tokenizer import Tokenizer, load_tokenizer
from tp import Group, join

MAX_WINDOW = 2048  # tokens, where --max_seq_length does not say and the model's context is longer
LOGIT_ROWS = 256  # positions whose logits are in memory at a time
ELSEWHERE = ("checkpoint_path", "adapters", "perplexity", "task_path")  # may be on another machine
NEW_TOKENS = 256  # at most, where a task does not say

Row = tuple[list[int], list[int]]  # inputs, and targets: the tokens that follow the last of the inputs


@torch.inference_mode()
def score(model: Transformer, rows: list[Row]) -> list[tuple[float, bool]]:
    """Log-probability in nats of each row's targets, one after each of the last inputs; and whether all are greedy.

    With inputs [a, b, c] and targets [c, d]: log p(c | a, b) + log p(d | a, b, c).
    """
    device, width = model.norm.weight.device, max(len(inputs) for inputs, _ in rows)
    tokens = torch.tensor([inputs + [0] * (width - len(inputs)) for inputs, _ in rows], device=device)
    input_pos = torch.arange(width, device=device).repeat(len(rows), 1)
    for positions, (inputs, _) in zip(input_pos, rows, strict=True):
        positions[len(inputs) :] = model.max_seq_length  # padding: the spare slot
    hidden = model.hidden(tokens, input_pos, model.key_pos[:width])
    results = []
    for x, (inputs, targets) in zip(hidden, rows, strict=True):
        total, greedy = 0.0, True
        wanted = torch.tensor(targets, dtype=torch.long, device=device).split(LOGIT_ROWS)
        for part, ids in zip(x[len(inputs) - len(targets) : len(inputs)].split(LOGIT_ROWS), wanted, strict=True):
            logits = model.logits(part[None])[0].float()
            total -= F.cross_entropy(logits, ids, reduction="sum").item()
            greedy = greedy and bool((logits.argmax(-1) == ids).all())
        results.append((total, greedy))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity


def windows(ids: list[int], length: int, stride: int) -> Iterator[Row]:
    """Rows of at most `length` inputs whose targets are, all together, every id but the first once and in order."""
    scored = 0  # the last id that was a target
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + length, len(ids) - 1)
        yield ids[begin:end], ids[scored + 1 : end + 1]
        scored = end
        if end == len(ids) - 1:
            return


def perplexity(model: Transformer, tokenizer: Tokenizer, text: str, length: int, stride: int) -> dict[str, Any]:
    """{"perplexity", "bits_per_byte", "tokens" (that were scored), "bytes" (that these stand for), ...} of a text.

    The model's cache must hold a row of `length`. UserError when the text is shorter than two tokens.
    """
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} token, perplexity needs 2 or more; give a longer text")
    tokens, total = len(ids) - 1, 0.0
    with tqdm(total=tokens, unit="token", desc="perplexity", disable=None) as progress:
        for row in windows(ids, length, stride):
            total -= score(model, [row])[0][0]
            progress.update(len(row[1]))
    if not math.isfinite(total):
        raise UserError("the model's log-probabilities are not finite; is the checkpoint broken? convert it again")
    # Bytes that were scored: the first token, where it is not a bos, was only read.
    size = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    return {
        "perplexity": math.exp(min(total / tokens, 700)),
        "bits_per_byte": total / math.log(2) / max(size, 1),
        "tokens": tokens,
        "bytes": size,
        "window": length,
        "stride": stride,
    }


# ---------------------------------------------------------------------------------------------------------------------
# lm-eval


class HarnessMethods:
    """What lm-eval's TemplateLM asks of a model, see `harness_class`: requests in, log-likelihoods or text out."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        batch_size: int,
        max_seq_length: int,
        eos_ids: frozenset[int],
        adapters: Adapters | None = None,
    ):
        """The model has the first of the adapters."""
        super().__init__()
        if tokenizer.bos_id is None and not eos_ids:
            raise UserError("this model names neither a bos nor an eos token, and lm-eval needs one to begin with")
        self.tokens, self.batch_size, self.eos_ids = tokenizer, batch_size, eos_ids
        self.engine = Engine(model, adapters=adapters)
        self.adapter = next(iter(self.engine.adapters.names), None)
        self.engine.setup(batch_size, max_seq_length)

    @property
    def eot_token_id(self) -> int:
        return min(self.eos_ids, default=self.tokens.bos_id)

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokens.bos_id is None else self.tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        bos = self.tokens.named.get("bos_token")
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokens.encode(string, add_special_tokens)

    def in_batches(self, jobs: list, size: Callable[[Any], int], work: Callable[[list], list], what: str) -> list:
        """The results of `work`, called on batches of jobs of similar size, longest first, in the order of the jobs."""
        order = sorted(range(len(jobs)), key=lambda i: -size(jobs[i]))
        results = [None] * len(jobs)
        with tqdm(total=len(jobs), unit="request", desc=what, disable=None) as progress:
            for first in range(0, len(jobs), self.batch_size):
                batch = order[first : first + self.batch_size]
                for i, result in zip(batch, work([jobs[i] for i in batch]), strict=True):
                    results[i] = result
                progress.update(len(batch))
        return results

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each continuation, given its context; contexts that are too long lose their
        beginning."""
        limit = self.engine.model.max_seq_length
        rows: list[Row] = []
        for _, context, continuation in requests:
            if len(continuation) > limit:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens, the window {limit}; raise --max_seq_length"
                )
            rows.append(((context + continuation)[:-1][-limit:], continuation))
        model = self.engine.model
        self.engine.forget()  # `score` uses the caches as well
        self.engine.adapters.give(0, self.adapter)
        self.engine.adapters.use([0] * self.batch_size)
        return self.in_batches(rows, lambda row: len(row[0]), lambda batch: score(model, batch), "log-likelihoods")

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows that score each token once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        limit, pairs, counts = self.engine.model.max_seq_length, [], []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = get_rolling_token_windows(ids, self.prefix_token_id, limit, context_len=1)
            parts = [("", *make_disjoint_window(part)) for part in parts]
            pairs += parts
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(pairs))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string (not included), an end token, or the most tokens that a task allows."""
        wanted = [self.to_request(*request.args) for request in requests]
        texts = [""] * len(requests)
        with tqdm(total=len(requests), unit="request", desc="generation", disable=None) as progress:
            for token in generate(self.engine, self.tokens, wanted):
                texts[token.request] += token.text
                progress.update(token.finish_reason is not None)
        return texts

    def to_request(self, prompt: str, settings: dict[str, Any]) -> Request:
        """From a task's `settings`: until, max_gen_toks, do_sample, temperature ..."""
        until = settings.get("until") or ()
        stop = tuple(filter(None, (until,) if isinstance(until, str) else until))
        new = next((settings[name] for name in LENGTH_NAMES if settings.get(name)), NEW_TOKENS)
        room = self.engine.model.max_seq_length - new
        if room < 1:
            raise UserError(f"a task generates up to {new} tokens, more than the window; raise --max_seq_length")
        params = SamplingParams(temperature=0.0)
        if settings.get("do_sample", settings.get("temperature", 0) > 0):
            chosen = {name: settings[name] for name in ("top_k", "top_p", "min_p") if settings.get(name)}
            params = SamplingParams(temperature=settings.get("temperature", 1.0), **chosen)
        # A prompt that is empty begins like any text; one that is too long loses its beginning.
        ids = self.tok_encode(prompt)[-room:] or [self.prefix_token_id]
        return Request(ids, params, new, self.eos_ids, stop, adapter=self.adapter)


LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval knows them all


def harness_class() -> type[HarnessMethods]:
    """HarnessMethods as an `lm_eval.api.model.TemplateLM`. UserError when lm-eval is not installed."""
    return type("GptBrisk", (HarnessMethods, import_harness().api.model.TemplateLM), {})


def import_harness():
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise UserError(f"--tasks needs lm-eval ({error}); run `pip install lm-eval==0.4.13`") from error
    return lm_eval


def load_tasks(names: list[str], folder: Path | None):
    """lm-eval's task manager, asked for the tasks so that unknown names and missing data are told before any work."""
    lm_eval = import_harness()
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task_path {folder} is no folder; name the one with the task's yaml")
    manager = None
    if folder is not None:  # lm-eval's own tasks are thousands of files, which takes it seconds
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not all(manager.match_tasks([name]) for name in names):
        manager = lm_eval.tasks.TaskManager(include_path=str(folder) if folder else None)
    for name in names:
        if not manager.match_tasks([name]):
            raise UserError(f"lm-eval has no task {name!r}; `lm-eval ls tasks` lists them, --task_path adds your own")
    try:
        manager.load(names)
    except Exception as error:  # the data is fetched by another library, which raises anything
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the tasks ({type(error).__name__}: {what}); check their data and network"
        ) from error
    return manager


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Evaluate a checkpoint.")
    add = parser.add_argument
    add_model(parser)
    add_adapters(parser, "--adapter", "PATH", "one, to be evaluated with the model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--perplexity", type=Path, metavar="FILE", help="a UTF-8 text")
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="of lm-eval, also separated by commas")
    add("--stride", type=int, help="tokens between windows; default: --max_seq_length, so that they do not overlap")
    add("--max_seq_length", type=int, help=f"of a window; default: the model's context, at most {MAX_WINDOW}")
    add("--limit", type=int, help="samples of each task; default: all")
    add("--num_fewshot", type=int, help="examples before each question; default: what the task says")
    add("--batch_size", type=int, default=1, help="requests that are run together")
    add("--task_path", type=Path, metavar="DIR", help="a folder with yaml tasks of your own")
    add_device(parser)
    add("--json", action="store_true", help="the result as one JSON object")
    args = parser.parse_args()
    for name, least in (("stride", 1), ("max_seq_length", 1), ("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and not least <= value < 2**31:
            raise UserError(f"--{name} {value} is out of range; it must be {least} or more")
    others = ("stride",) if args.tasks else ("limit", "num_fewshot", "task_path")
    for name in others:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} goes with {'--perplexity' if args.tasks else '--tasks'}; leave it out")
    if args.perplexity and args.batch_size > 1:
        raise UserError("--batch_size goes with --tasks; leave it out")
    args.adapters, _ = named_adapters(args.adapters)
    if len(args.adapters) > 1:
        raise UserError("--adapter: one is evaluated at a time; give one")
    return args


def main() -> None:
    args = parse_args()
    with join(args.device, args.backend, args.threads) as group:
        evaluate(args, group)


def evaluate(args: argparse.Namespace, group: Group) -> None:
    """What every rank of a torchrun does, or this process alone."""
    device, path = group.device, weights_path(model_path(args))
    group.check_flags(args, ELSEWHERE, lambda: [checksum(path)])
    config = load_config(path.parent)
    tokenizer = load_tokenizer(path.parent, config.vocab_size)
    adapters = read_adapters(args.adapters, path.parent)
    length = args.max_seq_length or min(config.context_length, MAX_WINDOW)
    if length > config.context_length:
        raise UserError(f"--max_seq_length {length} is more than the model's context of {config.context_length} tokens")
    stride = args.stride or length
    if stride > length:
        raise UserError(f"--stride {stride} is more than the window of {length} tokens; some would not be scored")
    if args.tasks:
        names = [name for names in args.tasks for name in names.split(",") if name]
        if not names:
            raise UserError("--tasks names no task; `lm-eval ls tasks` lists them")
        tasks = load_tasks(names, args.task_path)
    else:
        text = group.from_rank_0(lambda: read_text(args.perplexity))

    model = load_model(path, device, dtype_named(args.dtype), group, dtype_named(args.cache_dtype))
    inserted = Adapters(model, config, adapters, args.adapter_scale, group)
    needed = group.sharing * cache_bytes(model, args.batch_size, length)
    check_memory(needed, f"the KV cache for {args.batch_size} x {length} tokens", device)
    if args.tasks:
        eos_ids = frozenset([*load_generation_config(path.parent)["eos_token_ids"], *tokenizer.eos_ids])
        lm = harness_class()(model, tokenizer, args.batch_size, length, eos_ids, inserted)
        lm_eval = import_harness()
        results = lm_eval.simple_evaluate(
            lm,
            tasks=names,
            task_manager=tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            bootstrap_iters=1000,  # for standard errors; lm-eval's own 100,000 take a minute a task
            log_samples=False,
        )
        if group.rank == 0:  # lm-eval has results only there
            keys = ("results", "groups", "versions", "n-shot", "n-samples")
            kept = {key: results[key] for key in keys if key in results}
            print(json.dumps(kept, default=str) if args.json else lm_eval.utils.make_table(results))
    else:
        model.setup_caches(args.batch_size, length)
        inserted.give(0, next(iter(inserted.names), None))
        inserted.use([0])
        result = perplexity(model, tokenizer, text, length, stride)
        if args.json:
            print(json.dumps(result))
        else:
            print(
                f"perplexity {result['perplexity']:.4f} over {result['tokens']} tokens, "
                f"{result['bits_per_byte']:.4f} bits a byte (windows of {length}, stride {stride})"
            )


if __name__ == "__main__":
    errors.run(main)
