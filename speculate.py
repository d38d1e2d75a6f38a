"""Speculative decoding: several tokens a step, proposed cheaply and verified by the model all at once.

    python generate.py --compile --checkpoint_path P --draft_checkpoint_path SMALL --speculate_k 5 --prompt "..."
    python generate.py --compile --checkpoint_path P --prompt_lookup --prompt "..."                      # or both

Proposals come from a smaller model with the same tokenizer, or from the text itself: what followed the last time that
its end occurred (prompt lookup). Of both, the text goes first where its last NGRAM tokens have occurred. The model's
logits after each proposal are sampled as always, with the noise that belongs to that position. A proposal is accepted
if it is the token drawn; the first that is not ends the step, and the drawn one takes its place. So the output is that
of plain decoding, greedy or sampled, whatever the filters and penalties are. The draft samples with the same noise,
which is what makes it agree often: coupled sampling, https://arxiv.org/abs/2408.07978. All of it is one compiled
function; the host reads a step's tokens at its end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from sampling import Sampler, logprobs, possible

AUTO = {"draft": (0, 2, 4), "lookup": (0, 3, 7)}  # what --speculate_k auto chooses from, step by step
NGRAM = 3  # tokens at the end of the text that prompt lookup looks for, at most
CAUGHT_UP = 16  # tokens that `catch_up` runs through the draft


def decode_step(
    model: Transformer,
    draft: Transformer | None,
    sampler: Sampler,
    key_pos: Tensor,
    k: int,
    lookup: bool,
    top: int | None,
) -> tuple[Tensor, ...]:
    """Moves every row on by 1 to k + 1 tokens -> int64 [B, k + 3]: how many of the proposals were right, how many
    tokens are new, and these; with `top` their log-probabilities as well (see sampling.logprobs).

    Prompt lookup alone scores its first proposal also where none is asked for (k = 0): that tells when to start again.
    """
    end = sampler.max_seq_length  # the spare slot: rows that reach it stay there
    position = sampler.position[:, None]
    tokens = sampler.history.gather(1, position)
    proposed = run_draft(draft, sampler, k, model.config.vocab_size) if draft is not None and k else None
    if lookup and (count := scored(k, draft, lookup)):
        found, alike = look_up(sampler.history, position, count)
        # The draft is asked where the text does not repeat itself.
        proposed = found if proposed is None else torch.where(alike == NGRAM, found, proposed)
    if proposed is not None and draft is not None and model.vocabulary is not None and draft.vocabulary is None:
        proposed = model.vocabulary.broadcast(proposed)  # each rank has a draft of its own
    if k:
        tokens = torch.cat((tokens, proposed), 1)
    at = (position + torch.arange(k + 1, device=position.device)).clamp(max=end)
    sampler.history.scatter_(1, at, tokens)
    hidden = model.hidden(tokens, at, key_pos)
    if sampler.plain and top is None:
        drawn = possible(*model.max_logit(hidden))
    else:
        logits = model.logits(hidden)
        drawn = sampler(logits, tokens, at)
    right = torch.zeros_like(position[:, 0])
    if proposed is not None:
        right = (drawn[:, : proposed.shape[1]] == proposed).cumprod(1).sum(1)
    new = right.clamp(max=k) + 1
    sampler.count(drawn, new)
    sampler.history.scatter_(1, (at + 1).clamp(max=end), drawn.clamp(min=0))
    sampler.position.copy_((sampler.position + new).clamp(max=end))
    result = torch.cat((right[:, None], new[:, None], drawn), 1)
    return (result,) if top is None else (result, *logprobs(logits, drawn.clamp(min=0), top))


def scored(k: int, draft: Transformer | None, lookup: bool) -> int:
    """Of how many proposals a step with k of them tells whether they are right."""
    return max(k, 1) if lookup and draft is None else k


def run_draft(draft: Transformer, sampler: Sampler, k: int, vocab_size: int) -> Tensor:
    """The next k tokens by the draft model, [B, k]."""
    # It has not seen the last token, and where all its proposals were accepted not the one before it either.
    at = (sampler.position[:, None] + torch.arange(-1, 1, device=sampler.position.device)).clamp(min=0)
    tokens, proposed = sampler.history.gather(1, at), []
    for _ in range(k):
        # Models of a family pad their vocabularies differently.
        logits = draft(tokens.clamp(max=draft.config.vocab_size - 1), at)[:, -1:]
        logits = F.pad(logits, (0, vocab_size - logits.shape[-1]), value=-torch.inf)
        tokens = sampler(logits, tokens[:, -1:], at[:, -1:]).clamp(min=0)
        at = (at[:, -1:] + 1).clamp(max=sampler.max_seq_length)
        proposed.append(tokens)
    return torch.cat(proposed, 1)


def look_up(history: Tensor, position: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where was the text, history [B, T], last like its end, at [B, 1]? -> the tokens that followed there, [B, k], and
    how many were alike, [B, 1].

    Prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding. Alike are as many of the last NGRAM
    tokens as can be had. Where too few follow, it is taken that what is between there and the end repeats.
    """
    places = torch.arange(history.shape[1], device=history.device)
    alike = (places < position).long()  # 1 + how many of the last tokens are those that end at this place
    for back in range(NGRAM):
        last = history.gather(1, (position - back).clamp(min=0))
        same = (history.roll(back, 1) == last) & (places >= back) & (places < position)
        alike = alike + (same & (alike == back + 1))
    place = (alike * history.shape[1] + places).argmax(1, keepdim=True)
    ahead = torch.arange(k, device=history.device) % (position - place).clamp(min=1)
    tokens = history.gather(1, (place + 1 + ahead).clamp(max=history.shape[1] - 1))
    return tokens, alike.gather(1, place) - 1


def catch_up(draft: Transformer, sampler: Sampler) -> None:
    """Runs the last tokens of every row through the draft, which has not seen them while it was not asked."""
    at = sampler.position[:, None] + torch.arange(1 - CAUGHT_UP, 1, device=sampler.position.device)
    tokens = sampler.history.gather(1, at.clamp(min=0)).clamp(max=draft.config.vocab_size - 1)
    draft.hidden(tokens, at.clamp(min=0))


class Pace:
    """How many tokens to propose a step: what promises the most tokens a second, from what was seen so far."""

    MEMORY = 0.95  # a step's weight in the acceptance rate after the next one

    def __init__(self, choices: tuple[int, ...]):
        self.choices = choices
        self.seconds: dict[int, float] = {}  # a step takes, by the number of tokens proposed
        self.tried, self.right = 3.0, 2.0  # a first guess that few steps overrule

    def choose(self) -> int:
        """The number for the next step. Each is tried once."""
        unknown = [k for k in self.choices if k not in self.seconds]
        return unknown[0] if unknown else max(self.choices, key=lambda k: self.expected_tokens(k) / self.seconds[k])

    def expected_tokens(self, k: int) -> float:
        """Of a step: https://arxiv.org/abs/2211.17192, equation 1."""
        rate = min(self.right / self.tried, 0.999)
        return (1 - rate ** (k + 1)) / (1 - rate)

    def saw(self, k: int, seconds: float, right: list[int], scored: int) -> None:
        """A step that proposed k tokens took so long; of the `scored` ones the first so many of each row were right."""
        known = self.seconds.get(k, seconds)
        self.seconds[k] = known + 0.1 * (min(seconds, 2 * known) - known)  # what else the machine did is no news
        if scored and right:
            share = 1 / len(right)
            self.tried = self.tried * self.MEMORY + share * sum(min(n + 1, scored) for n in right)
            self.right = self.right * self.MEMORY + share * sum(right)
        elif not scored:  # a draft that was not asked: by and by it gets another chance
            self.tried, self.right = self.tried * 0.98 + 0.02 * 3, self.right * 0.98 + 0.02 * 2
