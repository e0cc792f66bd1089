"""The devices a plan cuts over (never imports torch)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """name: "cuda:0", "cpu:1" or "device:0" for a planned one; capacity_bytes: what the engine may use of it
    (a cap, or the free memory measured); total_bytes: what it has."""

    name: str
    kind: str  # "cpu", "cuda" or "any"
    index: int
    capacity_bytes: int
    total_bytes: int
    description: str = ""
