"""Tool calls and reasoning found in text: each family's way of writing them, and any way of cutting the text."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from multitensor.server.chat_output import PlainParser, whole_message
from multitensor.server.reasoning import KNOWN_MARKS, ReasoningParser, find_reasoning, reasoning_begun
from multitensor.server.tool_parsers import ToolParser, ToolSyntax

NAMES = ("get_weather", "add")
HERMES = ToolSyntax(open="<tool_call>", close="</tool_call>")
LLAMA = ToolSyntax(open="<|python_tag|>", bare=True)
MISTRAL = ToolSyntax(open="[TOOL_CALLS]")
GEMMA = ToolSyntax(bare=True, fenced=True)
GENERIC = ToolSyntax(open="<tool_call>", close="</tool_call>", bare=True, fenced=True)
SYNTAXES = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA, "generic": GENERIC}


def make(syntax: ToolSyntax) -> ToolParser:
    numbers = itertools.count()
    return ToolParser(syntax, NAMES, lambda: f"call_{next(numbers)}")


def message_of(parser: Any, pieces: list[str]) -> dict[str, Any]:
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return whole_message(deltas + parser.finish())


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]


CASES = [
    # (syntax, text, content, calls)
    ("hermes", "Hello!", "Hello!", []),
    (
        "hermes",
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}\n</tool_call>',
        None,
        [("add", '{"a": 1, "b": [2, "}"]}')],
    ),
    (
        "hermes",
        'Let me see.\n<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>\n'
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Nice \\"là\\" \\\\"}}</tool_call> Done.',
        "Let me see.\nDone.",
        [("add", '{"a": 1}'), ("get_weather", '{"city": "Nice \\"là\\" \\\\"}')],
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', None, [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', None, [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>[{"name": "add", "arguments": {}}]</tool_call>', None, [("add", "{}")]),
    ("hermes", "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    ("hermes", '<tool_call>{"nam": 1}</tool_call>', '<tool_call>{"nam": 1}</tool_call>', []),
    ("hermes", "a <tool_cal", "a <tool_cal", []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', None, [("add", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}', None, [("add", '{"a": 1}')]),
    (
        "mistral",
        '[TOOL_CALLS]get_weather{}[TOOL_CALLS]add{"a": 1',
        None,
        [("get_weather", "{}"), ("add", '{"a": 1')],
    ),
    ("hermes", '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
    ("llama", '{"name": "add", "parameters": {"a": 1}}', None, [("add", '{"a": 1}')]),
    (
        "llama",
        '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1}}; '
        '{"name": "get_weather", "parameters": {}}',
        None,
        [("add", '{"a": 1}'), ("get_weather", "{}")],
    ),
    ("llama", '{"type": "function", "function": {"name": "add", "arguments": {}}}', None, [("add", "{}")]),
    ("llama", '{"name": "Ada", "parameters": {"a": 1}}', '{"name": "Ada", "parameters": {"a": 1}}', []),
    ("llama", '{"answer": 42}', '{"answer": 42}', []),
    ("llama", 'Say {"name": "add", "parameters": {}}', 'Say {"name": "add", "parameters": {}}', []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": [1]}}, {"name": "get_weather", "arguments": {}}]',
        None,
        [("add", '{"a": [1]}'), ("get_weather", "{}")],
    ),
    (
        "mistral",
        'Ok.[TOOL_CALLS]add{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "{"}',
        "Ok.",
        [("add", '{"a": 1}'), ("get_weather", '{"city": "{"}')],
    ),
    ("mistral", "[TOOL_CALLS] I cannot {", "[TOOL_CALLS] I cannot {", []),
    ("gemma", '```tool_code\nadd(a=1, b="x")\n```', None, [("add", '{"a": 1, "b": "x"}')]),
    (
        "gemma",
        "```tool_code\nprint(add(a=-1))\nget_weather()\n```",
        None,
        [("add", '{"a": -1}'), ("get_weather", "{}")],
    ),
    ("gemma", "[add(a=1), get_weather(city='Ulm')]", None, [("add", '{"a": 1}'), ("get_weather", '{"city": "Ulm"}')]),
    ("gemma", 'So:\n```json\n{"name": "add", "parameters": {"a": 1}}\n```', "So:\n", [("add", '{"a": 1}')]),
    ("gemma", '[{"name": "add", "parameters": {}}]', None, [("add", "{}")]),
    ("gemma", "```python\nimport os\n```\nbye", "```python\nimport os\n```\nbye", []),
    ("gemma", "```c\nadd(a=1)\n``` and ```json\n[1]\n```", "```c\nadd(a=1)\n``` and ```json\n[1]\n```", []),
    ("gemma", "[add, multiply]", "[add, multiply]", []),
    ("gemma", "[add(x)]", "[add(x)]", []),
    ("generic", '<tool_call>{"name": "x", "arguments": {}}</tool_call>', None, [("x", "{}")]),
    ("generic", '{"name": "add", "arguments": {"a": 1}}', None, [("add", '{"a": 1}')]),
]


@pytest.mark.parametrize(("syntax", "text", "content", "calls"), CASES)
def test_calls_are_found_and_the_rest_is_content(
    syntax: str, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    for pieces in ([text], list(text)):
        parser = make(SYNTAXES[syntax])
        message = message_of(parser, pieces)
        assert calls_of(message) == calls
        assert message["content"] == content
        cut = text.endswith('{"a": 1')
        assert parser.called == (bool(calls) and not cut) and parser.completed == len(calls) - cut


def test_arguments_come_as_they_are_written() -> None:
    parser = make(HERMES)
    assert parser.push('<tool_call>{"name": "add", "argu') == []
    first = parser.push('ments": {"a": 1')
    assert [part["function"] for delta in first for part in delta["tool_calls"]] == [
        {"name": "add", "arguments": ""},
        {"arguments": '{"a": 1'},
    ]
    assert first[0]["tool_calls"][0]["id"] == "call_0" and first[0]["tool_calls"][0]["type"] == "function"
    assert parser.push("234") == [{"tool_calls": [{"index": 0, "function": {"arguments": "234"}}]}]


def test_text_is_not_held_back_longer_than_needed() -> None:
    parser = make(GENERIC)
    assert parser.push("Hello <to") == [{"content": "Hello "}]
    assert parser.push("day") == [{"content": "<today"}]
    assert parser.push("```rust\nfn") == [{"content": "```rust\nfn"}]
    parser = make(LLAMA)
    assert parser.push('{"answer": ') == [{"content": '{"answer": '}]  # such a key is in no call


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>", "```", "\n"),
    *("```json\n", "```tool_code\n", '{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "parameters": {}}'),
    *('{"arguments": {"x": "}"}, "name": "get_weather"}', "add(a=1)", "[add(a=1)]", "[", "]", "{", "}", ",", ";", " "),
    *('{"name": ', '"add"', ', "arguments": ', '"', "\\", '{"a": 1}', "add", "hello", "<", "`", "é", ":", '{"x": 1}'),
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@st.composite
def cut_texts(draw: st.DrawFn) -> list[str]:
    text = draw(texts)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=8)))
    return [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]


@given(cut_texts(), st.sampled_from(sorted(SYNTAXES)), st.booleans(), st.booleans())
@example(["[add", " ", "x]```json\n", '{"name": "add"}```'], "gemma", False, False)
@settings(max_examples=600, deadline=None)
def test_any_cut_of_the_text_gives_the_same(pieces: list[str], syntax: str, reasons: bool, begun: bool) -> None:
    def build() -> Any:
        tools = make(SYNTAXES[syntax])
        return ReasoningParser(KNOWN_MARKS[0], tools, begun=begun) if reasons else tools

    whole = message_of(build(), ["".join(pieces)])
    assert message_of(build(), pieces) == whole
    assert message_of(build(), list("".join(pieces))) == whole


@given(texts, st.sampled_from(sorted(SYNTAXES)))
@settings(max_examples=300, deadline=None)
def test_without_calls_nothing_is_lost(text: str, syntax: str) -> None:
    message = message_of(make(SYNTAXES[syntax]), [text])
    if "tool_calls" not in message:
        assert message["content"] == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_arguments_arrive_unchanged(arguments: list[dict[str, Any]], ascii_only: bool) -> None:
    def written(key: str, separator: str, before: str, after: str) -> str:
        calls = [json.dumps({"name": "add", key: values}, ensure_ascii=ascii_only) for values in arguments]
        return separator.join(before + call + after for call in calls)

    cases = [
        (HERMES, written("arguments", "\n", "<tool_call>\n", "\n</tool_call>")),
        (LLAMA, written("parameters", "; ", "", "")),
        (MISTRAL, "[TOOL_CALLS] [" + written("arguments", ", ", "", "") + "]"),
        (GEMMA, "[" + written("parameters", ",\n", "", "") + "]"),
    ]
    for syntax, text in cases:
        message = message_of(make(syntax), [text[:7], text[7:]])
        assert [(name, json.loads(raw)) for name, raw in calls_of(message)] == [("add", each) for each in arguments]
        assert message["content"] is None


@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "content"),
    [
        ("<think>\nHm.\n\nYes.\n</think>\n\nIt is 4.", False, "Hm.\n\nYes.", "It is 4."),
        ("Hm. </think>It is 4.", True, "Hm.", "It is 4."),
        ("It is <think>4</think>", False, None, "It is <think>4</think>"),
        ("<think>\n\n</think>\n\nHi", False, None, "Hi"),
        ("<think> cut off ", False, "cut off", ""),
        ("  plain", False, None, "  plain"),
        ("<thi", False, None, "<thi"),
    ],
)
def test_reasoning_is_told_apart(text: str, begun: bool, reasoning: str | None, content: str) -> None:
    for pieces in ([text], list(text)):
        message = message_of(ReasoningParser(KNOWN_MARKS[0], PlainParser(), begun=begun), pieces)
        assert message.get("reasoning_content") == reasoning
        assert message["content"] == content


def test_marks_are_found_in_the_template() -> None:
    marks = find_reasoning("{{ '<think>' }}...{{ '</think>' }}")
    assert marks is not None and marks.open == "<think>"
    assert find_reasoning("{{ messages }}") is None
    assert find_reasoning("{{ messages }}", {"[THINK]": 5, "[/THINK]": 6}.get) == KNOWN_MARKS[1]
    assert reasoning_begun("<|im_start|>assistant\n<think>\n", marks)
    assert not reasoning_begun("<|im_start|>assistant\n", marks)
