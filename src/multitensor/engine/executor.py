"""How the engine drives its ranks, whatever they are: threads in this process or processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from multitensor.config import EngineConfig
from multitensor.engine.batch import StepInput, StepMasks, StepOutput
from multitensor.engine.statistics import RankSeconds
from multitensor.sharding.plan import Plan

Progress = Callable[[int, int], None]  # bytes loaded by rank 0's device and its total; called now and then


class Executor(Protocol):
    """Every method raises RankFailed, once and with the reason, when a rank is lost."""

    def start(self, plan: Plan, config: EngineConfig, progress: Progress | None = None) -> None:
        """Starts the ranks and loads the model; returns when every rank is ready."""

    def submit(self, step: StepInput) -> None:
        """Queues a step on all ranks; does not wait. Up to 4 may be under way."""

    def send_masks(self, masks: StepMasks) -> None:
        """Tells all ranks what a step with late masks waits for. It is the step that was submitted last; does not
        wait."""

    def collect(self) -> StepOutput:
        """Waits for the oldest submitted step's result (rank 0's)."""

    def call(self, method: str, **arguments: Any) -> list[Any]:
        """Runs `ModelRunner.<method>(**arguments)` on every rank, between steps; all ranks' results in rank order."""

    def rank_seconds(self) -> RankSeconds:
        """By rank: seconds that it computed, and that it was in reductions (None where not measured), so far."""

    def check(self) -> None:
        """Raises RankFailed when a rank has been lost, also while nothing is under way; does not wait."""

    def close(self) -> None:
        """Ends all ranks and frees everything; safe to call twice and from a signal's KeyboardInterrupt."""
