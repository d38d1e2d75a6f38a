"""Tokens of the engine -> OpenAI's answers, as parts of a stream or whole.

answer = ChatAnswer(work, model)              # or CompletionAnswer
parts = answer.put(index, tokens)             # choices[] of the next chunk, once for each request and step
answer.chunk(parts)                           # {"object": "chat.completion.chunk", ...}
answer.whole()                                # all that was put: {"object": "chat.completion", ...}
"""

import functools
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from grammar import spelled
from scheduler import Token
from server.api import Model, Work
from server.toolcalls import Piece, delta, message
from tokenizer import Tokenizer


@dataclass
class Choice:
    """What has come of one request. `entries`: log-probabilities, in `pending` those that no part has had yet."""

    new_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    is_begun: bool = False  # a part has been made
    lead: str | None = None  # of a completion: what `left_out` says, until it has been written
    text: str = ""  # of a completion
    pieces: list[Piece] = field(default_factory=list)  # of a chat
    entries: list[dict[str, Any]] = field(default_factory=list)
    pending: list[dict[str, Any]] = field(default_factory=list)


class Answer:
    """What the answers of both endpoints have in common."""

    kind = chunk_kind = prefix = ""

    def __init__(self, work: Work, model: Model):
        self.work, self.model = work, model
        self.choices = [Choice() for _ in work.requests]
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.chunk_kind,
            "created": int(time.time()),
            "model": model.name,
        }

    def chunk(self, parts: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        """An event of a stream: these parts as its choices, and other fields."""
        return self.head | {"choices": parts} | others

    def whole(self) -> dict[str, Any]:
        """The answer that is no stream: all that was put."""
        choices = [self.choice(index, choice) for index, choice in enumerate(self.choices)]
        return self.head | {"object": self.kind, "choices": choices, "usage": self.usage()}

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """One of the choices of the whole answer."""
        raise NotImplementedError

    def count(self, choice: Choice, token: Token) -> None:
        """Adds a token to what `usage` says."""
        if not token.of_prompt and token.id >= 0 and not self.work.drops_text:
            choice.new_tokens += 1
        if token.stats is not None:
            choice.cached_tokens = token.stats.cached_tokens

    def usage(self) -> dict[str, Any]:
        """The tokens of all choices; a prompt that several of them have counts once."""
        requests = self.work.requests
        firsts = {id(request.prompt): i for i, request in reversed(list(enumerate(requests)))}.values()
        prompt = sum(len(requests[i].prompt) for i in firsts)
        new = sum(choice.new_tokens for choice in self.choices)
        cached = sum(self.choices[i].cached_tokens for i in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def has_entry(self, index: int, token: Token) -> bool:
        """Whether the answer has log-probabilities of this token. End tokens, which are no text, have none."""
        return self.work.logprobs is not None and token.id >= 0 and token.id not in self.work.requests[index].eos_ids


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def put(self, index: int, tokens: list[Token]) -> list[dict[str, Any]]:
        """The choice's next parts, none where no text is certain yet. A choice may end before its request does, by the
        only tool call that it may have."""
        choice, reader = self.choices[index], self.work.readers[index]
        pieces: list[Piece] = []
        for token in tokens:
            self.count(choice, token)
            if self.has_entry(index, token):
                choice.pending.append(self.entry(token, is_first=choice.new_tokens == 1))
            pieces += reader.put(token.text)
            choice.finish_reason = token.finish_reason
            if token.finish_reason or reader.finished:
                pieces += reader.finish()
                if reader.complete and token.finish_reason != "length":
                    choice.finish_reason = "tool_calls"
                break
        choice.pieces += pieces
        deltas = [part for part in map(delta, pieces) if part]
        if choice.finish_reason == "stop" and not deltas and token.id not in self.work.requests[index].eos_ids:
            choice.pending = []  # tokens of a stop string
        if not choice.is_begun and (deltas or choice.finish_reason):
            choice.is_begun = True
            first = deltas.pop(0) if deltas else {}
            deltas.insert(0, {"role": "assistant", "content": None if "tool_calls" in first else ""} | first)
        parts = [{"index": index, "delta": part, "logprobs": None, "finish_reason": None} for part in deltas]
        if choice.finish_reason:
            parts.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": choice.finish_reason})
        if choice.pending and parts:
            parts[max(len(deltas) - 1, 0)]["logprobs"] = {"content": choice.pending, "refusal": None}
            choice.entries += choice.pending
            choice.pending = []
        return parts

    def entry(self, token: Token, is_first: bool) -> dict[str, Any]:
        """The log-probabilities of a token and of the likeliest ones, as chats have them."""
        top = [self.named(*likely, is_first) for likely in token.top[: self.work.logprobs]]
        return self.named(token.id, token.logprob, is_first) | {"top_logprobs": top}

    def named(self, token_id: int, logprob: float, is_first: bool) -> dict[str, Any]:
        """A token's text, log-probability and bytes. `is_first`: the text begins with it."""
        spelling = spellings(self.model.tokenizer, token_id)[is_first]
        return {"token": spelling.decode(errors="replace"), "logprob": logprob, "bytes": list(spelling)}

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = None if self.work.logprobs is None else {"content": choice.entries, "refusal": None}
        said = message(choice.pieces) | {"refusal": None}
        return {"index": index, "message": said, "logprobs": logprobs, "finish_reason": choice.finish_reason}


class CompletionAnswer(Answer):
    """Of /v1/completions. What is said continues the prompt: a space that the detokenizer leaves out at the beginning
    of a text is kept."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, work: Work, model: Model):
        super().__init__(work, model)
        self.lengths = [0] * len(work.requests)  # of the tokens that have an entry

    def put(self, index: int, tokens: list[Token]) -> list[dict[str, Any]]:
        """The choice's next part, as a list; empty where no text is certain yet."""
        choice, request = self.choices[index], self.work.requests[index]
        text = ""
        for token in tokens:
            self.count(choice, token)
            if token.of_prompt or (self.has_entry(index, token) and not self.work.drops_text):
                choice.pending.append(self.entry(index, token))
            if token.of_prompt:
                continue
            if choice.lead is None and request.grammar is None and token.id >= 0:
                choice.lead = self.left_out(token)
            if token.text and not self.work.drops_text:
                text += (choice.lead or "") + token.text
                choice.lead = ""
            choice.finish_reason = "length" if token.finish_reason and self.work.drops_text else token.finish_reason
        if choice.finish_reason == "stop" and not text and tokens[-1].id not in request.eos_ids:
            choice.pending = []  # tokens of a stop string
        if not choice.is_begun and self.work.echoed and (text or choice.finish_reason):
            text = self.work.echoed[index] + text
        if not text and not choice.finish_reason:
            return []
        choice.is_begun = True
        choice.text += text
        entries, choice.pending = choice.pending, []
        choice.entries += entries
        logprobs = None if self.work.logprobs is None else columns(entries)
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}]

    def left_out(self, token: Token) -> str | None:
        """What the detokenizer leaves out of the first token of the text; None where this is not the first one yet."""
        within, first = spellings(self.model.tokenizer, token.id)
        if token.id in self.model.tokenizer.special_ids:
            return None  # the text has not begun
        return within[: len(within) - len(first)].decode(errors="replace")

    def entry(self, index: int, token: Token) -> dict[str, Any]:
        """What a token adds to the lists of `columns`."""
        text, offset = self.name(token.id), self.lengths[index]
        if token.id not in self.model.tokenizer.special_ids:
            self.lengths[index] += len(text)
        top = None
        if token.logprob is not None:
            likely = [(token.id, token.logprob), *token.top[: self.work.logprobs]]
            top = {self.name(token_id): value for token_id, value in reversed(likely)}
        return {"tokens": text, "token_logprobs": token.logprob, "top_logprobs": top, "text_offset": offset}

    def name(self, token_id: int) -> str:
        """A token as the lists of a completion call it."""
        return spellings(self.model.tokenizer, token_id)[0].decode(errors="replace")

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = None if self.work.logprobs is None else columns(choice.entries)
        return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def columns(entries: list[dict[str, Any]]) -> dict[str, list]:
    """A list of each thing that the entries say, as completions have them."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry[name] for entry in entries] for name in names}


@functools.lru_cache(1 << 16)
def spellings(tokenizer: Tokenizer, token_id: int) -> tuple[bytes, bytes]:
    """What a token writes within a text, and where one begins; of a special token its name."""
    token = tokenizer.backend.id_to_token(token_id)
    if token is None or token_id in tokenizer.special_ids:
        name = (token or "").encode()
        return name, name
    return spelled(tokenizer, token)
