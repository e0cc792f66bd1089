"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from multitensor.engine.request import Logprob
from multitensor.engine.request_state import Tokenizer

Position = Mapping[int, Logprob]  # the chosen token comes first, then the best ones

FLOOR = -9999.0  # JSON has no infinity; OpenAI's value for "impossible"


def chat_logprobs(
    tokenizer: Tokenizer | None, ids: Sequence[int], positions: Sequence[Position], top: int
) -> dict[str, Any]:
    """{"content": [...], "refusal": None}: one entry a token."""
    content = []
    for token, position in zip(ids, positions, strict=True):
        best = [_entry(tokenizer, other, found) for other, found in _best(position, top)]
        content.append({**_entry(tokenizer, token, position[token]), "top_logprobs": best})
    return {"content": content, "refusal": None}


class TextOffsets:
    """Where in an answer's text its tokens begin, in characters, whatever of the text is held back for a stop string. A
    token that goes on with a character begins where that does; control tokens that are not shown take no place."""

    def __init__(self, tokenizer: Tokenizer | None, *, skip_special: bool) -> None:
        self._stream = tokenizer.stream(skip_special=skip_special, continuation=True) if tokenizer else None
        self._length = 0

    def next(self, token: int) -> int:
        """Of the answer's next token."""
        offset = self._length
        self._length += len(_text(None, token) if self._stream is None else self._stream.push(token))
        return offset


def completion_logprobs(
    tokenizer: Tokenizer | None, ids: Sequence[int], positions: Sequence[Position], top: int, offsets: TextOffsets
) -> dict[str, Any]:
    """Parallel lists. offsets: has heard of the tokens before these."""
    return {
        "tokens": [_text(tokenizer, token) for token in ids],
        "token_logprobs": [_finite(position[token].logprob) for token, position in zip(ids, positions, strict=True)],
        "top_logprobs": [
            {_text(tokenizer, other): _finite(found.logprob) for other, found in _best(position, top)}
            for position in positions
        ],
        "text_offset": [offsets.next(token) for token in ids],
    }


def _best(position: Position, top: int) -> list[tuple[int, Logprob]]:
    """The `top` likeliest, best first; the chosen one is among them only where it belongs."""
    ranked = sorted(position.items(), key=lambda entry: (entry[1].rank or 0, -entry[1].logprob))
    return [(token, found) for token, found in ranked if (found.rank or 0) <= top][:top]


def _entry(tokenizer: Tokenizer | None, token: int, found: Logprob) -> dict[str, Any]:
    data = tokenizer.token_bytes(token) if tokenizer else b""
    return {"token": _text(tokenizer, token), "logprob": _finite(found.logprob), "bytes": list(data)}


def _text(tokenizer: Tokenizer | None, token: int) -> str:
    """The token's text; without a vocabulary its number. Half a character shows as its bytes, as OpenAI's does."""
    if tokenizer is None:
        return f"token_id:{token}"
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(value: float) -> float:
    return max(value, FLOOR)
