"""What a caller asks for and what it gets back, with vLLM's names and shapes so that people's code moves.

Plain data: no torch, no engine state. Differences from vLLM: `prompt_logprobs` is not offered (use `LLM.score`),
`logit_bias` is refused where vLLM would clamp it, and results carry `delta` and `metrics` besides.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from multitensor.engine.grammar import GrammarSpec, choice_grammar, text_grammar
from multitensor.errors import InputError

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in vLLM
MAX_LOGPROBS = 1000
MAX_SEQUENCES = 1024


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What a text must follow: exactly one of the first five. Raises InputError otherwise.

    json: a JSON schema, as a mapping or as JSON text. regex: the whole text matches (Rust's syntax, no look-around).
    choice: one of these texts. grammar: GBNF, or llguidance's Lark when it has a `start` rule. json_object: any JSON
    object. whitespace_pattern: a regex of what may stand between the parts of JSON (default: up to 32 blanks);
    disable_any_whitespace: nothing may.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        wanted = (self.json, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(value is not None for value in wanted) != 1:
            raise InputError("structured_outputs needs exactly one of json, regex, choice, grammar and json_object")
        whitespace = self.disable_any_whitespace or self.whitespace_pattern is not None
        if whitespace and self.json is None and not self.json_object:
            raise InputError("whitespace_pattern and disable_any_whitespace go with json or json_object")
        self.grammar_spec  # noqa: B018 (checks the value)

    @property
    def grammar_spec(self) -> GrammarSpec:
        whitespace = "" if self.disable_any_whitespace else self.whitespace_pattern
        if self.json is not None:
            return GrammarSpec("json_schema", self.json, whitespace)
        if self.regex is not None:
            return GrammarSpec("regex", self.regex)
        if self.choice is not None:
            return choice_grammar(self.choice)
        if self.grammar is not None:
            return text_grammar(self.grammar)
        return GrammarSpec("json_object", whitespace=whitespace)


@dataclass
class SamplingParams:
    """How one request is sampled. Raises InputError (one line) for a value out of range, here and, since fields may be
    changed afterwards as in vLLM, again when a request is made of it.

    n: continuations of the same prompt, each its own sequence and its own random numbers.
    temperature: 0 is greedy. top_k: 0 or -1 is off. top_p: 1 is off. min_p: 0 is off. The order is the one vLLM has:
    logit bias, penalties, temperature, min-p, top-k, top-p.
    repetition_penalty: divides positive logits (multiplies negative ones) of tokens in prompt or output; 1 is off.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once or for each time.
    seed: same seed, same prompt, same plan: same text. None: taken from the engine's seed and the number of the
    request, so a fresh `LLM(seed=0)` that is asked the same things in the same order says the same.
    stop: strings that end the text (left out of it unless include_stop_str_in_output). stop_token_ids: the same with
    ids. ignore_eos: the model's own end tokens do not end it. min_tokens: nothing ends it before that many.
    max_tokens: None is "to the end of the context".
    logprobs: k >= 0 gives log-probabilities of the chosen token and of the k best at every position, of the
    model's own distribution (before bias, penalties and temperature).
    logit_bias: token id -> number added to its logit.
    structured_outputs: the text must follow a JSON schema, a regex or a grammar. It ends where nothing more can
    follow, even before min_tokens; unless max_tokens or a stop ends it earlier it is complete.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises InputError for a value of the wrong type or out of range. A logit bias may have its ids as text, as
        JSON has them."""
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        self._validate_numbers()
        self._validate_stops()
        if self.logit_bias is not None:
            self.logit_bias = _bias(self.logit_bias)

    def _validate_numbers(self) -> None:
        _integer("n", self.n, 1, MAX_SEQUENCES)
        _number("temperature", self.temperature, 0.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    def _validate_stops(self) -> None:
        for name, value in (("stop", self.stop), ("stop_token_ids", self.stop_token_ids)):
            if value is not None and not isinstance(value, (str, Sequence, Set)):
                raise InputError(f"{name} must be a list, not {value!r}")
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise InputError("stop: every stop string must be a text of at least one character")
        for token in self.stop_ids:
            _integer("stop_token_ids", token, 0)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(self.stop_token_ids or ())

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _bias(given: object) -> dict[int, float]:
    """{token id: bias}; ids may be decimal text. Raises InputError."""
    if not isinstance(given, Mapping):
        raise InputError(f"logit_bias must be a mapping from token ids to numbers, not {given!r}")
    checked = {}
    for token, bias in given.items():
        known = int(token) if isinstance(token, str) and token.isdecimal() else token
        _integer("logit_bias: a token id", known, 0)
        _number("logit_bias: a bias", bias, -100.0, 100.0)
        checked[int(known)] = bias
    return checked


def _integer(name: str, value: object, low: int | None = None, high: int | None = None) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, numbers.Integral)
    if wrong or (low is not None and value < low) or (high is not None and value > high):  # type: ignore[operator]
        wanted = (
            "an integer" + (f" >= {low}" if low is not None else "") + (f" and <= {high}" if high is not None else "")
        )
        raise InputError(f"{name} must be {wanted}, not {value!r}")


def _number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> None:
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or value > high or (above and value == low):  # type: ignore[operator]
        wanted = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        raise InputError(f"{name} must be a number {wanted}, not {value!r}")


@dataclass(frozen=True)
class Logprob:
    """logprob: natural logarithm. rank: 1 is the likeliest token. decoded_token: its text alone, None without a
    vocabulary."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One continuation. `text` and `token_ids` are everything so far; `delta` is the text that is new since the
    output before this one (all of it, when there was none). finish_reason: None while it runs, "stop" (a stop string,
    stop token or the model's end token) or "length". stop_reason: the stop string or stop token id that ended it,
    None for the model's end token."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    delta: str = ""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Seconds of `time.perf_counter`; None where it has not happened. A cancelled request keeps what it had."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache when it was first scheduled
    first_tokens: int = 0  # tokens that came at first_token_time (one a sequence whose prompt ended in that step)

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens over the time from the first step to the first token."""
        if self.first_token_time is None or self.first_scheduled_time is None:
            return None
        return self.prompt_tokens / max(self.first_token_time - self.first_scheduled_time, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the step that gave the first, over the time they took; None when there were none."""
        if self.first_token_time is None or self.last_token_time is None or self.decode_tokens < 1:
            return None
        return self.decode_tokens / max(self.last_token_time - self.first_token_time, 1e-9)

    @property
    def decode_tokens(self) -> int:
        return self.output_tokens - self.first_tokens


@dataclass
class RequestOutput:
    """What came of one prompt. `prompt` is None when it was given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    prompt_logprobs: None = None  # never offered, but vLLM's results have the field

    @property
    def delta(self) -> str:
        """New text of the first continuation since the output before this one."""
        return self.outputs[0].delta


@dataclass(frozen=True)
class PositionScore:
    """The model's distribution after one token of the text: its best ids, their log-probabilities (natural), and
    that of the id that follows in the text (None at the end)."""

    top_ids: list[int]
    top_logprobs: list[float]
    next_logprob: float | None
