"""Multi-tensor parallelism: every weight of a language model cut over the GPUs of one machine.

Names are loaded when first used, and nothing here imports torch: only the ranks' processes do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multitensor.engine.llm import LLM as LLM
    from multitensor.engine.request import CompletionOutput as CompletionOutput
    from multitensor.engine.request import Logprob as Logprob
    from multitensor.engine.request import PositionScore as PositionScore
    from multitensor.engine.request import RequestOutput as RequestOutput
    from multitensor.engine.request import SamplingParams as SamplingParams
    from multitensor.engine.request import StructuredOutputsParams as StructuredOutputsParams
    from multitensor.errors import CheckFailed as CheckFailed
    from multitensor.errors import DoesNotFit as DoesNotFit
    from multitensor.errors import InputError as InputError
    from multitensor.errors import MultitensorError as MultitensorError
    from multitensor.errors import RankFailed as RankFailed

__version__ = "0.1.0.dev0"

_HOMES = {
    "LLM": "multitensor.engine.llm",
    "SamplingParams": "multitensor.engine.request",
    "StructuredOutputsParams": "multitensor.engine.request",
    "RequestOutput": "multitensor.engine.request",
    "CompletionOutput": "multitensor.engine.request",
    "Logprob": "multitensor.engine.request",
    "PositionScore": "multitensor.engine.request",
    "MultitensorError": "multitensor.errors",
    "InputError": "multitensor.errors",
    "DoesNotFit": "multitensor.errors",
    "CheckFailed": "multitensor.errors",
    "RankFailed": "multitensor.errors",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'multitensor' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
