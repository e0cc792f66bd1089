"""Architecture name -> declaration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from multitensor.architectures import gemma, llama, qwen
from multitensor.architectures.spec import ModelSpec
from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint

# GGUF's general.architecture and config.json's model_type; where both exist they mean the same model.
ARCHITECTURES: Mapping[str, Callable[[Checkpoint], ModelSpec]] = MappingProxyType(
    {
        "llama": llama.declare_llama,
        "qwen2": qwen.declare_qwen2,
        "qwen3": qwen.declare_qwen3,
        "gemma3": gemma.declare_gemma3,
        "gemma3_text": gemma.declare_gemma3,
    }
)
_LAYER = re.compile(r"(?:blk|model\.layers)\.(\d{1,6})\.")
_MIXTURES = frozenset({"mixtral", "qwen2moe", "qwen2_moe", "qwen3moe", "qwen3_moe"})


def resolve(checkpoint: Checkpoint) -> ModelSpec:
    """The model that a checkpoint holds. Raises InputError for an architecture that is unknown (naming the known
    ones), and for a file whose tensors are not those of its architecture."""
    declare = ARCHITECTURES.get(checkpoint.architecture)
    if checkpoint.architecture in _MIXTURES:
        raise InputError(
            f"{checkpoint.path.name}: architecture {checkpoint.architecture!r} is a mixture of experts, which is not "
            "supported yet"
        )
    if declare is None:
        raise InputError(
            f"{checkpoint.path.name}: unknown architecture {checkpoint.architecture[:40]!r}; known: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    spec = declare(checkpoint)
    _check_depth(checkpoint, spec)
    used = {decl.info.name for decl in spec.tensors}
    return replace(spec, unused_tensors=tuple(name for name in checkpoint.tensors if name not in used))


def _check_depth(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """A header that says fewer layers than there are would make another, shorter model, without a word."""
    for name in checkpoint.tensors:
        found = _LAYER.match(name)
        if found and int(found.group(1)) >= spec.n_layers:
            raise InputError(
                f"{checkpoint.path.name}: the header says {spec.n_layers} layers, but there is a tensor {name!r}; "
                "the file is damaged, or of a kind that is not known here"
            )
