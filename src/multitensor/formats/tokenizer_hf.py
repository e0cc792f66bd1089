"""The tokenizer of a Hugging Face folder: tokenizer.json and the small files beside it (layer 1)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from tokenizers import Tokenizer as Pipeline

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint
from multitensor.formats.detokenizer import TokenKind, byte_of
from multitensor.formats.vocabulary import (
    UNMISTAKABLE_END_NAMES,
    Encoder,
    Part,
    StatedId,
    Traits,
    Vocabulary,
    clean,
    end_ids,
    stated_id,
)

MOST_UNNAMED = 1 << 20  # ids below the largest that no token has
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class PipelineEncoder:
    """A whole `tokenizers` pipeline. Whether special tokens match is a switch of the pipeline, hence the lock."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._lock = Lock()

    def encode(self, text: str, special: bool) -> list[int]:
        with self._lock:
            self._pipeline.encode_special_tokens = not special
            return list(self._pipeline.encode(text, add_special_tokens=False).ids)

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        return [
            token for part in parts for token in ([part] if isinstance(part, int) else self.encode(part, special=False))
        ]


def read_folder(checkpoint: Checkpoint) -> tuple[Vocabulary, Traits, Encoder] | None:
    """The parts of the tokenizer, or None without a tokenizer.json. Raises InputError when it cannot be read."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        pipeline = Pipeline.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: not a tokenizer that can be read: {' '.join(str(error).split())[:200]}") from None
    pipeline.no_truncation()
    pipeline.no_padding()
    vocabulary, strip_space = _vocabulary(pipeline, path)
    traits = _traits(folder, checkpoint.metadata, pipeline, vocabulary, strip_space)
    return vocabulary, traits, PipelineEncoder(pipeline)


def _vocabulary(pipeline: Pipeline, path: Path) -> tuple[Vocabulary, bool]:
    """The vocabulary, and whether decoding drops a leading space."""
    byte_level, byte_fallback, strip_space = _decoding(pipeline, path)
    ids = pipeline.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    if size > len(ids) + MOST_UNNAMED:  # checked before memory is taken for them
        raise InputError(f"{path}: has {len(ids)} tokens, but one of the id {size - 1}; the file is broken")
    texts, kinds = [""] * size, [int(TokenKind.UNUSED)] * size
    for text, token in ids.items():
        texts[token] = text
        kinds[token] = int(TokenKind.BYTE if byte_fallback and byte_of(text) else TokenKind.NORMAL)
    for token, added in pipeline.get_added_tokens_decoder().items():
        texts[token] = added.content
        special = added.special or added.content in UNMISTAKABLE_END_NAMES
        kinds[token] = int(TokenKind.CONTROL if special else TokenKind.USER_DEFINED)
    forgotten = [texts[i] for i, kind in enumerate(kinds) if kind == TokenKind.CONTROL]
    pipeline.add_special_tokens(forgotten)  # marks those that the file did not mark
    return Vocabulary(texts, kinds, byte_level), strip_space


def _decoding(pipeline: Pipeline, path: Path) -> tuple[bool, bool, bool]:
    """(byte-level alphabet, <0xXX> tokens, leading space dropped) of the pipeline's decoder."""
    state = json.loads(pipeline.decoder.__getstate__()) if pipeline.decoder is not None else None
    steps = list(_steps(state))
    kinds = {step["type"] for step in steps}
    unknown = kinds - {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
    if unknown:
        raise InputError(f"{path}: decoder {min(unknown)} is not supported; pass token ids instead of text")
    strips = any(
        (step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    return "ByteLevel" in kinds, "ByteFallback" in kinds, strips


def _steps(state: Any) -> Iterator[dict[str, Any]]:
    if isinstance(state, dict):
        if state.get("type") == "Sequence":
            for step in state.get("decoders", ()):
                yield from _steps(step)
        else:
            yield state


def _traits(
    folder: Path, config: Mapping[str, Any], pipeline: Pipeline, vocabulary: Vocabulary, strip_space: bool
) -> Traits:
    settings = _json(folder / "tokenizer_config.json")
    special_map = _json(folder / "special_tokens_map.json")
    texts = {
        name: text
        for name in _SPECIAL_NAMES
        if isinstance(text := _content(settings.get(name, special_map.get(name))), str)
    }
    size = len(vocabulary.texts)
    bos = [_named(pipeline, "bos", texts, folder)]
    if "bos_token" not in texts:
        bos = [stated_id("bos", "bos_token_id", id, size, "config.json") for id in _ids(config.get("bos_token_id"))[:1]]
    ends = [_named(pipeline, "eos", texts, folder)]
    for name, source in (("generation_config.json", _json(folder / "generation_config.json")), ("config.json", config)):
        ends += [stated_id("eos", "eos_token_id", id, size, name) for id in _ids(source.get("eos_token_id"))]
    bos_id = bos[0].id if bos else None
    add_bos = settings.get("add_bos_token")
    if add_bos is None:  # then the pipeline's post-processor decides
        add_bos = _begins(pipeline, folder) == [bos_id]
    return Traits(
        bos_id=bos_id,
        eos_ids=end_ids(vocabulary, [end.id for end in ends]),
        add_bos=bool(add_bos) and bos_id is not None,
        strip_space=strip_space,
        chat_templates=_chat_templates(folder, settings),
        special_texts=texts,
        warnings=tuple(dict.fromkeys(special.warning for special in bos + ends if special.warning)),
    )


def _named(pipeline: Pipeline, name: str, texts: Mapping[str, str], folder: Path) -> StatedId:
    """The special token that tokenizer_config.json states by its text, if it does."""
    text = texts.get(f"{name}_token")
    token = pipeline.token_to_id(text) if text is not None else None
    if text is None or token is not None:
        return StatedId(token)
    return StatedId(
        None, f"{folder.name}: {name}_token is {text!r}, which is no token of the vocabulary; it is left out"
    )


def _begins(pipeline: Pipeline, folder: Path) -> list[int]:
    """The first id of a text as the pipeline's post-processor completes it. Raises InputError where it cannot."""
    try:
        return list(pipeline.encode("a", add_special_tokens=True).ids[:1])
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the library; no Exception, and it cannot be imported
            raise
        raise InputError(f"{folder / 'tokenizer.json'}: its post-processor names a token that it lacks") from None


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Files win over tokenizer_config.json, as they do in transformers."""
    stated = settings.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(stated, str):
        templates["default"] = stated
    elif isinstance(stated, list):
        named = [entry for entry in stated if isinstance(entry, dict) and {"name", "template"} <= entry.keys()]
        if len(named) < len(stated):
            raise InputError(
                f"{folder.name}: tokenizer_config.json: chat_template has an entry without name or template"
            )
        templates = {str(entry["name"]): str(entry["template"]) for entry in named}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return templates | {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.exists()}


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> Any:
    text = token.get("content") if isinstance(token, dict) else token
    return clean(text) if isinstance(text, str) else text


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int)]
