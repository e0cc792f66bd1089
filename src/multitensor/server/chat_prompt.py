"""A chat request -> token ids, the grammar of its answer, and the parser of what the model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from multitensor.engine.request import SamplingParams
from multitensor.server.chat_messages import template_messages, template_tools
from multitensor.server.chat_output import OutputParser, PlainParser
from multitensor.server.errors import bad_request
from multitensor.server.sampling import grammar_of
from multitensor.server.schemas import ChatRequest
from multitensor.server.service import Service

if TYPE_CHECKING:
    from multitensor.engine.grammar import GrammarSpec


class ChatPrompt:
    """Raises InputError and ApiError for what the model or its template cannot do."""

    grammar: GrammarSpec | None

    def __init__(self, service: Service, body: ChatRequest) -> None:
        from multitensor.formats.chat_template import find_template, render_chat

        tokenizer = service.need_tokenizer()
        self.messages = template_messages(body.messages)
        tools = template_tools(body.tools)
        self.grammar = grammar_of(body)
        source = find_template(tokenizer, with_tools=bool(tools))
        self.ids = render_chat(
            tokenizer,
            self.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            tools=tools,
            variables=_variables(body, source),
        )
        service.check_length(self.ids, "messages")

    def params(self, params: SamplingParams) -> SamplingParams:
        return params

    def parser(self) -> OutputParser:
        return PlainParser()


def _variables(body: ChatRequest, template: str) -> dict[str, Any]:
    """What the template may read besides messages and tools."""
    variables = dict(body.chat_template_kwargs or {})
    reserved = {"messages", "tools", "add_generation_prompt"} & variables.keys()
    if reserved:
        name = min(reserved)
        raise bad_request(
            f"chat_template_kwargs cannot set {name}: the request has a field for it", "chat_template_kwargs"
        )
    effort = body.reasoning_effort
    if effort is None:
        return variables
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort, **variables}
    if "enable_thinking" in template:
        return {"enable_thinking": effort not in ("none", "minimal"), **variables}
    raise bad_request("this model has no setting of its reasoning effort", "reasoning_effort")
