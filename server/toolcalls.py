"""Tools: the form in which a model writes its calls, and reading them from a stream of text.

    form = detect_form(tokenizer.chat_template)  # None: it knows no calls, or none of the forms read here
    reader = CallReader(form, tools)  # one for each answer
    for text in texts:  # whole characters
        for piece in reader.put(text):
            print(delta(piece))
    pieces = reader.finish()

The forms, as the models' templates write them:

    hermes        <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>
    llama3        {"name": "f", "parameters": {...}}, all of the answer or after <|python_tag|>; several between `;`
    mistral       [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]
    mistral_args  [TOOL_CALLS]f[ARGS]{...}

A mark may be a special token, which is no text: StreamingDetokenizer writes those of `shown_ids` all the same.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from server.json_scanner import SPACE, JsonScanner
from tokenizer import Tokenizer

MARKS = {  # the first opens a call
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "mistral_args": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
}
THINKING = {"<think>": "</think>", "[THINK]": "[/THINK]"}
NAME = r"[a-zA-Z0-9_-]{1,64}"  # of a tool, as OpenAI defines it
ARGUMENTS = ("arguments", "parameters")  # the second is Llama's word
# What stands between [TOOL_CALLS] and the arguments, where they are no list. [CALL_ID] is of 2025's models.
HEAD = re.compile(rf"({NAME})(\[CALL_ID\]\w{{0,64}})?(\[ARGS\])?\s{{0,8}}\{{")
MAYBE_HEAD = re.compile(r"[\w\[\]-]*\s*")
LONGEST_HEAD = 160


@dataclass(frozen=True)
class Content:
    """A part of the answer's text."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A part of what the model says between the marks of reasoning."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """The beginning of a call."""

    index: int  # 0, 1, ... within the answer
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next part of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallDropped:
    """A call that had started is no valid JSON, or never ends: all of its text follows as content."""

    index: int


Piece = Content | Reasoning | CallStart | Arguments | CallDropped


def detect_form(chat_template: str | None) -> str | None:
    """The form of the calls that a chat template renders: "hermes", "llama3", "mistral", "mistral_args" or None."""
    template = chat_template or ""
    if "[TOOL_CALLS]" in template:
        return "mistral_args" if "[ARGS]" in template else "mistral"
    # Other models write <tool_call> as well, but XML inside or a list of calls.
    quoted = re.search(r'"arguments\\?":', template)
    if "</tool_call>" in template and quoted and "<function=" not in template and "<tool_calls>" not in template:
        return "hermes"
    if "<|start_header_id|>" in template and re.search(r'"parameters\\?":', template):
        return "llama3"
    return None


def thinking_mark(chat_template: str | None) -> str | None:
    """The mark with which the model of this template begins its reasoning; None if the template has none."""
    return next((mark for mark in THINKING if mark in (chat_template or "")), None)


def open_thinking(prompt: str) -> str | None:
    """The mark that a rendered prompt ends with, where the template itself begins the reasoning."""
    return next((mark for mark in THINKING if prompt.rstrip().endswith(mark)), None)


def shown_ids(tokenizer: Tokenizer, form: str | None) -> frozenset[int]:
    """The marks that are special tokens. The detokenizer has to write them, or a CallReader cannot see them."""
    marks = (*THINKING, *THINKING.values(), *MARKS.get(form, ()))
    return frozenset(map(tokenizer.backend.token_to_id, marks)) & tokenizer.special_ids


def random_id() -> str:
    """The id of a new call."""
    return f"call_{secrets.token_hex(12)}"


class CallReader:
    """The text of an answer in, its pieces out: what is certain at once, a possible beginning of a mark later. How the
    text is cut makes no difference to the pieces joined.

    Reasoning stands at the beginning of an answer. White space before a call is left out, and so are line breaks before
    and after the reasoning and its marks: templates add them when they render the chat. A call that breaks off or is no
    valid JSON is content, as it was written, marks included; one whose JSON is complete counts, closed or not.
    """

    def __init__(
        self,
        form: str | None,
        tools: Iterable[dict[str, Any]] = (),
        *,
        open_mark: str | None = None,
        parallel: bool = True,
        new_id: Callable[[], str] = random_id,
    ):
        """tools: as OpenAI's clients send them; without any no call is looked for. open_mark: what `open_thinking` says
        of the prompt. parallel: whether an answer may have several calls; what follows the only one is left out."""
        self.names = {tool["function"]["name"] for tool in tools}
        self.form = form if self.names else None
        self.parallel, self.new_id = parallel, new_id
        self.text = ""  # what has not been handed out
        self.pieces: list[Piece] = []
        self.started = self.complete = 0  # calls
        self.finished = False  # nothing that comes now counts
        self.closing = THINKING.get(open_mark or "", "")  # of reasoning
        self.read = self._reasoning if open_mark else self._beginning
        self.is_fresh = True  # nothing but line breaks of the reasoning has come
        self.follows_call = self.follows_reasoning = False

    def put(self, text: str) -> list[Piece]:
        """What the next part of the text makes certain."""
        self.text += text
        while self.read():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the answer."""
        self.put("")
        while self.read in (self._opened, self._object, self._arguments, self._between):
            if self.read == self._between:
                self.read = self._content
            else:
                self._give_up()
            while self.read():
                pass
        if self.read == self._reasoning:
            self._emit(Reasoning(self.text))
        elif self.text.strip() or not self.follows_call:
            self._emit(Content(self.text))
        self.text = ""
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self.pieces = self.pieces, []
        return pieces

    def _emit(self, piece: Piece) -> None:
        match piece:
            case Content(text="") | Reasoning(text="") | Arguments(text=""):
                return
            case Content():
                self.follows_call = False
        self.pieces.append(piece)

    # What is being read: each of these consumes what is certain, and says whether to go on.

    def _beginning(self) -> bool:
        if self.follows_reasoning:
            self.text = self.text.lstrip("\r\n")
        text = self.text.lstrip()
        mark = next((mark for mark in THINKING if text.startswith(mark)), None)
        if mark:
            self.text, self.closing = text[len(mark) :], THINKING[mark]
            self.read, self.is_fresh = self._reasoning, True
            return True
        if any(mark.startswith(text) for mark in THINKING):
            return False
        if self.form == "llama3" and text[0] == "{":
            self._begin_call(len(self.text) - len(text), is_bare=True)
        else:
            self.read = self._content
        return True

    def _reasoning(self) -> bool:
        if self.is_fresh:
            self.text = self.text.lstrip("\r\n")
            self.is_fresh = not self.text
        end = self.text.find(self.closing)
        certain = end if end >= 0 else certain_length(self.text, self.closing)
        shown = self.text[:certain].rstrip("\r\n")
        self._emit(Reasoning(shown))
        if end < 0:
            self.text = self.text[len(shown) :]
            return False
        self.text = self.text[end + len(self.closing) :]
        self.read, self.follows_reasoning = self._beginning, True
        return True

    def _content(self) -> bool:
        if self.form is None:
            self._emit(Content(self.text))
            self.text = ""
            return False
        mark = MARKS[self.form][0]
        start = self.text.find(mark)
        certain = start if start >= 0 else certain_length(self.text, mark)
        shown = self.text[:certain].rstrip()
        self._emit(Content(shown))
        self.text = self.text[len(shown) :]
        if start < 0:
            return False
        self._begin_call(start - len(shown) + len(mark))
        return True

    def _begin_call(self, start: int, is_bare: bool = False) -> None:
        """Looks for a call at `start`; before it stands the mark. A bare call has none and could be an answer in JSON:
        so its name has to be a tool's, and nothing else may be in it."""
        self.opening = self.at = start
        self.is_bare, self.in_list = is_bare, False
        self.scanner, self.name, self.key = JsonScanner(), "", ""
        self.index, self.start, self.sent, self.end = -1, -1, -1, -1  # of the call; of its arguments in `text`
        self.read = self._opened

    def _opened(self) -> bool:
        """Behind the mark, or what separates two calls."""
        rest = self.text[self.at :]
        self.at += len(rest) - len(rest.lstrip())
        rest = rest.lstrip()
        if not rest:
            return False
        if rest[0] == "{":
            self.read = self._object
            return True
        if not self.form.startswith("mistral") or self.in_list:
            return self._give_up()
        if rest[0] == "[":
            self.at += 1
            self.in_list = True
            return True
        head = HEAD.match(rest)
        if head is None:
            may_follow = len(rest) < LONGEST_HEAD and MAYBE_HEAD.fullmatch(rest)
            return False if may_follow else self._give_up()
        self.at += head.end() - 1
        self.name = head[1]
        self._start_arguments()
        self.read = self._arguments
        return True

    def _object(self) -> bool:
        """{"name": ..., "arguments": ...} in any order, and what else there may be in it."""
        scanner, text = self.scanner, self.text
        while self.at < len(text):
            char, depth, expected, in_token = text[self.at], scanner.depth, scanner.expects, scanner.in_token
            try:
                scanner.put(char)
            except ValueError:
                return self._give_up()
            if depth == 1 and not in_token and char not in SPACE and expected.startswith(("key", "value")):
                self.token = self.at
                if expected == "value" and not self._begin_value(char):
                    return self._give_up()
            self.at += 1
            if scanner.depth == 0:
                return self._end_call() or self._give_up()
            if scanner.depth == 1 and (depth == 2 or (in_token and not scanner.in_token)):
                if scanner.expects == ":":
                    self.key = json.loads(text[self.token : self.at])
                elif not self._end_value():
                    return self._give_up()
        self._send_arguments()
        return False

    def _begin_value(self, char: str) -> bool:
        """Whether a member's value may begin so."""
        if self.key == "name":
            return char == '"' and not self.name
        if self.key in ARGUMENTS:
            if char != "{" or self.start >= 0:
                return False
            self._start_arguments()
            return True
        return not self.is_bare or self.key == "type"

    def _end_value(self) -> bool:
        if self.key in ARGUMENTS:
            self.end = self.at
        elif self.key == "name":
            self.name = json.loads(self.text[self.token : self.at])
            known = self.name in self.names or not self.is_bare
            if not known or not re.fullmatch(NAME, self.name):
                return False
            if self.start >= 0:
                self._start_call()
        return True

    def _start_arguments(self) -> None:
        self.start = self.sent = self.at
        if self.name:
            self._start_call()

    def _start_call(self) -> None:
        self.index = self.started
        self.started += 1
        self._emit(CallStart(self.index, self.new_id(), self.name))

    def _send_arguments(self) -> None:
        end = self.end if self.end >= 0 else self.at
        if self.index >= 0 and end > self.sent:
            self._emit(Arguments(self.index, self.text[self.sent : end]))
            self.sent = end

    def _arguments(self) -> bool:
        """The arguments alone."""
        while self.at < len(self.text):
            try:
                self.scanner.put(self.text[self.at])
            except ValueError:
                return self._give_up()
            self.at += 1
            if self.scanner.depth == 0:
                self.end = self.at
                return self._end_call()
        self._send_arguments()
        return False

    def _end_call(self) -> bool:
        """Whether what has come is a call; then it is complete."""
        if self.index < 0:
            if not self.name or self.is_bare:
                return False
            self._start_call()
            self._emit(Arguments(self.index, "{}"))  # a tool without parameters
        else:
            self._send_arguments()
        self.text = self.text[self.at :]
        self.complete += 1
        self.follows_call = True
        self.read = self._between
        if not self.parallel:
            self.read, self.finished = self._ignored, True
        return True

    def _give_up(self) -> bool:
        """No call: what has come is content, and may hold another mark."""
        if self.index >= 0:
            self._send_arguments()
            self._emit(CallDropped(self.index))
        self.index = -1
        self._emit(Content(self.text[: self.opening]))
        self.text = self.text[self.opening :]
        self.read = self._content
        return True

    def _between(self) -> bool:
        """Behind a call: does another one follow without a mark of its own?"""
        rest = self.text.lstrip()
        if not rest:
            return False
        end = MARKS["hermes"][1] if self.form == "hermes" else "]" if self.in_list else ""
        more = "," if self.in_list else ";" if self.form == "llama3" else ""
        if more and rest[0] == more:
            self._begin_call(0, self.is_bare)
            self.at = len(self.text) - len(rest) + 1
            self.in_list = more == ","
        elif end and rest.startswith(end):
            self.text = rest[len(end) :]
            self.read = self._content
        elif end and end.startswith(rest):
            return False
        else:
            self.read = self._content
        return True

    def _ignored(self) -> bool:
        self.text = ""
        return False


def certain_length(text: str, mark: str) -> int:
    """The length of a text without an end that may be the beginning of the mark."""
    held = next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
    return len(text) - held


def delta(piece: Piece) -> dict[str, Any]:
    """What a piece adds to `choices[].delta` of a stream; empty where it adds nothing."""
    match piece:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallStart(index, id, name):
            call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
            return {"tool_calls": [call]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return {}


def message(pieces: Iterable[Piece]) -> dict[str, Any]:
    """The assistant's message of all the pieces of an answer."""
    content, reasoning = "", ""
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        match piece:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case CallStart(index, id, name):
                calls[index] = {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}
            case Arguments(index, text):
                calls[index]["function"]["arguments"] += text
            case CallDropped(index):
                del calls[index]
    result: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    if reasoning:
        result["reasoning_content"] = reasoning
    if calls:
        result["tool_calls"] = list(calls.values())
    return result
