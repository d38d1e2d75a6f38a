"""The chat at a terminal, or with a script at the other end of the pipe: generate.py --interactive.

Each line is answered. The KV cache is kept, so a turn prefills only what is new since the last one. Settings are
values in tensors: `/set` changes them without a compilation.
"""

import itertools
import json
import sys
from dataclasses import asdict
from typing import Any

from engine import Engine
from errors import UserError, log
from prompts import SETTINGS, Target, check_settings, make_request
from scheduler import generate

HELP = """/set NAME VALUE   change a setting; VALUE is text or JSON: /set stop ["\\n", "User:"]
/set NAME null    what the setting was when the chat began
/show             all settings
/clear            start anew
/exit             end, as Ctrl-D does"""


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def converse(engine: Engine, target: Target, settings: dict[str, Any]) -> None:
    """Answers stdin until it ends. With a chat template the lines are a user's messages; without one the model
    continues the text so far."""
    chatting = target.tokenizer.has_chat_template
    log("a chat" if chatting else "this model has no chat template: it continues what you write")
    log("/clear starts anew, /set and /show are for settings, /help explains, /exit or Ctrl-D ends")
    defaults = settings
    messages: list[dict[str, str]] = []
    history: list[int] = []  # all of the conversation
    cached: list[int] = []  # what the cache holds, and a token more
    while (line := engine.group.from_rank_0(ask)) is not None and line.strip() not in ("/exit", "/quit"):
        command, _, rest = line.strip().partition(" ")
        try:
            if line.strip() == "/clear":
                messages, history, cached = [], [], []
            elif line.strip() == "/help":
                log(HELP)
            elif line.strip() == "/show":
                for name, value in effective(settings, target).items():
                    log(f"{name} {json.dumps(value, ensure_ascii=False)}")
            elif command == "/set":
                settings = changed(engine, target, settings, defaults, rest)
            elif line.strip():
                messages, history = answer(engine, target, settings, line, messages, history, cached)
        except UserError as error:  # no reason to lose the conversation
            log(f"error: {error}")


def answer(
    engine: Engine,
    target: Target,
    settings: dict[str, Any],
    line: str,
    messages: list[dict[str, str]],
    history: list[int],
    cached: list[int],
) -> tuple[list[dict[str, str]], list[int]]:
    """Writes the model's answer to `line` -> the conversation with both, as messages and as tokens."""
    tokenizer = target.tokenizer
    asked = [*messages, {"role": "user", "content": line}]
    if tokenizer.has_chat_template:
        ids = tokenizer.encode(tokenizer.apply_chat_template(asked), add_special_tokens=False)
    else:
        ids = history + tokenizer.encode("\n" + line if history else line, add_special_tokens=not history)
    room = target.limit - len(ids)
    if room < 1:
        raise UserError(f"the conversation has no room left in {target.limit} tokens; /clear starts a new one")
    same = (a == b for a, b in zip(ids[:-1], cached[:-1], strict=False))
    start = sum(itertools.takewhile(bool, same))
    new = make_request(target, [0], settings).max_new_tokens  # if there is room for them
    request = make_request(target, ids, settings | {"max_new_tokens": min(new, room)}, start=start)
    cached[:], reply = ids, []
    for token in generate(engine, tokenizer, [request]):
        write(token.text)
        reply.append(token)
    write("\n")
    log(str(engine.stats))
    if reply[-1].finish_reason == "length":
        more = "/set max_new_tokens allows more" if new < room else "/clear makes room"
        log(f"cut off after {request.max_new_tokens} tokens; {more}")
    said = {"role": "assistant", "content": "".join(token.text for token in reply)}
    ended = reply[-1].id in request.eos_ids
    cached[:] = ids + [token.id for token in (reply[:-1] if ended else reply)]
    return [*asked, said], [*cached]


def effective(settings: dict[str, Any], target: Target) -> dict[str, Any]:
    """What each setting is, those that nobody has set included."""
    request = make_request(target, [0], settings)
    values = asdict(request.params) | {"max_new_tokens": request.max_new_tokens, "stop": request.stop}
    values |= {name: value for name, value in settings.items() if value is not None}
    return {name: values[name] for name in SETTINGS}


def changed(
    engine: Engine, target: Target, settings: dict[str, Any], defaults: dict[str, Any], line: str
) -> dict[str, Any]:
    """The settings after `/set LINE`. UserError where a value is not possible."""
    name, _, text = line.strip().partition(" ")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if name in SETTINGS:  # a string needs no quotes, and one word no list
        value = next((form for form in (value, text, [text]) if form is None or SETTINGS[name][1](form)), value)
    if value is not None or name not in SETTINGS:
        check_settings({name: value})
    settings = settings | {name: defaults[name] if value is None else value}
    words = make_request(target, [0], settings).params.bad_words
    room, longest = engine.sampler.words.shape[1:]
    if len(words) > room or max(map(len, words), default=0) > longest:
        raise UserError(
            f"bad_words: a chat has room for {room} spellings of {longest} tokens; give fewer or shorter ones"
        )
    return settings


def ask() -> str | None:
    """The user's next line, or None at the end of the input."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401  gives input() its line editing and history

        try:
            return input("> ")
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
