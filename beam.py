"""Beam search: the sequences of highest probability, instead of the token of highest probability at each step.

    engine.setup(batch_size=4, max_seq_length=1024, plain=True, eos_ids=request.eos_ids)
    for hypothesis in beam_search(engine, request, BeamParams(num_beams=4, num_return_sequences=2)):
        print(hypothesis.score, tokenizer.decode(hypothesis.tokens))

Each beam is a row of the static KV cache. A step runs the model for one token of every beam and ranks all
continuations. The first continuation of a beam stays in its row; each further one is copied into the row of a beam that
was given up. Only the positions that the two rows don't share are copied, mostly a few. Sequences and scores are those
of transformers' `generate(num_beams=...)`.
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
    """How to search. A score is a sequence's log-probability / its number of new tokens ** length_penalty."""

    num_beams: int
    length_penalty: float = 1.0  # above 0 prefers long sequences (a log-probability is negative), below 0 short ones
    # Once num_beams sequences have ended. True: stop. False: go on while a running beam, scored as it is now, is better
    # than the worst of them. "never": go on while one might become better, at the length that favours it most.
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


Candidate = tuple[float, int, int]  # a beam with a token more: log-probability, row of the beam, token id


@dataclass(frozen=True)
class Hypothesis:
    """One sequence that was found: its new tokens, including the end token."""

    tokens: list[int]
    score: float
    finish_reason: str  # "stop" (an end token) or "length"


@torch.no_grad()
def beam_search(engine: Engine, request: Request, beams: BeamParams) -> list[Hypothesis]:
    """The best `num_return_sequences` continuations of the prompt, best first.

    Of request.params the penalties, the bans and min_new_tokens apply, to log-probabilities; nothing is sampled.
    Raises ValueError where engine.setup did not make num_beams rows with room for the request, and UserError when the
    model has no next token.
    """
    model, sampler, device = engine.model, engine.sampler, engine.device
    N, prompt, longest = beams.num_beams, request.prompt, request.max_new_tokens
    if not prompt or longest < 1 or model.max_batch_size != N or len(prompt) + longest > model.max_seq_length:
        raise ValueError(
            f"{N} beams of {len(prompt)} + {longest} tokens do not fit a cache of "
            f"{model.max_batch_size} rows of {model.max_seq_length}"
        )
    width = N + len(request.eos_ids)  # among the best so many tokens after a beam are N that don't end it
    if width > model.config.vocab_size:
        raise UserError(f"num_beams {N} is too many for a vocabulary of {model.config.vocab_size} tokens; use fewer")
    step = engine.compile(beam_step)
    for row in range(N):
        sampler.set_row(row, request.params, prompt)
    engine.take(request, [0])
    engine.adapters.use([0] * N)
    logits = model.logits(engine.prefill(0, request)[None, -1:])
    engine.forget()  # what rows hold is no longer told by what they were given
    token = torch.tensor([prompt[-1:]], device=device)
    input_pos = torch.tensor([[len(prompt) - 1]], device=device)
    first_row = torch.zeros(1, dtype=torch.long, device=device)
    ranked = rank(sampler, logits, token, input_pos, torch.zeros(1, device=device), width, first_row)

    texts: list[list[int]] = [[] for _ in range(N)]  # the new tokens of the beam in each row; the first is in row 0
    shared = torch.zeros(N, N, dtype=torch.long)  # how many positions of the cache two rows have in common
    finished: list[Hypothesis] = []  # at most N, best first
    for length in range(1, longest + 1):
        running: list[Candidate] = []
        for rank_of_all, (score, row, token_id) in enumerate(in_order(ranked)):
            ends = token_id in request.eos_ids
            if not ends and length < longest:
                running.append((score, row, token_id))
                if len(running) == N:
                    break
            elif rank_of_all < N and score > -math.inf:
                reason = "stop" if ends else "length"
                finished.append(Hypothesis([*texts[row], token_id], score / length**beams.length_penalty, reason))
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:N]
        if not running or is_done(beams, running[0][0], finished, length, longest):
            break

        by_row = assign_rows(running)
        scores = [score for score, _, _ in by_row]
        sources = [source for _, source, _ in by_row]
        tokens = [token_id for _, _, token_id in by_row]
        end = len(prompt) + length - 1  # the first position that is not in the cache yet
        for row, source in enumerate(sources):
            if row != source:
                copy_row(engine, source, row, int(shared[source, row]), end)
        texts = [[*texts[source], token_id] for source, token_id in zip(sources, tokens, strict=True)]
        source = torch.tensor(sources)
        shared = torch.where(source[:, None] == source, end, shared[source][:, source])

        token = torch.tensor(tokens, device=device)[:, None]
        input_pos = torch.full_like(token, end)
        key_pos = engine.begin_step(end + 1)
        ranked = step(model, sampler, token, input_pos, key_pos, torch.tensor(scores, device=device), width)
    if not finished:
        raise UserError("the model has no next token: all are banned; ban fewer")
    return finished[: beams.num_return_sequences]


def in_order(ranked: tuple[Tensor, Tensor]) -> list[Candidate]:
    """All candidates of what `rank` returned, best first."""
    candidates: list[Candidate] = []
    for row, (scores, tokens) in enumerate(zip(ranked[0].tolist(), ranked[1].tolist(), strict=True)):
        if math.isnan(scores[0]):  # topk puts NaN first
            raise UserError("the model has no next token: its logits are not numbers; the checkpoint may be damaged")
        candidates += [(score, row, token_id) for score, token_id in zip(scores, tokens, strict=True)]
    return sorted(candidates, key=lambda candidate: -candidate[0])


def assign_rows(running: list[Candidate]) -> list[Candidate]:
    """The candidates that go on, as many as there are rows, each at the index of the row that it gets: the first one of
    a beam stays in its row, each further one takes the row of a beam that was given up."""
    given_up = set(range(len(running))) - {source for _, source, _ in running}
    by_row: dict[int, Candidate] = {}
    for candidate in running:
        source = candidate[1]
        by_row[given_up.pop() if source in by_row else source] = candidate
    return [by_row[row] for row in range(len(running))]


def is_done(beams: BeamParams, best: float, finished: list[Hypothesis], length: int, longest: int) -> bool:
    """Whether to stop although beams could go on; `length` is theirs, `best` the highest log-probability of one."""
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
    """Runs the last token of every beam, [B, 1], at its position [B, 1] -> what `rank` says of the tokens after it."""
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
    """The `width` best tokens after each beam, by its logits [B, 1, V] and the beams' log-probabilities [B].

    Returns the log-probabilities of the beams with these tokens, float32 [B, width], best first, and the ids. `rows` as
    in Sampler.
    """
    logprobs = logits.float().log_softmax(-1)
    if not sampler.plain:
        logprobs = sampler.penalize(logprobs, token, input_pos, rows)
    values, ids = (scores[:, None] + logprobs[:, 0]).topk(width)
    return values, ids


def copy_row(engine: Engine, source: int, row: int, begin: int, end: int) -> None:
    """Copies a beam to another row: positions begin:end of the caches, and its text in the sampler."""
    engine.copy_row(source, row, begin, end)
    if not engine.sampler.plain:
        engine.sampler.history[row] = engine.sampler.history[source]
        engine.sampler.counts[row] = engine.sampler.counts[source]
