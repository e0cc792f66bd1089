"""Reasoning told apart from the answer: <think>...</think> becomes reasoning_content, as the text comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Delta = dict[str, Any]  # a part of an assistant's message

_BLANK = " \t\r\n"


class Parser(Protocol):
    """Text in as it comes, deltas out."""

    @property
    def called(self) -> bool: ...
    def push(self, text: str) -> list[Delta]: ...
    def finish(self) -> list[Delta]: ...


@dataclass(frozen=True)
class ReasoningMarks:
    """What a model writes around its reasoning."""

    open: str
    close: str


KNOWN_MARKS = (ReasoningMarks("<think>", "</think>"), ReasoningMarks("[THINK]", "[/THINK]"))


def find_reasoning(template: str, token_id: Callable[[str], int | None] | None = None) -> ReasoningMarks | None:
    """The marks that the model's chat template knows; or that its vocabulary has as control tokens, if token_id (of a
    control token's name, or None) is given. None: the model does not reason in the open."""
    for marks in KNOWN_MARKS:
        in_template = marks.close in template
        if in_template or (
            token_id is not None and token_id(marks.open) is not None and token_id(marks.close) is not None
        ):
            return marks
    return None


def reasoning_begun(prompt: str, marks: ReasoningMarks) -> bool:
    """Whether the prompt's text ends inside a reasoning: templates that write the opening mark themselves."""
    return prompt.rstrip(_BLANK).endswith(marks.open)


class ReasoningParser:
    """Splits off the reasoning at the answer's beginning; what follows goes through `inner` (`OutputParser`).

    begun: the prompt ended with the opening mark. A closing mark without an opening one is taken for text: only what
    comes first can be reasoning. Blanks around the marks belong to neither part.
    """

    def __init__(self, marks: ReasoningMarks, inner: Parser, *, begun: bool = False) -> None:
        self._marks = marks
        self._inner = inner
        self._text = ""
        self._place = "inside" if begun else "before"
        self._blank = True  # nothing of the part has been told yet: leading blanks are dropped

    @property
    def called(self) -> bool:
        """Whether a tool call has come."""
        return self._inner.called

    def push(self, text: str) -> list[Delta]:
        return self._take(text, final=False)

    def finish(self) -> list[Delta]:
        return self._take("", final=True) + self._inner.finish()

    def _take(self, text: str, final: bool) -> list[Delta]:
        self._text += text
        deltas: list[Delta] = []
        if self._place == "before":
            self._look_for_opening(final)
        if self._place == "inside":
            deltas += self._reason(final)
        if self._place == "gap":
            self._text = self._text.lstrip(_BLANK)
            if self._text:
                self._place = "after"
        if self._place == "after" and self._text:
            rest, self._text = self._text, ""
            deltas += self._inner.push(rest)
        return deltas

    def _look_for_opening(self, final: bool) -> None:
        found = self._text.lstrip(_BLANK)
        mark = self._marks.open
        if found.startswith(mark):
            self._text, self._place = found[len(mark) :], "inside"
        elif final or not mark.startswith(found):
            self._place = "after"

    def _reason(self, final: bool) -> list[Delta]:
        if self._blank:
            self._text = self._text.lstrip(_BLANK)
        end = self._text.find(self._marks.close)
        if end >= 0:
            told = self._text[:end].rstrip(_BLANK)
            self._text, self._place = self._text[end + len(self._marks.close) :], "gap"
        else:
            stop = len(self._text) if final else self._certain()
            told, self._text = self._text[:stop].rstrip(_BLANK) if final else self._text[:stop], self._text[stop:]
        if told:
            self._blank = False
        return [{"reasoning_content": told}] if told else []

    def _certain(self) -> int:
        """How much of the text is reasoning whatever follows: not its last blanks, nor a beginning of the mark."""
        mark = self._marks.close
        stop = len(self._text)
        stop -= next((n for n in range(min(len(mark) - 1, stop), 0, -1) if self._text.endswith(mark[:n])), 0)
        return len(self._text[:stop].rstrip(_BLANK))
