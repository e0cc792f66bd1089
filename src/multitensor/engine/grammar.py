"""Grammars that a text must follow: what may come next, as one bit a token (engine side; never imports torch).

A `GrammarSpec` is what a caller writes down. `GrammarCompiler` checks and compiles it against the model's vocabulary,
and gives each sequence a `GrammarState`, which takes the tokens as they are sampled and tells which may come next.
The automaton is llguidance's; what it cannot do it rejects, and that is an InputError before anything runs.

End tokens may come only where the grammar accepts. Where it accepts and nothing else can follow, the text ends at once,
without an end token. Control tokens never match a grammar's text (`.` is text); a Lark grammar may name them.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from multitensor.errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

GrammarKind = Literal["json_object", "json_schema", "regex", "lark", "gbnf"]

MAX_CHARACTERS = 1 << 18
# The compiler follows references recursively and has no limit of its own: a chain of some thousand overflows its stack.
MAX_REFERENCES = 1000
CACHED_GRAMMARS = 32
# A mask takes 20 to 50 us as a rule. Waking threads for a few costs more, on two shared cores several times more.
MASK_THREADS = 8
PARALLEL_MASKS = 6
# Bounds of compiling, in llguidance's units; its own let a regex of twenty characters work for 15 seconds.
LEXER_FUEL = 200_000
LEXER_STATES = 50_000
PARSER_ITEMS = 20_000
SLOWEST_MASK = 0.5  # seconds; a grammar that takes longer at its very beginning would hold up everyone's tokens
# JSON may have this between its parts. Unlimited, small models write blanks until they are cut off.
JSON_WHITESPACE = r"[ \t\n\r]{0,32}"

_LARK = re.compile(r"(?m)^\s*(%llguidance\b|start\s*:(?!:=))")
# GBNF: literals, classes of characters and comments (perhaps unclosed) are passed over, so that what remains are names.
_GBNF_NAME = re.compile(r'(?s)"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|#[^\r\n]*|(?P<name>[\w\-]+)')
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


@dataclass(frozen=True)
class GrammarSpec:
    """kind and value: "json_object" (no value), "json_schema" (a mapping, a boolean, or either as JSON text), "regex"
    (Rust's syntax, the whole text must match), "lark" (llguidance's dialect, beginning at `start`) or "gbnf"
    (llama.cpp's, beginning at `root`). whitespace: a regex of what may stand between the parts of JSON; "" is nothing.
    Raises InputError for another kind, a value of the wrong type, or one that is too long.
    """

    kind: GrammarKind
    value: Any = None
    whitespace: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise InputError(f"unknown kind of grammar {self.kind!r}; known: {', '.join(get_args(GrammarKind))}")
        if self.kind == "json_schema":
            if not isinstance(self.value, str | bool | Mapping):
                raise InputError(f"a JSON schema is an object or a boolean, not {type(self.value).__name__}")
        elif self.kind != "json_object" and not isinstance(self.value, str):
            raise InputError(f"a grammar of kind {self.kind} is a text, not {type(self.value).__name__}")
        if len(self.text) > MAX_CHARACTERS:
            raise InputError(f"the grammar has {len(self.text)} characters, more than the {MAX_CHARACTERS} allowed")

    @property
    def text(self) -> str:
        """The value as text. Raises InputError for what JSON cannot hold."""
        if self.kind == "json_object":
            return '{"type":"object"}'
        if isinstance(self.value, str):
            return self.value
        try:
            return json.dumps(self.value)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the JSON schema is no JSON: {_one_line(error)}") from None

    @property
    def key(self) -> tuple[str, str, str | None]:
        """Equal for equal grammars."""
        return self.kind, self.text, self.whitespace


def choice_grammar(choices: Sequence[str]) -> GrammarSpec:
    """One of these texts. Raises InputError."""
    if isinstance(choices, str) or not choices or not all(isinstance(text, str) and text for text in choices):
        raise InputError("choice: give a list of texts of at least one character each")
    return GrammarSpec("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices))


def text_grammar(text: str) -> GrammarSpec:
    """A grammar whose notation nobody told: Lark if it has a rule `start:` (or %llguidance), else GBNF."""
    return GrammarSpec("lark" if _LARK.search(text) else "gbnf", text)


class GrammarTokenizer(Protocol):
    """What grammars need of a tokenizer."""

    @property
    def eos_ids(self) -> Iterable[int]: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...
    def token_bytes(self, token: int) -> bytes: ...
    def is_control(self, token: int) -> bool: ...
    def encode(self, text: str) -> list[int]: ...


class GrammarState:
    """Where one sequence is in its grammar. `mask` is what may be sampled next: uint32 [vocabulary / 32 rounded up],
    bit i of word w is token 32 w + i. A new array each time, since ranks may still read the old one.

    barred: ids that may not come, though the grammar allows them. early: ids that may not before min_tokens have come.
    What remains is never empty: where nothing would remain, the text is over.
    """

    def __init__(
        self, matcher: LLMatcher, words: int, barred: Iterable[int] = (), early: Iterable[int] = (), min_tokens: int = 0
    ) -> None:
        self.matcher = matcher
        self._barred = token_words(barred, words)
        self._early = token_words(early, words)
        self._min_tokens = min_tokens
        self._taken = 0
        self.finished = False
        self.error: str | None = None
        self.mask = np.zeros(words, np.uint32)

    def accept(self, token: int) -> None:
        """The token that was sampled. Sets `finished` when the text is complete and nothing can follow, `error` (one
        line) when the grammar became too costly to follow."""
        self._taken += 1
        if not self.matcher.consume_token(token):
            self._fail()
        elif self.matcher.is_stopped():
            self.finished = True

    @property
    def accepting(self) -> bool:
        """Whether the text could end here."""
        return self.matcher.is_accepting()

    def set_mask(self, mask: np.ndarray) -> None:
        """Takes what the grammar allows."""
        hidden = self._barred | self._early if self._taken < self._min_tokens else self._barred
        self.mask = mask & ~hidden
        if self.matcher.is_error():
            self._fail()
        elif not self.mask.any():
            self.finished = True

    def _fail(self) -> None:
        self.error = f"the grammar cannot be followed further: {_one_line(self.matcher.get_error())}"


class GrammarCompiler:
    """Compiles grammars for one vocabulary. vocab_size: the model's, which may have more ids than the tokenizer.

    What is costly (0.2 s for 49,000 tokens, 2 s for 262,000) is done at the first grammar, or in `prepare`. `compile`
    may be called by several threads.
    """

    def __init__(self, tokenizer: GrammarTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._vocabulary: LLTokenizer | None = None
        self._executor: Any = None
        self._compiled: OrderedDict[tuple[str, str, str | None], tuple[LLMatcher, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Reads the vocabulary now."""
        with self._lock:
            self._prepared()

    def compile(self, spec: GrammarSpec) -> None:
        """Checks a grammar and keeps it compiled, so that `start` is quick. Raises InputError."""
        with self._lock:
            self._first(spec)

    def start(
        self, spec: GrammarSpec, *, barred: Iterable[int] = (), early: Iterable[int] = (), min_tokens: int = 0
    ) -> GrammarState:
        """The state of a sequence that has no token yet, its mask made. Raises InputError."""
        with self._lock:
            matcher, mask = self._first(spec)
            state = GrammarState(matcher.deep_copy(), self._words, barred, early, min_tokens)
        state.set_mask(mask)
        if state.finished:
            raise InputError("the grammar allows no text, with end tokens and stop tokens barred at its beginning")
        return state

    def fill_masks(self, states: Sequence[GrammarState]) -> None:
        """Makes what may come next for each."""
        if not states:
            return
        masks = np.zeros((len(states), self._words), np.uint32)
        size = self._words * 4
        threads = min(os.cpu_count() or 1, MASK_THREADS)
        if len(states) < PARALLEL_MASKS or threads < MASK_THREADS:
            for state, mask in zip(states, masks, strict=True):
                state.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, size)
        else:
            if self._executor is None:
                from llguidance import LLExecutor

                self._executor = LLExecutor(threads)
            numbered = [(state.matcher, number) for number, state in enumerate(states)]
            self._executor.unsafe_compute_mask_ptr(numbered, masks.ctypes.data, size, len(states))
        for state, mask in zip(states, masks, strict=True):
            state.set_mask(mask)

    def _first(self, spec: GrammarSpec) -> tuple[LLMatcher, np.ndarray]:
        """The compiled grammar at its beginning, to be copied, and what may come there."""
        found = self._compiled.pop(spec.key, None) or self._compile(spec)
        self._compiled[spec.key] = found
        if len(self._compiled) > CACHED_GRAMMARS:
            self._compiled.popitem(last=False)
        return found

    def _compile(self, spec: GrammarSpec) -> tuple[LLMatcher, np.ndarray]:
        from llguidance import LLMatcher, LLParserLimits

        vocabulary = self._prepared()
        limits = LLParserLimits(
            initial_lexer_fuel=LEXER_FUEL,
            step_lexer_fuel=LEXER_FUEL // 2,
            step_max_items=PARSER_ITEMS,
            max_lexer_states=LEXER_STATES,
            verbose_errors=False,
        )
        try:
            matcher = LLMatcher(vocabulary, _llguidance(spec), log_level=0, limits=limits)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{_described(spec)}: {_one_line(error)}") from None
        mask = np.zeros(self._words, np.uint32)
        started = time.perf_counter()
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            raise InputError(f"{_described(spec)}: {_one_line(matcher.get_error())}")
        if time.perf_counter() - started > SLOWEST_MASK:
            raise InputError(f"{_described(spec)}: it takes too long to follow; make it simpler")
        if not mask.any():
            raise InputError(f"no text follows {_described(spec).removesuffix(' is not supported')}")
        return matcher, mask

    def _prepared(self) -> LLTokenizer:
        if self._vocabulary is None:
            from llguidance import LLTokenizer, TokenizerWrapper

            vocabulary = _Vocabulary(self._tokenizer, self._vocab_size)
            self._vocabulary = LLTokenizer(
                TokenizerWrapper(vocabulary), n_vocab=self._vocab_size, eos_token=vocabulary.eos_ids
            )
        return self._vocabulary


class _Vocabulary:
    """The vocabulary as llguidance reads it (`TokenizerWrapper` names the attributes)."""

    def __init__(self, tokenizer: GrammarTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        known = range(min(tokenizer.vocab_size, vocab_size))
        self.tokens = [tokenizer.token_bytes(token) for token in known] + [b""] * (vocab_size - len(known))
        self.special_token_ids = [token for token in known if tokenizer.is_control(token)]
        self.eos_ids = sorted(token for token in tokenizer.eos_ids if token < vocab_size)
        if not self.eos_ids:
            raise InputError("this model's vocabulary has no end token, which a grammar needs")
        self.eos_token_id = self.eos_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self._single = {text: token for token, text in reversed(list(enumerate(self.tokens))) if len(text) == 1}

    def __call__(self, data: bytes) -> list[int]:
        """Ids of text in the midst of a text, whose bytes are exactly these: some tokenizers put a space before the
        first word. Where a grammar leaves no choice of text, llguidance takes the tokens from here."""
        text = data.decode("utf-8", "replace")
        ids = self._tokenizer.encode(text)
        if self._joined(ids) == data:
            return ids
        ids = self._tokenizer.encode("\n" + text)
        for skipped in range(1, len(ids)):
            if self._joined(ids[skipped:]) == data:
                return ids[skipped:]
        return [self._single[byte] for byte in (data[i : i + 1] for i in range(len(data))) if byte in self._single]

    def _joined(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids)


def token_words(tokens: Iterable[int], words: int) -> np.ndarray:
    """The bits of some ids, uint32 [words]."""
    result = np.zeros(words, np.uint32)
    for token in tokens:
        result[token >> 5] |= np.uint32(1 << (token & 31))
    return result


def _llguidance(spec: GrammarSpec) -> str:
    """The grammar in the form that the compiler reads. Raises InputError, ValueError."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    text = spec.text
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if spec.kind in ("json_object", "json_schema"):
        text = _checked_schema(text)
        options: Any = {"whitespace_pattern": JSON_WHITESPACE if spec.whitespace is None else spec.whitespace}
        if spec.whitespace == "":
            options = {"whitespace_flexible": False}
        return LLMatcher.grammar_from_json_schema(text, defaults=options, overrides={"lenient": False})
    if text.count("::=") > MAX_REFERENCES:
        raise InputError(f"the grammar has more than the {MAX_REFERENCES} rules allowed")
    if spec.kind == "gbnf":
        try:
            text = gbnf_to_lark(_without_start(text))
        except RecursionError:
            raise InputError("the GBNF grammar is nested too deeply") from None
        except Exception as error:  # of several types, the base class among them
            raise InputError(f"the GBNF grammar cannot be read: {_one_line(error)}") from None
    if sum(":" in line for line in text.splitlines()) > MAX_REFERENCES or _references(text) > MAX_REFERENCES:
        raise InputError(f"the grammar has more than the {MAX_REFERENCES} rules allowed")
    return LLMatcher.grammar_from_lark(text)


def _without_start(gbnf: str) -> str:
    """With another name for a rule that is called `start`, as Lark calls the one that GBNF calls `root`."""
    names = {match["name"] for match in _GBNF_NAME.finditer(gbnf)}
    if "start" not in names:
        return gbnf
    other = next(name for number in range(len(names)) if (name := f"start-{number}") not in names)
    return _GBNF_NAME.sub(lambda match: other if match["name"] == "start" else match[0], gbnf)


def _checked_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema is no JSON: {_one_line(error)}") from None
    if not isinstance(schema, dict | bool):
        raise InputError(f"a JSON schema is an object or a boolean, not {type(schema).__name__}")
    if _references(text) > MAX_REFERENCES:
        raise InputError(f"the JSON schema has more than the {MAX_REFERENCES} references allowed")
    if schema is False:
        raise InputError("no text follows the JSON schema: false allows nothing")
    return "{}" if schema is True else text


def _references(text: str) -> int:
    """How many times it may say "$ref" (or $dynamicRef), escaped or not."""
    plain = _ESCAPE.sub(lambda match: chr(int(match.group(1), 16)), text)
    return plain.count('Ref"') + plain.count('$ref"')


def _described(spec: GrammarSpec) -> str:
    names = {"json_schema": "JSON schema", "json_object": "JSON schema", "gbnf": "GBNF grammar", "lark": "Lark grammar"}
    return f"the {names.get(spec.kind, spec.kind)} is not supported"


def _one_line(error: object) -> str:
    return " ".join(str(error).replace("<non-verbose/>", "").split())[:300] or "unknown reason"
