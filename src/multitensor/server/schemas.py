"""Bodies of requests. Strict types; unknown extra fields are ignored; null stands for "not given", as in OpenAI's API.

Fields of OpenAI's API that this server cannot honour are declared too, so that they are refused instead of ignored;
so are those that are only hints, which change no answer here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

INT64 = 2**63
MAX_LOGIT_BIAS = 8192
MAX_STOP = 64
MAX_PARTS = 1 << 14  # messages, and parts of one: checking a list holds up the whole process
MAX_STOP_LENGTH = 1000

Integer = Annotated[int, Field(ge=-INT64, lt=INT64)]
Count = Annotated[int, Field(ge=1, lt=INT64)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = StopString | Annotated[list[StopString], Field(max_length=MAX_STOP)]
LogitBias = Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)]
Name = Annotated[str, Field(min_length=1, max_length=128)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=2048)]
TextOrIds = str | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]


def _only_null(value: Any) -> None:
    if value is not None:
        raise ValueError("this server does not support it; leave it out")


Refused = Annotated[None, BeforeValidator(_only_null)]  # what it asks for is not here


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", regex_engine="rust-regex", protected_namespaces=())


# --- parts that several requests share ---


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Grammar(Body):
    """A grammar of the answer. gbnf: llama.cpp's notation; lark: llguidance's dialect of Lark."""

    type: Literal["gbnf", "lark", "regex"] = "gbnf"
    value: Annotated[str, Field(min_length=1, max_length=1 << 20)]


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type json_schema needs json_schema.schema")
        return self


class Sampling(Body):
    """What chat and plain completions have in common. top_k, min_p, repetition_penalty, min_tokens, stop_token_ids,
    ignore_eos, include_stop_str_in_output, skip_special_tokens and grammar are extensions."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Integer | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: LogitBias | None = None
    response_format: ResponseFormat | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=1 << 20)] | Grammar | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self


# --- chat ---


class ContentPart(Body):
    """prompt_cache_breakpoint is a hint: beginnings of prompts are found again without it."""

    type: Name
    text: str | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class CalledFunction(Body):
    name: Name
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    audio: Refused = None
    function_call: Refused = None


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: Name


class NamedToolChoice(Body):
    type: Literal["function"]
    function: ChosenFunction


class ChatRequest(Sampling):
    """POST /v1/chat/completions. chat_template_kwargs (further variables of the model's template) is an extension."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_PARTS)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    # Hints, whose answer would be the same without them.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    audio: Refused = None
    functions: Refused = None
    function_call: Refused = None
    metadata: Refused = None
    moderation: Refused = None
    prediction: Refused = None
    verbosity: Literal["medium"] | None = None
    web_search_options: Refused = None


# --- completions ---


class CompletionRequest(Sampling):
    """POST /v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: TextOrIds
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Literal[""] | None = None


# --- the rest ---


class EmbeddingRequest(Body):
    """POST /v1/embeddings. dimensions: only the model's own."""

    model: str | None = None
    input: TextOrIds
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None


class TokenizeRequest(Body):
    """POST /tokenize: `prompt`, or `messages` through the chat template. add_special_tokens: begin as prompts of this
    model do (with BOS if it has one). parse_special: names of control tokens in the prompt become those tokens."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_PARTS)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    parse_special: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize. skip_special_tokens: leave control tokens out (default false)."""

    model: str | None = None
    tokens: list[TokenId]
    skip_special_tokens: bool | None = None
