"""One tool call as JSON or as Python: read a character at a time, or whole."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from typing import Any

ARGUMENT_KEYS = ("arguments", "parameters")
_CALL_KEYS = frozenset({"name", "type", "id", "function", *ARGUMENT_KEYS})


class JsonCall:
    """One object `{"name": ..., "arguments": {...}}`, a character at a time.

    names: those that make it a call; None: any. `started`: it is a call and its arguments have begun. `is_none`: it is
    no call. `ended`: the object is complete.
    """

    def __init__(self, names: Collection[str] | None) -> None:
        self.name = ""
        self.index = -1
        self.started = self.ended = self.is_none = False
        self._names = names
        self._text: list[str] = []
        self._told = 0  # characters of the arguments that were told
        self._arguments: list[str] = []
        self._in_arguments = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._string = ""  # the last string at depth 1, with its quotes
        self._key: str | None = None

    @classmethod
    def of_arguments(cls, name: str) -> JsonCall:
        """Of which only the arguments are written."""
        call = cls(None)
        call.name, call.started, call._in_arguments, call._depth = name, True, True, 1
        return call

    @property
    def complete(self) -> bool:
        """Whether it is a call whose arguments are all there."""
        return self.started and not self._in_arguments

    @property
    def index_given(self) -> bool:
        return self.index >= 0

    def push(self, text: str) -> int:
        """Takes characters up to the object's end; how many."""
        for number, char in enumerate(text):
            self._text.append(char)
            if self._in_arguments:
                self._arguments.append(char)
            self._take(char)
            if self.ended or self.is_none:
                return number + 1
        return len(text)

    def news(self) -> str:
        """What is new of the arguments."""
        text = "".join(self._arguments[self._told :])
        self._told = len(self._arguments)
        return text

    def whole(self) -> tuple[str, str] | None:
        """(name, arguments) of the ended object, if it is a call that was not told as it came."""
        try:
            call = call_of(json.loads("".join(self._text), strict=False))
        except (ValueError, RecursionError):
            return None
        return call if call is not None and (self._names is None or call[0] in self._names) else None

    def _take(self, char: str) -> None:
        if self._in_string:
            if self._depth == 1:
                self._string += char
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
            if self._depth == 1:
                self._string = char
        elif char in "{[":
            self._open(char)
        elif char in "}]":
            self._shut()
        elif self._depth == 1 and char == ":":
            self._set_key()
        elif self._depth == 1 and char == ",":
            self._end_value()

    def _open(self, char: str) -> None:
        if self._depth == 1 and char == "{" and self._key in ARGUMENT_KEYS and not self._arguments:
            self._in_arguments = True
            self._arguments.append(char)
            self.started = bool(self.name)
        self._depth += 1

    def _shut(self) -> None:
        self._depth -= 1
        if self._depth == 1 and self._in_arguments:
            self._in_arguments = False
            if len(self._text) == len(self._arguments):  # of_arguments
                self.ended = True
        elif self._depth == 0:
            self._end_value()
            self.ended = True

    def _set_key(self) -> None:
        self._key, self._string = _unquoted(self._string), ""
        if self._names is not None and self._key not in _CALL_KEYS and not self.started:
            self.is_none = True

    def _end_value(self) -> None:
        if self._key == "name" and not self.name:
            name = _unquoted(self._string) or ""
            if not name or (self._names is not None and name not in self._names):
                self.is_none = True
            else:
                self.name = name
                self.started = bool(self._arguments)
        self._key = None


def _unquoted(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def call_of(value: Any) -> tuple[str, str] | None:
    """(name, arguments as JSON) of an object that is a call."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments: Any = next((value[key] for key in ARGUMENT_KEYS if key in value), {})
    if isinstance(arguments, str):
        return value["name"], arguments
    return value["name"], json.dumps({} if arguments is None else arguments, ensure_ascii=False)


def python_calls(code: str, names: Collection[str]) -> list[tuple[str, str]]:
    """(name, arguments) of Python calls with literal keyword arguments: `f(a=1)`, one a line, or `[f(a=1), g()]`.
    Empty if anything else is in it."""
    try:
        body = ast.parse(code.strip()).body
        values = [statement.value for statement in body if isinstance(statement, ast.Expr)]
        if len(values) == 1 and isinstance(values[0], ast.List | ast.Tuple):
            values = values[0].elts
        calls = [_python_call(value, names) for value in values]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []
    return calls if len(calls) >= len(body) else []


def _python_call(value: ast.expr, names: Collection[str]) -> tuple[str, str]:
    """Raises ValueError for what is no such call, TypeError for what JSON cannot hold."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "print" and value.args:
        value = value.args[0]  # Gemma's models print what they call
    if not isinstance(value, ast.Call) or value.args:
        raise ValueError("no call with keywords")
    name = ast.unparse(value.func)
    if name not in names:
        raise ValueError("no tool")
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in value.keywords if keyword.arg is not None}
    if len(arguments) != len(value.keywords):
        raise ValueError("arguments that are no literals")
    return name, json.dumps(arguments, ensure_ascii=False)
