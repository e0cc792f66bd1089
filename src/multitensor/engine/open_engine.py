"""From a model's path to an engine whose ranks are ready; again and again with one plan (never imports torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitensor.engine.engine import Engine
from multitensor.engine.executor import Progress
from multitensor.engine.prepare import Prepared, prepare
from multitensor.engine.process_executor import ProcessExecutor
from multitensor.formats.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class EngineOpener:
    """A model that is planned. Calling it starts the ranks and loads the model, each time; what it opens,
    `Engine.close` ends. progress: of loading, called with bytes done and bytes in all."""

    prepared: Prepared
    tokenizer: Tokenizer | None
    progress: Progress | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is worth telling of the plan and the files' vocabulary before anything is loaded, a line each."""
        return (*self.prepared.plan.warnings, *(self.tokenizer.warnings if self.tokenizer is not None else ()))

    def __call__(self) -> Engine:
        executor = ProcessExecutor()
        try:
            executor.start(self.prepared.plan, self.prepared.config, self.progress)
            return Engine(executor, self.prepared.plan, self.prepared.config, self.tokenizer)
        except BaseException:
            executor.close()
            raise


def engine_opener(model: str | Path, *, progress: Progress | None = None, **settings: Any) -> EngineOpener:
    """Plans the model at once. settings: as `prepare` has them. Raises InputError, DoesNotFit."""
    prepared = prepare(model, **settings)
    return EngineOpener(prepared, load_tokenizer(prepared.checkpoint), progress)
