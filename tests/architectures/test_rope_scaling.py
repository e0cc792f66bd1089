"""Every rope scaling against transformers' own, from both forms of config.json and from GGUF keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from multitensor.architectures.fields import Fields
from multitensor.architectures.rope import make_rope, read_config_rope, read_gguf_rope
from multitensor.architectures.spec import RopeSpec
from multitensor.errors import InputError

HEAD_DIM = 64
CONTEXT = 32768

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 1e6},
    "yarn with a given magnitude": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.25,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "rope_theta": 10000.0,
    },
    "yarn with mscales": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
        "rope_theta": 10000.0,
    },
    "yarn whose ramp has no width": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 6,
        "rope_theta": 10000.0,
    },
    "dynamic within the context": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "part of the head": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


def llama_rotary(rope: dict[str, Any]) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=HEAD_DIM, max_position_embeddings=CONTEXT, rope_parameters=rope
    )
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq, rotary.attention_scaling


def assert_same(spec: RopeSpec, frequencies: torch.Tensor, magnitude: float) -> None:
    own = torch.tensor(spec.inverse_frequencies, dtype=torch.float64)
    torch.testing.assert_close(own, frequencies.double(), rtol=1e-5, atol=0.0)
    assert spec.magnitude == pytest.approx(magnitude, rel=1e-6)


def fields(values: dict[str, Any]) -> Fields:
    return Fields(values, "", "config.json")


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_are_those_of_transformers(name: str) -> None:
    rope = SCALINGS[name]
    if "partial_rotary_factor" in rope:
        frequencies, magnitude = 1.0 / 10000.0 ** (torch.arange(0, 32, 2).double() / 32), 1.0
    else:
        frequencies, magnitude = llama_rotary(dict(rope))
    new_form = fields({"rope_parameters": rope})
    assert_same(make_rope(read_config_rope(new_form, HEAD_DIM, CONTEXT), "half"), frequencies, magnitude)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    for key in ("rope_type", "type"):
        old_form = fields({"rope_theta": rope["rope_theta"], "rope_scaling": {**scaling, key: rope["rope_type"]}})
        assert_same(make_rope(read_config_rope(old_form, HEAD_DIM, CONTEXT), "half"), frequencies, magnitude)


def test_without_settings_the_base_is_10000() -> None:
    frequencies, magnitude = llama_rotary({"rope_type": "default", "rope_theta": 10000.0})
    for values in ({}, {"rope_scaling": None}, {"rope_parameters": None}):
        assert_same(make_rope(read_config_rope(fields(values), HEAD_DIM, CONTEXT), "half"), frequencies, magnitude)


def test_gemma3_has_one_rope_a_layer_type() -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    rotary = Gemma3RotaryEmbedding(Gemma3TextConfig(hidden_size=256, head_dim=HEAD_DIM, rope_parameters=nested))
    for layer_type in nested:
        parameters = read_config_rope(fields({"rope_parameters": nested}), HEAD_DIM, CONTEXT, layer_type=layer_type)
        assert_same(make_rope(parameters, "half"), getattr(rotary, f"{layer_type}_inv_freq"), 1.0)


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"freq_base": 500000.0}, SCALINGS["default"]),
        ({"freq_base": 10000.0, "scaling.type": "linear", "scaling.factor": 4.0}, SCALINGS["linear"]),
        ({"freq_base": 10000.0, "scaling.factor": 4.0}, SCALINGS["linear"]),
        ({"freq_base": 10000.0, "scale_linear": 4.0}, SCALINGS["linear"]),
        (
            {
                "freq_base": 1e6,
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 8192,
                "scaling.yarn_attn_factor": 7.0,  # llama.cpp ignores it where the ramp is applied
            },
            SCALINGS["yarn"],
        ),
        (
            {
                "freq_base": 1e6,
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 8192,
                "scaling.yarn_beta_fast": 16.0,
                "scaling.yarn_beta_slow": 2.0,
                "scaling.attn_factor": 0.5,
            },
            {**SCALINGS["yarn"], "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.5 * 1.1386294361},
        ),
        (
            {"freq_base": 1e6, "scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_ext_factor": 0.0},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_gguf_keys_mean_the_same(architecture: str, keys: dict[str, Any], rope: dict[str, Any]) -> None:
    gguf = Fields({f"{architecture}.rope.{key}": value for key, value in keys.items()}, f"{architecture}.", "a.gguf")
    assert_same(make_rope(read_gguf_rope(gguf, HEAD_DIM, CONTEXT), "half"), *llama_rotary(dict(rope)))


def test_gguf_may_rotate_a_part_of_the_head() -> None:
    gguf = Fields({"llama.rope.dimension_count": 32}, "llama.", "a.gguf")
    assert len(make_rope(read_gguf_rope(gguf, HEAD_DIM, CONTEXT), "interleaved").inverse_frequencies) == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope'.*supported: default, linear"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 0.0}, "factor is 0"),
        ({"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}, "low_freq_factor is missing"),
        ({"rope_type": "default", "rope_theta": "x"}, "rope_theta is 'x'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.01}, "covers 0 of 64"),
        ({"rope_type": "default", "partial_rotary_factor": 1e308}, "covers 128 of 64"),
        ({"rope_type": 3}, "rope_type is '3'; text"),
    ],
)
def test_what_is_not_supported_or_wrong_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_config_rope(fields({"rope_parameters": settings}), HEAD_DIM, CONTEXT)
    if settings.get("rope_type") == "longrope":
        with pytest.raises(InputError, match=message):
            read_gguf_rope(Fields({"llama.rope.scaling.type": "longrope"}, "llama.", "a.gguf"), HEAD_DIM, CONTEXT)


@pytest.mark.parametrize(
    ("name", "value"),
    [("freq_base", 1.0), ("freq_base", 0.0), ("scaling.yarn_beta_fast", -1.0), ("scaling.yarn_beta_slow", 1e-300)],
)
def test_gguf_values_without_a_meaning_are_named(name: str, value: float) -> None:
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, f"llama.rope.{name}": value}
    with pytest.raises(InputError, match=f"a.gguf: llama.rope.{name} is "):
        make_rope(read_gguf_rope(Fields(keys, "llama.", "a.gguf"), HEAD_DIM, CONTEXT), "half")


def test_llama3_may_have_one_factor_for_long_and_short_waves() -> None:
    turns = CONTEXT / (2 * math.pi)  # of the first frequency, 1
    settings = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": turns, "high_freq_factor": turns}
    rope = make_rope(read_config_rope(fields({"rope_parameters": settings}), HEAD_DIM, CONTEXT), "half")
    assert rope.inverse_frequencies[0] == 1.0 and rope.inverse_frequencies[1] < 0.5


def test_a_base_beside_the_rope_settings_is_checked_too() -> None:
    with pytest.raises(InputError, match="rope_theta is 0"):
        read_config_rope(fields({"rope_theta": 0}), HEAD_DIM, CONTEXT)
