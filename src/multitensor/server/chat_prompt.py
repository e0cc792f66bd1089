"""A chat request -> token ids, the grammar of its answer, and the parser of what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from multitensor.engine.request import SamplingParams
from multitensor.errors import InputError
from multitensor.server.chat_messages import template_messages, template_tools
from multitensor.server.chat_output import OneCall, OnlyCalls, OutputParser, PlainParser
from multitensor.server.errors import bad_request
from multitensor.server.reasoning import ReasoningMarks, ReasoningParser, find_reasoning, reasoning_begun
from multitensor.server.sampling import grammar_of
from multitensor.server.schemas import ChatRequest, Message, NamedToolChoice
from multitensor.server.service import Service
from multitensor.server.tool_formats import (
    find_tool_format,
    knows_tools,
    schema_error,
    tool_grammar,
    with_tool_instructions,
)

if TYPE_CHECKING:
    from multitensor.engine.grammar import GrammarSpec
    from multitensor.formats.tokenizer import Tokenizer

_TAIL = 32  # tokens of the prompt's end in which an opened reasoning shows


class ChatPrompt:
    """ids: the prompt. grammar: what the answer must follow, if anything. messages: as the template gets them, but for
    instructions about tools. Raises InputError and ApiError for what the model or its template cannot do."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        from multitensor.formats.chat_template import find_template, render_chat

        self._tokenizer: Tokenizer = service.need_tokenizer()
        self._named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedToolChoice) else None
        # A function that is named is wanted once.
        self._one_call = body.parallel_tool_calls is False or self._named is not None
        self._demanded = body.tool_choice == "required" or self._named is not None
        self._tools = _tools(body)
        service.check_size(len(body.messages), _characters(body.messages), "messages")
        self.messages = template_messages(body.messages)
        template = find_template(self._tokenizer, with_tools=bool(self._tools))
        self._format = find_tool_format(service.engine.plan.spec.architecture, template)
        told: Sequence[dict[str, Any]] = self.messages
        known = knows_tools(template)
        if not known:
            told = with_tool_instructions(self.messages, self._tools, self._format)
        self.ids = render_chat(
            self._tokenizer,
            told,
            add_generation_prompt=body.add_generation_prompt is not False,
            tools=self._tools if known and self._tools else None,
            variables=_variables(body, template),
        )
        service.check_length(self.ids, "messages")
        self.grammar: GrammarSpec | None = grammar_of(body)
        # A grammar shapes the answer from its first character on, so there is no reasoning before it.
        marks = find_reasoning(template, self._tokenizer.token_id) if self.grammar is None else None
        self._marks = marks
        self._begun = marks is not None and self._reasoning_begun(marks)
        if self._tools:
            self.grammar = self._tool_grammar()
        if self.grammar is not None:
            self._compile(service)

    def _compile(self, service: Service) -> None:
        assert self.grammar is not None
        try:
            service.engine.compile_grammar(self.grammar)
        except InputError as error:
            raise (schema_error(self.grammar, error) if self._tools else error) from None

    def params(self, params: SamplingParams) -> SamplingParams:
        """With control tokens in the text where they mark what the parser looks for."""
        named = self._tokenizer.token_id
        needed = bool(self._tools) and self._format.needs_control(named)
        if self._marks is not None:
            needed = needed or named(self._marks.close) is not None
        return replace(params, skip_special_tokens=False) if needed else params

    def parser(self) -> OutputParser:
        """A new one for each answer."""
        parser: OutputParser = PlainParser()
        if self._tools:
            calls = self._format.parser(self._tools)
            parser = OneCall(calls) if self._one_call else calls
            if self._demanded:
                parser = OnlyCalls(parser)
        return ReasoningParser(self._marks, parser, begun=self._begun) if self._marks is not None else parser

    def _reasoning_begun(self, marks: ReasoningMarks) -> bool:
        return reasoning_begun(self._tokenizer.decode(self.ids[-_TAIL:]), marks) or reasoning_begun(
            "".join(map(self._tokenizer.token_text, self.ids[-_TAIL:])), marks
        )

    def _tool_grammar(self) -> GrammarSpec | None:
        grammar = tool_grammar(
            self._format,
            self._tools,
            choice="required" if self._demanded else "auto",
            name=self._named,
            parallel=not self._one_call,
            token_id=self._tokenizer.token_id,
            reasoning=self._marks,
            reasoning_begun=self._begun,
        )
        if self.grammar is not None:
            raise bad_request(
                "tools and a shape of the answer (response_format or grammar) cannot be asked for at once; give "
                'tool_choice: "none", or leave one of them out',
                "tools",
            )
        return grammar


def _characters(messages: Sequence[Message]) -> int:
    """Of what templates cannot leave out: some drop the reasoning in a model's earlier answers, and trim all."""
    asked = (message.content for message in messages if message.role != "assistant")
    return sum(
        len(content.strip()) if isinstance(content, str) else sum(len((part.text or "").strip()) for part in content)
        for content in asked
        if content is not None
    )


def _tools(body: ChatRequest) -> list[dict[str, Any]]:
    """The tools that the model may call. Raises ApiError for settings of tools without any, two of one name, and
    arguments that are no object: values without names, which nobody can hand to a function."""
    tools = template_tools(body.tools) or []
    if not tools:
        for name, value in (("tool_choice", body.tool_choice), ("parallel_tool_calls", body.parallel_tool_calls)):
            if value is not None and value != "none":
                raise bad_request(f"{name} is only allowed together with tools", name)
    names = [tool["function"]["name"] for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise bad_request(f"two tools are named {twice}", "tools")
    for name, tool in zip(names, tools, strict=True):
        kind = (tool["function"].get("parameters") or {}).get("type", "object")
        if kind != "object":
            raise bad_request(f"the parameters of the tool {name} must be of type object, not {kind!s:.40}", "tools")
    return [] if body.tool_choice == "none" else tools


def _variables(body: ChatRequest, template: str) -> dict[str, Any]:
    """What the template may read besides messages and tools."""
    variables = dict(body.chat_template_kwargs or {})
    reserved = {"messages", "tools", "add_generation_prompt"} & variables.keys()
    if reserved:
        message = f"chat_template_kwargs cannot set {min(reserved)}: the request has a field for it"
        raise bad_request(message, "chat_template_kwargs")
    effort = body.reasoning_effort
    if effort is None:
        return variables
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort, **variables}
    if "enable_thinking" in template:
        return {"enable_thinking": effort not in ("none", "minimal"), **variables}
    raise bad_request("this model has no setting of its reasoning effort", "reasoning_effort")
