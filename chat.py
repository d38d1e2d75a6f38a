"""The chat at a terminal, or with a script at the other end of the pipe: generate.py --interactive.

Each line is answered. A turn's prompt is the whole conversation, of which the KV cache still holds all but what is new.
Settings are values in tensors: `/set` changes them without a compilation.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from engine import Engine, Request
from errors import UserError, log
from prompts import SETTINGS, Target, check_settings, encode_chat, make_request, read_images, told
from scheduler import Token, generate

if TYPE_CHECKING:
    from images import ImageInput

HELP = """/image PATH       show the model an image with the next message: before it, or where <image> stands in it
/set NAME VALUE   change a setting; VALUE is text or JSON: /set stop ["\\n", "User:"]
/set NAME null    what the setting was when the chat began
/show             all settings
/system TEXT      start anew with this system message; without TEXT, with none
/clear            start anew
/exit             end, as Ctrl-D does
A message that begins with a slash is written with two: //text. Text of several lines is one message where it is
pasted, or between lines of three quotes: \"\"\". Ctrl-C ends a reply; before a message it ends the chat.
The first message after the seed was set draws with it, each further one with the next number."""
COMMANDS = ("/image", "/set", "/show", "/system", "/clear", "/help", "/exit", "/quit")
QUOTES = '"""'
REPLY_SHARE = 4  # a reply has room for this fraction of the context, or for max_new_tokens if those are fewer

Content = str | list[dict[str, Any]]  # of a message: its text, or parts
Prompt = tuple[list[int], "tuple[ImageInput, ...]"]


@dataclass
class Conversation:
    """What has been said."""

    system: str | None
    variables: dict[str, Any]  # of the chat template
    messages: list[dict[str, Any]] = field(default_factory=list)  # of the user and the model, in turns
    tokens: list[int] = field(default_factory=list)  # all of it, where there is no chat template
    images: "list[ImageInput]" = field(default_factory=list)  # for the next message
    questions: int = 0  # since the seed was set

    def start_anew(self, system: str | None) -> None:
        self.system, self.messages, self.tokens, self.images = system, [], [], []

    def prompt(self, target: Target, content: Content, messages: list[dict[str, Any]]) -> Prompt:
        """The tokens and images of the conversation, or of these messages of it, and of what the user says next."""
        tokenizer = target.tokenizer
        if not tokenizer.has_chat_template:
            new = tokenizer.encode("\n" + content if self.tokens else content, add_special_tokens=not self.tokens)
            return self.tokens + new, ()
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, *messages, {"role": "user", "content": content}]
        return encode_chat(target, messages, self.variables, tokenizer.encode)[1:]

    def fitting_prompt(self, target: Target, content: Content, wanted: int) -> tuple[Prompt, list[dict[str, Any]]]:
        """A prompt with room for `wanted` tokens behind it, and the messages that are in it. Where all of them leave
        less, the first are left out, a few more than need be, since what follows has to be prefilled again. UserError
        where the words alone leave no room."""
        messages, limit = self.messages, target.limit
        ids, images = self.prompt(target, content, messages)
        if limit - len(ids) < wanted:
            wanted += limit // REPLY_SHARE
            if not target.tokenizer.has_chat_template and self.tokens:
                bos = ids[: ids[0] == target.tokenizer.bos_id]
                kept = max(limit - wanted - len(bos), len(ids) - len(self.tokens))  # the new words at least
                ids = bos + ids[len(ids) - kept :]
            while limit - len(ids) < wanted and messages:
                messages = messages[2:]
                ids, images = self.prompt(target, content, messages)
        if len(ids) >= limit:
            raise UserError(f"these {len(ids)} tokens{told(images)} leave no room in {limit}; give a shorter text")
        return (ids, images), messages


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def converse(
    engine: Engine, target: Target, settings: dict[str, Any], system: str | None, variables: dict[str, Any]
) -> None:
    """Answers stdin until it ends. With a chat template the lines are a user's messages; without one the model
    continues the text so far. `settings` has a seed."""
    chatting = target.tokenizer.has_chat_template
    log("a chat" if chatting else "this model has no chat template: it continues what you write")
    log("/clear starts anew, /set and /show are for settings, /help explains, /exit or Ctrl-D ends")
    defaults = settings
    conversation = Conversation(system, variables)
    while (asked := engine.group.from_rank_0(ask)) is not None:
        text, may_be_command = asked
        words = text.strip() if may_be_command else ""
        try:
            if words.startswith("/") and not words.startswith("//"):
                command, _, rest = words.partition(" ")
                if command in ("/exit", "/quit") and not rest:
                    break
                settings = run_command(engine, target, settings, defaults, conversation, command, rest.strip())
            elif text.strip():
                text = text.lstrip()[1:] if words.startswith("//") else text
                answer(engine, target, settings, text, conversation)
        except UserError as error:  # no reason to lose the conversation
            log(f"error: {error}")
        except KeyboardInterrupt:
            if engine.group.size > 1:
                raise
            log("interrupted")


def run_command(
    engine: Engine,
    target: Target,
    settings: dict[str, Any],
    defaults: dict[str, Any],
    conversation: Conversation,
    command: str,
    rest: str,
) -> dict[str, Any]:
    """Does what `/COMMAND REST` says -> the settings from now on."""
    if command not in COMMANDS:
        raise UserError(f"{command} is not a command; /help lists them, //... is a message that begins with a slash")
    if rest and command not in ("/image", "/set", "/system"):
        raise UserError(f"{command} stands alone; for a message that begins with a slash write //...")
    if command == "/clear":
        conversation.start_anew(conversation.system)
    elif command == "/image":
        show(engine, target, conversation, rest)
    elif command == "/system":
        if not target.tokenizer.has_chat_template:
            raise UserError("this model has no chat template for a system message; write it as text")
        conversation.start_anew(rest or None)
        log(f"started anew {'with' if rest else 'without'} a system message")
    elif command == "/help":
        log(HELP)
    elif command == "/show":
        for name, value in effective(settings, target).items():
            log(f"{name} {json.dumps(value, ensure_ascii=False)}")
    elif command == "/set":
        settings = changed(engine, target, settings, defaults, rest)
        if rest.startswith("seed"):
            conversation.questions = 0
    return settings


def show(engine: Engine, target: Target, conversation: Conversation, path: str) -> None:
    """Reads an image for the next message."""
    if not path:
        raise UserError("/image needs the path of a file; name one")
    if not target.tokenizer.has_chat_template:
        raise UserError("this model has no chat template to show it images by; use one that is trained to chat")
    part = {"type": "image", "image": path}
    message = engine.group.from_rank_0(lambda: read_images([{"role": "user", "content": [part]}], target)[0])
    image = message["content"][0]["image"]
    conversation.images.append(image)
    log(f"{path} is {image.count} tokens, and goes with the next message")


def answer(engine: Engine, target: Target, settings: dict[str, Any], text: str, conversation: Conversation) -> None:
    """Writes the model's answer to `text`, and adds both to the conversation."""
    new = make_request(target, [0], settings).max_new_tokens  # if there is room for them
    content: Content = text
    if conversation.images:
        from images import with_images

        content = with_images(text, conversation.images)
        conversation.images = []
    (ids, images), messages = conversation.fitting_prompt(target, content, min(new, target.limit // REPLY_SHARE))
    room = target.limit - len(ids)
    own = {"max_new_tokens": min(new, room), "seed": (settings["seed"] + conversation.questions) % 2**63}
    request = make_request(target, ids, settings | own, images)
    if len(messages) < len(conversation.messages) or ids[: len(conversation.tokens)] != conversation.tokens:
        log(f"the context of {target.limit} tokens is full: what was said first is forgotten")
    conversation.messages = messages
    conversation.questions += 1
    reply, interrupted = write_reply(engine, target, request)
    if not reply:
        log("interrupted before the reply began; the message is forgotten")
        return
    if interrupted:
        log("interrupted; what was said stays in the conversation")
    elif reply[-1].finish_reason == "length":
        more = "/set max_new_tokens allows more" if new < room else "the context is full"
        log(f"cut off after {request.max_new_tokens} tokens; {more}")
    said = "".join(token.text for token in reply)
    if target.tokenizer.has_chat_template:
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
        conversation.messages = [*messages, *turns]
    else:
        ended = reply[-1].id in request.eos_ids
        conversation.tokens = ids + [token.id for token in (reply[:-1] if ended else reply)]


def write_reply(engine: Engine, target: Target, request: Request) -> tuple[list[Token], bool]:
    """Writes the reply as it comes -> its tokens, and whether Ctrl-C ended it. (Of several ranks it ends them all:
    they would stop at different tokens.)"""
    reply: list[Token] = []
    try:
        for token in generate(engine, target.tokenizer, [request]):
            reply.append(token)
            write(token.text)
    except KeyboardInterrupt:
        if engine.group.size > 1:
            raise
        write("\n")
        return reply, True
    write("\n")
    log(str(engine.stats))
    return reply, False


def effective(settings: dict[str, Any], target: Target) -> dict[str, Any]:
    """What each setting is, those that nobody has set included."""
    request = make_request(target, [0], settings)
    values = asdict(request.params) | {"max_new_tokens": request.max_new_tokens, "stop": request.stop}
    values |= {name: value for name, value in settings.items() if value is not None}
    return {name: values.get(name) for name in SETTINGS}


def changed(
    engine: Engine, target: Target, settings: dict[str, Any], defaults: dict[str, Any], line: str
) -> dict[str, Any]:
    """The settings after `/set LINE`. UserError where a value is not possible."""
    name, _, text = line.strip().partition(" ")
    if not name or (name in SETTINGS and not text):
        raise UserError(f"{name or 'a setting'} needs a value, as in /set temperature 0.7; /show lists the settings")
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


def ask() -> tuple[str, bool] | None:
    """The user's next message, and whether it may be a command; None at the end of the input.

    It is a line, or the lines between three quotes and three quotes, or at a terminal what was pasted.
    """
    line = read_line("> ")
    if line is None or not line.startswith(QUOTES):
        return None if line is None else (line, "\n" not in line)
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES) and (line := read_line("... ")) is not None:
        lines.append(line)
    return "\n".join(lines).rstrip().removesuffix(QUOTES).strip("\n"), False


def read_line(prompt: str) -> str | None:
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # gives input() its line editing and history

        if os.environ.get("TERM", "dumb") != "dumb":  # line breaks in what is pasted then do not end the message
            readline.parse_and_bind("set enable-bracketed-paste on")
        try:
            return input(prompt)
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
