"""What callers of the Python API may pass as prompts and parameters, brought into one shape, and their progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

from multitensor.engine.request import SamplingParams
from multitensor.errors import InputError

if TYPE_CHECKING:
    from multitensor.formats.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]

VERIFY_TEXTS = (
    "The tide comes in twice a day, and the harbour fills with boats that have nowhere else to go.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
VERIFY_TOKENS = 24  # a prompt, where there is no vocabulary to make it from text


def id_list(ids: object) -> list[int]:
    """Token ids from any sequence of integers (lists, tuples, arrays). Raises InputError for anything else."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    good = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    if not good or not all(isinstance(value, Integral) and not isinstance(value, bool) for value in values):  # type: ignore[union-attr]
        raise InputError(f"a text, or a list of token ids, is wanted here, not {str(ids)[:60]!r}")
    return [int(value) for value in values]  # type: ignore[union-attr]


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list."""
    values: Any = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        return [values]
    if values and isinstance(values[0], Integral):
        return [values]
    return list(values)


def need_tokenizer(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    """The tokenizer; InputError, beginning with `what`, where the model's files carry none."""
    if tokenizer is None:
        raise InputError(f"{what}: the model file has no vocabulary; give token ids instead of text")
    return tokenizer


def encode(tokenizer: Tokenizer | None, text: object, *, special: bool, bos: bool) -> list[int]:
    """Token ids of a text, as LLM.tokenize. Raises InputError."""
    if not isinstance(text, str):
        raise InputError(f"tokenize: give a text, not {text!r}")
    return need_tokenizer(tokenizer, "tokenize").encode(text, special=special, bos=bos)


def decode(tokenizer: Tokenizer | None, ids: object, vocab_size: int) -> str:
    """The text of token ids, control tokens left out. vocab_size: rows that the model has. Raises InputError."""
    found, known = need_tokenizer(tokenizer, "detokenize"), id_list(ids)
    wrong = next((token for token in known if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InputError(f"detokenize: {wrong} is not a token id of this model, which has 0 to {vocab_size - 1}")
    return found.decode(known)


def encode_chat(
    tokenizer: Tokenizer | None,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[int]:
    """Token ids of a conversation through the model's chat template. Raises InputError."""
    found = need_tokenizer(tokenizer, "chat")
    from multitensor.formats.chat_template import render_chat

    if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError('chat: every message is a mapping such as {"role": "user", "content": "Hello"}')
    conversation = [dict(message) for message in messages]
    known = None if tools is None else [dict(tool) for tool in tools]
    return render_chat(found, conversation, add_generation_prompt=add_generation_prompt, tools=known)


def parse_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, Sequence[int]]:
    """(text or None, token ids). Raises InputError for what is neither."""
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), id_list(prompt["prompt_token_ids"])
        prompt = prompt.get("prompt", prompt)
    if isinstance(prompt, str):
        return prompt, _encode(prompt, need_tokenizer(tokenizer, "a text prompt"))
    return None, id_list(prompt)


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text prompt's ids. It gets BOS where the model wants one; a text that spells BOS at its start gets no second
    one."""
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        name = tokenizer.token_bytes(tokenizer.bos_id).decode("utf-8", "replace")
        if name:
            text = text.removeprefix(name)
    return tokenizer.encode(text, bos=True)


def verify_prompts(tokenizer: Tokenizer | None, vocab_size: int, most: int) -> list[list[int]]:
    """What `verify` runs where it is given nothing: a few short prompts, `most` tokens each at most (one at least)."""
    if tokenizer is not None:
        texts = [tokenizer.encode(text, bos=True) for text in VERIFY_TEXTS]
    else:
        # Steps that are prime to most vocabulary sizes, so that ids spread over all ranks' parts of it.
        texts = [[(first + 7919 * i) % vocab_size for i in range(VERIFY_TOKENS)] for first in (1, 104_729)]
    return [ids[: max(1, most)] for ids in texts]


def params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InputError(f"{count} prompts but {len(params)} sampling_params; give one for all, or one each")
    return list(params)


@contextmanager
def progress_bar(wanted: bool | Callable[[int, int], None]) -> Iterator[Callable[[int, int], None] | None]:
    if callable(wanted):
        yield wanted
    elif not wanted:
        yield None
    else:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("prompts", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
