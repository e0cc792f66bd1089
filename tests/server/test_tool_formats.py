"""Tools told to models, calls asked for by a grammar: what the grammar lets through, the parser understands."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from multitensor.engine.grammar import GrammarCompiler, GrammarSpec
from multitensor.errors import InputError
from multitensor.server.chat_output import whole_message
from multitensor.server.reasoning import KNOWN_MARKS
from multitensor.server.tool_formats import (
    FORMATS,
    GEMMA,
    GENERIC,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    ToolFormat,
    find_tool_format,
    knows_tools,
    schema_error,
    tool_grammar,
    with_tool_instructions,
)

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/n"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer"}},
}
ADD = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now", "description": "the time"}}
STRICT = {"type": "function", "function": {**ADD["function"], "strict": True}}  # type: ignore[dict-item]
CONTROL = {"[TOOL_CALLS]": 1, "</s>": 0, "[THINK]": 2, "[/THINK]": 3}


class ByteTokenizer:
    """Ids from 4 on are bytes; those before are control tokens."""

    names = ("</s>", "[TOOL_CALLS]", "[THINK]", "[/THINK]")
    eos_ids = frozenset({0})
    bos_id = None
    vocab_size = 260

    def token_bytes(self, token: int) -> bytes:
        return self.names[token].encode() if token < 4 else bytes([token - 4])

    def is_control(self, token: int) -> bool:
        return token < 4

    def encode(self, text: str) -> list[int]:
        return [byte + 4 for byte in text.encode()]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ByteTokenizer(), 260)


def fits(compiler: GrammarCompiler, spec: GrammarSpec | None, *parts: str | int) -> bool:
    """Whether the grammar lets the parts (texts and control tokens) be a whole answer."""
    assert spec is not None
    state = compiler.start(spec)
    for part in parts:
        for token in [part] if isinstance(part, int) else ByteTokenizer().encode(part):
            if state.finished or not np.unpackbits(state.mask.view(np.uint8), bitorder="little")[token]:
                return False
            state.accept(token)
            compiler.fill_masks([state])
    return state.accepting


def call(name: str, key: str, arguments: str) -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


WRAPPED = {
    "hermes": lambda *calls: "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in calls),
    "llama3_json": lambda *calls: "; ".join(calls),
    "mistral": lambda *calls: "[TOOL_CALLS][" + ", ".join(calls) + "]",
    "gemma": lambda *calls: calls[0] if len(calls) == 1 else "[" + ", ".join(calls) + "]",
}
WRAPPED["generic"] = WRAPPED["hermes"]


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_required_calls_are_let_through_and_understood(compiler: GrammarCompiler, form: ToolFormat) -> None:
    wrap, key = WRAPPED[form.name], form.arguments_key
    one, other = call("add", key, '{"a": 17}'), call("now", key, "{}")
    spec = tool_grammar(form, [ADD, NOW])
    for calls in ([one], [other, one], [one, other, one]):
        text = wrap(*calls)
        assert fits(compiler, spec, text), text
        parser = form.parser([ADD, NOW])
        message = whole_message(parser.push(text) + parser.finish())
        found = [(each["function"]["name"], each["function"]["arguments"]) for each in message["tool_calls"]]
        assert found == [("add", '{"a": 17}') if each is one else ("now", "{}") for each in calls]
        assert message["content"] is None
    for text in (
        "Hello",
        wrap(call("add", key, "{}")),
        wrap(call("sub", key, "{}")),
        wrap(call("add", key, '{"a": "x"}')),
    ):
        assert not fits(compiler, spec, text), text
    single = tool_grammar(form, [ADD, NOW], parallel=False)
    assert fits(compiler, single, wrap(one)) and not fits(compiler, single, wrap(one, other))
    named = tool_grammar(form, [ADD, NOW], name="now")
    assert fits(compiler, named, wrap(other)) and not fits(compiler, named, wrap(one))


def test_a_mark_that_is_a_control_token_is_that_token(compiler: GrammarCompiler) -> None:
    spec = tool_grammar(MISTRAL, [NOW], token_id=CONTROL.get)
    assert fits(compiler, spec, 1, '[{"name": "now", "arguments": {}}]')
    assert not fits(compiler, spec, '[TOOL_CALLS][{"name": "now", "arguments": {}}]')
    assert MISTRAL.needs_control(CONTROL.get) and not HERMES.needs_control(CONTROL.get)


def test_reasoning_may_come_first(compiler: GrammarCompiler) -> None:
    text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    spec = tool_grammar(HERMES, [NOW], reasoning=KNOWN_MARKS[0])
    assert fits(compiler, spec, f"<think>so\n</think>\n\n{text}") and fits(compiler, spec, text)
    assert not fits(compiler, spec, f"so</think>{text}")
    begun = tool_grammar(HERMES, [NOW], reasoning=KNOWN_MARKS[0], reasoning_begun=True)
    assert fits(compiler, begun, f"so <tool_call> </think>\n{text}") and not fits(compiler, begun, text)
    control = tool_grammar(HERMES, [NOW], reasoning=KNOWN_MARKS[1], token_id=CONTROL.get)
    assert fits(compiler, control, 2, "so", 3, text)


def test_strict_tools_are_held_to_their_schema_when_the_model_chooses(compiler: GrammarCompiler) -> None:
    assert tool_grammar(HERMES, [ADD, NOW], choice="auto") is None
    good, bad = (f"<tool_call>\n{call('add', 'arguments', a)}\n</tool_call>" for a in ('{"a": 1}', "{}"))
    spec = tool_grammar(HERMES, [STRICT, NOW], choice="auto")
    assert fits(compiler, spec, "Just text < with <tool and more.")
    assert fits(compiler, spec, f"Text {good}\n{good}") and fits(compiler, spec, good)
    assert not fits(compiler, spec, f"Text {bad}")
    # Where an unmarked answer can be a call too, no grammar can tell the two apart.
    assert tool_grammar(GENERIC, [STRICT], choice="auto") is None
    spec = tool_grammar(MISTRAL, [STRICT], choice="auto", token_id=CONTROL.get)
    assert fits(compiler, spec, "Text") and fits(
        compiler, spec, "Text", 1, "[" + call("add", "arguments", '{"a": 1}') + "]"
    )
    assert not fits(compiler, spec, 1, "[{}]")


def test_schemas_beyond_the_grammar_are_refused_only_when_strict(compiler: GrammarCompiler) -> None:
    odd = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
    for strict in (True, False):
        tool = {"type": "function", "function": {"name": "f", "parameters": odd, "strict": strict}}
        spec = tool_grammar(HERMES, [tool])
        assert spec is not None
        if strict:
            with pytest.raises(InputError, match="not supported"):
                compiler.compile(spec)
        else:
            compiler.compile(spec)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"a": {"not": {"type": "null"}}}, 'Unimplemented keys: ["not"]'),
        ({"a": {"type": "text"}}, "Invalid type: text"),
        ({"a": {"$ref": "#/x"}}, "Pointer '/x' does not exist"),
        ({"a": {"type": "string", "pattern": "(?=9 | start: b"}}, "regex parse error: (?=9"),
    ],
)
def test_the_tool_with_a_bad_schema_is_named(compiler: GrammarCompiler, wrong: dict[str, Any], reason: str) -> None:
    parameters = {"type": "object", "properties": wrong}
    tool = {"type": "function", "function": {"name": "f.g-h", "parameters": parameters, "strict": True}}
    for form in FORMATS.values():
        for tools, name in (([ADD, tool, NOW], None), ([tool], None), ([NOW, ADD, tool], "f.g-h")):
            spec = tool_grammar(form, tools, name=name)
            assert spec is not None
            with pytest.raises(InputError) as raised:
                compiler.compile(spec)
            text = str(schema_error(spec, raised.value))
            assert text.startswith("the parameters of the tool f.g-h are not supported: ") and reason in text
            assert "%json" not in text and "x-guidance" not in text and "arguments_" not in text


def test_errors_about_no_schema_stay_as_they_are() -> None:
    spec = GrammarSpec("lark", "start: a")
    for text in ("it takes too long", "at 1(8): unknown name: a", "at 9(1): failed to compile JSON schema: x"):
        error = InputError(text)
        assert schema_error(spec, error) is error


def test_a_tool_that_is_not_there_cannot_be_chosen() -> None:
    with pytest.raises(InputError, match="names no function"):
        tool_grammar(HERMES, [ADD], name="other")
    with pytest.raises(InputError, match="without tools"):
        tool_grammar(HERMES, [])


@pytest.mark.parametrize(
    ("architecture", "template", "form"),
    [
        ("qwen3", "{{ '<tool_call>' }}", HERMES),
        ("llama", "{{ '<|python_tag|>' }}", LLAMA3_JSON),
        ("llama", "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", MISTRAL),
        ("gemma3", "<start_of_turn>", GEMMA),
        ("qwen2", "<|im_start|>", HERMES),
        ("llama", "<|im_start|>", GENERIC),
    ],
)
def test_the_format_follows_the_template(architecture: str, template: str, form: ToolFormat) -> None:
    assert find_tool_format(architecture, template) is form
    assert knows_tools(template) == ("tools" in template)


def test_templates_that_know_no_tools_are_told_in_words() -> None:
    function = {"name": "add", "arguments": {"a": 1}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "x", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "x", "content": "2"},
        {"role": "tool", "tool_call_id": "y", "content": "3"},
    ]
    for form in FORMATS.values():
        told = with_tool_instructions(messages, [ADD, NOW], form)
        assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
        assert told[0]["content"].startswith("Be brief.") and '"the time"' in told[0]["content"]
        assert all(set(message) == {"role", "content"} for message in told)
        parser = form.parser([ADD, NOW])
        calls = whole_message(parser.push(told[2]["content"]) + parser.finish())["tool_calls"]
        assert json.loads(calls[0]["function"]["arguments"]) == {"a": 1}
        assert told[3]["content"].count("<tool_response>") == 2
    assert with_tool_instructions(messages[1:2], [NOW], HERMES)[0]["role"] == "system"
    assert messages[2]["tool_calls"]  # as they were
