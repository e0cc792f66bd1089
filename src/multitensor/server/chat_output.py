"""What a model writes -> OpenAI's messages and deltas: reasoning, tool calls and plain content told apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from multitensor.engine.request import CompletionOutput
from multitensor.server.tool_parsers import ToolParser

Delta = dict[str, Any]  # a part of an assistant's message: content, reasoning_content or tool_calls


class OutputParser(Protocol):
    """Text in as it comes, deltas out. `called`: whether tool calls came, whole ones."""

    @property
    def called(self) -> bool: ...
    def push(self, text: str) -> list[Delta]: ...
    def finish(self) -> list[Delta]: ...


class PlainParser:
    """Everything is content."""

    called = False

    def push(self, text: str) -> list[Delta]:
        return [{"content": text}] if text else []

    def finish(self) -> list[Delta]:
        return []


class OneCall:
    """Lets no tool call through but the first."""

    def __init__(self, inner: ToolParser) -> None:
        self._inner = inner

    @property
    def called(self) -> bool:
        return self._inner.completed > 0

    def push(self, text: str) -> list[Delta]:
        return self._first(self._inner.push(text))

    def finish(self) -> list[Delta]:
        return self._first(self._inner.finish())

    def _first(self, deltas: list[Delta]) -> list[Delta]:
        return [delta for delta in deltas if all(call["index"] == 0 for call in delta.get("tool_calls", ()))]


class OnlyCalls:
    """Of an answer that its grammar holds to calls: anything else in it is the beginning of one that was cut off."""

    def __init__(self, inner: OutputParser) -> None:
        self._inner = inner

    @property
    def called(self) -> bool:
        return self._inner.called

    def push(self, text: str) -> list[Delta]:
        return self._calls(self._inner.push(text))

    def finish(self) -> list[Delta]:
        return self._calls(self._inner.finish())

    def _calls(self, deltas: list[Delta]) -> list[Delta]:
        return [delta for delta in deltas if "tool_calls" in delta]


class ChatChoice:
    """One continuation as it grows. `take` gives what is new in an output."""

    def __init__(self, index: int, parser: OutputParser) -> None:
        self.index = index
        self.ended = False
        self.n_tokens = 0  # of which the log-probabilities were given
        self._parser = parser

    def take(self, output: CompletionOutput) -> tuple[list[Delta], str | None]:
        """(the new deltas, the finish reason when this is the end)."""
        deltas = self._parser.push(output.delta) if output.delta else []
        if output.finish_reason is None:
            return deltas, None
        self.ended = True
        deltas += self._parser.finish()
        called = self._parser.called and output.finish_reason == "stop"
        return deltas, "tool_calls" if called else output.finish_reason


def whole_message(deltas: Iterable[Delta]) -> dict[str, Any]:
    """The message that the deltas make together."""
    texts: dict[str, list[str]] = {}
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                texts.setdefault(name, []).append(delta[name])
        for part in delta.get("tool_calls", ()):
            call = calls.setdefault(part["index"], {"id": None, "type": "function", "function": {"name": ""}})
            call["id"] = part.get("id") or call["id"]
            function = part.get("function", {})
            call["function"]["name"] = function.get("name") or call["function"]["name"]
            call["function"]["arguments"] = call["function"].get("arguments", "") + (function.get("arguments") or "")
    content = "".join(texts.get("content", ()))
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if calls and not content.strip() else content,
        "refusal": None,
    }
    if "reasoning_content" in texts:
        message["reasoning_content"] = "".join(texts["reasoning_content"])
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message
