"""Grammars that force tool calls, in the form that the model itself writes.

text = tool_grammar(tools, "required", detect_form(tokenizer.chat_template), tokenizer)
constraint = grammars.lark(text)
"""

import json
import re
from typing import Any

from server.toolcalls import MARKS, THINKING
from tokenizer import Tokenizer


def tool_grammar(
    tools: list[dict[str, Any]],
    tool_choice: str | dict[str, Any],
    form: str,
    tokenizer: Tokenizer,
    *,
    parallel: bool = True,
    thinking: str | None = None,
    open_mark: str | None = None,
) -> str | None:
    """The grammar, in llguidance's dialect of Lark, of an answer that must be calls: of any tool where `tool_choice` is
    "required", of the one that it names; None where it forces none. Arguments are held to the tools' parameters; what
    llguidance does not know in a schema is not enforced unless the tool is `strict`, and then an error there.

    thinking, open_mark: what `thinking_mark` says of the template and `open_thinking` of the prompt: the model may
    reason first. Llama 3's templates take one call an answer, so no more are allowed.
    """
    if isinstance(tool_choice, dict):
        name = tool_choice["function"]["name"]
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    elif tool_choice != "required":
        return None
    rules = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        if form == "mistral_args":
            body = f"{literal(function['name'])} {terminal('[ARGS]', tokenizer)} arguments_{i}"
        else:
            key = "parameters" if form == "llama3" else "arguments"
            head = literal(f'{{"name": "{function["name"]}", "{key}": ')
            body = f'{head} arguments_{i} "}}"'
        rules += [f"call_{i}: {body}", f"arguments_{i}: %json {arguments_schema(function)}"]
    opening, closing = (terminal(mark, tokenizer) for mark in (MARKS[form][0], MARKS[form][-1]))
    first, more, last = {
        "hermes": (rf'{opening} "\n" call "\n" {closing}', rf'"\n" {opening} "\n" call "\n" {closing}', ""),
        "llama3": ("call", "", ""),
        "mistral": (f'{opening} " "? "[" call', '", " call', '"]"'),
        "mistral_args": (f"{opening} call", f"{opening} call", ""),
    }[form]
    repeated = f"({more})*" if more and parallel else ""
    start = f"{first} {repeated} {last}".strip()
    if mark := open_mark or thinking:
        start = f"thought {start}" if open_mark else f"({terminal(mark, tokenizer)} thought)? {start}"
        rules += thought_rules(THINKING[mark], tokenizer)
    choices = " | ".join(f"call_{i}" for i in range(len(tools)))
    return "\n".join([f"start: {start}", f"call: {choices}", *rules]) + "\n"


def thought_rules(closing: str, tokenizer: Tokenizer) -> list[str]:
    """Any text up to the mark, and line breaks behind it."""
    if special_id(closing, tokenizer) is None:
        until = ["until[lazy]: /(.|\\n)*" + re.escape(closing).replace("/", "\\/") + "/"]
    else:
        until = [f"until: /(.|\\n)*/ {terminal(closing, tokenizer)}"]
    return ["thought: until LINES?", r"LINES: /\n{1,2}/", *until]


def special_id(mark: str, tokenizer: Tokenizer) -> int | None:
    """The id of a mark that is a special token, None for one that is text."""
    token_id = tokenizer.backend.token_to_id(mark)
    return token_id if token_id in tokenizer.special_ids else None


def terminal(mark: str, tokenizer: Tokenizer) -> str:
    """A mark in a grammar: a special token by its id, anything else as text."""
    token_id = special_id(mark, tokenizer)
    return literal(mark) if token_id is None else f"<[{token_id}]>"


def literal(text: str) -> str:
    """A text in a grammar."""
    return json.dumps(text)


def arguments_schema(function: dict[str, Any]) -> str:
    """JSON as the templates write it: in one line, with or without a space behind `,` and `:`."""
    options = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
    if not function.get("strict"):
        options["lenient"] = True
    return json.dumps(function["parameters"] | {"x-guidance": options})
