"""What callers of the Python API may pass as prompts and parameters, brought into one shape, and their progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from multitensor.engine.request import SamplingParams
from multitensor.errors import InputError

Prompt = str | Sequence[int] | Mapping[str, Any]


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
