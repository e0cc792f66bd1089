"""Token ids to text, a token at a time, never half a character (layer 1)."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from enum import IntEnum

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space


class TokenKind(IntEnum):
    """GGUF's `tokenizer.ggml.token_type`. Unused tokens decode to nothing, as in llama.cpp."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: character -> byte. Printable Latin-1 bytes stand for themselves, the
    68 others are numbered upwards from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """Bytes of single tokens.

    byte_level: normal tokens are spelled in GPT-2's byte alphabet; otherwise they are UTF-8 with U+2581 for a space.
    """

    def __init__(self, byte_level: bool) -> None:
        self._alphabet = byte_alphabet() if byte_level else None

    def __call__(self, text: str, kind: int) -> bytes:
        if kind == TokenKind.NORMAL:
            return self._normal(text)
        if kind == TokenKind.BYTE:
            return byte_of(text)
        if kind in (TokenKind.UNUSED, TokenKind.UNDEFINED):
            return b""
        return text.encode("utf-8", "replace")

    def _normal(self, text: str) -> bytes:
        if self._alphabet is None:
            return text.replace(SPACE_MARK, " ").encode("utf-8", "replace")
        try:
            return bytes(map(self._alphabet.__getitem__, text))
        except KeyError:  # a character outside the alphabet can only mean itself
            return b"".join(
                bytes([self._alphabet[c]]) if c in self._alphabet else c.encode("utf-8", "replace") for c in text
            )


def byte_of(text: str) -> bytes:
    """The byte that a token spelled <0xXX> stands for; nothing when it is spelled otherwise."""
    try:
        return bytes([int(text[3:5], 16)]) if text.startswith("<0x") and len(text) == 6 else b""
    except ValueError:
        return b""


class Detokenizer:
    """A stream of ids to text. What `push` returns, joined, with `flush` at the end, is what decoding the ids at once
    gives: incomplete characters wait for their bytes, bytes that can never become one turn into U+FFFD.

    token_bytes: id -> bytes (empty for ids to be left out).
    strip_space: drop one leading space of the whole text, which the encoder had put there.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], strip_space: bool) -> None:
        self._token_bytes = token_bytes
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that is certain once this token is known; may be empty."""
        data = self._token_bytes(token)
        if data and self._strip_space:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What still waited, as U+FFFD. The stream can be used again afterwards."""
        rest = self._utf8.decode(b"", True)
        self._utf8.reset()
        return rest

    def decode(self, ids: Iterable[int]) -> str:
        """All ids at once."""
        return "".join([self.push(token) for token in ids]) + self.flush()
