"""How each family of models is told of tools, made to call them, and understood when it does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multitensor.engine.grammar import JSON_WHITESPACE, GrammarSpec
from multitensor.errors import InputError
from multitensor.server.reasoning import ReasoningMarks
from multitensor.server.tool_parsers import ToolParser, ToolSyntax

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name": ..., "parameters": ..., "strict": ...}}
TokenId = Callable[[str], int | None]  # id of the control token of that name

_SCHEMA_ERROR = re.compile(r"at (?P<line>\d+)\(\d+\): failed to compile JSON schema: (?P<reason>.*)")

MAX_CALLS = 16  # in one answer, where a grammar asks for calls: else small models never stop


@dataclass(frozen=True)
class ToolFormat:
    """syntax: how calls are read. before, between, after: what stands around the calls when they are asked for by a
    grammar; where `many` is given, the three of an answer with any number of calls. arguments_key: "arguments" or
    "parameters". The opening mark may be a control token, whose text must be kept then (`needs_control`)."""

    name: str
    syntax: ToolSyntax
    arguments_key: str = "arguments"
    before: str = ""
    between: str = ""
    after: str = ""
    many: tuple[str, str, str] | None = None

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return ToolParser(self.syntax, [tool["function"]["name"] for tool in tools])

    def needs_control(self, token_id: TokenId) -> bool:
        """Whether skip_special_tokens must be off for the calls to be seen."""
        mark = self.syntax.open
        return mark is not None and not self.syntax.bare and token_id(mark) is not None


HERMES = ToolFormat(
    "hermes",
    ToolSyntax(open="<tool_call>", close="</tool_call>"),
    before="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    after="\n</tool_call>",
)
LLAMA3_JSON = ToolFormat(
    "llama3_json", ToolSyntax(open="<|python_tag|>", bare=True), arguments_key="parameters", between="; "
)
MISTRAL = ToolFormat("mistral", ToolSyntax(open="[TOOL_CALLS]"), before="[TOOL_CALLS][", between=", ", after="]")
GEMMA = ToolFormat("gemma", ToolSyntax(bare=True, fenced=True), arguments_key="parameters", many=("[", ", ", "]"))
# For models that were never taught any: they are told of Hermes' way, and whatever they make of it is understood.
GENERIC = ToolFormat(
    "generic",
    ToolSyntax(open="<tool_call>", close="</tool_call>", bare=True, fenced=True),
    before=HERMES.before,
    between=HERMES.between,
    after=HERMES.after,
)
FORMATS = {each.name: each for each in (HERMES, LLAMA3_JSON, MISTRAL, GEMMA, GENERIC)}


def find_tool_format(architecture: str, template: str) -> ToolFormat:
    """The way that fits the model's chat template; without a sign there, its architecture's."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or ('"parameters"' in template and "<|start_header_id|>" in template):
        return LLAMA3_JSON
    if architecture.startswith("gemma"):
        return GEMMA
    return HERMES if architecture.startswith("qwen") else GENERIC


def knows_tools(template: str) -> bool:
    """Whether the template tells the model of tools; otherwise `with_tool_instructions` must."""
    return "tools" in template


def with_tool_instructions(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], form: ToolFormat
) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: they are described in the system message, earlier calls
    are text of the assistant's, and their results are the user's."""
    told: list[dict[str, Any]] = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        if message.get("tool_calls"):
            calls = [_written(call["function"], form) for call in message["tool_calls"]]
            text = form.before + form.between.join(calls) + form.after
            plain["content"] = "\n".join(part for part in (message.get("content"), text) if part)
        elif message["role"] == "tool":
            plain = {"role": "user", "content": f"<tool_response>\n{message.get('content')}\n</tool_response>"}
            if told and told[-1].get("answers"):  # templates want user and assistant in turn
                told[-1]["content"] += "\n" + plain["content"]
                continue
            plain["answers"] = True
        told.append(plain)
    for message in told:
        message.pop("answers", None)
    if tools:
        instructions = _instructions(tools, form)
        if told and told[0]["role"] == "system":
            told[0]["content"] = f"{told[0]['content']}\n\n{instructions}"
        else:
            told.insert(0, {"role": "system", "content": instructions})
    return told


def _instructions(tools: Sequence[Tool], form: ToolFormat) -> str:
    signatures = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = form.before + f'{{"name": "NAME", "{form.arguments_key}": {{"ARGUMENT": VALUE}}}}' + form.after
    return (
        f"You can call these functions, described by JSON Schema, one a line:\n{signatures}\n"
        f"To call one, answer with nothing but this, its name and arguments filled in:\n{example}\n"
        "Its result is given to you afterwards. If no function helps, answer as usual."
    )


def _written(function: Mapping[str, Any], form: ToolFormat) -> str:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(function["name"])}, "{form.arguments_key}": {text}}}'


def tool_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    *,
    choice: str = "required",
    name: str | None = None,
    parallel: bool = True,
    token_id: TokenId = lambda name: None,
    reasoning: ReasoningMarks | None = None,
    reasoning_begun: bool = False,
) -> GrammarSpec | None:
    """What the answer must look like. choice "required": a call of any tool, or of the one named; "auto": anything, but
    a call once begun is held to its tool's schema, if one of the tools is strict (else None: no grammar).

    parallel: more than one call may come. reasoning: the model may reason first. Keywords of schemas that the
    grammar cannot hold to are an error (at compiling) in strict tools, else they are passed over.
    Raises InputError for a name that is not among the tools.
    """
    functions = [tool["function"] for tool in tools]
    if name is not None:
        functions = [function for function in functions if function["name"] == name]
    if not functions:
        raise InputError(
            "tool_choice names no function of tools" if name else "tool_choice asks for a call without tools"
        )
    rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(functions)))}"]
    for number, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"])}, "{form.arguments_key}": '
        rules.append(f"call_{number}: {_literal(head)} arguments_{number} {_literal('}')}")
        rules.append(f"arguments_{number}: %json {json.dumps(_arguments_schema(function))}")
    if choice == "auto":
        if form.syntax.open is None or form.syntax.bare or not any(function.get("strict") for function in functions):
            return None
        return GrammarSpec("lark", "\n".join([*_auto_rules(form, parallel, token_id), *rules]))
    start = "calls"
    if reasoning is not None:
        start = "thought /[ \\n]*/ calls" if reasoning_begun else "(open_mark thought /[ \\n]*/)? calls"
        opening, closing = token_id(reasoning.open), token_id(reasoning.close)
        rules.append(f"open_mark: {_mark(reasoning.open, opening)}")
        rules.append(_until("thought", reasoning.close, closing))
    rules.append(f"calls: {_calls(form, parallel, token_id)}")
    return GrammarSpec("lark", "\n".join([f"start: {start}", *rules]))


def schema_error(spec: GrammarSpec, error: InputError) -> InputError:
    """The error of compiling a `tool_grammar`, told by the tool whose schema it is about instead of by the grammar
    around it, which nobody but this server has written; the same error where it is about none."""
    found = _SCHEMA_ERROR.search(str(error))
    lines = spec.text.splitlines()
    number = int(found["line"]) if found is not None else 0
    rule = re.match(r"arguments_(\d+): ", lines[number - 1]) if 0 < number <= len(lines) else None
    if found is None or rule is None:
        return error
    head = next(line for line in lines if line.startswith(f"call_{rule[1]}: "))
    name = head.split('\\"')[3]  # of {\"name\": \"...\"
    shown = max(1, number - 2)  # the lines around the place, which follow the reason
    reason = found["reason"].partition(f" {shown} | {lines[shown - 1].partition(':')[0]}:")[0]
    return InputError(f"the parameters of the tool {name} are not supported: {reason}")


def _calls(form: ToolFormat, parallel: bool, token_id: TokenId) -> str:
    before, between, after = form.before, form.between, form.after
    one = f"{_marked(before, form, token_id)} call {_literal(after)}"
    if not parallel:
        return one
    if form.many is None:
        more = f"({_marked(between, form, token_id)} call){{0,{MAX_CALLS - 1}}}"
        return f"{_marked(before, form, token_id)} call {more} {_literal(after)}"
    before, between, after = form.many
    more = f"({_literal(between)} call){{1,{MAX_CALLS - 1}}}"
    return f"{one} | {_literal(before)} call {more} {_literal(after)}"


def _auto_rules(form: ToolFormat, parallel: bool, token_id: TokenId) -> list[str]:
    """Text, in which the opening mark begins a call."""
    mark = form.syntax.open or ""
    token = token_id(mark)
    payload = form.before.removeprefix(mark)
    if form.syntax.close is None:  # one mark for all calls
        more = f"({_literal(form.between)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
        calls = f"{_literal(payload)} call {more} {_literal(form.after)}"
        return [f"start: (before {calls})? rest", _until("before", mark, token), "rest: /(?s:.*)/"]
    calls = f"before {_literal(payload)} call {_literal(form.after)}"
    count = f"{{0,{MAX_CALLS}}}" if parallel else "?"
    return [f"start: ({calls}){count} rest", _until("before", mark, token), "rest: /(?s:.*)/"]


def _until(rule: str, mark: str, token: int | None) -> str:
    """A rule for any text that ends with the mark."""
    if token is not None:
        return f"{rule}: /(?s:.*)/ <[{token}]>"
    return f"{rule}[suffix={_literal(mark)}]: /(?s:.*)/"


def _marked(text: str, form: ToolFormat, token_id: TokenId) -> str:
    """The text, whose opening mark may be a control token."""
    mark = form.syntax.open
    token = token_id(mark) if mark is not None else None
    if mark is None or token is None or mark not in text:
        return _literal(text)
    before, _, after = text.partition(mark)
    return f"{_literal(before)} {_mark(mark, token)} {_literal(after)}"


def _mark(text: str, token: int | None) -> str:
    return _literal(text) if token is None else f"<[{token}]>"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Its own document, so that references of the schema to its own parts still hold."""
    parameters = function.get("parameters")
    schema = (
        {"type": "object", **parameters}
        if parameters
        else {"type": "object", "properties": {}, "additionalProperties": False}
    )
    options = {"whitespace_pattern": JSON_WHITESPACE, "lenient": not function.get("strict")}
    return {**schema, "x-guidance": options}
