"""Typed look-ups in a checkpoint's metadata, so that every error names the key and the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint


class Fields:
    """`values` with keys under `prefix` ("llama." for GGUF, "" for config.json). A null counts as absent."""

    def __init__(self, values: Mapping[str, Any], prefix: str, where: str) -> None:
        self._values = values
        self._prefix = prefix
        self._where = where

    @classmethod
    def of(cls, checkpoint: Checkpoint, section: str | None = None) -> Fields:
        """The hyperparameters of a checkpoint. `section`: a nested part of config.json to read, where it exists."""
        where = checkpoint.path.name
        if checkpoint.format == "gguf":
            return cls(checkpoint.metadata, f"{checkpoint.architecture}.", where)
        nested = checkpoint.metadata.get(section) if section else None
        return cls(nested if isinstance(nested, Mapping) else checkpoint.metadata, "", where)

    def raw(self, name: str) -> Any:
        """The value as the file has it, or None."""
        return self._values.get(self._prefix + name)

    def error(self, name: str, what: str) -> InputError:
        return InputError(f"{self._where}: {self._prefix}{name} {what}")

    def number(self, name: str, default: float | None = None, *, minimum: float | None = None) -> float:
        """A finite number; without a default the key is required. Raises InputError."""
        return self._number(name, self.raw(name), default, minimum)

    def _number(self, name: str, value: Any, default: float | None, minimum: float | None) -> float:
        if value is None:
            if default is None:
                raise self.error(name, "is missing; the file does not describe its model")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise self.error(name, f"is {str(value)[:40]!r}; a number was expected")
        if not abs(float(value)) < float("inf") or (minimum is not None and value < minimum):
            limit = f"; at least {minimum} was expected" if minimum is not None else ""
            raise self.error(name, f"is {value}{limit}")
        return float(value)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number, or a list of equal ones (GGUF allows one a layer). Raises InputError."""
        value = self.raw(name)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, Sequence) and not isinstance(value, str):
            if not value or any(item != value[0] for item in value):
                raise self.error(name, "differs from layer to layer, which is not supported yet")
            value = value[0]
        number = self._number(name, value, default, minimum)
        if number != int(number):
            raise self.error(name, f"is {number}; a whole number was expected")
        return int(number)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw(name)
        if value is not None and not isinstance(value, int):
            raise self.error(name, f"is {str(value)[:40]!r}; true or false was expected")
        return default if value is None else bool(value)

    def text(self, name: str, default: str) -> str:
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, f"is {str(value)[:40]!r}; text was expected")
        return default if value is None else value

    def sliding_layers(self, count: int, otherwise: Sequence[bool]) -> Sequence[bool]:
        """Which layers have a sliding window: by config.json's layer_types, else `otherwise`. Raises InputError."""
        kinds = self.raw("layer_types")
        if kinds is None:
            return otherwise
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, Sequence) or len(kinds) != count or any(kind not in known for kind in kinds):
            raise self.error("layer_types", f"should name one of {' and '.join(known)} for each of {count} layers")
        return [kind == "sliding_attention" for kind in kinds]
