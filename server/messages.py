"""The messages and tools of OpenAI's chat API -> what chat templates take. UserError for what is wrong in them.

messages = check_messages(body["messages"], form)
tools = check_tools(body.get("tools"))
choice = check_tool_choice(body.get("tool_choice"), tools)
prompt = tokenizer.apply_chat_template(messages, variables={"tools": template_tools(tools, choice)})
"""

import hashlib
import json
import re
from typing import Any

from errors import UserError
from server.toolcalls import NAME

MAX_IMAGES = 64  # of a request: each may be as large as ever, or have to be fetched
ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS = {  # beside "role" and "content"
    "system": ("name",),
    "user": ("name",),
    "assistant": ("name", "tool_calls", "reasoning_content"),
    "tool": ("name", "tool_call_id"),
}


def check_messages(messages: Any, form: str | None = None, sees: bool = False) -> list[dict[str, Any]]:
    """Messages as templates take them: contents are text, a developer is the system, arguments of tool calls are
    objects. Fields that are null or empty are left out. UserError, naming the field, for what is no message.

    sees: a user's content may have images, and is then a list of parts. form: `detect_form`'s. Mistral's templates want
    ids of nine letters and digits: others are replaced, the same id by the same one each time. Llama 3's take one call
    a message: several become several messages, each with its result.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of at least one message; give it one")
    checked = [check_message(message, f"messages[{i}]", sees) for i, message in enumerate(messages)]
    contents = [message["content"] for message in checked if isinstance(message["content"], list)]
    images = sum(part["type"] == "image_url" for content in contents for part in content)
    if images > MAX_IMAGES:
        raise UserError(f"messages have {images} images, more than {MAX_IMAGES}; send fewer")
    if form in ("mistral", "mistral_args"):
        for message in checked:
            shorten_ids(message)
    if form == "llama3":
        checked = with_single_calls(checked)
    return checked


def check_message(message: Any, path: str, sees: bool = False) -> dict[str, Any]:
    """One message as templates take it. `path`: what errors call it."""
    if not isinstance(message, dict):
        raise UserError(f"{path} is {shown(message)}, not an object; give it a role and a content")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{path}.role is {shown(role)}; use one of {', '.join(ROLES)}")
    role = "system" if role == "developer" else role
    given = {name: value for name, value in message.items() if not is_empty(value)}
    for name in given:
        if name not in ("role", "content", *FIELDS[role]):
            raise UserError(f"{path}.{str(name)[:80]} is not supported in a message of the {role}; leave it out")
    content = message.get("content")
    checked = {"role": role}
    if content is None:
        if role != "assistant":
            raise UserError(f"{path}.content is missing; give it a string or a list of text parts")
        content = ""  # templates add to it
    checked["content"] = check_content(content, f"{path}.content", sees and role == "user")
    for name in ("name", "reasoning_content", "tool_call_id"):
        if name in given:
            checked[name] = check_string(given[name], f"{path}.{name}")
    if role == "tool" and "tool_call_id" not in checked:
        raise UserError(f"{path}.tool_call_id is missing; give the id of the call that this is the result of")
    if "tool_calls" in given:
        calls = given["tool_calls"]
        if not isinstance(calls, list):
            raise UserError(f"{path}.tool_calls is {shown(calls)}, not a list; correct it")
        checked["tool_calls"] = [check_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return checked


def check_content(content: Any, path: str, sees: bool = False) -> str | list[dict[str, Any]]:
    """The text of a content that is a string or a list of parts; the parts where there are images among them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{path} is {shown(content)}; give a string or a list of text parts")
    parts, has_images = [], False
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url" and sees:
            parts.append(
                {"type": "image_url", "image_url": check_image(part.get("image_url"), f"{path}[{i}].image_url")}
            )
            has_images = True
        elif kind == "text":
            parts.append({"type": "text", "text": check_string(part.get("text"), f"{path}[{i}].text")})
        else:
            known = "'text' or 'image_url'" if sees else "'text'"
            raise UserError(f"{path}[{i}] is {shown(kind or part)}; this model takes parts of type {known} only")
    return parts if has_images else "".join(part["text"] for part in parts)


def check_image(image: Any, path: str) -> dict[str, str]:
    """A URL, and in how much detail the image is to be seen."""
    image = {"url": image} if isinstance(image, str) else image
    if not isinstance(image, dict):
        raise UserError(f"{path} is {shown(image)}, not an object; give it a url")
    detail = image.get("detail") or "auto"
    if detail not in ("auto", "low", "high"):
        raise UserError(f"{path}.detail is {shown(detail)}; use 'auto', 'low' or 'high'")
    return {"url": check_string(image.get("url"), f"{path}.url"), "detail": detail}


def check_call(call: Any, path: str) -> dict[str, Any]:
    """A call of the history, its arguments parsed."""
    if not isinstance(call, dict):
        raise UserError(f"{path} is {shown(call)}, not an object; correct it")
    if call.get("type", "function") != "function":
        raise UserError(f"{path}.type is {shown(call['type'])}; only 'function' is supported")
    function = call.get("function")
    if not isinstance(function, dict):
        raise UserError(f"{path}.function is {shown(function)}, not an object; correct it")
    name = check_string(function.get("name"), f"{path}.function.name")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=no_constant)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(f"{path}.function.arguments is not valid JSON ({reason}); correct it") from error
    if not isinstance(arguments, dict):
        raise UserError(f"{path}.function.arguments is {shown(arguments)}, not a JSON object; correct it")
    checked: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if not is_empty(call.get("id")):
        checked["id"] = check_string(call["id"], f"{path}.id")
    return checked


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Functions, each with a description and parameters, which templates count on, and "strict" where it is true; none
    is []. UserError, naming the field, for what is no such tool."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise UserError(f"tools is {shown(tools)}, not a list; correct it")
    checked = [check_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in checked]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"tools[{i}].function.name is {name!r} like another tool's; give each a name of its own")
    return checked


def check_tool(tool: Any, path: str) -> dict[str, Any]:
    """One tool as `check_tools` returns it."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise UserError(f'{path} is not {{"type": "function", "function": {{...}}}}; correct it')
    function = {name: value for name, value in tool["function"].items() if value is not None}
    for name in function:
        if name not in ("name", "description", "parameters", "strict"):
            raise UserError(f"{path}.function.{str(name)[:80]} is not supported; leave it out")
    name = check_string(function.get("name"), f"{path}.function.name")
    if not re.fullmatch(NAME, name):
        raise UserError(f"{path}.function.name is {shown(name)}; use 1 to 64 of the characters a-z A-Z 0-9 _ -")
    description = check_string(function.get("description", ""), f"{path}.function.description")
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise UserError(f'{path}.function.parameters must be a JSON schema of "type": "object"; correct it')
    if not isinstance(parameters.get("properties", {}), dict):
        raise UserError(f"{path}.function.parameters.properties is not an object; correct it")
    if not isinstance(function.get("strict", False), bool):
        raise UserError(f"{path}.function.strict is {shown(function['strict'])}; give true or false")
    parameters = {"type": "object", "properties": {}} | parameters
    checked = {"name": name, "description": description, "parameters": parameters}
    if function.get("strict"):
        checked["strict"] = True
    return {"type": "function", "function": checked}


def check_tool_choice(tool_choice: Any, tools: list[dict[str, Any]]) -> str | dict[str, Any]:
    """ "none", "auto", "required" or {"type": "function", "function": {"name": ...}} of one of the tools."""
    if tool_choice is None:
        return "auto" if tools else "none"
    if isinstance(tool_choice, dict):
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if tool_choice.get("type") != "function" or not isinstance(name, str):
            raise UserError('tool_choice is not {"type": "function", "function": {"name": "..."}}; correct it')
        if name not in [tool["function"]["name"] for tool in tools]:
            raise UserError(f"tool_choice names {shown(name)}, which is not among the tools; name one of them")
        return {"type": "function", "function": {"name": name}}
    if tool_choice not in ("none", "auto", "required"):
        raise UserError(f"tool_choice is {shown(tool_choice)}; use 'none', 'auto', 'required' or a function's name")
    if tool_choice == "required" and not tools:
        raise UserError("tool_choice is 'required', but there are no tools; give some")
    return tool_choice


def template_tools(tools: list[dict[str, Any]], tool_choice: str | dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools as chat templates take them, without `strict`, which no model knows; None where it may use none."""
    if not tools or tool_choice == "none":
        return None
    told = ("name", "description", "parameters")
    return [{"type": "function", "function": {name: tool["function"][name] for name in told}} for tool in tools]


# ---------------------------------------------------------------------------------------------------------------------
# What some templates insist on


def shorten_ids(message: dict[str, Any]) -> None:
    """Replaces a message's ids of tool calls by ids that Mistral's templates take."""
    for call in message.get("tool_calls", []):
        if "id" in call:
            call["id"] = short_id(call["id"])
    if "tool_call_id" in message:
        message["tool_call_id"] = short_id(message["tool_call_id"])


def short_id(call_id: str) -> str:
    """Nine letters and digits: the id itself, or what stands for it."""
    if re.fullmatch("[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="surrogatepass")).hexdigest()[:9]


def with_single_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A message for each call, its result behind it, then the results that belong to none of them."""
    result, i = [], 0
    while i < len(messages):
        message = messages[i]
        i += 1
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            result.append(message)
            continue
        answers = []
        while i < len(messages) and messages[i]["role"] == "tool":
            answers.append(messages[i])
            i += 1
        for number, call in enumerate(calls):
            own = [answer for answer in answers if answer["tool_call_id"] == call.get("id")]
            answers = [answer for answer in answers if answer not in own]
            result.append((message if number == 0 else {"role": "assistant", "content": ""}) | {"tool_calls": [call]})
            result += own
        result += answers
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Values


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: clients send back all the fields of an answer."""
    return value is None or value in ("", [], {})


def check_string(value: Any, path: str) -> str:
    """The value, if it is a string."""
    if not isinstance(value, str):
        raise UserError(f"{path} is {shown(value)}, not a string; correct it")
    return value


def no_constant(name: str) -> None:
    """For json.loads: NaN and the infinities are no JSON."""
    raise ValueError(f"{name} is no JSON")


def shown(value: Any) -> str:
    """A value in an error message: short, and in one line."""
    if value is None:
        return "missing"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."
