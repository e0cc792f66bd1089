"""What each architecture says of a file: dimensions, traits, tensors; and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from multitensor.architectures.cut_rules import CutColumns, CutHeads, CutRows, Replicate
from multitensor.architectures.registry import ARCHITECTURES, resolve
from multitensor.architectures.spec import LayerSpec, ModelSpec
from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint, open_checkpoint
from synthetic import tiny_hf, write_gguf

DIMS: dict[str, Any] = {"hidden": 96, "ffn": 128, "n_layers": 7, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32}


def from_gguf(tmp_path: Path, architecture: str, **options: Any) -> ModelSpec:
    return resolve(open_checkpoint(write_gguf(tmp_path / "m.gguf", architecture, **{**DIMS, **options})))


def from_hf(tmp_path: Path, architecture: str, **options: Any) -> ModelSpec:
    return resolve(open_checkpoint(tiny_hf(tmp_path / "hf", architecture, **{**DIMS, **options})))


def names(spec: ModelSpec) -> set[str]:
    """Canonical names, one block for all."""
    return {decl.name.replace(f"blk.{decl.layer}.", "") for decl in spec.tensors}


COMMON = {
    "token_embd.weight",
    "output_norm.weight",
    *(f"{part}.weight" for part in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")),
    *(f"ffn_{part}.weight" for part in ("gate", "up", "down")),
}
OWN = {
    "llama": set(),
    "qwen2": {"attn_q.bias", "attn_k.bias", "attn_v.bias"},
    "qwen3": {"attn_q_norm.weight", "attn_k_norm.weight"},
    "gemma3": {
        "attn_q_norm.weight",
        "attn_k_norm.weight",
        "post_attention_norm.weight",
        "post_ffw_norm.weight",
    },
}


@pytest.mark.parametrize("architecture", OWN)
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_and_hugging_face_declare_the_same_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    gguf = from_gguf(tmp_path, architecture, tied=tied, norm_eps=1e-6)
    hf = from_hf(tmp_path, architecture, tied=tied, rms_norm_eps=1e-6)
    for spec in (gguf, hf):
        assert spec.architecture == architecture
        assert (spec.hidden_size, spec.ffn_size, spec.n_layers, spec.vocab_size) == (96, 128, 7, 320)
        assert (spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.train_context) == (6, 2, 32, 512)
        assert spec.norm_eps == pytest.approx(1e-6)
        assert spec.tied_embeddings is tied
        assert names(spec) == COMMON | OWN[architecture] | (set() if tied else {"output.weight"})
        assert spec.qk_norm is (architecture in ("qwen3", "gemma3"))
        assert spec.post_norms is (architecture == "gemma3")
        assert spec.attention_scale == pytest.approx(32**-0.5)
        assert spec.activation == ("gelu_tanh" if architecture == "gemma3" else "silu")
        assert spec.embedding_scale == (96**0.5 if architecture == "gemma3" else 1.0)
    assert [decl.name for decl in gguf.tensors] == [decl.name for decl in hf.tensors]
    assert [decl.info.shape for decl in gguf.tensors] == [decl.info.shape for decl in hf.tensors]
    assert [rope.style for rope in hf.ropes] == ["half"] * len(hf.ropes)
    assert gguf.ropes[0].style == ("interleaved" if architecture == "llama" else "half")
    assert (gguf.norm_offset, hf.norm_offset) == (0.0, 1.0 if architecture == "gemma3" else 0.0)


def test_rules_and_groups(tmp_path: Path) -> None:
    spec = from_gguf(tmp_path, "qwen2", tied=False)
    found = {decl.name: decl for decl in spec.tensors}
    expected: dict[str, tuple[type | CutHeads, str]] = {
        "token_embd.weight": (CutRows, "vocabulary"),
        "output.weight": (CutRows, "vocabulary"),
        "output_norm.weight": (Replicate, "shared"),
        "blk.3.attn_norm.weight": (Replicate, "shared"),
        "blk.3.attn_q.weight": (CutHeads("query"), "attention"),
        "blk.3.attn_q.bias": (CutHeads("query"), "attention"),
        "blk.3.attn_k.weight": (CutHeads("kv"), "attention"),
        "blk.3.attn_v.bias": (CutHeads("kv"), "attention"),
        "blk.3.attn_output.weight": (CutHeads("output"), "attention"),
        "blk.3.ffn_gate.weight": (CutRows, "ffn"),
        "blk.3.ffn_up.weight": (CutRows, "ffn"),
        "blk.3.ffn_down.weight": (CutColumns, "ffn"),
    }
    for name, (rule, group) in expected.items():
        own = found[name]
        assert own.rule == rule if isinstance(rule, CutHeads) else isinstance(own.rule, rule)
        assert own.group == group
        assert own.layer == (3 if name.startswith("blk.3.") else None)


def test_llama_biases_are_taken_where_the_model_has_them(tmp_path: Path) -> None:
    spec = from_hf(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    biases = {f"attn_{part}.bias" for part in ("q", "k", "v", "output")}
    biases |= {f"ffn_{part}.bias" for part in ("gate", "up", "down")}
    assert names(spec) == COMMON | biases | {"output.weight"}
    found = {decl.name: decl.rule for decl in spec.tensors}
    assert isinstance(found["blk.0.attn_output.bias"], Replicate) and isinstance(
        found["blk.0.ffn_down.bias"], Replicate
    )
    assert found["blk.0.attn_k.bias"] == CutHeads("kv") and found["blk.0.ffn_up.bias"] == CutRows()


def test_rope_factors_of_a_gguf_llama(tmp_path: Path) -> None:
    spec = from_gguf(tmp_path, "llama", rope_factors=True)
    assert spec.ropes[0].use_factors_tensor
    factors = next(decl for decl in spec.tensors if decl.name == "rope_freqs.weight")
    assert factors.info.shape == (16,) and isinstance(factors.rule, Replicate)
    assert not from_gguf(tmp_path, "llama").ropes[0].use_factors_tensor


def test_gemma3_layers_and_ropes(tmp_path: Path) -> None:
    for spec in (from_gguf(tmp_path, "gemma3", sliding_window=48), from_hf(tmp_path, "gemma3", sliding_window=48)):
        assert [layer.window for layer in spec.layers] == [48, 48, 48, 48, 48, None, 48]
        assert [layer.rope for layer in spec.layers] == [1, 1, 1, 1, 1, 0, 1]
        assert spec.ropes[1].inverse_frequencies[1] == pytest.approx(10000.0 ** (-2 / 32))


def test_gemma3_ropes_of_config_json_old_and_new(tmp_path: Path) -> None:
    new = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }
    old = {
        "rope_parameters": None,
        "rope_theta": 2e6,
        "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    folder = tiny_hf(tmp_path / "hf", "gemma3", **DIMS)
    specs = [with_config(folder, change) for change in ({"rope_parameters": new}, old)]
    for spec in specs:
        assert spec.ropes[0].inverse_frequencies[:2] == pytest.approx((1 / 8, 2e6 ** (-2 / 32) / 8))
        assert spec.ropes[1].inverse_frequencies[:2] == pytest.approx((1.0, 5000.0 ** (-2 / 32)))
    bare = with_config(folder, {"rope_parameters": None})
    assert bare.ropes[0].inverse_frequencies[1] == pytest.approx(1e6 ** (-2 / 32))
    assert bare.ropes[1].inverse_frequencies[1] == pytest.approx(1e4 ** (-2 / 32))


def with_config(folder: Path, change: dict[str, Any]) -> ModelSpec:
    """The folder's model with other settings; None removes a key."""
    checkpoint = open_checkpoint(folder)
    values = {key: value for key, value in {**checkpoint.metadata, **change}.items() if value is not None}
    return resolve(replace(checkpoint, metadata=values))


def test_gemma3_settings_of_config_json(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "hf", "gemma3", **DIMS)
    spec = with_config(folder, {"query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0})
    assert (spec.attention_scale, spec.logit_softcap, spec.attention_softcap) == (0.25, 30.0, None)
    assert with_config(folder, {"attn_logit_softcapping": 50.0}).attention_softcap is None  # as in transformers
    pattern = with_config(folder, {"layer_types": None, "sliding_window_pattern": 3})
    assert [layer.window is None for layer in pattern.layers] == [False, False, True, False, False, True, False]
    typed = with_config(folder, {"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 4})
    assert [layer.rope for layer in typed.layers] == [0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(InputError, match="layer_types"):
        with_config(folder, {"layer_types": ["full_attention"]})
    with pytest.raises(InputError, match="bidirectional"):
        with_config(folder, {"use_bidirectional_attention": True})


def test_gemma3_27b_scales_queries_by_hidden_size_over_heads(tmp_path: Path) -> None:
    spec = from_gguf(tmp_path, "gemma3", n_layers=62, n_kv_heads=1)
    assert spec.attention_scale == pytest.approx((96 / 6) ** -0.5)


def test_gemma3_beside_a_vision_tower(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "hf", "gemma3", tied=True, **DIMS)
    plain = open_checkpoint(folder)
    config = {
        "model_type": "gemma3",
        "text_config": {key: value for key, value in plain.metadata.items() if key != "tie_word_embeddings"},
        "vision_config": {"hidden_size": 8},
    }
    for prefix in ("language_model.model.", "model.language_model."):
        tensors = {
            prefix + name.removeprefix("model."): replace(info, name=prefix + name.removeprefix("model."))
            for name, info in plain.tensors.items()
        }
        vision = next(iter(plain.tensors.values()))
        tensors["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = vision
        spec = resolve(replace(plain, architecture="gemma3", metadata=config, tensors=tensors))
        assert names(spec) == COMMON | OWN["gemma3"] and spec.tied_embeddings
        assert spec.unused_tensors == ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",)
        assert spec.layers[5] == LayerSpec() and spec.layers[0].rope == 1


def test_qwen_uses_a_window_only_when_asked(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "hf", "qwen3", **DIMS)
    assert all(layer == LayerSpec() for layer in with_config(folder, {}).layers)
    asked = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 5}
    windows = [layer.window for layer in with_config(folder, {**asked, "layer_types": None}).layers]
    assert windows == [None] * 5 + [20] * 2


def test_real_models(smollm2_path: Path, gemma3_path: Path) -> None:
    spec = resolve(open_checkpoint(smollm2_path))
    assert (spec.n_layers, spec.n_heads, spec.n_kv_heads, spec.hidden_size, spec.ffn_size) == (30, 9, 3, 576, 1536)
    assert spec.tied_embeddings and spec.vocab_size == 49152 and spec.unused_tensors == ()
    assert spec.ropes[0].style == "interleaved" and len(spec.ropes[0].inverse_frequencies) == 32
    spec = resolve(open_checkpoint(gemma3_path))
    assert (spec.n_layers, spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.ffn_size) == (18, 4, 1, 256, 2048)
    assert [index for index, layer in enumerate(spec.layers) if layer.window is None] == [5, 11, 17]
    assert spec.layers[0].window == 512 and spec.embedding_scale == math.sqrt(640) and spec.norm_offset == 0.0


def changed(checkpoint: Checkpoint, **metadata: Any) -> Checkpoint:
    return replace(
        checkpoint, metadata={**checkpoint.metadata, **{k.replace("__", "."): v for k, v in metadata.items()}}
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_gguf(tmp_path_factory.mktemp("llama") / "m.gguf", **{**DIMS, "n_layers": 2}))


def refuses(checkpoint: Checkpoint, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve(checkpoint)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_named_with_the_known_ones(llama: Checkpoint) -> None:
    refuses(
        replace(llama, architecture="mamba"), "unknown architecture 'mamba'; known: " + ", ".join(sorted(ARCHITECTURES))
    )


def test_fewer_layers_than_there_are_tensors_of_are_refused(llama: Checkpoint) -> None:
    layers = resolve(llama).n_layers
    refuses(
        changed(llama, llama__block_count=layers - 1), rf"header says {layers - 1} layers, but .*blk\.{layers - 1}\."
    )


def test_mixtures_of_experts_are_not_supported_yet(llama: Checkpoint) -> None:
    refuses(replace(llama, architecture="qwen3moe"), "'qwen3moe' is a mixture of experts, which is not supported yet")
    refuses(changed(llama, llama__expert_count=8), "mixture of experts is not supported yet")
    expert = {"blk.0.ffn_up_exps.weight": next(iter(llama.tensors.values()))}
    refuses(replace(llama, tensors={**llama.tensors, **expert}), "mixture of experts is not supported yet")


def test_missing_and_misshapen_tensors_are_named(llama: Checkpoint) -> None:
    for name in ("token_embd.weight", "blk.1.ffn_down.weight", "output_norm.weight"):
        refuses(
            replace(llama, tensors={k: v for k, v in llama.tensors.items() if k != name}), f"tensor {name} is missing"
        )
    wrong = replace(llama.tensors["blk.1.attn_k.weight"], shape=(96, 32))
    tensors = {**llama.tensors, "blk.1.attn_k.weight": wrong}
    refuses(replace(llama, tensors=tensors), r"tensor blk\.1\.attn_k\.weight is 96 x 32; .* 64 x 96")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama__block_count": None}, "llama.block_count is missing"),
        ({"llama__block_count": 1 << 40}, "do not go with the"),
        ({"llama__block_count": 0}, "llama.block_count is 0; at least 1"),
        ({"llama__embedding_length": "96"}, "llama.embedding_length is '96'; a number"),
        ({"llama__embedding_length": 64.5}, "llama.embedding_length is 64.5; a whole number"),
        ({"llama__attention__head_count": 0}, "head_count is 0"),
        ({"llama__attention__head_count_kv": 4}, "6 query heads cannot share 4 KV heads"),
        ({"llama__feed_forward_length": [96, 128]}, "differs from layer to layer"),
        ({"llama__attention__value_length": 16}, "value_length differs"),
        ({"llama__attention__key_length": 1 << 31, "llama__attention__value_length": 1 << 31}, "do not go with"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"llama__rope__dimension_count": 33}, "covers 33 of 32"),
        ({"llama__rope__scaling__type": "longrope"}, "'longrope', which is not supported yet"),
    ],
)
def test_hyperparameters_that_make_no_sense_are_named(llama: Checkpoint, change: dict[str, Any], message: str) -> None:
    refuses(changed(llama, **change), message)


def test_a_list_of_equal_sizes_is_one_size(llama: Checkpoint) -> None:
    assert resolve(changed(llama, llama__feed_forward_length=[128, 128])).ffn_size == 128


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "hf", "llama", **DIMS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    refuses(open_checkpoint(folder), "hidden_act is 'relu'")


def test_a_head_that_config_json_promises_must_be_there(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "hf", "llama", tied=True, **DIMS)
    assert with_config(folder, {"tie_word_embeddings": None}).tied_embeddings
    with pytest.raises(InputError, match=r"tensor output\.weight is missing"):
        with_config(folder, {"tie_word_embeddings": False})
