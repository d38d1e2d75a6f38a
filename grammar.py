"""Texts held to a JSON schema, a regular expression or a grammar: which tokens may come next.

    grammars = Grammars(tokenizer, vocab_size, eos_ids)  # made once
    constraint = grammars.json_schema({"type": "object"})  # or .json_object(), .regex("[0-9]+"), .lark("start: ...")
    matcher = constraint.start()  # one for each text
    matcher.fill(mask)  # int32 [ceil(V / 32)]: bit i % 32 of word i // 32 tells whether token i may come next
    matcher.accept(token_id)  # the token that came

llguidance compiles a grammar and computes the masks. What matches is the text as the detokenizer writes it: special
tokens are not part of it, and sentencepiece's space before the first word is not written. Any tokens that spell a text
are allowed, not only those that the tokenizer would choose. An end token is allowed wherever the text may end.
"""

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errors import UserError
from grammar_trial import LIMITS, TokenSource, Trial
from sampling import unpacked
from tokenizer import BYTE_OF, Tokenizer

if TYPE_CHECKING:  # imported where it is used: most runs need no grammar
    from llguidance import LLMatcher

KEPT = 64  # compiled grammars, those used last
# A model that sees no end of its text may go on with spaces for ever, if the schema lets it. Any character may be
# written as \\uXXXX, and what is beyond these as a pair of them.
JSON_OPTIONS = {"whitespace_pattern": r"(\r?\n)?[ \t]{0,64}", "json_allow_general_unicode_escapes": True}
# Masks hold every token that fits, not only the one that the tokenizer would choose where the text is certain.
ALL_SPELLINGS = '\n%llguidance {"no_forcing": true}\n'


class Grammars:
    """Compiles constraints for one tokenizer, and keeps the last few. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]):
        """vocab_size: the model's, often larger than the tokenizer's; ids that no token has are never allowed."""
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.eos_ids = sorted(token for token in set(eos_ids) if token < vocab_size)
        self.compile = functools.lru_cache(KEPT)(self._compile)

    def json_schema(self, schema: dict[str, Any] | str) -> "Constraint":
        """A JSON value that the schema describes. Its own "x-guidance" may change llguidance's options."""
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(schema, dict):
                raise ValueError("it is not an object")
            options = schema.get("x-guidance", {})
            if not isinstance(options, dict):
                raise ValueError("x-guidance is not an object")
            schema = schema | {"x-guidance": JSON_OPTIONS | options}
            grammars = [{"lark_grammar": "start: @schema" + ALL_SPELLINGS}, {"name": "schema", "json_schema": schema}]
            source = json.dumps({"grammars": grammars}, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"json_schema cannot be used ({error}); correct it") from error
        return self._constraint("json_schema", source)

    def json_object(self) -> "Constraint":
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> "Constraint":
        """A text all of which a regular expression matches: Rust's syntax, without look-around."""
        from llguidance import LLMatcher

        try:
            source = json.loads(LLMatcher.grammar_from_regex(pattern))
        except UnicodeEncodeError as error:
            raise UserError("regex is not valid UTF-8; correct it") from error
        source["grammars"][0]["lark_grammar"] += ALL_SPELLINGS
        return self._constraint("regex", json.dumps(source))

    def lark(self, text: str) -> "Constraint":
        """A text that a grammar in Lark's syntax produces from `start`."""
        return self._constraint("grammar", json.dumps({"grammars": [{"lark_grammar": text + ALL_SPELLINGS}]}))

    def bind(self, constraint: "Constraint") -> "Constraint":
        """A constraint that came from another process, compiled here."""
        return constraint if constraint.grammars is self else self._constraint(constraint.name, constraint.source)

    def _constraint(self, name: str, source: str) -> "Constraint":
        constraint = Constraint(name, source, self)
        self.compile(constraint)
        return constraint

    def _compile(self, constraint: "Constraint") -> "LLMatcher":
        """What every text begins with a copy of. UserError where llguidance refuses."""
        from llguidance import LLMatcher, LLParserLimits

        name, source = constraint.name, constraint.source
        if not self.vocabulary.trial.compiles(source):
            raise UserError(f"{name} takes too much time or memory to compile; simplify it")
        matcher = LLMatcher(self.vocabulary.lltokenizer, source, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise UserError(f"{name} cannot be used ({shortened(matcher.get_error())}); correct it")
        matcher.compute_bitmask()
        if matcher.is_error():
            raise UserError(f"{name} cannot be used (no text matches it, or it is too complex); correct it")
        return matcher

    @functools.cached_property
    def vocabulary(self) -> "Vocabulary":
        """Made when the first grammar comes, which takes a moment."""
        return Vocabulary(self.tokenizer, self.vocab_size, self.eos_ids)


@dataclass(frozen=True)
class Constraint:
    """What a text must match. It can be sent to another process, where Grammars.bind makes it usable again."""

    name: str  # of the setting
    source: str  # the grammar, as llguidance takes it
    grammars: Grammars | None

    def start(self) -> "Matcher":
        """The state of one text, at its beginning."""
        if self.grammars is None:
            raise ValueError(f"a {self.name} of another process, which Grammars.bind has not been given")
        return Matcher(self.grammars.compile(self).deep_copy(), self.grammars.vocabulary)

    def __reduce__(self) -> tuple:
        return Constraint, (self.name, self.source, None)


class Matcher:
    """Follows one text. `finished`: no token but an end token is possible any more, or one has come."""

    def __init__(self, matcher: "LLMatcher", vocabulary: "Vocabulary"):
        self._matcher, self._vocabulary = matcher, vocabulary
        self._is_first = bool(vocabulary.first)
        self.finished = False

    def fill(self, mask: Tensor) -> None:
        """Writes which tokens may come next, int32 [ceil(V / 32)] on the CPU. None may where the text got too complex
        for llguidance's limits."""
        vocabulary, words = self._vocabulary, self._vocabulary.words
        if (mask.shape, mask.dtype, mask.device.type) != ((words,), torch.int32, "cpu") or not mask.is_contiguous():
            raise ValueError(f"a mask {mask.dtype} {list(mask.shape)} on {mask.device}, not int32 [{words}] on the CPU")
        if vocabulary.all_words == words:
            self._compute(mask)
            return
        longer = torch.empty(vocabulary.all_words, dtype=torch.int32)
        self._compute(longer)
        if self._is_first and not self.finished:
            allowed = unpacked(longer)
            allowed[vocabulary.first_ids] = allowed[32 * words :][: len(vocabulary.first_ids)].clone()
            allowed[vocabulary.unwritten] = True
            longer = packed(allowed)
        mask.copy_(longer[:words])

    def _compute(self, mask: Tensor) -> None:
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        if self._matcher.is_error():
            mask.zero_()

    def accept(self, token_id: int) -> None:
        """Takes the next token, one of those that `fill` allowed."""
        vocabulary = self._vocabulary
        if self._is_first and token_id in vocabulary.first:
            token_id = vocabulary.first[token_id]
        self._is_first = False
        if token_id is not None:
            self._matcher.consume_token(token_id)
            self.finished = self._matcher.is_stopped() and not self._matcher.is_error()


class Vocabulary:
    """A tokenizer's tokens as llguidance takes them.

    Tokens that are written differently where a text begins follow once more, behind the model's ids, as they are
    written there. `first`: the id of that copy, or None for a token of which nothing is written. `special`: the names
    of the special tokens. `trial` tries grammars for them.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: list[int]):
        from llguidance import LLTokenizer

        strip = tokenizer.decoder_steps.get("Strip", {"content": " ", "start": 1})
        if tokenizer.clean_up or (strip["content"], strip["start"]) != (" ", 1):
            raise UserError("this tokenizer rewrites spaces, which a grammar cannot foresee; leave the grammar out")
        self.words = -(-size // 32)
        tokens = [b""] * (self.words * 32)
        self.special = {token_id: f"<|token_{token_id}|>" for token_id in eos_ids}  # the tokenizer may not know them
        self.first: dict[int, int | None] = {}
        for token, token_id in tokenizer.backend.get_vocab().items():
            if token_id in tokenizer.special_ids or token_id in self.special:
                self.special[token_id] = token
                continue
            tokens[token_id], first = spelled(tokenizer, token)
            if 0xFF in tokens[token_id]:  # no text; and llguidance begins the names of special tokens with it
                tokens[token_id] = b""
            elif first != tokens[token_id]:
                self.first[token_id] = len(tokens) if first else None
                tokens += [first] if first else []
        if not eos_ids:  # llguidance wants one
            eos_ids = [len(tokens)]
            tokens.append(b"")
            self.special[eos_ids[0]] = f"<|token_{eos_ids[0]}|>"
        for token_id, name in self.special.items():
            tokens[token_id] = name.encode()
        self.first_ids = torch.tensor([i for i, copy in self.first.items() if copy is not None], dtype=torch.int64)
        self.unwritten = torch.tensor([i for i, copy in self.first.items() if copy is None], dtype=torch.int64)
        self.trial = Trial(len(tokens), self.special)  # starts while the next line takes its time
        source = TokenSource(tokens, eos_ids[0], list(self.special))
        self.lltokenizer = LLTokenizer(source, eos_token=eos_ids)
        self.all_words = -(-len(tokens) // 32)


def spelled(tokenizer: Tokenizer, token: str) -> tuple[bytes, bytes]:
    """The bytes that the detokenizer writes for a token that is not special: within a text, and where one begins."""
    steps = tokenizer.decoder_steps
    if "ByteLevel" in steps:
        in_bytes = BYTE_OF.keys() >= set(token)  # added tokens may be plain text
        spelling = bytes(map(BYTE_OF.get, token)) if in_bytes else token.encode()
        return spelling, spelling
    if metaspace := steps.get("Metaspace"):
        prefixed = metaspace["prepend_scheme"] != "never"
        within, first = (token.replace(metaspace["replacement"], space) for space in (" ", "" if prefixed else " "))
        return within.encode(), first.encode()
    if "ByteFallback" in steps and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
        within = bytes.fromhex(byte[1])
    else:
        within = token.replace(steps["Replace"]["pattern"]["String"], steps["Replace"]["content"]).encode()
    return within, within.removeprefix(b" ") if "Strip" in steps else within


def packed(bits: Tensor) -> Tensor:
    """The inverse of sampling.unpacked, bool [..., 32 N] -> int32 [..., N]."""
    values = torch.tensor([1 << i for i in range(31)] + [-(1 << 31)], dtype=torch.int32)
    return (bits.unflatten(-1, (-1, 32)).int() * values).sum(-1, dtype=torch.int32)


def shortened(message: str) -> str:
    """llguidance's words in one line: of a report over several lines what is wrong, without the quoted lines."""
    lines = [line.strip() for line in message.strip().splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = errors[0] if errors else lines[0] if lines else "unknown error"
    said = re.sub(r"^(at )?(\d+)\((\d+)\): ", r"line \2, column \3: ", said)
    return said if len(said) <= 200 else said[:200] + "..."
