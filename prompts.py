"""What is asked for -> engine.Request: prompts from the command line or a file, each with its settings, all checked.

    target = Target(tokenizer, vocab_size, eos_ids, limit=2048, limited_by="context")
    jobs = read_jobs(args, target, default_settings(args, generation_config))

Settings are a dict of the names in SETTINGS: what the flags say, what a line of a JSONL file says instead, or what a
chat's `/set` does. A setting that is None has its default.
"""

import argparse
import contextlib
import functools
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import ModelConfig
from engine import Request
from errors import UserError, log
from files import read_bounded
from grammar import Constraint, Grammars
from sampling import SamplingParams
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from images import ImageInput, ImageOptions

DEMO_PROMPT = "def read_lines(path):"


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000


def is_number(value: Any) -> bool:
    return isinstance(value, float) or is_int(value)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def is_bias(value: Any) -> bool:
    ids = isinstance(value, dict) and all(re.fullmatch("[0-9]{1,9}", key) for key in value)
    return ids and all(map(is_number, value.values()))


NUMBER, COUNT = ("a number", is_number), ("a whole number", is_int)
TEXT = ("a string", lambda value: isinstance(value, str))
SETTINGS = {  # what each may be
    "temperature": NUMBER,
    "top_k": COUNT,
    "top_p": NUMBER,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "logit_bias": ('an object {"token id": number}', is_bias),
    "bad_words": ("a list of strings", is_texts),
    "min_new_tokens": COUNT,
    "max_new_tokens": COUNT,
    "stop": ("a string or a list of strings", lambda value: isinstance(value, str) or is_texts(value)),
    "seed": COUNT,
    "ignore_eos": ("true or false", lambda value: isinstance(value, bool)),
    "json_schema": ("an object", lambda value: isinstance(value, dict)),
    "regex": TEXT,
    "grammar": TEXT,
    "adapter": TEXT,  # the name of one; "" is none
}
GRAMMARS = ("json_schema", "regex", "grammar")  # what a text may be held to, one of them
OTHER_FIELDS = ("id", "prompt", "messages", "template_vars")  # of a line of JSON
NO_BEAMS = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", *GRAMMARS)  # what beam search knows nothing of


def check_settings(settings: dict[str, Any]) -> None:
    """The names and types of settings; the ranges are SamplingParams' and make_request's."""
    for name, value in settings.items():
        if name not in SETTINGS:
            raise UserError(f"{name!r} is not a setting; use one of {', '.join(SETTINGS)}")
        kind, accepts = SETTINGS[name]
        if not accepts(value):
            raise UserError(f"{name} {json.dumps(value)[:80]} is not {kind}; correct it")


@dataclass(frozen=True)
class Target:
    """What requests are for. `limit`: how many tokens a prompt and its continuation may be; `limited_by`: by what."""

    tokenizer: Tokenizer
    vocab_size: int
    eos_ids: frozenset[int]
    limit: int
    limited_by: str
    adapters: tuple[str, ...] = ()  # their names
    images: "ImageOptions | None" = None  # how the model wants them; None: it has no eyes

    @functools.cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocab_size, self.eos_ids)


@dataclass(frozen=True)
class Job:
    """A request, and what its results say about it."""

    request: Request
    text: str  # the prompt's
    labels: dict[str, Any]  # "id", where the input names one

    def bound(self, target: Target) -> "Job":
        """The same, where it may have come from another rank: its grammar is compiled here."""
        grammar = self.request.grammar and target.grammars.bind(self.request.grammar)
        return replace(self, request=replace(self.request, grammar=grammar))


def default_settings(args: argparse.Namespace, recommended: dict[str, Any]) -> dict[str, Any]:
    """The flags first, then generation_config.json: its repetition_penalty, and how to sample if it says do_sample."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    sampled = ("temperature", "top_k", "top_p", "min_p") if recommended.get("do_sample") and args.num_beams == 1 else ()
    for name in ("repetition_penalty", *sampled):
        if settings[name] is None and name in recommended:
            settings[name] = int(recommended[name]) if name == "top_k" else recommended[name]
    if sampled and settings["temperature"] is None:
        settings["temperature"] = 1.0
    return settings


def draw_seed() -> int:
    """The seed of what was given none."""
    return random.SystemRandom().randrange(2**32)


def sampling_params(settings: dict[str, Any], tokenizer: Tokenizer) -> SamplingParams:
    """Greedy, unless a temperature is given or a filter, which would have nothing to do."""
    names = {field.name for field in fields(SamplingParams)}
    given = {name: value for name, value in settings.items() if value is not None and name in names}
    filtered = given.get("top_k", 0) > 0 or given.get("top_p", 1) < 1 or given.get("min_p", 0) > 0
    given.setdefault("temperature", 1.0 if filtered else 0.0)
    given.setdefault("seed", draw_seed())
    given["logit_bias"] = tuple((int(token), float(bias)) for token, bias in given.get("logit_bias", {}).items())
    given["bad_words"] = tuple(
        dict.fromkeys(ids for word in given.get("bad_words", []) for ids in spell(word, tokenizer))
    )
    return SamplingParams(**given)


def spell(word: str, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """The ids of a word where a text begins with it, and where it follows a space or a line break."""
    newline, after = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "\n" + word))
    spellings = [tokenizer.encode(text, add_special_tokens=False) for text in (word, " " + word)]
    if after[: len(newline)] == newline:
        spellings.append(after[len(newline) :])
    if not word or not all(spellings):
        raise UserError(f"bad_words: the tokenizer has no tokens for {word!r}; leave it out")
    return map(tuple, spellings)


def make_request(
    target: Target, prompt: list[int], settings: dict[str, Any], images: "tuple[ImageInput, ...]" = ()
) -> Request:
    """The request that these settings make of a prompt. UserError where they make no sense or there is no room."""
    if not prompt:
        raise UserError("the tokenizer has no tokens for the prompt; give it another")
    room = target.limit - len(prompt)
    new = settings["max_new_tokens"]
    new = max(1, min(200, room)) if new is None else new
    if not 1 <= new < 2**31:
        raise UserError(f"max_new_tokens {new} is out of range; it must be 1 or more")
    if new > room:
        raise UserError(
            f"a prompt of {len(prompt)} tokens{told(images)} and {new} new ones exceed the {target.limited_by} of "
            f"{target.limit}; shorten the prompt or lower max_new_tokens"
        )
    params = sampling_params(settings, target.tokenizer)
    if params.min_new_tokens > new:
        raise UserError(f"min_new_tokens {params.min_new_tokens} are more than max_new_tokens {new}; lower it")
    eos_ids = frozenset() if settings["ignore_eos"] else target.eos_ids
    params.check(target.vocab_size, eos_ids)
    stop = settings["stop"] or ()
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop or settings["stop"] == "":
        raise UserError("stop: an empty string ends every text; leave it out")
    if stop:  # special tokens are not part of the text, where they could be found
        name = target.tokenizer.backend.id_to_token
        eos_ids |= {token_id for token_id in target.tokenizer.special_ids if name(token_id) in stop}
    adapter = settings.get("adapter") or None
    if adapter is not None and adapter not in target.adapters:
        there = f"there are {', '.join(target.adapters)}" if target.adapters else "there are none"
        raise UserError(f"adapter {adapter[:40]!r} is unknown, {there}; name one of them, or load it")
    grammar = make_constraint(target, settings)
    return Request(prompt, params, new, eos_ids, stop, grammar=grammar, adapter=adapter, images=images)


def told(images: "tuple[ImageInput, ...]") -> str:
    """How many tokens of a prompt its images are, for a message about its length."""
    return f" ({sum(image.count for image in images)} of them of {len(images)} images)" if images else ""


def encode_chat(
    target: Target, messages: list[dict[str, Any]], variables: dict[str, Any], encode: Callable[..., list[int]]
) -> "tuple[str, list[int], tuple[ImageInput, ...]]":
    """Messages, whose images have been read (see images.read_parts), -> the text of the prompt by the chat template,
    its tokens by `encode` and its images. UserError as of Tokenizer.apply_chat_template, and where an image has no
    place."""
    images: list[ImageInput] = []
    if holds_images(messages):
        from images import bare  # here, as Pillow takes a while to import and only images need it

        messages, images = bare(messages)
    text = target.tokenizer.apply_chat_template(messages, variables=variables)
    ids = encode(text, add_special_tokens=False)  # a rendered chat has its own
    if not images:
        return text, ids, ()
    from images import place_images

    return text, *place_images(ids, images, target.images)


def make_constraint(target: Target, settings: dict[str, Any]) -> Constraint | None:
    """What the text is held to, if to anything."""
    given = [name for name in GRAMMARS if settings.get(name) is not None]
    if not given:
        return None
    name = given[0]
    # The grammar alone says where a text may end.
    clashes = given[1:] + [other for other in ("min_new_tokens", "ignore_eos") if settings.get(other)]
    if clashes:
        raise UserError(f"{name} and {clashes[0]} do not go together; leave one out")
    make = {"json_schema": target.grammars.json_schema, "regex": target.grammars.regex, "grammar": target.grammars.lark}
    return make[name](settings[name])


# ---------------------------------------------------------------------------------------------------------------------
# Input


def read_jobs(args: argparse.Namespace, target: Target, settings: dict[str, Any]) -> list[Job]:
    """All that the command line asks for, each sample a job; those of one prompt share the list of its tokens."""
    if args.prompt_file is not None:
        jobs = list(read_file(args, target, settings))
        if not jobs:
            raise UserError(f"--prompt_file {args.prompt_file} has no prompt; write one on each line")
    elif args.prompt_text_file is not None:
        text = read_text("prompt_text_file", args.prompt_text_file)
        jobs = [make_job({"prompt": text}, args, target, settings)]
    elif not args.chat and not args.image and (length := synthetic_length(args.prompt)):
        jobs = [synthetic_job(length, target, settings)]
    elif args.prompt is None and (args.checkpoint_path is not None or args.repo is not None):
        raise UserError('nothing to continue; give --prompt "...", --prompt_file, --prompt_text_file or --interactive')
    else:
        jobs = [make_job({"prompt": DEMO_PROMPT if args.prompt is None else args.prompt}, args, target, settings)]
    return list(itertools.chain.from_iterable(samples(job, args.num_samples) for job in jobs))


def synthetic_job(length: int, target: Target, settings: dict[str, Any]) -> Job:
    """Random tokens, to measure with: none of them ends the text."""
    if length > target.limit:
        raise UserError(f"--prompt {length} exceeds the {target.limited_by} of {target.limit} tokens; give less")
    draw = random.Random(0)
    prompt = [draw.randrange(target.vocab_size) for _ in range(length)]
    request = make_request(target, prompt, settings | {"ignore_eos": True})
    log(
        f"--prompt {length} means {length} random tokens, as a load to measure; "
        f"for the text {str(length)!r} take --chat, or --prompt_text_file with a file that holds it"
    )
    return Job(request, target.tokenizer.decode(prompt), {})


def samples(job: Job, count: int) -> Iterator[Job]:
    """The same request with one seed after the other."""
    params = job.request.params
    for sample in range(count):
        seed = (params.seed + sample) % 2**63
        yield replace(job, request=replace(job.request, params=replace(params, seed=seed)))


def synthetic_length(prompt: str | None) -> int | None:
    """The number of tokens where the prompt is a number."""
    if prompt is None or not (prompt.isascii() and prompt.isdigit()):
        return None
    if not 1 <= len(prompt.lstrip("0")) <= 9:
        raise UserError(f"--prompt {prompt[:12]}: a synthetic prompt of so many tokens is not possible")
    return int(prompt)


def read_bytes(flag: str, name: str) -> bytes:
    """What a file holds, or stdin if its name is -, without a byte order mark. UserError when that is too much."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            return read_bounded(file, f"--{flag} {name}").removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"--{flag} {name}: {error.strerror}; name a readable file") from error


def decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"it is not UTF-8 (byte {error.start + 1}); re-encode it") from error


def read_text(flag: str, name: str) -> str:
    """A file of UTF-8, or stdin."""
    data = read_bytes(flag, name)
    try:
        return decode(data)
    except UserError as error:
        raise UserError(f"--{flag} {name}: {error}") from error


def read_file(args: argparse.Namespace, target: Target, settings: dict[str, Any]) -> Iterator[Job]:
    """A prompt a line, or a JSON object a line: when the name says .jsonl, or the first line is one."""
    name = args.prompt_file
    data = read_bytes("prompt_file", name)
    if kind := json_over_lines(data):
        raise UserError(
            f'--prompt_file {name} holds {kind}; write each object with "prompt" or "messages" on a line of its own '
            '(jq -c ".[]?" of an array, jq -c . of an object)'
        )
    is_json = name.endswith(".jsonl") or holds_object(data.lstrip().split(b"\n", 1)[0])
    for number, line in enumerate(data.split(b"\n"), 1):  # not at form feeds, as splitlines would
        try:
            text = decode(line).removesuffix("\r")
            if text.strip():
                own = parse(text, args.num_beams > 1) if is_json else {"prompt": text}
                yield make_job(own, args, target, settings)
        except UserError as error:
            said = " ".join(f"--prompt_file {name}, line {number}: {error}".split())
            if not args.skip_bad_lines:
                raise UserError(said) from error
            log(f"warning: {said}")


def json_over_lines(data: bytes) -> str:
    """What a file is that holds one JSON array or one object of several lines, as other programs write them, or ""."""
    if data.strip()[:1] not in (b"[", b"{"):
        return ""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    if isinstance(value, list):
        return "a JSON array" if all(isinstance(item, (dict, str)) for item in value) else ""
    return "a JSON object of several lines" if b"\n" in data.strip() else ""


def holds_object(line: bytes) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not value.keys().isdisjoint(("prompt", "messages"))


def parse(line: str, searching: bool) -> dict[str, Any]:
    """The fields of a line of JSON, with the types that they should have."""
    try:
        own = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error}); correct it") from error
    if not isinstance(own, dict) or ("prompt" in own) == ("messages" in own):
        raise UserError('it is not a JSON object with either "prompt" or "messages"; give it one of them')
    if not isinstance(own.get("prompt", ""), str):
        raise UserError("prompt is not a string; correct it")
    messages = own.get("messages", [{"role": "", "content": ""}])
    if not (isinstance(messages, list) and messages and all(map(is_message, messages))):
        raise UserError('messages is not a list of objects like {"role": "user", "content": "text"}; correct it')
    if not isinstance(own.get("template_vars", {}), dict):
        raise UserError('template_vars is not an object like {"enable_thinking": false}; correct it')
    check_settings({name: value for name, value in own.items() if name not in OTHER_FIELDS})
    if searching and (sampled := [name for name in NO_BEAMS if name in own]):
        raise UserError(f"{sampled[0]} does not go with --num_beams; leave one out")
    return own


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and is_content(value.get("content"))


def is_content(value: Any) -> bool:
    """A text, or a list of parts that are texts or images: [{"type": "text", "text": "..."}, {"type": "image", "image":
    "a.jpg"}, {"type": "image_url", "image_url": {"url": "data:..."}}]."""
    return isinstance(value, str) or (isinstance(value, list) and all(map(is_part, value)))


def is_part(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image", "image_url"):
        return False
    held = part.get(kind)
    return isinstance(held.get("url") if kind == "image_url" and isinstance(held, dict) else held, str)


def make_job(own: dict[str, Any], args: argparse.Namespace, target: Target, settings: dict[str, Any]) -> Job:
    """The job of a prompt with fields of its own: "prompt" or "messages", "id", "template_vars" and settings."""
    if own.get("prompt") == "" and not args.image:
        raise UserError("the prompt is empty; give it some text")
    messages = own.get("messages")
    if "template_vars" in own and messages is None and not args.chat:
        raise UserError("template_vars are for messages; add --chat, or leave them out")
    if messages is None and (args.chat or args.image):
        content = own["prompt"]
        if args.image:
            from images import with_images

            content = with_images(content, args.image)
        messages = [{"role": "user", "content": content}]
        if args.system is not None:
            messages.insert(0, {"role": "system", "content": args.system})
    images: tuple[ImageInput, ...] = ()
    if messages is None:
        text = own["prompt"]
        prompt = target.tokenizer.encode(text)
    else:
        variables = (args.template_vars or {}) | own.get("template_vars", {})
        text, prompt, images = encode_chat(target, read_images(messages, target), variables, target.tokenizer.encode)
    if not own.keys().isdisjoint(GRAMMARS):
        settings = settings | dict.fromkeys(GRAMMARS)  # the line's takes the place of any other
    settings = settings | {name: value for name, value in own.items() if name in SETTINGS}
    return Job(make_request(target, prompt, settings, images), text, {"id": own["id"]} if "id" in own else {})


def image_options(folder: Path, config: ModelConfig) -> "ImageOptions | None":
    """How a checkpoint's model wants images, if it has eyes."""
    if config.vision is None:
        return None
    from images import load_options

    return load_options(folder, config.vision)


def read_images(messages: list[dict[str, Any]], target: Target) -> list[dict[str, Any]]:
    """The messages, with the images that they name read."""
    if not holds_images(messages):
        return messages
    from images import read_parts

    return read_parts(messages, target.images)


def holds_images(messages: list[dict[str, Any]]) -> bool:
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return any(isinstance(part, dict) and part.get("type") != "text" for content in contents for part in content)


def check_draft(tokenizer: Tokenizer, draft: Tokenizer) -> None:
    """A draft model's tokens have to be the target's."""
    mine, theirs = tokenizer.backend.get_vocab(), draft.backend.get_vocab()
    if mine != theirs:
        differ = len(mine.items() ^ theirs.items())
        raise UserError(
            f"the draft model's tokenizer is not the model's: they differ in {differ} tokens; "
            "use a draft from the same family"
        )
