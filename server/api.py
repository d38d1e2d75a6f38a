"""What a client may ask for: the bodies of OpenAI's API, checked, and the engine's requests that they mean.

    body = ChatBody.model_validate(...)         # pydantic refuses what is no such body
    work = chat_work(body, model)               # UserError for what makes no sense, or does not fit
    work.requests                               # engine.Request, one for each choice

Beside OpenAI's fields there are those of other servers, by their usual names: top_k, min_p, repetition_penalty,
min_tokens, ignore_eos, chat_template_kwargs, guided_json, guided_regex, guided_grammar. A field that is null counts as
absent. What is absent is as generation_config.json says, or else as OpenAI has it.
"""

import argparse
import itertools
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator
from typing_extensions import TypeAliasType

from engine import Request
from errors import UserError
from grammar import Constraint, Matcher
from prompts import (
    GRAMMARS,
    SETTINGS,
    Target,
    default_settings,
    draw_seed,
    encode_chat,
    holds_images,
    make_request,
    told,
)
from server.messages import check_messages, check_tool_choice, check_tools, template_tools
from server.toolcalls import CallReader, detect_form, open_thinking, shown_ids, thinking_mark
from server.toolgrammar import tool_grammar
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from images import ImageInput

MAX_LOGPROBS = 20
MAX_CHOICES = 128  # of a request
# Where max_tokens is absent: of /v1/completions, and of a chat that a model without a chat template finds no end of.
COMPLETION_TOKENS, PLAIN_TOKENS = 16, 200
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000  # every token is compared with all of them
MAX_BIASES = 1024
MAX_FIELDS = 100  # more than there are
# Pydantic would list all that is wrong in millions of entries. (Python cannot hash the annotations, which unions want.)
Texts = TypeAliasType("Texts", Annotated[list[str], FailFast()])
Ids = TypeAliasType("Ids", Annotated[list[int], FailFast()])
Prompts = TypeAliasType("Prompts", Annotated[list[Ids], FailFast()])
Biases = TypeAliasType("Biases", Annotated[dict[str, float], FailFast()])
NAMES = {  # ours -> a client's
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "json_schema": "response_format",
    "regex": "guided_regex",
    "grammar": "guided_grammar",
}


class Body(BaseModel):
    """A JSON object of known fields, of the types that they have. Those that are null are absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data: Any) -> Any:
        """The fields that are not null; of very many, which cannot all be known, some."""
        if not isinstance(data, dict):
            return data
        given = ((name, value) for name, value in data.items() if value is not None)
        return dict(itertools.islice(given, MAX_FIELDS))


class StreamOptions(Body):
    """Obfuscation pads the events of a stream, so that their sizes say nothing."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Body):
    """A schema; what it is called changes nothing, and it is always strict."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    """What the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingBody(Body):
    """What both endpoints take."""

    model: str = ""  # BASE:NAME has an adapter; otherwise there is one, whatever a client calls it
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop: str | Texts | None = None
    seed: int | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    # Nothing here depends on these.
    user: str = ""
    metadata: Annotated[dict[str, str], FailFast()] = {}
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    service_tier: Literal["auto", "default"] = "auto"
    store: Literal[False] = False


class ChatBody(SamplingBody):
    """A body of /v1/chat/completions."""

    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    modalities: Annotated[list[Literal["text"]], FailFast()] = ["text"]


class CompletionBody(SamplingBody):
    """A body of /v1/completions."""

    prompt: str | Texts | Ids | Prompts
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Literal[1] = 1


class TokenizeBody(Body):
    """A body of /tokenize: a prompt, or a chat as it would be rendered."""

    model: str = ""
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """A body of /detokenize."""

    model: str = ""
    tokens: Ids


@dataclass
class Model:
    """What is served; make_model makes one."""

    name: str
    target: Target
    settings: dict[str, Any]  # where a client gives none
    merges_system: bool  # into the user's first message
    form: str | None  # of its tool calls
    shown_ids: frozenset[int]  # special tokens that a reader of answers has to see
    most_characters: int  # of a prompt: all of its tokens would be the longest
    fetches_images: bool = False  # from URLs

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's."""
        return self.target.tokenizer

    @property
    def sees(self) -> bool:
        """Whether messages may have images: the chat template has to mark their places."""
        return self.target.images is not None and self.tokenizer.has_chat_template

    @property
    def names(self) -> list[str]:
        """What clients may call it: its own name is without an adapter."""
        return [self.name_of(adapter) for adapter in (None, *self.target.adapters)]

    def name_of(self, adapter: str | None) -> str:
        return self.name if adapter is None else f"{self.name}:{adapter}"

    def adapter(self, name: str) -> str | None:
        """Which one a client's name for the model means. UnknownModel for BASE:NAME without an adapter of that name;
        where there are no adapters, a colon may be part of any other name than the model's own."""
        base, _, adapter = name.rpartition(":")
        if name == self.name or not base or not (self.target.adapters or base == self.name):
            return None
        if adapter not in self.target.adapters:
            raise UnknownModel(f"model {name[:80]!r} does not exist; there is {', '.join(self.names)}")
        return adapter


def make_model(
    name: str,
    target: Target,
    recommended: dict[str, Any],
    merges_system: bool = False,
    fetches_images: bool = False,
) -> Model:
    """The model that clients see. `recommended`: what its generation_config.json says."""
    settings = default_settings(argparse.Namespace(**dict.fromkeys(SETTINGS), num_beams=1), recommended)
    if settings["temperature"] is None:
        settings["temperature"] = 1.0
    tokenizer = target.tokenizer
    form = detect_form(tokenizer.chat_template)
    most_characters = target.limit * max(map(len, tokenizer.backend.get_vocab()))
    shown = shown_ids(tokenizer, form)
    return Model(name, target, settings, merges_system, form, shown, most_characters, fetches_images)


@dataclass
class Work:
    """What a body asks for: a request for each choice, those of one prompt one after the other."""

    requests: list[Request]
    logprobs: int | None = None  # so many of the likeliest tokens, and the tokens' own
    readers: list[CallReader] = field(default_factory=list)  # of a chat: one for each request
    echoed: list[str] = field(default_factory=list)  # what the choices' texts begin with
    drops_text: bool = False  # none was asked for: only the prompt's tokens


def chat_work(body: ChatBody, model: Model) -> Work:
    """What a chat asks for. UserError for what makes no sense, or does not fit."""
    if body.top_logprobs and not body.logprobs:
        raise UserError("top_logprobs needs logprobs; set that to true")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise UserError("max_tokens and max_completion_tokens do not go together; leave the first one out")
    tools = check_tools(body.tools)
    choice = check_tool_choice(body.tool_choice, tools)
    text, prompt, images = render(body, model, tools, choice)
    settings = settings_of(body, model)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if wanted is None and not model.tokenizer.has_chat_template:
        wanted = PLAIN_TOKENS
    if choice == "none":
        tools = []
    constrained = any(settings[name] is not None for name in GRAMMARS)
    mark = None if constrained else open_thinking(text)
    if tools:
        if model.form is None:
            raise UserError("tools: this model's chat template has no form of tool calls that is known here")
        if constrained:
            raise UserError("tools do not go together with a format of the answer; leave one out, or tool_choice none")
        thinking = thinking_mark(model.tokenizer.chat_template)
        parallel = body.parallel_tool_calls
        settings["grammar"] = tool_grammar(
            tools, choice, model.form, model.tokenizer, parallel=parallel, thinking=thinking, open_mark=mark
        )
    try:
        requests = requests_of(prompt, wanted, settings, body.n, model.target, images)
    except UserError as error:
        if tools and str(error).startswith("grammar "):
            raise UserError(f"tools: their {error}") from error
        raise
    requests = [replace(request, shown_ids=model.shown_ids) for request in requests]
    readers = [CallReader(model.form, tools, open_mark=mark, parallel=body.parallel_tool_calls) for _ in requests]
    return Work(requests, (body.top_logprobs or 0) if body.logprobs else None, readers)


def completion_work(body: CompletionBody, model: Model) -> Work:
    """What a completion asks for. UserError for what makes no sense, or does not fit."""
    settings = settings_of(body, model)
    wanted = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    drops_text = wanted == 0 and body.echo  # which asks for the prompt's log-probabilities alone
    requests, echoed = [], []
    prompts = prompts_of(body.prompt)
    if len(prompts) * body.n > MAX_CHOICES:
        raise UserError(
            f"prompt: {len(prompts)} prompts, {body.n} choices each, are more than {MAX_CHOICES}; send fewer"
        )
    for prompt in prompts:
        ids = prompt_ids(prompt, model)
        requests += requests_of(ids, 1 if drops_text else wanted, settings, body.n, model.target)
        if body.echo:
            echoed += [prompt if isinstance(prompt, str) else model.tokenizer.decode(ids)] * body.n
    if body.echo and body.logprobs is not None:
        requests = [replace(request, echo=True) for request in requests]
    return Work(requests, body.logprobs, echoed=echoed, drops_text=drops_text)


def render(
    body: ChatBody | TokenizeBody, model: Model, tools: list[dict], choice: str | dict[str, Any]
) -> "tuple[str, list[int], tuple[ImageInput, ...]]":
    """The text, the tokens and the images of a chat's prompt. A model without a chat template continues what was
    said."""
    messages = check_messages(body.messages, model.form, model.sees)
    if model.merges_system:
        messages = merged_system(messages)
    if not model.tokenizer.has_chat_template:
        if tools and choice != "none":
            raise UserError("tools: this model has no chat template for them; leave them out")
        text = "\n".join(message["content"] for message in messages)
        return text, encode(text, model), ()
    if holds_images(messages):
        from images import read_parts  # Pillow takes a while to import
        from server.pictures import read_url

        messages = read_parts(messages, model.target.images, partial(read_url, may_fetch=model.fetches_images))
    variables = body.chat_template_kwargs | {"tools": template_tools(tools, choice)}
    return encode_chat(model.target, messages, variables, partial(encode, model=model))


def token_ids(body: TokenizeBody, model: Model) -> list[int]:
    """The tokens of a text, or of a chat as it would be prefilled."""
    if (body.prompt is None) == (body.messages is None):
        raise UserError("prompt or messages must be given, one of them")
    if body.prompt is not None:
        return model.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    tools = check_tools(body.tools)
    return render(body, model, tools, check_tool_choice(None, tools))[1]


def merged_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without system messages: what those say stands at the beginning of the user's first one."""
    said = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    if not said:
        return messages
    first = next((i for i, message in enumerate(others) if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": "\n\n".join(said)}, *others]
    content = others[first]["content"]
    if isinstance(content, list):  # of parts
        content = [{"type": "text", "text": "\n\n".join([*said, ""])}, *content]
    else:
        content = "\n\n".join([*said, content])
    others[first] = others[first] | {"content": content}
    return others


def prompts_of(prompt: str | list) -> list[str | list[int]]:
    """OpenAI's four forms of a prompt, as a list of texts or token ids."""
    if isinstance(prompt, list) and not prompt:
        raise UserError("prompt is an empty list; give it some text")
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def prompt_ids(prompt: str | list[int], model: Model) -> list[int]:
    """The tokens of one of the prompts. UserError for ids that the model lacks."""
    if isinstance(prompt, str):
        return encode(prompt, model)
    check_ids("prompt", prompt, model)
    return prompt


def encode(text: str, model: Model, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a prompt. ContextExceeded for megabytes that cannot fit: to count their tokens would take long."""
    if len(text) > model.most_characters:
        raise ContextExceeded(
            f"the prompt has {len(text)} characters, more than the {model.target.limit} tokens of the "
            f"{model.target.limited_by} can hold; shorten the prompt"
        )
    return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def check_ids(name: str, ids: list[int], model: Model) -> None:
    """UserError that names the field, where an id is none of the model's."""
    size = model.target.vocab_size
    unknown = next((i for i in ids if not 0 <= i < size), None)
    if unknown is not None:
        raise UserError(f"{name}: there is no token {str(unknown)[:20]}; the model's ids are 0 to {size - 1}")


def settings_of(body: SamplingBody, model: Model) -> dict[str, Any]:
    """A body's settings by our names, the model's where it has none."""
    given = {name: getattr(body, NAMES.get(name, name), None) for name in SETTINGS}
    given["max_new_tokens"] = None  # comes with the prompt
    given["adapter"] = model.adapter(body.model)
    schema = schema_of(body.response_format)
    if schema is not None and body.guided_json is not None:
        raise UserError("response_format and guided_json do not go together; leave one out")
    given["json_schema"] = body.guided_json if schema is None else schema
    biases = body.logit_bias or {}
    if len(biases) > MAX_BIASES:
        raise UserError(f"logit_bias has {len(biases)} entries, and at most {MAX_BIASES} are possible; give fewer")
    for name in biases:
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise UserError(f"logit_bias: {name[:20]!r} is not a token id; correct it")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP_LENGTH:
        raise UserError(f"stop: at most {MAX_STOPS} strings of {MAX_STOP_LENGTH} characters are possible; give fewer")
    if body.seed is not None:
        given["seed"] = body.seed % 2**63  # OpenAI's may be negative
    return model.settings | {name: value for name, value in given.items() if value is not None}


def schema_of(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema that a response_format means, None where it means text."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise UserError("response_format.json_schema is missing; give it a schema")
    return wanted.json_schema.schema_


def requests_of(
    prompt: list[int],
    wanted: int | None,
    settings: dict[str, Any],
    n: int,
    target: Target,
    images: "tuple[ImageInput, ...]" = (),
) -> list[Request]:
    """n requests, whose seeds follow one another, for `wanted` new tokens, or as many as there is room for."""
    room = target.limit - len(prompt)
    if room < 1:
        raise ContextExceeded(
            f"the prompt has {len(prompt)} tokens{told(images)}, and the {target.limited_by} holds {target.limit}, of "
            "which at least one is to be new; shorten the prompt"
        )
    new = room if wanted is None else min(wanted, room)
    seed = draw_seed() if settings["seed"] is None else settings["seed"]
    request = make_request(target, prompt, settings | {"max_new_tokens": new, "seed": seed}, images)
    params = request.params
    requests = [replace(request, params=replace(params, seed=(seed + i) % 2**63)) for i in range(n)]
    return [replace(request, grammar=request.grammar and Started(request.grammar)) for request in requests]


class ContextExceeded(UserError):
    """A prompt that is too long."""


class UnknownModel(UserError):
    """A model that there is not."""


class Started:
    """A constraint whose matcher is made already, in the thread of the request and not in the one that computes. Other
    ranks get the constraint itself."""

    def __init__(self, constraint: Constraint):
        self.constraint, self.matcher = constraint, constraint.start()

    def __reduce__(self) -> tuple:
        return self.constraint.__reduce__()

    def start(self) -> Matcher:
        """The matcher; a Started is for one text."""
        return self.matcher
