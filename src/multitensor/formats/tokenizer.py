"""Text <-> token ids, from GGUF metadata or a Hugging Face folder's tokenizer.json (layer 1).

User text never becomes a control token unless asked: `encode(text)` reads "<|im_end|>" as ten or so characters,
`encode(text, special=True)` as one token. Tokens that the model's makers defined as ordinary text (`user_defined`: runs
of newlines, `<table>`) always match, as in llama.cpp and Hugging Face's tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint
from multitensor.formats.detokenizer import Detokenizer, TokenBytes, TokenKind
from multitensor.formats.tokenizer_gguf import read_gguf
from multitensor.formats.tokenizer_hf import read_folder
from multitensor.formats.vocabulary import Encoder, Part, TokenSplitter, Traits, Vocabulary, clean


class Tokenizer:
    """Encodes and decodes for one model. Made by `load_tokenizer`.

    vocab_size: ids that have a text; a model's embedding may have more rows, whose ids decode to nothing.
    warnings: one line each about what the files did not say and was assumed.
    """

    def __init__(self, vocabulary: Vocabulary, traits: Traits, encoder: Encoder) -> None:
        self._vocabulary = vocabulary
        self._traits = traits
        self._encoder = encoder
        self._token_bytes = TokenBytes(vocabulary.byte_level)
        self._hidden = (TokenKind.CONTROL, TokenKind.UNKNOWN)
        self._control = TokenSplitter(vocabulary.named(self._hidden))
        self.vocab_size = len(vocabulary.texts)
        self.bos_id = traits.bos_id
        self.eos_ids = traits.eos_ids
        self.add_bos = traits.add_bos
        self.chat_templates = dict(traits.chat_templates)
        self.special_texts = dict(traits.special_texts)
        self.warnings = traits.warnings
        self.renderer: Any = None  # the chat template's process, started on first use by chat_template.py

    @property
    def chat_template(self) -> str | None:
        """Source of the model's usual chat template (Jinja), None when its files have none."""
        return self.chat_templates.get("default")

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Ids of the text.

        special: names of control tokens in the text become those tokens (for text that the caller trusts).
        bos: begin as the model's files ask for: with BOS if they add one, with nothing if they do not.
        """
        start = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        return start + self._encoder.encode(clean(text), special)

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Ids of plain text pieces and given ids; no control token comes out but those given."""
        return self._encoder.encode_parts([clean(part) if isinstance(part, str) else part for part in parts])

    def split_control(self, text: str) -> list[Part]:
        """The text with the names of control tokens cut out as ids."""
        return self._control.split(text)

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        """(start, stop) of every name of a control token in the text, overlapping ones too."""
        return self._control.spans(text)

    def control_names(self) -> list[tuple[str, int]]:
        """(text, id) of every control and unknown token."""
        return self._vocabulary.named(self._hidden)

    def token_text(self, token: int) -> str:
        """The token as its vocabulary spells it."""
        return self._vocabulary.texts[self._checked(token)] if token < self.vocab_size else ""

    def token_id(self, text: str) -> int | None:
        """Id of the control token of that name."""
        parts = self._control.split(text)
        return parts[0] if len(parts) == 1 and isinstance(parts[0], int) else None

    def is_control(self, token: int) -> bool:
        """Whether the token is a control (or the unknown) token, which decoding leaves out by default."""
        return token < self.vocab_size and self._vocabulary.kinds[self._checked(token)] in self._hidden

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that the token adds to a text, possibly half a character; its name for a control token;
        nothing for an id beyond the vocabulary. Raises InputError for a negative id."""
        if self._checked(token) >= self.vocab_size:
            return b""
        return self._token_bytes(self._vocabulary.texts[token], self._vocabulary.kinds[token])

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """Text of the ids. continuation: the ids go on after other text, so a leading space is part of them."""
        return self.stream(skip_special=skip_special, continuation=continuation).decode(ids)

    def stream(self, *, skip_special: bool = True, continuation: bool = False) -> Detokenizer:
        """A detokenizer for ids that come one at a time: what it returns, joined, is what `decode` gives."""
        bytes_of: Callable[[int], bytes] = self._visible_bytes if skip_special else self.token_bytes
        return Detokenizer(bytes_of, self._traits.strip_space and not continuation)

    def _visible_bytes(self, token: int) -> bytes:
        return b"" if self.is_control(token) else self.token_bytes(token)

    def _checked(self, token: int) -> int:
        if token < 0:
            raise InputError(f"{token} is not a token id; ids run from 0 to {self.vocab_size - 1}")
        return token


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The model's tokenizer; None when its files carry no vocabulary (token ids still work everywhere).
    Raises InputError for a kind of vocabulary that is not supported, naming it."""
    found = read_gguf(checkpoint) if checkpoint.format == "gguf" else read_folder(checkpoint)
    return Tokenizer(*found) if found else None
