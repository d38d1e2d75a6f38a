"""Chat templates: messages -> the text of a prompt, exactly as transformers renders it.

text = render_chat(source, [{"role": "user", "content": "Hello"}], {"add_generation_prompt": True})
"""

import contextlib
import functools
import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from errors import UserError


def render_chat(source: str, messages: list[dict], variables: dict[str, Any]) -> str:
    """The prompt that a template makes of a chat. UserError where the template is broken or refuses these messages."""
    template = compile_template(source)
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    variables = {"tools": None, "documents": None, **variables}
    if any(isinstance(message.get("content"), list) for message in messages):
        messages = fit_contents(template, messages, variables)
    try:
        return template.render(variables | {"messages": messages})
    except Exception as error:  # a template is code of somebody else's: it can raise anything
        raise UserError(f"the model's chat template does not take this chat: {error}") from error


def fit_contents(template: jinja2.Template, messages: list[dict], variables: dict[str, Any]) -> list[dict]:
    """Contents in parts as they are for a template that goes through the parts, joined to strings for any other.

    It is tried out: a template of the other kind raises, leaves the parts out, or writes the list as Python or JSON.
    """
    text = "text of a part"
    probe = [message | {"content": [{"type": "text", "text": text}]} for message in messages]
    with contextlib.suppress(Exception):
        rendered = template.render(variables | {"messages": probe})
        if text in rendered and repr(text) not in rendered and json.dumps(text) not in rendered:
            return messages
    return [m | {"content": join_parts(m["content"])} if isinstance(m.get("content"), list) else m for m in messages]


def join_parts(parts: list[dict]) -> str:
    """The text of a message. UserError where a part is something else."""
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise UserError("the model's chat template takes text only; leave out the other parts of the messages")
    return "".join(texts)


@functools.lru_cache(8)
def compile_template(source: str) -> jinja2.Template:
    """The template, in the sandbox and with the functions that transformers gives it. UserError where it is broken."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except Exception as error:  # RecursionError among them
        raise UserError(f"the model's chat template is broken: {error}; get another or correct it") from error


class Generation(Extension):
    """{% generation %} marks the assistant's words for training. Here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
