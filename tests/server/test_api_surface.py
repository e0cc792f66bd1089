"""Every parameter that the official client knows is known here, to be honoured or refused: none is passed over."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import openai.types.chat as chat
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.shared_params import FunctionDefinition
from openai.types.shared_params.response_format_json_schema import JSONSchema
from pydantic import TypeAdapter, ValidationError

from multitensor.server import schemas

MESSAGE: dict[str, Any] = {"role": "user", "content": "hi"}


def messages() -> Iterator[Any]:
    """The kinds of message; those of role "function" are refused by their role."""
    kinds = typing.get_args(chat.ChatCompletionMessageParam)
    yield from (kind for kind in kinds if kind.__name__ != "ChatCompletionFunctionMessageParam")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (chat_create_params.CompletionCreateParamsStreaming, schemas.ChatRequest),
        (chat_create_params.CompletionCreateParamsNonStreaming, schemas.ChatRequest),
        (completion_create_params.CompletionCreateParamsStreaming, schemas.CompletionRequest),
        (embedding_create_params.EmbeddingCreateParams, schemas.EmbeddingRequest),
        (chat.ChatCompletionStreamOptionsParam, schemas.StreamOptions),
        (chat.ChatCompletionContentPartTextParam, schemas.ContentPart),
        (chat.ChatCompletionContentPartRefusalParam, schemas.ContentPart),
        (chat.ChatCompletionFunctionToolParam, schemas.Tool),
        (chat.ChatCompletionMessageFunctionToolCallParam, schemas.ToolCall),
        (chat.ChatCompletionNamedToolChoiceParam, schemas.NamedToolChoice),
        (FunctionDefinition, schemas.Function),
        (JSONSchema, schemas.JsonSchema),
        *((kind, schemas.Message) for kind in messages()),
    ],
)
def test_no_parameter_of_the_official_client_is_unknown(theirs: Any, ours: type[schemas.Body]) -> None:
    names = theirs.__required_keys__ | theirs.__optional_keys__
    assert names and names <= {field.alias or name for name, field in ours.model_fields.items()}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"moderation": {"model": "omni-moderation-latest"}}, "moderation"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]}, "function_call"),
        ({"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]}, "audio"),
    ],
)
def test_what_would_change_the_answer_is_refused(change: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=f"{where}\n.*does not support it") as raised:
        schemas.ChatRequest.model_validate({"messages": [MESSAGE], **change})
    assert raised.value.errors()[-1]["loc"][-1] == where
    schemas.ChatRequest.model_validate({"messages": [MESSAGE], where: None})


def test_hints_are_taken() -> None:
    part = {"type": "text", "text": "hi", "prompt_cache_breakpoint": {"mode": "explicit"}}
    hints = {
        "safety_identifier": "a",
        "prompt_cache_key": "b",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    }
    schemas.ChatRequest.model_validate({"messages": [{"role": "user", "content": [part]}], **hints})
    with pytest.raises(ValidationError):
        schemas.ChatRequest.model_validate({"messages": [MESSAGE], "prompt_cache_key": 7})


def test_every_effort_of_the_official_client_is_known() -> None:
    efforts = typing.get_type_hints(chat_create_params.CompletionCreateParamsNonStreaming)["reasoning_effort"]
    known = TypeAdapter(schemas.ChatRequest.model_fields["reasoning_effort"].annotation)
    for effort in typing.get_args(typing.get_args(efforts)[0]):
        assert known.validate_python(effort) == effort
