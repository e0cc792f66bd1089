"""Rotary position embedding: the scalings of GGUF keys and of config.json, as frequencies and a magnitude.

Formulas: RoPE (arXiv:2104.09864), linear scaling (arXiv:2306.15595), YaRN (arXiv:2309.00071), Llama 3.1's by
wavelength. Both llama.cpp and transformers use the same ones; only the names of the settings differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from multitensor.architectures.fields import Fields
from multitensor.architectures.spec import RopeSpec
from multitensor.errors import InputError

Style = Literal["interleaved", "half"]

KINDS = ("default", "linear", "llama3", "yarn", "dynamic")
LEAST_BASE = 1.001  # at 1 every pair would turn alike, and yarn's ramp has no place
LEAST_TURNS = 1e-3  # of yarn's betas


@dataclass(frozen=True)
class RopeParameters:
    """dim: rotated elements of a head. original_context: tokens before scaling (llama3, yarn).
    attention_factor: the magnitude where the file gives it; else yarn's follows from `factor` and the mscales.
    extrapolation: how much of yarn's ramp is applied; at 0 yarn is linear scaling."""

    dim: int
    base: float
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    extrapolation: float = 1.0


def make_rope(p: RopeParameters, style: Style, *, use_factors_tensor: bool = False) -> RopeSpec:
    """The angles of `p`. "dynamic" scales only beyond the trained context, so within it it is the default."""
    frequencies = [p.base ** (-2.0 * i / p.dim) for i in range(p.dim // 2)]
    if p.kind == "linear":
        frequencies = [f / p.factor for f in frequencies]
    elif p.kind == "llama3":
        frequencies = [_llama3(f, p) for f in frequencies]
    elif p.kind == "yarn":
        frequencies = _yarn(frequencies, p)
    return RopeSpec(style, tuple(frequencies), _magnitude(p), use_factors_tensor)


def _llama3(frequency: float, p: RopeParameters) -> float:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    turns = p.original_context * frequency / (2.0 * math.pi)  # in the original context
    if turns >= p.high_freq_factor:
        return frequency
    if turns < p.low_freq_factor:
        return frequency / p.factor
    smooth = (turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)
    return (1.0 - smooth) * frequency / p.factor + smooth * frequency


def _yarn(frequencies: list[float], p: RopeParameters) -> list[float]:
    """Blends each frequency with its slowed one along a ramp between the dimensions of beta_fast and beta_slow."""

    def dimension(turns: float) -> float:
        return p.dim * math.log(p.original_context / (turns * 2.0 * math.pi)) / (2.0 * math.log(p.base))

    low, high = dimension(p.beta_fast), dimension(p.beta_slow)
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, p.dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    kept = [p.extrapolation * (1.0 - min(max((i - low) / (high - low), 0.0), 1.0)) for i in range(len(frequencies))]
    return [f / p.factor * (1.0 - keep) + f * keep for f, keep in zip(frequencies, kept, strict=True)]


def _magnitude(p: RopeParameters) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(p.factor) + 1.0 if p.factor > 1.0 else 1.0

    if p.attention_factor is not None:
        return p.attention_factor
    if p.kind != "yarn":
        return 1.0
    if p.mscale and p.mscale_all_dim:
        return scale(p.mscale) / scale(p.mscale_all_dim)
    return scale(1.0)


def read_gguf_rope(fields: Fields, head_dim: int, train_context: int, default_base: float = 10000.0) -> RopeParameters:
    """The rope keys of a GGUF file. Raises InputError for a scaling that is not supported.

    yarn_beta_fast, yarn_beta_slow and yarn_ext_factor are honoured for every architecture. The GGUF specification does
    not list them, but gguf-py names them for every architecture, and llama.cpp's converter writes them from the
    settings that the model was trained with. llama.cpp itself (as of 0.3.36 of llama-cpp-python) reads
    them for two architectures only (grok, mistral3) and takes 32, 1 and 1 for the rest. So the two differ only for a
    file whose values are others, and there the model as published is the one that counts.
    """
    kind = fields.text("rope.scaling.type", "none")
    kind = _known_kind(fields, "rope.scaling.type", "default" if kind == "none" else kind)
    # Files from before rope.scaling.* had one key for the linear factor.
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0)) or 1.0
    if kind == "default" and fields.raw("rope.scaling.type") is None and factor != 1.0:
        kind = "linear"
    own = RopeParameters(
        dim=_rotated(fields.integer("rope.dimension_count", head_dim), head_dim),
        base=fields.number("rope.freq_base", default_base, minimum=LEAST_BASE),
        kind=kind,
        factor=factor,
        original_context=fields.integer("rope.scaling.original_context_length", train_context),
        beta_fast=_turns(fields, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_turns(fields, "rope.scaling.yarn_beta_slow", 1.0),
        extrapolation=fields.number("rope.scaling.yarn_ext_factor", 1.0),
    )
    # llama.cpp multiplies by attn_factor whatever the kind, and ignores yarn_attn_factor where the ramp is applied.
    extra = fields.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn" and own.extrapolation != 0.0:
        extra *= _magnitude(own)
    else:
        extra *= fields.number("rope.scaling.yarn_attn_factor", 1.0)
    return replace(own, attention_factor=extra)


def read_config_rope(
    fields: Fields, head_dim: int, train_context: int, *, layer_type: str = "", default_base: float = 10000.0
) -> RopeParameters:
    """The rope of config.json: `rope_parameters` (flat, or one a layer type) of transformers 5, or `rope_theta` and
    `rope_scaling` of the versions before. Raises InputError for a scaling that is not supported."""
    own = _config_section(fields, layer_type)
    name = "rope_parameters" if fields.raw("rope_parameters") is not None else "rope_scaling"
    where = Fields(own, "", f"config.json, {name}")
    kind = _known_kind(where, "rope_type", where.text("rope_type", where.text("type", "default")))
    part = where.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * min(part, 2.0))  # `_rotated` refuses what is above 1
    original = fields.integer("original_max_position_embeddings", train_context)
    original = where.integer("original_max_position_embeddings", original)
    given_factor = kind == "yarn" and own.get("attention_factor") is not None
    needs_factor = kind in ("linear", "llama3")
    factor = where.number("factor", None if needs_factor else train_context / original, minimum=1e-6)
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            where.number(key)
    return RopeParameters(
        dim=_rotated(dim, head_dim),
        base=where.number(
            "rope_theta", fields.number("rope_theta", default_base, minimum=LEAST_BASE), minimum=LEAST_BASE
        ),
        kind=kind,
        factor=factor,
        original_context=original,
        low_freq_factor=where.number("low_freq_factor", 1.0),
        high_freq_factor=where.number("high_freq_factor", 4.0),
        beta_fast=_turns(where, "beta_fast", 32.0),
        beta_slow=_turns(where, "beta_slow", 1.0),
        attention_factor=where.number("attention_factor") if given_factor else None,
        mscale=where.number("mscale", 0.0),
        mscale_all_dim=where.number("mscale_all_dim", 0.0),
        truncate=where.flag("truncate", True),
    )


def _config_section(fields: Fields, layer_type: str) -> Mapping[str, Any]:
    """The rope settings of a layer type. In the flat forms of old, they are those of the full-attention layers."""
    settings = fields.raw("rope_parameters")
    if settings is None:
        settings = fields.raw("rope_scaling")
    if not isinstance(settings, Mapping):
        return {}
    nested = settings.get(layer_type or "full_attention")
    if isinstance(nested, Mapping):
        return nested
    return {} if any(isinstance(value, Mapping) for value in settings.values()) else settings


def _turns(fields: Fields, name: str, default: float) -> float:
    """One of yarn's betas; 0 stands for the default. Raises InputError."""
    return fields.number(name, default, minimum=LEAST_TURNS) if fields.raw(name) != 0 else default


def _known_kind(fields: Fields, name: str, kind: str) -> str:
    if kind not in KINDS:
        raise fields.error(name, f"is {kind[:40]!r}, which is not supported yet; supported: {', '.join(KINDS)}")
    return kind


def _rotated(dim: int, head_dim: int) -> int:
    if dim % 2 or not 2 <= dim <= head_dim:
        raise InputError(
            f"the rotary embedding covers {dim} of {head_dim} elements of a head; an even part is expected"
        )
    return dim
