"""A vocabulary and what belongs to it, whatever file it came from (layer 1)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from multitensor.errors import InputError
from multitensor.formats.detokenizer import TokenKind

Part = str | int
"""A piece of a prompt: text to encode, or the id of a token as it is."""

# Names that end a turn wherever they are control tokens (what llama.cpp and the models' own configurations agree on).
END_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<｜end▁of▁sentence｜>",
    # a code model that begins another file has finished this one
    "<|fim_pad|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<reponame>",
    "<|file_sep|>",
)
# Of those, the ones that no ordinary text contains: control tokens even where a file forgot to say so.
UNMISTAKABLE_END_NAMES = tuple(name for name in END_NAMES if name[1] in "|｜" or "_of_" in name)


@dataclass(frozen=True)
class Vocabulary:
    """texts[id] and kinds[id] of every token; `byte_level`: normal tokens use GPT-2's byte alphabet."""

    texts: Sequence[str]
    kinds: Sequence[int]
    byte_level: bool

    def named(self, kinds: Iterable[int]) -> list[tuple[str, int]]:
        """(text, id) of the tokens of these kinds, in order of id; empty texts are left out."""
        wanted = frozenset(kinds)
        return [(self.texts[i], i) for i, kind in enumerate(self.kinds) if kind in wanted and self.texts[i]]


@dataclass(frozen=True)
class Traits:
    """What the model's files say beside the vocabulary.

    eos_ids: every id that ends a generation. strip_space: encoding puts a space before the text, decoding removes it.
    chat_templates: by name, the usual one as "default". special_texts: names that templates use (bos_token ...).
    """

    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    add_bos: bool = False
    strip_space: bool = False
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    special_texts: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class StatedId(NamedTuple):
    """The id of a special token, if there is one, and what is to be told of it."""

    id: int | None
    warning: str | None = None


class Encoder(Protocol):
    """One way of turning text into ids."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of the text; control tokens match in it only when `special`."""
        ...

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Ids of plain text pieces (never control tokens) and given ids."""
        ...


class TokenSplitter:
    """Finds tokens by their text: the longest (in bytes) first anywhere in the text, then the next, as llama.cpp does.

    strip_after: ids that swallow the white space that follows them.
    """

    _PREFIX = 4

    def __init__(self, entries: Iterable[tuple[str, int]], strip_after: frozenset[int] = frozenset()) -> None:
        ordered = sorted(entries, key=lambda entry: -len(entry[0].encode("utf-8", "replace")))
        self._strip_after = strip_after
        self._by_prefix: dict[str, list[tuple[int, str, int]]] = {}
        for order, (text, token) in enumerate(ordered):
            self._by_prefix.setdefault(text[: self._PREFIX], []).append((order, text, token))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, stop) of every occurrence of every token, overlapping ones too."""
        return [
            (match.start(), match.start() + len(name))
            for _, name, _ in self._found(text)
            for match in re.finditer(f"(?={re.escape(name)})", text)
        ]

    def _found(self, text: str) -> list[tuple[int, str, int]]:
        return sorted(
            entry
            for prefix, entries in self._by_prefix.items()
            if prefix in text
            for entry in entries
            if entry[1] in text
        )

    def split(self, text: str) -> list[Part]:
        """The text with its tokens cut out; empty pieces are left out."""
        parts: list[Part] = [text] if text else []
        for _, name, token in self._found(text):
            parts = [piece for part in parts for piece in self._cut(part, name, token)]
        return parts

    def _cut(self, part: Part, name: str, token: int) -> list[Part]:
        if isinstance(part, int) or name not in part:
            return [part]
        pieces: list[Part] = []
        for i, text in enumerate(part.split(name)):
            if i:
                pieces.append(token)
            kept = text.lstrip() if i and token in self._strip_after else text
            if kept:
                pieces.append(kept)
        return pieces


def end_ids(vocabulary: Vocabulary, stated: Iterable[int | None]) -> frozenset[int]:
    """Ids that end a generation: the ones the files state, and control tokens with a name known to end a turn.
    Where a model writes in channels (`<|return|>` with `<|call|>`, `<|flush|>` with `<|calls|>`), `<|end|>` only ends a
    channel and does not count."""
    control = dict(vocabulary.named((TokenKind.CONTROL,)))
    names = [name for name in END_NAMES if name in control]
    channels = {"<|return|>", "<|call|>"} <= control.keys() or {"<|flush|>", "<|calls|>"} <= control.keys()
    ids = {control[name] for name in names if not (channels and name == "<|end|>")}
    return frozenset(ids | {token for token in stated if token is not None and 0 <= token < len(vocabulary.texts)})


_WITHOUT = {
    "bos": "texts begin without it",
    "eos": "answers may not end where they should",
    "eot": "answers may not end where they should",
    "eom": "answers may not end where they should",
}


def stated_id(name: str, key: str, value: object, size: int, where: str, otherwise: int | None = None) -> StatedId:
    """The special token `name` ("bos", ...) that the file `where` states under `key`; None: it states none. An id that
    no token has is told and replaced by `otherwise`, if that is one: llama.cpp does so too, and token ids still work.
    Raises InputError for what is no number."""
    if value is None:
        return StatedId(otherwise if otherwise is not None and otherwise < size else None)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: {key} is {str(value)[:40]!r}, not a token id; the file is broken")
    if 0 <= value < size:
        return StatedId(value)
    instead = otherwise if otherwise is not None and otherwise < size else None
    effect = f"{instead} is used instead" if instead is not None else _WITHOUT.get(name, "it is left out")
    return StatedId(instead, f"{where}: {key} is {value}, but tokens have the ids 0 to {size - 1}; {effect}")


def clean(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 has, replaced by U+FFFD."""
    if text.isascii():
        return text
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
