"""Tokenizers of Hugging Face folders, against the `tokenizers` library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Pipeline

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint
from multitensor.formats.detokenizer import byte_alphabet
from multitensor.formats.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["hello world", "<|im_start|>user\nhi<|im_end|>", "Ünïcödé 🎉 字", "  spaces  ", "", "<tool>x</tool>"]


def byte_level() -> Pipeline:
    letters = sorted(byte_alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    vocabulary = {text: i for i, text in enumerate([*letters, *(a + b for a, b in merges)])}
    pipeline = Pipeline(models.BPE(vocabulary, merges))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    pipeline.add_tokens(["<tool>"])
    pipeline.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", pipeline.token_to_id("<|begin|>"))]
    )
    return pipeline


def sentence_piece() -> Pipeline:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    pipeline = Pipeline(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [("\u2581", "a")], byte_fallback=True, unk_token="<unk>"
        )
    )
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pipeline.add_special_tokens(["<unk>", "<s>", "</s>"])
    return pipeline


def save(folder: Path, pipeline: Pipeline, **files: Any) -> Tokenizer:
    pipeline.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    config = files.get("config", {})
    tokenizer = load_tokenizer(Checkpoint("safetensors", folder, (), "llama", config, {}))
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_ids_are_the_pipelines(tmp_path: Path, make: Any) -> None:
    pipeline = make()
    tokenizer = save(tmp_path, pipeline)
    for text in TEXTS:
        assert tokenizer.encode(text, special=True) == pipeline.encode(text, add_special_tokens=False).ids
        ids = tokenizer.encode(text)
        assert not any(tokenizer.is_control(token) for token in ids)
        assert tokenizer.decode(ids) == pipeline.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join([stream.push(token) for token in ids]) + stream.flush() == text


def test_tokens_that_are_not_special_always_match(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, byte_level())
    assert "<tool>" in [tokenizer.token_text(token) for token in tokenizer.encode("a<tool>b")]


def test_an_end_token_that_the_file_forgot_to_mark_is_control(tmp_path: Path) -> None:
    pipeline = byte_level()
    pipeline.add_tokens(["<|eot_id|>"])
    tokenizer = save(tmp_path, pipeline)
    token = pipeline.token_to_id("<|eot_id|>")
    assert token in tokenizer.eos_ids
    assert token not in tokenizer.encode("a<|eot_id|>")
    assert tokenizer.encode("<|eot_id|>", special=True) == [token]
    assert tokenizer.decode([token]) == ""


def test_what_the_files_beside_it_say(tmp_path: Path) -> None:
    pipeline = byte_level()
    begin, end = pipeline.token_to_id("<|begin|>"), pipeline.token_to_id("<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    tokenizer = save(
        tmp_path,
        pipeline,
        tokenizer_config={
            "bos_token": {"content": "<|begin|>"},
            "eos_token": "<|im_start|>",
            "chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
        },
        generation_config={"eos_token_id": [3, 4]},
        config={"eos_token_id": 5},
    )
    assert tokenizer.bos_id == begin
    assert tokenizer.add_bos  # the pipeline's post-processor adds it
    assert tokenizer.eos_ids == {end, pipeline.token_to_id("<|im_start|>"), 3, 4, 5}
    assert tokenizer.chat_templates == {"default": "from the file", "tool_use": "T"}
    assert tokenizer.special_texts == {"bos_token": "<|begin|>", "eos_token": "<|im_start|>"}
    assert tokenizer.encode("a", bos=True)[0] == begin


def test_add_bos_token_wins_over_the_pipeline(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, byte_level(), tokenizer_config={"bos_token": "<|begin|>", "add_bos_token": False})
    assert not tokenizer.add_bos
    assert tokenizer.encode("a", bos=True) == tokenizer.encode("a")


def test_special_tokens_that_do_not_exist_are_told(tmp_path: Path) -> None:
    tokenizer = save(
        tmp_path,
        byte_level(),
        tokenizer_config={"eos_token": "<|nowhere|>", "add_bos_token": True},
        generation_config={"eos_token_id": [3, 10**6]},
        config={"bos_token_id": -1, "eos_token_id": 3},
    )
    assert tokenizer.bos_id is None and not tokenizer.add_bos
    assert {3} <= tokenizer.eos_ids and 10**6 not in tokenizer.eos_ids
    begin, named, numbered = tokenizer.warnings
    assert begin.startswith("config.json: bos_token_id is -1, but tokens have the ids 0 to ")
    assert "eos_token is '<|nowhere|>', which is no token" in named
    assert numbered.startswith("generation_config.json: eos_token_id is 1000000, but")


@pytest.mark.parametrize("templates", [[None], ["a"], [{}], [{"name": "default"}]])
def test_chat_templates_without_name_or_text_are_refused(templates: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat_template has an entry without name or template"):
        save(tmp_path, byte_level(), tokenizer_config={"chat_template": templates})


def test_a_huge_id_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    state = json.loads(byte_level().to_str())
    state["model"]["vocab"]["a"] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="but one of the id 4294967295"):
        load_tokenizer(Checkpoint("safetensors", tmp_path, (), "llama", {}, {}))


def test_a_post_processor_without_its_token_is_refused(tmp_path: Path) -> None:
    state = json.loads(byte_level().to_str())
    del state["post_processor"]["special_tokens"]["<|begin|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="names a token that it lacks"):
        load_tokenizer(Checkpoint("safetensors", tmp_path, (), "llama", {}, {}))


def test_a_name_that_is_no_unicode_is_told(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, byte_level(), tokenizer_config={"eos_token": {"content": "\ud800"}})
    (warning,) = tokenizer.warnings
    assert "eos_token is '\ufffd', which is no token" in warning


def test_padding_and_truncation_of_the_file_do_not_apply(tmp_path: Path) -> None:
    pipeline = byte_level()
    pipeline.enable_truncation(4)
    pipeline.enable_padding(length=16)
    assert len(save(tmp_path, pipeline).encode("a b c d e f")) == 11


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    checkpoint = Checkpoint("safetensors", tmp_path, (), "llama", {}, {})
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(checkpoint)
    pipeline = byte_level()
    pipeline.decoder = decoders.WordPiece()
    pipeline.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="decoder WordPiece is not supported"):
        load_tokenizer(checkpoint)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(checkpoint)
