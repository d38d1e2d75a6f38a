"""From logits to the next token: grammars, bias, penalties, banned words, temperature, top-k, top-p, min-p, greedy.

    sampler = Sampler(batch_size, vocab_size, max_seq_length, eos_ids, device)
    sampler.set_row(0, SamplingParams(temperature=0.8, top_p=0.95, seed=1), prompt)
    token = sampler(logits, tokens, input_pos)               # [B, S, V], [B, S], [B, S] -> [B, S]

Everything runs inside the compiled decode step. What a row wants is in buffers at fixed addresses, so a batch may mix
any settings and changing one never recompiles. The random number of a token is a hash of the row's seed, the position
and its id: the same seed gives the same text, whatever else is in the batch, and two models that draw with the same
numbers agree as often as their distributions let them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels  # noqa: F401  defines torch.ops.brisk
from attention import first_rows, of_rows
from errors import UserError

# The columns of Sampler.settings (float32) and Sampler.integers (int32).
SETTINGS = ("temperature", "top_k", "top_p", "max_distance", "repetition", "presence", "frequency")
INTEGERS = ("seed_low", "seed_high", "first_end")  # first_end: the first position where an end token may be
# Biases and penalties are applied in float32, whose largest number is 3.4e38. With these bounds no product or quotient
# of the two overflows, which would look like logits of a broken checkpoint. (OpenAI's -100 to 100 for a bias is too
# narrow: logits of some models lie further apart.)
MAX_BIAS = 1e30
MAX_REPETITION_PENALTY = 1e6


@dataclass(frozen=True)
class SamplingParams:
    """How one row is sampled. The settings apply in the order of transformers: logit_bias, penalties, min_new_tokens,
    bad_words, temperature, top_k, top_p, min_p."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this likely relative to the most likely one
    repetition_penalty: float = 1.0  # divides the logits of tokens in the prompt or the output; below 0, multiplies
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens in the output
    frequency_penalty: float = 0.0  # subtracted once for each time that they are in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, the number added to its logit)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that are never completed
    min_new_tokens: int = 0  # no end token before so many other tokens
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature} is out of range; it must be finite and 0 (greedy) or more")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k {self.top_k} is out of range; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is out of range; it must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p} is out of range; it must be between 0 (off) and 1")
        if not 1 / MAX_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise UserError(
                f"repetition_penalty {self.repetition_penalty} is out of range; it must be between "
                f"{1 / MAX_REPETITION_PENALTY:g} and {MAX_REPETITION_PENALTY:g} (1 is off)"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name} {getattr(self, name)} is out of range; it must be between -2 and 2 (0 is off)")
        for token, bias in self.logit_bias:
            if token < 0 or not abs(bias) <= MAX_BIAS:
                raise UserError(
                    f"logit_bias {token}: {bias} is out of range; it must be a token id and a number between "
                    f"{-MAX_BIAS:g} and {MAX_BIAS:g}"
                )
        for word in self.bad_words:
            if not word or min(word) < 0:
                raise UserError(f"bad_words {word} is out of range; it must be one or more token ids")
        if not 0 <= self.min_new_tokens < 2**31:
            raise UserError(f"min_new_tokens {self.min_new_tokens} is out of range; it must be 0 (off) or more")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} is out of range; it must be between 0 and 2^63 - 1")

    @property
    def plain(self) -> bool:
        """Greedy and nothing else: the token is the argmax of the logits as they are."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
        return not (self.temperature or penalties or self.logit_bias or self.bad_words or self.min_new_tokens)

    def check(self, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """UserError for what no row of this model can do: ids beyond its vocabulary, a ban of all tokens."""
        for name, ids in (
            ("logit_bias", [token for token, _ in self.logit_bias]),
            ("bad_words", [token for word in self.bad_words for token in word]),
        ):
            unknown = [token for token in ids if token >= vocab_size]
            if unknown:
                raise UserError(f"{name}: there is no token {unknown[0]}; the model's ids end at {vocab_size - 1}")
        banned = {word[0] for word in self.bad_words if len(word) == 1} - set(eos_ids)
        if self.min_new_tokens:
            banned |= set(eos_ids)
        if len(banned) >= vocab_size:
            raise UserError("bad_words ban every token; leave one that may be produced")


class Sampler(nn.Module):
    """The settings and the text of every row of a batch, and the functions of the compiled step that sample by them."""

    def __init__(
        self,
        batch_size: int,
        vocab_size: int,
        max_seq_length: int,
        eos_ids: Iterable[int],
        device: torch.device | str,
        plain: bool = False,
        bad_words: tuple[int, int] = (0, 0),  # room for so many a row, of so many ids each
    ):
        super().__init__()
        self.plain = plain  # every row is: then the sampler is an argmax and has no buffers but the history
        self.eos_ids = frozenset(eos_ids)

        def buffer(name: str, *shape: int, dtype: torch.dtype, fill: int = 0) -> None:
            self.register_buffer(name, torch.full(shape, fill, dtype=dtype, device=device), persistent=False)

        # The token at each position; the last slot is for padding.
        buffer("history", batch_size, max_seq_length + 1, dtype=torch.int64)
        buffer("position", batch_size, dtype=torch.int64)  # of each row's last token
        self.max_seq_length = max_seq_length
        if plain:
            return
        buffer("counts", batch_size, vocab_size, dtype=torch.int32)  # how often a token is in the output
        buffer("prompted", batch_size, vocab_size, dtype=torch.bool)  # whether it is in the prompt
        buffer("bias", batch_size, vocab_size, dtype=torch.float32)
        buffer("settings", batch_size, len(SETTINGS), dtype=torch.float32)
        buffer("integers", batch_size, len(INTEGERS), dtype=torch.int32)
        buffer("words", batch_size, *bad_words, dtype=torch.int64, fill=-1)  # aligned to the right
        # The tokens that grammars allow: bit i % 32 of word i // 32 is token i's. The host writes it for every step.
        buffer("mask", batch_size, -(-vocab_size // 32), dtype=torch.int32, fill=-1)
        self.host_mask = self.mask
        if self.mask.is_cuda:
            self.host_mask = torch.full(self.mask.shape, -1, dtype=torch.int32, pin_memory=True)
        buffer("eos", vocab_size, dtype=torch.bool)
        self.eos[[token for token in self.eos_ids if token < vocab_size]] = True
        self.register_buffer("ids", torch.arange(vocab_size, dtype=torch.int32, device=device), persistent=False)
        for row in range(batch_size):
            self.set_row(row, SamplingParams(), [])

    @torch.no_grad()
    def set_row(self, row: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Gives a row to a new text. `prompt` is all of it before the first new token."""
        prompt = torch.tensor(prompt, dtype=torch.int64, device=self.history.device)
        self.history[row, : len(prompt)] = prompt
        if self.plain:
            if not params.plain:
                raise ValueError(f"{params} in a sampler of plain rows")
            return
        self.counts[row] = 0
        self.prompted[row] = False
        self.prompted[row, prompt] = True
        # float32 can't divide by less or more than this; it is greedy, or flat, long before.
        temperature = 0.0 if params.temperature < 1e-37 else min(params.temperature, 1e37)
        max_distance = math.inf  # of a logit that is kept, below the highest one
        if temperature == 0:
            max_distance = 0.0
        elif params.min_p:
            max_distance = -math.log(params.min_p)
        settings = {
            "temperature": temperature,
            "top_k": params.top_k or math.inf,
            "top_p": params.top_p if params.top_p < 1 else math.inf,
            "max_distance": max_distance,
            "repetition": params.repetition_penalty,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
        }
        integers = {
            "seed_low": (params.seed & 0xFFFFFFFF) - (params.seed & 0x80000000) * 2,  # as int32
            "seed_high": params.seed >> 32,
            "first_end": min(len(prompt) + params.min_new_tokens, 2**31 - 1),
        }
        self.settings[row] = torch.tensor([settings[name] for name in SETTINGS], dtype=torch.float32)
        self.integers[row] = torch.tensor([integers[name] for name in INTEGERS], dtype=torch.int32)
        self.bias[row] = 0
        if params.logit_bias:
            tokens, values = zip(*params.logit_bias, strict=True)
            values = torch.tensor(values, dtype=torch.float32, device=self.bias.device)
            self.bias[row, torch.tensor(tokens, device=self.bias.device)] = values
        # A ban of an end token by itself does nothing in transformers, and a text must be able to end.
        words = [word for word in params.bad_words if not (len(word) == 1 and word[0] in self.eos_ids)]
        room, longest = self.words.shape[1:]
        if len(words) > room or max(map(len, words), default=0) > longest:
            raise ValueError(
                f"{len(words)} bad words of up to {max(map(len, words))} ids; there is room for {room, longest}"
            )
        if room:
            padded = [[-1] * (longest - len(word)) + list(word) for word in words] + [[-1] * longest] * (
                room - len(words)
            )
            self.words[row] = torch.tensor(padded, dtype=torch.int64)

    @torch.no_grad()
    def set_mask(self, row: int, fill: Callable[[Tensor], None] | None) -> None:
        """What a row's next token may be: `fill` writes it, int32 [ceil(V / 32)] on the CPU; None is anything.

        What the row drew by its last mask has to have been read: on CUDA a copy of that may be under way until then.
        """
        if self.plain:
            if fill is not None:
                raise ValueError("a mask in a sampler of plain rows")
            return
        if fill is None:
            self.host_mask[row] = -1
        else:
            fill(self.host_mask[row])
        if self.host_mask is not self.mask:
            self.mask[row].copy_(self.host_mask[row], non_blocking=True)

    @torch.no_grad()
    def begin(self, row: int, token: Tensor, position: int) -> None:
        """Appends a row's first new token, int64 [1, 1], to its prompt."""
        token, drawn = token[0].clamp(min=0), token[0] >= 0
        self.position[row] = position
        self.history[row, position] = token[0]
        if not self.plain:
            self.counts[row].scatter_add_(0, token, drawn.int())

    @torch.no_grad()
    def park(self, row: int | slice) -> None:
        """Moves a row whose text has ended to the padding position, where steps change nothing that counts."""
        self.position[row] = self.max_seq_length

    def forward(self, logits: Tensor, tokens: Tensor, input_pos: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] after the inputs [B, S] at their positions [B, S] -> the tokens that follow, int64 [B, S].

        -1 where no token is possible. Inputs after the first are proposals: in the history, but not counted yet.
        `rows` int64 [B] are the rows of the sampler that the logits belong to, by default all.
        """
        if self.plain:
            return possible(*logits.max(-1))
        filtered = self.filtered(self.penalize(logits, tokens, input_pos, rows), rows)
        # An exponential race, as in the Gumbel-max trick: of exponential times with the rates p, the one of token i is
        # the smallest with probability p[i].
        greedy = self._setting("temperature", rows) == 0
        times = torch.where(greedy[..., None], 1.0, self.times(input_pos + 1, rows))
        best, token = (filtered.exp() / times).max(-1)
        return torch.where(best > 0, token, -1)

    def penalize(self, scores: Tensor, tokens: Tensor, input_pos: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] -> float32, after everything that depends on the text: transformers' logits processors."""
        repetition = self._setting("repetition", rows)[..., None]
        presence = self._setting("presence", rows)[..., None]
        frequency = self._setting("frequency", rows)[..., None]
        counts = self._select("counts", rows)[:, None]
        for i in range(1, tokens.shape[1]):
            later = torch.arange(tokens.shape[1], device=tokens.device)[:, None] >= i
            counts = counts + ((tokens[:, i, None, None] == self.ids) & later)
        allowed = unpacked(self._select("mask", rows))[:, None, : scores.shape[-1]]
        scores = torch.where(allowed, scores.float() + self._select("bias", rows)[:, None], -math.inf)
        seen = self._select("prompted", rows)[:, None] | (counts > 0)
        scores = torch.where(seen, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
        scores = scores - torch.where(counts > 0, presence, 0.0) - frequency * counts
        early = input_pos + 1 < self._setting("first_end", rows)
        scores = torch.where(early[..., None] & self.eos, -math.inf, scores)
        if self.words.shape[1] == 0:
            return scores
        words = self._select("words", rows)[:, None]  # [B, 1, W, L]
        before = input_pos[..., None] - torch.arange(words.shape[-1] - 2, -1, -1, device=tokens.device)
        text = self._select("history", rows).gather(1, before.clamp(min=0).flatten(1)).view(before.shape)
        text = torch.where(before < 0, -2, text)[:, :, None]
        completes = ((words[..., :-1] == text) | (words[..., :-1] < 0)).all(-1) & (words[..., -1] >= 0)  # [B, S, W]
        last = words[..., -1].clamp(min=0).expand(completes.shape)
        return scores.scatter_add(-1, last, torch.where(completes, -math.inf, 0.0))

    def filtered(self, scores: Tensor, rows: Tensor | None = None) -> Tensor:
        """Penalized scores [B, S, V] -> the logits that tokens are drawn from: 0 at most, -inf where a filter cuts."""
        temperature = self._setting("temperature", rows)[..., None]
        top_k = self._setting("top_k", rows)[..., None]
        top_p = self._setting("top_p", rows)[..., None]
        max_distance = self._setting("max_distance", rows)[..., None]
        # As distances from the highest, a tiny temperature does not overflow.
        distance = (scores.amax(-1, keepdim=True) - scores) / torch.where(temperature > 0, temperature, 1.0)
        cut = torch.ops.brisk.reach(distance, None, top_k.expand(*distance.shape[:-1], 1))
        likely = torch.where(distance <= cut, (-distance).exp(), 0.0)
        cut = torch.minimum(cut, torch.ops.brisk.reach(distance, likely, top_p * likely.sum(-1, keepdim=True)))
        return torch.where(distance <= torch.minimum(cut, max_distance), -distance, -math.inf)

    def times(self, position: Tensor, rows: Tensor | None = None) -> Tensor:
        """Exponentially distributed numbers for all tokens at the positions [B, S], float32 [B, S, V]."""
        low, high = self._setting("seed_low", rows), self._setting("seed_high", rows)
        key = _mix(_mix(_mix(low) ^ high) ^ position.int())[..., None]
        bits = _mix(self.ids ^ key, _mix(key ^ 0x5BD1E995))
        # The smallest numbers win, so these must be fine: 31 bits near 0. Near 1, float32 must not round to 1.
        uniform = (((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
        return -torch.log1p(-uniform)

    def count(self, tokens: Tensor, n: Tensor, rows: Tensor | None = None) -> None:
        """Adds the first n [B] of the tokens [B, S] to the output of these rows; a token of -1 is none."""
        if not self.plain:
            those = (torch.arange(tokens.shape[1], device=tokens.device) < n[:, None]) & (tokens >= 0)
            rows = first_rows(tokens) if rows is None else rows
            self.counts.index_put_((rows[:, None], tokens.clamp(min=0)), those.int(), accumulate=True)

    def _select(self, name: str, rows: Tensor | None) -> Tensor:
        return of_rows(getattr(self, name), rows)

    def _setting(self, name: str, rows: Tensor | None) -> Tensor:
        """One setting of all rows, [B, 1]."""
        buffer, names = ("settings", SETTINGS) if name in SETTINGS else ("integers", INTEGERS)
        column = names.index(name)
        return self._select(buffer, rows)[:, column : column + 1]


def unpacked(mask: Tensor) -> Tensor:
    """int32 [..., N] -> bool [..., 32 N], the lowest bit of a word first."""
    return ((mask[..., None] >> torch.arange(32, dtype=torch.int32, device=mask.device)) & 1).flatten(-2).bool()


def possible(best: Tensor, token: Tensor) -> Tensor:
    """The token of the largest logit; -1 where that is NaN, or -inf like all others."""
    return torch.where(best.isfinite(), token, -1)


def logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, S, V] -> log-probabilities of the tokens [B, S], and of the k most likely ones (of all V if k is more)
    their log-probabilities and ids, [B, S, min(k, V)]. All are finite: that of an impossible token is -3.4e38."""
    logits = logits.float().clamp(min=torch.finfo(torch.float32).min)
    total = logits.logsumexp(-1, keepdim=True)
    top, ids = largest(logits, k)
    return (logits.gather(-1, tokens[..., None]) - total)[..., 0], top - total, ids


def largest(x: Tensor, k: int, block: int = 256) -> tuple[Tensor, Tensor]:
    """The k largest of x [B, S, V] (all V if k is more) and their indices, [B, S, min(k, V)], largest first.

    This is torch.topk, but only among the blocks with the largest maxima: of 150,000 numbers it takes a quarter of the
    time.
    """
    k = min(k, x.shape[-1])
    # No number of x may tie with the padding, which has no index.
    above = x.clamp(min=torch.finfo(x.dtype).min)
    blocks = F.pad(above, (0, -x.shape[-1] % block), value=-torch.inf).unflatten(-1, (-1, block))
    chosen = blocks.amax(-1).topk(min(k, blocks.shape[-2]), -1).indices  # of the blocks
    within = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, block)).flatten(-2).topk(k, -1).indices
    ids = chosen.gather(-1, within // block) * block + within % block
    return x.gather(-1, ids), ids


def _mix(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """A bijection of int32 in which every input bit reaches every output bit; the key makes it another one."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF) ^ key) * 0x1B873593
    return x ^ ((x >> 16) & 0xFFFF)
