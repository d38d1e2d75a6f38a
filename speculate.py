"""Speculative decoding: several tokens a step, proposed cheaply and verified by the model all at once.

    python generate.py --compile --checkpoint_path P --draft_checkpoint_path SMALL --speculate_k 5 --prompt "..."
    python generate.py --compile --checkpoint_path P --prompt_lookup --prompt "..."                      # or both

Proposals come from a smaller model with the same tokenizer (the draft), or from the text itself: what followed where
its last tokens occurred before (prompt lookup). With both, the text goes first where its last NGRAM tokens have
occurred before. The model's logits after each proposal are sampled as always, with the random numbers that belong to
that position. A proposal is accepted if it is the token drawn; the first that is not ends the step, and the drawn one
takes its place. So the output is that of plain decoding, greedy or sampled, whatever the filters and penalties are. The
draft samples with the same random numbers, which is what makes it agree often: coupled sampling,
https://arxiv.org/abs/2408.07978. All of it is one compiled function; the host reads a step's tokens at its end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import first_rows, of_rows
from model import Transformer
from sampling import Sampler, logprobs, possible

AUTO = {"draft": (0, 2, 4), "lookup": (0, 3, 7)}  # what --speculate_k auto chooses from, step by step
NGRAM = 3  # tokens at the end of the text that prompt lookup compares, at most
# Tokens that a draft has not seen before a step: the last one, and the one before it if all proposals were accepted.
DRAFT_LAG = 2
CATCH_UP = 16  # tokens that `catch_up` runs through the draft: as many queries as the decode kernels take


def decode_step(
    model: Transformer,
    draft: Transformer | None,
    sampler: Sampler,
    key_pos: Tensor,
    k: int,
    lookup: bool,
    top: int | None,
    rows: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Moves rows on by 1 to k + 1 tokens each -> int64 [B, k + 3]: how many of the k proposals were right, how many
    tokens are new, and the tokens; with `top` their log-probabilities as well (see sampling.logprobs).

    `rows` int64 [B] are those of the caches and the sampler, by default all. One that is parked changes nothing. Where
    steps propose nothing (k = 0), prompt lookup still scores a proposal: that tells when it would pay again.
    """
    end = sampler.max_seq_length  # the spare slot: rows that reach it stay there
    history, position = of_rows(sampler.history, rows), of_rows(sampler.position, rows)[:, None]
    tokens = history.gather(1, position)
    proposed = None
    if draft is not None and k:
        proposed = run_draft(draft, sampler, k, model.config.vocab_size, rows)
    count = scored(k, draft, lookup)
    if lookup and count:
        found, alike = look_up(history, position, count)
        # The draft proposes where the text does not repeat itself.
        proposed = found if proposed is None else torch.where(alike == NGRAM, found, proposed)
    if proposed is not None and draft is not None and model.vocabulary is not None and draft.vocabulary is None:
        proposed = model.vocabulary.broadcast(proposed)  # each rank has a draft of its own
    if k:
        tokens = torch.cat((tokens, proposed), 1)
    at = (position + torch.arange(k + 1, device=position.device)).clamp(max=end)
    written = first_rows(position) if rows is None else rows  # the rows of the buffers
    sampler.history[written[:, None], at] = tokens
    hidden = model.hidden(tokens, at, key_pos, rows=rows)
    if sampler.plain and top is None:
        drawn = possible(*model.max_logit(hidden))
    else:
        logits = model.logits(hidden)
        drawn = sampler(logits, tokens, at, rows)
    right = torch.zeros_like(position[:, 0])
    if proposed is not None:
        right = (drawn[:, : proposed.shape[1]] == proposed).cumprod(1).sum(1)
    new = right.clamp(max=k) + 1
    sampler.count(drawn, new, rows)
    sampler.history[written[:, None], (at + 1).clamp(max=end)] = drawn.clamp(min=0)
    sampler.position[written] = (position[:, 0] + new).clamp(max=end)
    result = torch.cat((right[:, None], new[:, None], drawn), 1)
    return (result,) if top is None else (result, *logprobs(logits, drawn.clamp(min=0), top))


def scored(k: int, draft: Transformer | None, lookup: bool) -> int:
    """How many proposals are compared with what the model draws, in a step with k of them."""
    return max(k, 1) if lookup and draft is None else k


def run_draft(draft: Transformer, sampler: Sampler, k: int, vocab_size: int, rows: Tensor | None) -> Tensor:
    """The next k tokens by the draft model, [B, k]. `vocab_size` is the target's."""
    tokens, at = last_tokens(sampler, DRAFT_LAG, rows)
    proposed = []
    for _ in range(k):
        logits = draft.logits(draft.hidden(in_vocabulary(draft, tokens), at, rows=rows)[:, -1:])
        logits = F.pad(logits, (0, vocab_size - logits.shape[-1]), value=-torch.inf)
        tokens = sampler(logits, tokens[:, -1:], at[:, -1:], rows).clamp(min=0)
        at = (at[:, -1:] + 1).clamp(max=sampler.max_seq_length)
        proposed.append(tokens)
    return torch.cat(proposed, 1)


def last_tokens(sampler: Sampler, count: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The last tokens of rows, [B, count], and their positions; position 0 again where a text has fewer, and the
    padding position where a row is parked."""
    position = of_rows(sampler.position, rows)[:, None]
    back = torch.arange(1 - count, 1, device=position.device)
    at = torch.where(position == sampler.max_seq_length, position, (position + back).clamp(min=0))
    return of_rows(sampler.history, rows).gather(1, at), at


def in_vocabulary(draft: Transformer, tokens: Tensor) -> Tensor:
    """The target's tokens as input of the draft. Models of a family pad their vocabularies to different sizes; an id
    that the draft lacks becomes its last one."""
    return tokens.clamp(max=draft.config.vocab_size - 1)


def look_up(history: Tensor, position: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds the last n-gram of a text, history [B, T] up to position [B, 1], earlier in the same text -> the k tokens
    that followed there, [B, k], and the length of the n-gram, [B, 1].

    Prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding. The longest n-gram of at most NGRAM
    tokens counts, and of its occurrences the last. Where fewer than k tokens follow up to the end of the text, they are
    repeated.
    """
    ends = torch.arange(history.shape[1], device=history.device)  # where an occurrence may end
    matched = (ends < position).long()  # 1 + the length of the n-gram that ends there; 0 at the text's own end
    for back in range(NGRAM):
        last = history.gather(1, (position - back).clamp(min=0))
        same = (history.roll(back, 1) == last) & (ends >= back) & (ends < position)
        matched = matched + (same & (matched == back + 1))
    end = (matched * history.shape[1] + ends).argmax(1, keepdim=True)
    ahead = torch.arange(k, device=history.device) % (position - end).clamp(min=1)
    tokens = history.gather(1, (end + 1 + ahead).clamp(max=history.shape[1] - 1))
    return tokens, matched.gather(1, end) - 1


def catch_up(draft: Transformer, sampler: Sampler, rows: Tensor | None = None) -> None:
    """Runs the last CATCH_UP tokens of rows through the draft: steps without proposals have left it behind."""
    tokens, at = last_tokens(sampler, CATCH_UP, rows)
    draft.hidden(in_vocabulary(draft, tokens), at, rows=rows)


class Pace:
    """Chooses how many tokens to propose a step: what promises the most tokens a second, by what was seen so far."""

    FIRST_TRIED, FIRST_RIGHT = 3.0, 2.0  # a first guess of the acceptance rate, which few steps overrule
    MEMORY = 0.95  # the weight of a step in the acceptance rate falls by this factor with every step after it
    RETURN = 0.02  # without proposals the rate goes back to the first guess by so much a step
    NEW_SECONDS = 0.1  # the weight of a step's time in the average

    def __init__(self, choices: tuple[int, ...]):
        self.choices = choices
        self.seconds: dict[tuple[int, int], float] = {}  # that a step takes, by its rows and the number of proposals
        self.tried, self.right = self.FIRST_TRIED, self.FIRST_RIGHT

    def choose(self, rows: int = 1) -> int:
        """The number for the next step, of so many rows. Each is tried once."""
        for k in self.choices:
            if (rows, k) not in self.seconds:
                return k
        return max(self.choices, key=lambda k: self.expected_tokens(k) / self.seconds[rows, k])

    def expected_tokens(self, k: int) -> float:
        """Of a step: https://arxiv.org/abs/2211.17192, equation 1."""
        rate = min(self.right / self.tried, 0.999)
        return (1 - rate ** (k + 1)) / (1 - rate)

    def saw(self, k: int, seconds: float, right: list[int], scored: int, rows: int = 1) -> None:
        """A step of so many rows that proposed k tokens took `seconds`; of its `scored` proposals the first right[i] of
        row i were right."""
        known = self.seconds.get((rows, k), seconds)
        capped = min(seconds, 2 * known)  # other work on the machine may slow a step, which says nothing about it
        self.seconds[rows, k] = known + self.NEW_SECONDS * (capped - known)
        if scored and right:
            share = 1 / len(right)
            self.tried = self.tried * self.MEMORY + share * sum(min(n + 1, scored) for n in right)
            self.right = self.right * self.MEMORY + share * sum(right)
        elif not scored:  # so that a draft that was given up gets another chance
            self.tried += self.RETURN * (self.FIRST_TRIED - self.tried)
            self.right += self.RETURN * (self.FIRST_RIGHT - self.right)
