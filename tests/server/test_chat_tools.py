"""Tool calls and reasoning through the official client, over a rank that says what it is told to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from scripted import Script, Server, make_model, scripted_server, texts

MESSAGES: Any = [{"role": "user", "content": "Weather in Oslo?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"tells the {name}",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "tide")
]
OSLO = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
BERGEN = '<tool_call>\n{"name": "tide", "arguments": {"city": "Bergen"}}\n</tool_call>'
THINKING = "{# <think> </think> #}"  # a template that knows reasoning


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, script: Script) -> Iterator[Server]:
    with scripted_server(make_model(tmp_path_factory.mktemp("model")), script) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def ask(client: openai.OpenAI, **settings: Any) -> tuple[str | None, list[tuple[str, Any]], str, list[str]]:
    """(content, [(name, arguments)], finish reason, ids), after a check that the stream says the same."""
    request = {"model": "tide", "messages": MESSAGES, "tools": TOOLS, **settings}
    answer = client.chat.completions.create(**request)
    (choice,) = answer.choices
    calls = choice.message.tool_calls or []
    found = [(call.function.name, call.function.arguments) for call in calls]  # type: ignore[union-attr]
    chunks = list(client.chat.completions.create(**request, stream=True))
    streamed: dict[int, list[str]] = {}
    for part in (part for chunk in chunks for c in chunk.choices for part in c.delta.tool_calls or ()):
        entry = streamed.setdefault(part.index, ["", ""])
        entry[0] += part.function.name or ""
        entry[1] += part.function.arguments or ""
        assert (part.id is not None) == bool(part.function.name), "id and name come together, once"
    assert [tuple(entry) for entry in streamed.values()] == found
    assert (texts(chunks).strip() or None) == ((choice.message.content or "").strip() or None)
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    parsed = [(name, json.loads(arguments)) for name, arguments in found]
    return choice.message.content, parsed, choice.finish_reason, [call.id for call in calls]


def test_a_call_comes_as_a_call(client: openai.OpenAI, script: Script) -> None:
    script.text = "Let me look. " + OSLO
    content, calls, reason, ids = ask(client)
    assert calls == [("weather", {"city": "Oslo"})] and reason == "tool_calls"
    assert content is not None and content.strip() == "Let me look."
    assert len(ids) == 1 and ids[0].startswith("call_")


def test_an_answer_without_a_call_is_an_answer(client: openai.OpenAI, script: Script) -> None:
    script.text = "It rains."
    assert ask(client) == ("It rains.", [], "stop", [])
    assert ask(client, tool_choice="auto") == ("It rains.", [], "stop", [])


def test_parallel_calls_and_only_one(client: openai.OpenAI, script: Script) -> None:
    script.text = OSLO + "\n" + BERGEN
    _, calls, _, ids = ask(client)
    assert calls == [("weather", {"city": "Oslo"}), ("tide", {"city": "Bergen"})] and len(set(ids)) == 2
    _, calls, reason, _ = ask(client, parallel_tool_calls=False)
    assert calls == [("weather", {"city": "Oslo"})] and reason == "tool_calls"


def test_a_required_call_comes_whatever_the_model_wants(client: openai.OpenAI, script: Script) -> None:
    script.text = OSLO
    assert ask(client, tool_choice="required")[1] == [("weather", {"city": "Oslo"})]
    request = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 300, "model": "tide"}
    for choice in ("required", {"type": "function", "function": {"name": "tide"}}):
        script.text = "I will not."
        answer = client.chat.completions.create(**request, tool_choice=choice, parallel_tool_calls=False)  # type: ignore[call-overload]
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name in (("weather", "tide") if choice == "required" else ("tide",))
        assert call.function.arguments.lstrip().startswith("{")


def test_a_named_function_is_called_once(client: openai.OpenAI, script: Script) -> None:
    script.text = BERGEN + "\n" + BERGEN.replace("Bergen", "Oslo")
    assert len(ask(client, tool_choice="required")[1]) == 2
    _, calls, reason, _ = ask(client, tool_choice={"type": "function", "function": {"name": "tide"}})
    assert calls == [("tide", {"city": "Bergen"})] and reason == "tool_calls"


def test_a_demanded_call_that_is_cut_off_leaves_no_markup(client: openai.OpenAI, script: Script) -> None:
    script.text = BERGEN
    one: Any = {"type": "function", "function": {"name": "tide"}}
    for limit in (1, 4, 12, 24, 48):
        for choice in ("required", one):
            answer = client.chat.completions.create(
                model="tide", messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=limit
            )
            assert answer.choices[0].finish_reason == "length" and not answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls, "the last of them was long enough for a name"


def test_only_whole_calls_are_tool_calls(client: openai.OpenAI, script: Script) -> None:
    """A stop string within a call breaks it off, which nobody should take for a call to be made."""
    script.text = OSLO + "\n" + BERGEN
    for settings in ({}, {"tool_choice": "required"}):
        for stop, reason, count in (("ci", "stop", 1), ("Berg", "stop", 2), ("}\n</", "tool_calls", 1)):
            answer = client.chat.completions.create(
                model="tide",
                messages=MESSAGES,
                tools=TOOLS,
                stop=stop,
                **settings,  # type: ignore[call-overload]
            )
            (choice,) = answer.choices
            assert choice.finish_reason == reason and len(choice.message.tool_calls) == count
    _, calls, reason, _ = ask(client, parallel_tool_calls=False, stop="Berg")
    assert calls == [("weather", {"city": "Oslo"})] and reason == "tool_calls", "the one that counts is whole"


def test_no_call_where_none_is_wanted(client: openai.OpenAI, script: Script) -> None:
    script.text = OSLO
    content, calls, reason, _ = ask(client, tool_choice="none")
    assert calls == [] and reason == "stop" and content == OSLO


def test_the_model_is_told_of_tools_and_results(client: openai.OpenAI, script: Script) -> None:
    script.text = "Rain."
    plain = client.chat.completions.create(model="tide", messages=MESSAGES).usage
    told = client.chat.completions.create(model="tide", messages=MESSAGES, tools=TOOLS).usage
    assert plain is not None and told is not None and told.prompt_tokens > plain.prompt_tokens + 100
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turn: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
    ]
    answer = client.chat.completions.create(model="tide", messages=turn, tools=TOOLS)
    assert answer.choices[0].message.content == "Rain."
    assert answer.usage is not None and answer.usage.prompt_tokens > told.prompt_tokens
    assert client.chat.completions.create(model="tide", messages=turn).choices[0].message.content == "Rain."


@pytest.mark.parametrize(
    "change",
    [
        {"tools": None, "tool_choice": "required"},
        {"tools": None, "parallel_tool_calls": False},
        {"tool_choice": {"type": "function", "function": {"name": "nothing"}}},
        {"tool_choice": "sometimes"},
        {"tools": [TOOLS[0], TOOLS[0]]},
        {"tools": [{"type": "function", "function": {"name": "bad name!"}}]},
        {"tools": [{"type": "browser"}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": ["object", "null"]}}}]},
        {"response_format": {"type": "json_object"}},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "a", "arguments": ""}}]}]},
    ],
)
def test_what_does_not_go_together(client: openai.OpenAI, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{"model": "tide", "messages": MESSAGES, "tools": TOOLS, **change})
    assert raised.value.type == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_the_audit_log_tells_the_ends_that_clients_were_told(tmp_path: Path, stream: bool) -> None:
    log, script = tmp_path / "audit.jsonl", Script(text=OSLO)
    with (
        scripted_server(make_model(tmp_path), script, audit_log=log) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        for question in ({"tools": TOOLS, "n": 2}, {"tools": TOOLS, "stop": "city"}, {"max_tokens": 2}):
            answer: Any = client.chat.completions.create(
                model="tide",
                messages=MESSAGES,
                stream=stream,
                **question,  # type: ignore[call-overload]
            )
            list(answer)
        # The first prompt leaves room for three tokens, the second for all.
        list(client.completions.create(model="tide", prompt=[[1] * 1021, [1]], max_tokens=100, stream=stream))
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["outcome"] for record in records[1::2]] == ["tool_calls", "stop", "length", "length, stop"]


def test_a_bad_schema_is_told_with_its_tool(client: openai.OpenAI) -> None:
    odd = {"type": "object", "properties": {"when": {"type": "date"}}}
    tools: Any = [*TOOLS, {"type": "function", "function": {"name": "book", "parameters": odd, "strict": True}}]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tide", messages=MESSAGES, tools=tools, tool_choice="required")
    message = "the parameters of the tool book are not supported: Invalid type: date"
    assert raised.value.body["message"] == message  # type: ignore[index]


def test_reasoning_is_split_off(tmp_path: Path) -> None:
    script = Script(text="<think>\nOslo is cold.\n</think>\n\nIt snows.")
    with scripted_server(make_model(tmp_path, prefix=THINKING), script) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)
        message: Any = client.chat.completions.create(model="tide", messages=MESSAGES).choices[0].message
        assert (message.content, message.reasoning_content) == ("It snows.", "Oslo is cold.")
        chunks: Any = list(client.chat.completions.create(model="tide", messages=MESSAGES, stream=True))
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Oslo is cold."
        assert texts(chunks) == "It snows."
        script.text = "<think>\nLet me ask.\n</think>\n\n" + OSLO
        message = client.chat.completions.create(model="tide", messages=MESSAGES, tools=TOOLS).choices[0].message
        assert message.reasoning_content == "Let me ask." and message.tool_calls[0].function.name == "weather"
