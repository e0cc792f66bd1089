"""Tool calls in what a model writes -> OpenAI's deltas, as the text comes.

What a parser says depends on the text alone, never on where it was cut into pieces: a decision waits for the character
that settles it. Arguments are passed on as they are written, once the name of the function is known.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from multitensor.server.tool_json import JsonCall, call_of, python_calls

Delta = dict[str, Any]  # a part of an assistant's message: content, or tool_calls

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
# What stands between a name and its arguments where Mistral's models write no JSON around them.
_BETWEEN = re.compile(r"\s*(\[CALL_ID\]\s*[A-Za-z0-9]*\s*)?(\[ARGS\])?\s*")
_LONGEST_HEAD = 200  # characters of such a name and what follows it
_BLANK = " \t\r\n"
_FENCE = "```"
_FENCED = ("tool_code", "tool_call", "json", "python")


@dataclass(frozen=True)
class ToolSyntax:
    """How a family of models writes calls.

    open, close: what stands around them, None for nothing. bare: an answer that begins with JSON (or with `[name(`) is
    a call, if it names a tool. fenced: so may be a block of code.
    """

    open: str | None = None
    close: str | None = None
    bare: bool = False
    fenced: bool = False


def random_call_id() -> str:
    return "call_" + secrets.token_hex(12)


class ToolParser:
    """Text in, deltas out (`OutputParser`). names: of the tools that the request offers.

    `called`: whether calls have come, and none that was cut off. `completed`: how many are whole. Text around calls is
    content; blanks after a call are not. What looks like a call and is none, is content.
    """

    def __init__(self, syntax: ToolSyntax, names: Collection[str], new_id: Callable[[], str] = random_call_id) -> None:
        self._syntax = syntax
        self._names = frozenset(names)
        self._new_id = new_id
        self._openings = [mark for mark in (syntax.open, _FENCE if syntax.fenced else None) if mark]
        self._text = ""  # not decided upon yet
        self._state: Callable[[bool], Iterator[Delta] | None] = self._begin if syntax.bare else self._content
        self._calls = 0
        self._cut = False  # the text ended in the midst of the last call's arguments
        self._call: JsonCall | None = None
        self._raw = ""  # of the payload so far, should it turn out to be content
        self._marked = False  # the payload has an opening mark: any name is a call
        self._in_list = False

    @property
    def called(self) -> bool:
        return self._calls > 0 and not self._cut

    @property
    def completed(self) -> int:
        return self._calls - self._cut

    def push(self, text: str) -> list[Delta]:
        self._text += text
        return self._run(final=False)

    def finish(self) -> list[Delta]:
        return self._run(final=True)

    def _run(self, final: bool) -> list[Delta]:
        deltas: list[Delta] = []
        while True:
            news = self._state(final)
            if news is None:  # it needs more text
                break
            deltas += news
        return _joined(deltas)

    # Each state takes what it can from the text and returns the deltas, or None when it needs more. When `final` there
    # is no more: then it leaves no text over.

    def _begin(self, final: bool) -> Iterator[Delta] | None:
        """Whether the answer begins with a call that nothing marks."""
        found = self._text.lstrip(_BLANK)
        if not found and not final:
            return None
        if found[:1] == "[":
            rest = found[1:].lstrip(_BLANK)
            name = _NAME.match(rest)
            next_char = (rest[name.end() :] if name else rest).lstrip(_BLANK)[:1]
            if not next_char and not final:
                return None
            if name is not None and name.group() in self._names and next_char == "(":
                return self._go(self._python)
            return self._payload("", marked=False) if rest[:1] == "{" else self._go(self._content)
        return self._payload("", marked=False) if found[:1] == "{" else self._go(self._content)

    def _content(self, final: bool) -> Iterator[Delta] | None:
        """Text up to the next opening mark."""
        if not self._text:
            return None
        places = [(place, mark) for mark in self._openings if (place := self._text.find(mark)) >= 0]
        if places:
            place, mark = min(places)
            before = self._take(place)
            self._take(len(mark))
            if mark == _FENCE:
                self._state = self._fence
            else:
                self._payload(mark, marked=True)
            return _content(before)
        held = 0 if final else max((_overlap(self._text, mark) for mark in self._openings), default=0)
        return _content(self._take(len(self._text) - held)) if len(self._text) > held else None

    def _fence(self, final: bool) -> Iterator[Delta] | None:
        """A block of code after its opening mark: taken whole where it may be a call."""
        end = self._text.find(_FENCE)
        kind, newline, _ = self._text[: end if end >= 0 else None].partition("\n")
        if not newline and end < 0 and not final:
            return None
        if kind.strip() not in ("", *_FENCED):
            return self._go(self._code, _FENCE)
        if end < 0 and not final:
            return None
        block = self._take(end if end >= 0 else len(self._text))
        closing = self._take(len(_FENCE)) if end >= 0 else ""
        calls = self._calls_of(block[len(kind) :])
        if not calls:
            return self._go(self._content, "".join((_FENCE, block, closing)))
        self._state = self._after
        return (delta for name, arguments in calls for delta in self._whole(name, arguments))

    def _code(self, final: bool) -> Iterator[Delta] | None:
        """A block of other code, up to its closing mark."""
        end = self._text.find(_FENCE)
        if end >= 0:
            return self._go(self._content, self._take(end + len(_FENCE)))
        held = 0 if final else _overlap(self._text, _FENCE)
        return _content(self._take(len(self._text) - held)) if len(self._text) > held else None

    def _python(self, final: bool) -> Iterator[Delta] | None:
        """An answer that is a list of Python calls: taken whole."""
        if not final:
            return None
        text = self._take(len(self._text))
        calls = python_calls(text, self._names)
        self._state = self._content
        return (
            (delta for name, arguments in calls for delta in self._whole(name, arguments)) if calls else _content(text)
        )

    def _objects(self, final: bool) -> Iterator[Delta] | None:
        """Between the objects of a payload."""
        found = self._text.lstrip(_BLANK + ",;")
        if not found and not final:
            return None
        first = found[:1]
        blanks = len(self._text) - len(found)
        if first == "{":
            self._raw += self._take(blanks)
            self._call = JsonCall(None if self._marked else self._names)
            return self._go(self._object)
        if first == "[" and not self._in_list and not self._call:
            self._raw += self._take(blanks + 1)
            self._in_list = True
            return iter(())
        if first == "]" and self._in_list:
            self._take(blanks + 1)
            return self._go(self._close)
        if self._marked and not self._call and not self._in_list and self._syntax.close is None:
            return self._go(self._named)
        if self._call is None:  # no payload at all
            raw, self._raw = self._raw, ""
            return self._go(self._content, raw)
        return self._go(self._close)

    def _object(self, final: bool) -> Iterator[Delta] | None:
        """Inside an object."""
        call = self._call
        assert call is not None
        if self._text and not (call.ended or call.is_none):
            used = call.push(self._text)
            self._raw += self._take(used)
            if call.started and not call.index_given:
                call.index = self._start()
                return iter((self._head(call.index, call.name), *self._arguments(call)))
            if call.started and not call.ended:
                return iter(self._arguments(call))
        if call.is_none or (call.ended and not call.started):
            whole = call.whole() if call.ended and not call.is_none else None
            if whole is not None:
                self._raw, self._state = "", self._objects
                return self._whole(*whole)
            self._call, raw, self._raw = None, self._raw, ""
            return self._go(self._content, raw)
        if call.ended:
            self._raw, self._state = "", self._objects
            return iter(self._arguments(call))
        if not final:
            return None
        # The text was cut off in the midst of a call: what is there of it has been told, or it is content.
        raw, self._raw, self._call = self._raw, "", None
        self._cut = call.started and not call.complete
        return self._go(self._content, "" if call.started else raw)

    def _named(self, final: bool) -> Iterator[Delta] | None:
        """`name{...}` or `name[ARGS]{...}`: no JSON around the arguments."""
        found = self._text.lstrip(_BLANK)
        name = _NAME.match(found)
        brace = found.find("{", 0, _LONGEST_HEAD)
        if not final and brace < 0 and len(found) < _LONGEST_HEAD:
            return None
        between = _BETWEEN.fullmatch(found, name.end(), brace) if name is not None and brace > 0 else None
        if name is None or between is None:
            raw, self._raw = self._raw, ""
            return self._go(self._content, raw)
        self._take(len(self._text) - len(found) + brace)
        self._call = JsonCall.of_arguments(name.group())
        return self._go(self._object)

    def _close(self, final: bool) -> Iterator[Delta] | None:
        """After the last object: the closing mark, which may be missing."""
        found = self._text.lstrip(_BLANK)
        mark = self._syntax.close if self._marked else None
        if mark is not None:
            if found.startswith(mark):
                self._take(len(self._text) - len(found) + len(mark))
            elif mark.startswith(found) and not final:
                return None
        return self._go(self._after)

    def _after(self, final: bool) -> Iterator[Delta] | None:
        """Blanks after a call are dropped."""
        self._text = self._text.lstrip(_BLANK)
        self._call = None
        return self._go(self._content) if self._text or final else None

    # --- helpers ---

    def _go(self, state: Callable[[bool], Iterator[Delta] | None], content: str = "") -> Iterator[Delta]:
        self._state = state
        return _content(content)

    def _payload(self, mark: str, *, marked: bool) -> Iterator[Delta]:
        self._raw, self._marked, self._in_list, self._call = mark, marked, False, None
        return self._go(self._objects)

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        return taken

    def _start(self) -> int:
        self._calls += 1
        return self._calls - 1

    def _head(self, index: int, name: str) -> Delta:
        function = {"name": name, "arguments": ""}
        return {"tool_calls": [{"index": index, "id": self._new_id(), "type": "function", "function": function}]}

    def _arguments(self, call: JsonCall) -> list[Delta]:
        text = call.news()
        return [_arguments(call.index, text)] if text else []

    def _whole(self, name: str, arguments: str) -> Iterator[Delta]:
        index = self._start()
        return iter((self._head(index, name), _arguments(index, arguments)))

    def _calls_of(self, code: str) -> list[tuple[str, str]]:
        """(name, arguments) of every call in a block of code; empty if anything in it is none."""
        try:
            value = json.loads(code)
        except (ValueError, RecursionError):
            return python_calls(code, self._names)
        found = [call_of(item) for item in (value if isinstance(value, list) else [value])]
        calls = [call for call in found if call is not None and call[0] in self._names]
        return calls if len(calls) == len(found) else []


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbouring texts become one."""
    result: list[Delta] = []
    for delta in deltas:
        if result and "content" in delta and "content" in result[-1]:
            result[-1] = {"content": result[-1]["content"] + delta["content"]}
        else:
            result.append(delta)
    return result


def _content(text: str) -> Iterator[Delta]:
    return iter([{"content": text}] if text else [])


def _arguments(index: int, text: str) -> Delta:
    return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of the text with which the mark begins."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
