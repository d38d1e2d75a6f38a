"""Beam search: the sequences of highest probability, instead of the token of highest probability at each step.

    engine.setup(batch_size=4, max_seq_length=1024, plain=True, eos_ids=request.eos_ids)
    for hypothesis in beam_search(engine, request, BeamParams(num_beams=4, num_return_sequences=2)):
        print(hypothesis.score, tokenizer.decode(hypothesis.tokens))

Each beam is a row of the static KV cache. A step runs the model for one token of every beam and ranks all ways to go
on; a beam that goes on in one way stays in its row, and one that goes on in two is copied into the row of a beam that
was given up. Only what the two rows don't share is copied, mostly a few positions. Sequences and scores are those of
transformers' `generate(num_beams=...)`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import Engine, Request
from errors import UserError
from model import Transformer
from sampling import Sampler


@dataclass(frozen=True)
class BeamParams:
    """How the search goes. A score is a sequence's log-probability / its number of new tokens ** length_penalty."""

    num_beams: int
    length_penalty: float = 1.0  # above 0 prefers long sequences (a log-probability is negative), below 0 short ones
    # When num_beams sequences have ended. True: stop; False: stop unless a beam as it is now would score better than
    # the worst of them; "never": unless one might, had it the best length.
    early_stopping: bool | str = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if not 2 <= self.num_beams <= 64:
            raise UserError(f"num_beams {self.num_beams} is out of range; it must be between 2 and 64")
        if not -10 <= self.length_penalty <= 10:
            raise UserError(f"length_penalty {self.length_penalty} is out of range; it must be between -10 and 10")
        if self.early_stopping not in (True, False, "never"):
            raise UserError(f"early_stopping {self.early_stopping!r} is unknown; it must be true, false or 'never'")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise UserError(
                f"num_return_sequences {self.num_return_sequences} is out of range; "
                f"it must be between 1 and num_beams {self.num_beams}"
            )


@dataclass(frozen=True)
class Hypothesis:
    """One sequence that was found: its new tokens, the end token included."""

    tokens: list[int]
    score: float
    finish_reason: str  # "stop" (an end token) or "length"


@torch.no_grad()
def beam_search(engine: Engine, request: Request, beams: BeamParams) -> list[Hypothesis]:
    """The best `num_return_sequences` ways to continue the prompt, best first.

    Of request.params the penalties, the bans and min_new_tokens apply, to log-probabilities; nothing is sampled.
    Raises ValueError where engine.setup did not make num_beams rows with room for the request, and UserError when the
    model has no next token.
    """
    model, sampler, device = engine.model, engine.sampler, engine.device
    N, prompt, longest = beams.num_beams, request.prompt, request.max_new_tokens
    if (
        not prompt
        or request.context
        or longest < 1
        or model.max_batch_size != N
        or len(prompt) + longest > model.max_seq_length
    ):
        raise ValueError(
            f"{N} beams of {request.start} + {len(prompt)} + {longest} tokens do not fit a cache of "
            f"{model.max_batch_size} rows of {model.max_seq_length}"
        )
    width = N + len(request.eos_ids)  # among so many ways to continue a beam are N that don't end it
    if width > model.config.vocab_size:
        raise UserError(f"num_beams {N} is too many for a vocabulary of {model.config.vocab_size} tokens; use fewer")
    step = engine.compile(beam_step)
    for row in range(N):
        sampler.set_row(row, request.params, prompt)
    logits = model.logits(engine.prefill(0, request)[None, -1:])
    token, input_pos = torch.tensor([[prompt[-1:]], [[len(prompt) - 1]]], device=device)
    first_row = torch.zeros(1, dtype=torch.long, device=device)
    ranked = rank(sampler, logits, token, input_pos, torch.zeros(1, device=device), width, first_row)

    texts: list[list[int]] = [[] for _ in range(N)]  # the new tokens of the beam in each row; the first is in row 0
    shared = torch.zeros(N, N, dtype=torch.long)  # how many positions of the cache two rows have in common
    finished: list[Hypothesis] = []  # at most N, best first
    for length in range(1, longest + 1):
        running = []
        for place, (score, row, token_id) in enumerate(in_order(ranked)):
            ends = token_id in request.eos_ids
            if not ends and length < longest:
                running.append((score, row, token_id))
                if len(running) == N:
                    break
            elif place < N and score > -math.inf:
                reason = "stop" if ends else "length"
                finished.append(Hypothesis([*texts[row], token_id], score / length**beams.length_penalty, reason))
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:N]
        if not running or is_done(beams, running[0][0], finished, length, longest):
            break

        # The first way to continue a beam stays in its row, each other one takes the row of a beam that was given up.
        free = set(range(N)) - {row for _, row, _ in running}
        placed: dict[int, tuple[float, int, int]] = {}
        for way in running:
            placed[free.pop() if way[1] in placed else way[1]] = way
        scores, sources, tokens = zip(*(placed[row] for row in range(N)), strict=True)
        end = len(prompt) + length - 1  # the first position that is not in the cache yet
        for row, source in enumerate(sources):
            if row != source:
                copy_row(engine, source, row, int(shared[source, row]), end)
        texts = [[*texts[source], token_id] for source, token_id in zip(sources, tokens, strict=True)]
        source = torch.tensor(sources)
        shared = torch.where(source[:, None] == source, end, shared[source][:, source])

        token, input_pos = torch.tensor([tokens, [end] * N], device=device)[..., None]
        key_pos = engine.begin_step(end + 1)
        ranked = step(model, sampler, token, input_pos, key_pos, torch.tensor(scores, device=device), width)
    if not finished:
        raise UserError("the model has no next token: all are banned; ban fewer")
    return finished[: beams.num_return_sequences]


def in_order(ranked: tuple[Tensor, Tensor]) -> list[tuple[float, int, int]]:
    """What `rank` returned -> (log-probability, row, token id) of all candidates, best first."""
    scores, tokens = (part.tolist() for part in ranked)
    if any(math.isnan(of_row[0]) for of_row in scores):  # topk puts them first
        raise UserError("the model has no next token: its logits are not numbers; the checkpoint may be damaged")
    rows = enumerate(zip(scores, tokens, strict=True))
    ways = [(score, row, token_id) for row, ranks in rows for score, token_id in zip(*ranks, strict=True)]
    return sorted(ways, key=lambda way: -way[0])


def is_done(beams: BeamParams, best: float, finished: list[Hypothesis], length: int, longest: int) -> bool:
    """Whether to stop, though beams of this length run on; `best` is the highest log-probability among them."""
    if len(finished) < beams.num_beams:
        return best == -math.inf
    if beams.early_stopping == "never":
        length = longest if beams.length_penalty > 0 else length
    elif beams.early_stopping:
        return True
    return best / length**beams.length_penalty <= finished[-1].score


def beam_step(
    model: Transformer, sampler: Sampler, token: Tensor, input_pos: Tensor, key_pos: Tensor, scores: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Takes up the last token of every beam, [B, 1] at its position [B, 1], and ranks what may follow."""
    if not sampler.plain:
        sampler.history.scatter_(1, input_pos, token)
        sampler.count(token, torch.ones_like(token[:, 0]))
    return rank(sampler, model(token, input_pos, key_pos), token, input_pos, scores, width)


def rank(
    sampler: Sampler,
    logits: Tensor,
    token: Tensor,
    input_pos: Tensor,
    scores: Tensor,
    width: int,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `width` best tokens for each beam, best first, by logits [B, 1, V] and the beams' log-probabilities [B].

    Returns the log-probabilities of the beams with them, float32 [B, width], and their ids. `rows` as in Sampler.
    """
    logprobs = logits.float().log_softmax(-1)
    if not sampler.plain:
        logprobs = sampler.penalize(logprobs, token, input_pos, rows)
    values, ids = (scores[:, None] + logprobs[:, 0]).topk(width)
    return values, ids


def copy_row(engine: Engine, source: int, row: int, begin: int, end: int) -> None:
    """Makes a row of the caches, from position `begin` up to `end`, and of the sampler what another row is."""
    engine.copy_row(source, row, begin, end)
    if not engine.sampler.plain:
        engine.sampler.history[row] = engine.sampler.history[source]
        engine.sampler.counts[row] = engine.sampler.counts[source]
