"""Chat messages to a prompt, with the model's own Jinja template (layer 1).

A template joins the model's control tokens with what users wrote. In the finished text nobody can tell a control token
of the template's from one that a user typed, so the text is rendered a second time with a *shield*: in everything that
came from the messages, each character that occurs in a control token's name is replaced by a private-use character.
What then still reads as a control token is the template's, every character of it; all else is encoded as plain text.

A template may look at what it is given (`'</think>' in content`), and decide differently when it is shielded. Literals
of the template that cannot be part of a control token stay readable therefore, and if the two renderings still differ,
only the control tokens that users typed, and beginnings and ends of such at the edges of their texts, are shielded.
That rendering counts if it has the control tokens of the fully shielded one, which are certain to be the template's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from multitensor.errors import InputError
from multitensor.formats.template_process import TemplateProcess
from multitensor.formats.tokenizer import Tokenizer
from multitensor.formats.vocabulary import Part

Message = Mapping[str, Any]

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{ message.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{% set ns = namespace(system='') %}{% for message in messages %}{% if message.role == 'system' %}"
    "{% set ns.system = ns.system + message.content | trim + '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{ ns.system + message.content | trim + '<end_of_turn>\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# For files without a template: the layout that goes with these control tokens.
_FALLBACKS = (
    (("<|im_start|>", "<|im_end|>"), _CHATML),
    (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), _LLAMA3),
    (("<start_of_turn>", "<end_of_turn>"), _GEMMA),
)

_IDENTIFIER = re.compile(r"[A-Za-z0-9_. -]*")
_STRUCTURAL_KEYS = frozenset({"role", "type"})
_LITERAL = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"")
_PRIVATE_USE = range(0xF0000, 0x10FFFE)
# Not shielded: they are written differently inside JSON, and every control token has other characters.
_UNSHIELDED = frozenset('"\\')


def render_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt as text, for reading. To generate from it use `render_chat`: encoding this text cannot tell the
    template's control tokens from the users'. Raises InputError."""
    template, context = _prepare(tokenizer, messages, add_generation_prompt, tools, variables)
    return _text(_renderer(tokenizer).process.render(template, [context])[0])


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt's token ids; nothing in messages or tools becomes a control token.

    messages: [{"role": "user", "content": "..."}, ...]; content may also be a list of {"type": "text", "text": ...}.
    tools: JSON schemas of functions, where the template knows them. variables: further names for the template.
    BOS comes first where the model asks for it, once. Raises InputError: no template, one that fails, bad messages.
    """
    template, context = _prepare(tokenizer, messages, add_generation_prompt, tools, variables)
    parts = _renderer(tokenizer).parts(template, context)
    text = "".join(tokenizer.token_text(part) if isinstance(part, int) else part for part in parts)
    if parts == tokenizer.split_control(text):  # nobody typed a control token: the tokenizer may see the whole text
        ids = tokenizer.encode(text, special=True)
    else:
        ids = tokenizer.encode_parts(parts)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


def find_template(tokenizer: Tokenizer, *, with_tools: bool = False) -> str:
    """The template's source: the model's own, or the layout that goes with its control tokens. Raises InputError."""
    templates = tokenizer.chat_templates
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if templates:
        return templates.get("default") or next(iter(templates.values()))
    for names, template in _FALLBACKS:
        if all(tokenizer.token_id(name) is not None for name in names):
            return template
    raise InputError("this model has no chat template; give it a plain prompt instead of messages")


def _prepare(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None,
) -> tuple[str, dict[str, Any]]:
    """The template and what it is rendered with."""
    context = {
        **(variables or {}),
        "messages": [_checked(message) for message in messages],
        "tools": list(tools) if tools else None,
        "documents": (variables or {}).get("documents"),
        "add_generation_prompt": add_generation_prompt,
        **tokenizer.special_texts,
    }
    if not context["messages"]:
        raise InputError("a chat needs at least one message")
    return find_template(tokenizer, with_tools=bool(tools)), context


def _checked(message: Any) -> dict[str, Any]:
    """The message, with a list of text parts joined. Raises InputError."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f'a chat message is {{"role": ..., "content": ...}}, not {str(message)[:60]!r}')
    content = message.get("content")
    if isinstance(content, list | tuple):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise InputError("message content can be text only; images and sound are not supported")
        return {**message, "content": "\n".join(part["text"] for part in content)}
    if content is not None and not isinstance(content, str):
        raise InputError(f"message content must be text, not {type(content).__name__}")
    return dict(message)


def _renderer(tokenizer: Tokenizer) -> _Renderer:
    if tokenizer.renderer is None:
        tokenizer.renderer = _Renderer(tokenizer)
    return tokenizer.renderer


def _text(result: Mapping[str, str]) -> str:
    if "text" not in result:
        raise InputError(f"the chat template refused: {' '.join(result['error'].split())[:300]}")
    return result["text"]


class _Renderer:
    """A tokenizer's rendering process, and what is known about the names of its control tokens.

    beginnings, ends: of those names, all that are shorter than the name.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.process = TemplateProcess()
        self._tokenizer = tokenizer
        names = [name for name, _ in tokenizer.control_names()]
        self._all_names = "\n".join(names)
        self._longest = max(map(len, names), default=0)
        self._beginnings = {name[:i] for name in names for i in range(1, len(name))}
        self._ends = {name[i:] for name in names for i in range(1, len(name))}
        self._letters = sorted({char for name in names for char in name if not char.isspace()} - _UNSHIELDED)
        self._end_words = {tokenizer.token_text(token).strip("<|>[]/｜▁_ ") for token in tokenizer.eos_ids}
        self._harmless: dict[str, re.Pattern[str]] = {}

    def parts(self, template: str, context: dict[str, Any]) -> list[Part]:
        """The prompt as text pieces and ids of the template's control tokens."""
        users = {key: context[key] for key in ("messages", "tools", "documents")}
        # code points that nothing uses stand in for the characters of control tokens
        used = {char for text in (template, *_strings(users)) for char in text}
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        to_private = {ord(char): private for char, private in zip(self._letters, free, strict=False)}
        to_plain = {ord(private): chr(code) for code, private in to_private.items()}

        def shielded(hide: Callable[[str], str]) -> dict[str, Any]:
            return {**context, **{key: _mapped(value, hide, self._end_words) for key, value in users.items()}}

        harmless = self._harmless_literals(template)
        whole = shielded(lambda text: _hide_all(text, harmless, to_private))
        plain, safe = self.process.render(template, [context, whole])
        text = _text(plain)
        if "text" not in safe or safe["text"].translate(to_plain) != text:
            names_only = shielded(lambda text: self._hide_names(text, to_private))
            closer = self.process.render(template, [names_only])[0]
            if "text" not in safe or self._same_control(closer, safe):
                safe = closer
        pieces = self._tokenizer.split_control(_text(safe))
        return [piece if isinstance(piece, int) else piece.translate(to_plain) for piece in pieces]

    def _same_control(self, one: Mapping[str, str], other: Mapping[str, str]) -> bool:
        """Whether two renderings have the same control tokens: a template that changes letters could make one of text
        that is none."""

        def control(result: Mapping[str, str]) -> list[Part]:
            return [part for part in self._tokenizer.split_control(result.get("text", "")) if isinstance(part, int)]

        return control(one) == control(other)

    def _harmless_literals(self, template: str) -> re.Pattern[str]:
        """Finds the template's own literals that no control token can share a character with, wherever they stand."""
        if template not in self._harmless:
            literals = sorted({text for text in _literals(template) if self._is_harmless(text)}, key=len, reverse=True)
            self._harmless[template] = re.compile("|".join(map(re.escape, literals)) or "(?!)")
        return self._harmless[template]

    def _is_harmless(self, text: str) -> bool:
        return not (
            text in self._all_names
            or self._tokenizer.control_spans(text)
            or any(text[:i] in self._ends or text[-i:] in self._beginnings for i in range(1, len(text) + 1))
        )

    def _hide_names(self, text: str, to_private: Mapping[int, str]) -> str:
        """Shields names of control tokens, and what could become one with a neighbour."""
        hidden = bytearray(len(text))
        for start, stop in self._tokenizer.control_spans(text):
            hidden[start:stop] = b"\1" * (stop - start)
        for length in range(1, min(len(text), self._longest) + 1):
            if text[-length:] in self._beginnings:
                hidden[-length:] = b"\1" * length
            if text[:length] in self._ends:
                hidden[:length] = b"\1" * length
        return "".join(char.translate(to_private) if hide else char for char, hide in zip(text, hidden, strict=True))


def _hide_all(text: str, harmless: re.Pattern[str], to_private: Mapping[int, str]) -> str:
    """Shields every character that control tokens have, but for the template's own harmless literals."""
    pieces = []
    position = 0
    for match in harmless.finditer(text):
        pieces += [text[position : match.start()].translate(to_private), match.group()]
        position = match.end()
    return "".join(pieces) + text[position:].translate(to_private)


def _mapped(value: Any, hide: Callable[[str], str], end_words: Collection[str]) -> Any:
    """The value with its texts changed; words that say what something *is* (a role, a type, a plain key) stay, unless
    they are the word of an end token, which a template's '<|' + role + '|>' would complete."""

    def stays(key: Any, item: Any) -> bool:
        word = isinstance(item, str) and _IDENTIFIER.fullmatch(item) is not None
        return key in _STRUCTURAL_KEYS and word and item not in end_words

    if isinstance(value, str):
        return hide(value)
    if isinstance(value, Mapping):
        return {
            key if not isinstance(key, str) or _IDENTIFIER.fullmatch(key) else hide(key): (
                item if stays(key, item) else _mapped(item, hide, end_words)
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(item, hide, end_words) for item in value]
    return value


def _strings(value: Any) -> list[str]:
    """Every text in the value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


def _literals(template: str) -> set[str]:
    """Texts in quotes in the template, of two characters or more."""
    found = set()
    for match in _LITERAL.finditer(template):
        try:
            text = ast.literal_eval(match.group())
        except (ValueError, SyntaxError):
            continue
        if len(text) >= 2:
            found.add(text)
    return found
