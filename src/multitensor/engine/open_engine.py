"""From a model's path to an engine whose ranks are ready; again and again with one plan (never imports torch)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from multitensor.engine.engine import Engine
from multitensor.engine.executor import Progress
from multitensor.engine.prepare import Prepared, prepare
from multitensor.engine.process_executor import ProcessExecutor
from multitensor.formats.tokenizer import load_tokenizer


def engine_opener(
    model: str | Path, *, progress: Progress | None = None, **settings: Any
) -> tuple[Prepared, Callable[[], Engine]]:
    """Plans the model at once (settings: as `prepare` has them; raises InputError, DoesNotFit). The second value starts
    the ranks and loads the model each time it is called; what it opens, `Engine.close` ends."""
    prepared = prepare(model, **settings)
    tokenizer = load_tokenizer(prepared.checkpoint)

    def open_engine() -> Engine:
        executor = ProcessExecutor()
        try:
            executor.start(prepared.plan, prepared.config, progress)
            return Engine(executor, prepared.plan, prepared.config, tokenizer)
        except BaseException:
            executor.close()
            raise

    return prepared, open_engine
