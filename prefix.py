"""What the rows of the caches hold, and which row suits a prompt.

    places = Places(models, rows=8)
    row, source, shared = places.choose(prompt, free=[0, 3, 4])   # row `source` holds the prompt's first tokens
    places[row].tokens                                            # whose keys and values the row holds

A row keeps what it has read and written after its text has ended. The next prompt that begins in the same way, as the
next turn of a conversation does, goes on from there, and a row whose text another one goes on with is a source to copy
from. What a row holds is told by its tokens alone: a prompt is compared with them, so nothing that has been written
beyond them, by steps that a text ended before or by a prefill that was interrupted, is ever taken for part of a text.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from config import RopeConfig
from model import Transformer
from speculate import CATCH_UP

if TYPE_CHECKING:
    from engine import Request

# A shorter prefix is not worth it. All prompts begin with a bos token or the same tokens of a chat template, a prefill
# of so few more takes the same time, and it rounds as that of the same prompt anywhere else does.
LEAST_SHARED = 8


def compared(request: "Request") -> list[int]:
    """A prompt as others are compared with it: in the places of an image's tokens a number, below 0, of that image."""
    tokens = list(request.prompt) if request.images else request.prompt
    for image in request.images:
        tokens[image.start : image.start + image.count] = [image.key] * image.count
    return tokens


@dataclass
class Place:
    """What a row of the caches holds."""

    tokens: list[int] = field(default_factory=list)  # whose keys and values it holds, from position 0 on: see compared
    drafted: int = 0  # during a prefill: how many of them the draft has seen
    # No position from here on has ever been written. Steps write some beyond the tokens, and in a ring each takes the
    # slot of an earlier one.
    written: int = 0
    prompt_length: int = 0  # that the keys were rotated for
    adapter: str = ""  # the identity of the adapter that they were computed with
    used: int = 0  # when the row was last given to a request, or set free: the number of that event


class Places:
    """What all rows hold."""

    def __init__(self, models: Sequence[Transformer], rows: int):
        """`models`: the target and maybe its draft, with caches of so many rows."""
        self._places = [Place() for _ in range(rows)]
        self._events = 0
        self._ropes = [rope for model in models if model.config.rotary_dim for rope in model.config.ropes]
        # Of each kind of ring the window, the slots, and how far before the shared tokens the model goes on: steps that
        # asked for no proposals have left a draft behind.
        self._rings = {
            (layer.attention.window, layer.attention.kv_cache.slot_count, CATCH_UP * is_draft)
            for is_draft, model in enumerate(models)
            for layer in model.layers
            if layer.attention.kv_cache.is_ring
        }

    def __getitem__(self, row: int) -> Place:
        return self._places[row]

    @property
    def latest(self) -> int:
        """The row that was used last."""
        return max(range(len(self._places)), key=lambda row: self._places[row].used)

    def touch(self, row: int) -> None:
        """The row is used now."""
        self._events += 1
        self._places[row].used = self._events

    def choose(self, prompt: list[int], free: Sequence[int], adapter: str = "") -> tuple[int, int, int]:
        """Which of the free rows a prompt goes to, which row holds the longest prefix of it, and how many tokens.

        It goes where it continues all that a row holds, otherwise to an empty row, so that nothing is lost; where there
        is none to a row of which it shares at least half, which is the same conversation, changed, or to the one that
        was not used for the longest time.
        """
        shared = [self.usable(place, prompt) if place.adapter == adapter else 0 for place in self._places]

        def suits(row: int) -> tuple[int, int, int]:
            place, kept = self._places[row], shared[row]
            if kept and kept == len(place.tokens):
                return 3, kept, -place.used
            if not place.tokens:
                return 2, 0, -place.used
            return (1, kept, -place.used) if 2 * kept >= len(place.tokens) else (0, 0, -place.used)

        row = max(free, key=suits)
        source = max(range(len(shared)), key=lambda i: (shared[i], i == row))
        return row, source, shared[source]

    def usable(self, place: Place, prompt: list[int]) -> int:
        """How many of the prompt's tokens need not be run where a row holds what this one does. Never all of them: what
        follows is drawn from what the model says of the last one."""
        most = min(len(place.tokens), len(prompt) - 1)
        shared = bisect_left(range(most), True, key=lambda i: place.tokens[: i + 1] != prompt[: i + 1])
        for rope in self._ropes:
            shared = min(shared, rotated_alike(rope, place.prompt_length, len(prompt), shared))
        for window, slots, back in self._rings:
            if place.written > max(shared - back - window + 1, 0) + slots:  # what the first token would see is lost
                return 0
        return shared if shared >= LEAST_SHARED or shared == len(prompt) - 1 else 0


def rotated_alike(rope: RopeConfig, held: int, wanted: int, count: int) -> int:
    """How many of the first `count` keys of a text, whose prompt had `held` tokens, are those of the same text with a
    prompt of `wanted` tokens. Some kinds of RoPE turn by the length of the text: see attention.rope_angles."""
    if rope.type not in ("dynamic", "longrope"):
        return count
    if max(held, wanted) <= rope.original_length:
        return min(count, rope.original_length)  # what was generated beyond turns otherwise
    return count if rope.type == "longrope" and min(held, wanted) > rope.original_length else 0
