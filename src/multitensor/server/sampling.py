"""Bodies of requests -> SamplingParams and grammars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from multitensor.engine.request import SamplingParams
from multitensor.server.errors import bad_request
from multitensor.server.schemas import Sampling
from multitensor.server.settings import ServerSettings

if TYPE_CHECKING:
    from multitensor.engine.grammar import GrammarSpec


def sampling_params(
    body: Sampling,
    settings: ServerSettings,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    n: int | None = None,
    prompts: int = 1,
) -> SamplingParams:
    """max_tokens: None is "to the end of the context". logprobs: None is off. n: instead of the body's.
    Raises InputError, and ApiError 400 beyond the server's limits."""
    n = n or body.n or 1
    if n * prompts > settings.max_choices:
        raise bad_request(f"{n * prompts} answers at once; this server writes {settings.max_choices} at most", "n")
    stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    return SamplingParams(
        n=n,
        temperature=_given(body.temperature, 1.0),
        top_p=_given(body.top_p, 1.0),
        top_k=_given(body.top_k, 0),
        min_p=_given(body.min_p, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        seed=body.seed,
        stop=stop or None,
        stop_token_ids=body.stop_token_ids or None,
        ignore_eos=bool(body.ignore_eos),
        max_tokens=max_tokens,
        min_tokens=_given(body.min_tokens, 0),
        logprobs=logprobs,
        logit_bias=dict(body.logit_bias) if body.logit_bias else None,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=_given(body.skip_special_tokens, True),
    )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def grammar_of(body: Sampling) -> GrammarSpec | None:
    """What response_format or grammar asks for. Raises ApiError when both do."""
    from multitensor.engine.grammar import GrammarSpec, text_grammar

    wanted = body.response_format if body.response_format and body.response_format.type != "text" else None
    if wanted is not None and body.grammar is not None:
        raise bad_request("response_format and grammar both shape the answer; give one of them", "grammar")
    if wanted is not None and wanted.json_schema is not None and wanted.type == "json_schema":
        return GrammarSpec("json_schema", wanted.json_schema.schema_)
    if wanted is not None:
        return GrammarSpec("json_object")
    if isinstance(body.grammar, str):
        return text_grammar(body.grammar)
    return GrammarSpec(body.grammar.type, body.grammar.value) if body.grammar is not None else None
