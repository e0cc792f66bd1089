"""Messages as OpenAI's API has them -> messages as models' templates expect them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from multitensor.server.errors import bad_request
from multitensor.server.schemas import ContentPart, Message, Tool


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Roles, content and tool calls as templates know them. Raises ApiError for what is no text."""
    return [_message(message, f"messages.{number}") for number, message in enumerate(messages)]


def template_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    return [tool.model_dump(exclude_none=True) for tool in tools] if tools else None


def _message(message: Message, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        # the name that OpenAI gave to "system" later; templates know the older one
        "role": "system" if message.role == "developer" else message.role,
        "content": _content(message, where),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    if message.tool_calls:
        if message.role != "assistant":
            raise bad_request(f"{where}: only an assistant's message can have tool_calls", "messages")
        found["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                **({"id": call.id} if call.id is not None else {}),
            }
            for call in message.tool_calls
        ]
    return found


def _content(message: Message, where: str) -> str:
    content = message.content if message.content is not None else message.refusal
    if content is None:
        if message.role == "assistant":
            return ""
        raise bad_request(f"{where}: a message of role {message.role} needs content", "messages")
    if isinstance(content, str):
        return content
    return "\n".join(_part(part, f"{where}.content.{number}") for number, part in enumerate(content))


def _part(part: ContentPart, where: str) -> str:
    text = {"text": part.text, "refusal": part.refusal}.get(part.type)
    if part.type not in ("text", "refusal"):
        raise bad_request(f"{where}: type {part.type[:40]!r} is not supported: this model reads text only", "messages")
    if text is None:
        raise bad_request(f"{where}: a part of type {part.type} needs the field {part.type}", "messages")
    return text


def _arguments(text: str) -> Any:
    """Templates write arguments as JSON themselves, so they get the object, not its text; the text where it is none,
    as with NaN, and with 1e999, which JSON has but could not be written again."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
