"""The tokenizer that a GGUF file's metadata describes (layer 1). Facts: llama.cpp's `llama-vocab.cpp`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pipeline
from tokenizers.models import BPE

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint
from multitensor.formats.detokenizer import SPACE_MARK, TokenKind, byte_of
from multitensor.formats.pretokenizers import DEFAULT, PreTokenizer, find_pre_tokenizer
from multitensor.formats.spm import ScoreMerger
from multitensor.formats.vocabulary import (
    UNMISTAKABLE_END_NAMES,
    Encoder,
    Part,
    TokenSplitter,
    Traits,
    Vocabulary,
    clean,
    end_ids,
    stated_id,
)

_KEY = "tokenizer.ggml."
_BPE_MODELS = ("gpt2", "gemma4")
_SPM_MODEL = "llama"
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where the file states none
# What chat templates call the special tokens that GGUF calls by these names.
_TEMPLATE_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",
}


class PartsEncoder:
    """Cuts out tokens that match by name, then encodes what lies between.

    plain: ids of a text without such tokens. prefix_space: such a text gets a space in front when it begins the prompt
    or follows a token cut out.
    """

    def __init__(
        self,
        plain: Callable[[str], list[int]],
        always: TokenSplitter,
        all_tokens: TokenSplitter,
        prefix_space: bool,
    ) -> None:
        self._plain = plain
        self._always = always
        self._all = all_tokens
        self._prefix_space = prefix_space

    def encode(self, text: str, special: bool) -> list[int]:
        return self._join((self._all if special else self._always).split(text))

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        return self._join(
            [piece for part in parts for piece in ([part] if isinstance(part, int) else self._always.split(part))]
        )

    def _join(self, parts: Sequence[Part]) -> list[int]:
        ids: list[int] = []
        fresh = True
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._plain(" " + part if fresh and self._prefix_space else part)
            fresh = isinstance(part, int)
        return ids


def read_gguf(checkpoint: Checkpoint) -> tuple[Vocabulary, Traits, Encoder] | None:
    """The parts of the tokenizer, or None without a vocabulary. Raises InputError for unsupported or broken ones."""
    model = _text(checkpoint, _KEY + "model")
    if model in ("", "none", "no_vocab") or _KEY + "tokens" not in checkpoint.metadata:
        return None
    if model not in (*_BPE_MODELS, _SPM_MODEL):
        raise InputError(
            f"{checkpoint.path.name}: tokenizer model {model[:40]!r} is not supported; known are gpt2, gemma4 and llama"
            " (pass token ids instead of text)"
        )
    vocabulary = _vocabulary(checkpoint, byte_level=model == "gpt2")
    if model == _SPM_MODEL:
        return _spm(checkpoint, vocabulary)
    return _bpe(checkpoint, vocabulary, model)


def _text(checkpoint: Checkpoint, key: str) -> str:
    """A text of the file; empty where it has none. Raises InputError for anything else."""
    value = checkpoint.metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{checkpoint.path.name}: {key} is {str(value)[:40]!r}; text was expected")
    return value or ""


def _flag(checkpoint: Checkpoint, name: str, default: bool) -> bool:
    """Yes or no, as the file says. Raises InputError for anything else."""
    value = checkpoint.metadata.get(_KEY + name, default)
    if not isinstance(value, int):
        raise InputError(f"{checkpoint.path.name}: {_KEY}{name} is {str(value)[:40]!r}; true or false was expected")
    return bool(value)


def _texts(checkpoint: Checkpoint, name: str) -> list[str]:
    """A list of the file; empty where it has none. Raises InputError for anything else."""
    value = checkpoint.metadata.get(_KEY + name, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{checkpoint.path.name}: {_KEY}{name} is no list of texts; the file is broken")
    return value


def _numbers(checkpoint: Checkpoint, name: str, kinds: str) -> list[Any]:
    """A list of numbers of the file; empty where it has none. kinds: of numpy's dtypes. Raises InputError."""
    value = checkpoint.metadata.get(_KEY + name, [])
    listed = isinstance(value, list) and all(isinstance(number, int | float) for number in value)
    array = np.asarray(value) if listed or isinstance(value, np.ndarray) else None
    if array is None or (array.size and (array.ndim != 1 or array.dtype.kind not in kinds)):
        raise InputError(f"{checkpoint.path.name}: {_KEY}{name} is no list of numbers; the file is broken")
    return array.tolist()


def _vocabulary(checkpoint: Checkpoint, byte_level: bool) -> Vocabulary:
    texts = [clean(text) or f"[EMPTY_{i}]" for i, text in enumerate(_texts(checkpoint, "tokens"))]
    kinds = _numbers(checkpoint, "token_type", "iu") or [int(TokenKind.NORMAL)] * len(texts)
    if len(kinds) < len(texts):
        raise InputError(
            f"{checkpoint.path.name}: {_KEY}token_type has {len(kinds)} entries for {len(texts)} tokens;"
            " the file is broken"
        )
    known = set(UNMISTAKABLE_END_NAMES)
    kinds = [int(TokenKind.CONTROL) if text in known else kind for text, kind in zip(texts, kinds, strict=False)]
    return Vocabulary(texts, kinds, byte_level)


def _spm(checkpoint: Checkpoint, vocabulary: Vocabulary) -> tuple[Vocabulary, Traits, Encoder]:
    scores = _numbers(checkpoint, "scores", "iuf")
    if len(scores) < len(vocabulary.texts):
        raise InputError(
            f"{checkpoint.path.name}: {_KEY}scores has {len(scores)} entries for {len(vocabulary.texts)} tokens;"
            " the file is broken"
        )
    mergeable = (TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED)
    pieces = {
        text: (float(score), i)
        for i, (text, kind, score) in enumerate(zip(vocabulary.texts, vocabulary.kinds, scores, strict=False))
        if kind in mergeable
    }
    by_byte = {byte_of(text): i for text, i in vocabulary.named((TokenKind.BYTE,))}
    byte_ids = [by_byte.get(bytes([byte])) for byte in range(256)]
    prefix_space = _flag(checkpoint, "add_space_prefix", True)
    traits = _traits(checkpoint, vocabulary, _SPM_IDS, add_bos=True, strip_space=prefix_space)
    unknown = _special_ids(checkpoint, len(vocabulary.texts), _SPM_IDS)[0]["unknown"]
    merger = ScoreMerger(pieces, byte_ids, unknown)
    return vocabulary, traits, _encoder(checkpoint, vocabulary, merger, prefix_space)


def _bpe(checkpoint: Checkpoint, vocabulary: Vocabulary, model: str) -> tuple[Vocabulary, Traits, Encoder]:
    name = "gemma4" if model == "gemma4" else _text(checkpoint, _KEY + "pre")
    kind = find_pre_tokenizer(name or DEFAULT)
    warnings: tuple[str, ...] = ()
    if kind is None or not name:
        kind = kind or find_pre_tokenizer(DEFAULT)
        said = f"pre-tokenizer {name[:40]!r} is unknown" if name else "the file names no pre-tokenizer"
        warnings = (f"{checkpoint.path.name}: {said}; using {DEFAULT!r}, so token ids may differ from the model's own",)
    assert kind is not None  # the default is in the table
    if not kind.byte_level:
        vocabulary = Vocabulary(vocabulary.texts, vocabulary.kinds, byte_level=False)
    pipeline = _bpe_pipeline(checkpoint, vocabulary, kind)
    prefix_space = _flag(checkpoint, "add_space_prefix", False) and not kind.byte_level
    traits = _traits(checkpoint, vocabulary, {}, add_bos=kind.add_bos, strip_space=prefix_space, warnings=warnings)

    def plain(text: str) -> list[int]:
        return pipeline.encode(text, add_special_tokens=False).ids

    return vocabulary, traits, _encoder(checkpoint, vocabulary, plain, prefix_space)


def _bpe_pipeline(checkpoint: Checkpoint, vocabulary: Vocabulary, kind: PreTokenizer) -> Pipeline:
    """BPE over the tokens that text may become; merges that name another token are left out."""
    hidden = (TokenKind.CONTROL, TokenKind.UNKNOWN)
    known = {text: i for i, text in enumerate(vocabulary.texts) if vocabulary.kinds[i] not in hidden}
    if _KEY + "merges" not in checkpoint.metadata:
        raise InputError(
            f"{checkpoint.path.name}: {_KEY}merges is missing; the file is broken or needs converting anew"
        )
    merges = []
    for line in _texts(checkpoint, "merges"):
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut > 0 and left in known and right in known and left + right in known:
            merges.append((left, right))
    pipeline = Pipeline(BPE(known, merges, ignore_merges=kind.ignore_merges, byte_fallback=not kind.byte_level))
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
    if kind.byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    else:
        pipeline.normalizer = normalizers.Replace(" ", SPACE_MARK)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return pipeline


def _encoder(
    checkpoint: Checkpoint, vocabulary: Vocabulary, plain: Callable[[str], list[int]], prefix_space: bool
) -> PartsEncoder:
    user_defined = vocabulary.named((TokenKind.USER_DEFINED,))
    hidden = vocabulary.named((TokenKind.CONTROL, TokenKind.UNKNOWN))
    strip_after: frozenset[int] = frozenset()
    if any(name in _text(checkpoint, "general.name").lower() for name in ("phi-3", "phi3")):
        # Phi-3's own tokenizer says so of its special tokens; GGUF has no field for it, so llama.cpp goes by name too
        kept = ("<unk>", "<s>", "<|endoftext|>")
        strip_after = frozenset(i for text, i in user_defined + hidden if text not in kept)
    both = sorted(user_defined + hidden, key=lambda entry: entry[1])
    return PartsEncoder(plain, TokenSplitter(user_defined, strip_after), TokenSplitter(both, strip_after), prefix_space)


def _special_ids(
    checkpoint: Checkpoint, size: int, defaults: Mapping[str, int]
) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """Ids of the special tokens by name, and what is to be told of those that the file states wrongly."""
    found = {}
    for name in (*_TEMPLATE_NAMES, "eot", "eom"):
        key = f"{_KEY}{name}_token_id"
        value = checkpoint.metadata.get(key)
        found[name] = stated_id(name, key, value, size, checkpoint.path.name, defaults.get(name))
    return (
        {name: special.id for name, special in found.items()},
        tuple(special.warning for special in found.values() if special.warning),
    )


def _traits(
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    defaults: Mapping[str, int],
    *,
    add_bos: bool,
    strip_space: bool,
    warnings: tuple[str, ...] = (),
) -> Traits:
    ids, told = _special_ids(checkpoint, len(vocabulary.texts), defaults)
    special_texts = {
        text: vocabulary.texts[token] for name, text in _TEMPLATE_NAMES.items() if (token := ids[name]) is not None
    }
    return Traits(
        bos_id=ids["bos"],
        eos_ids=end_ids(vocabulary, (ids["eos"], ids["eot"], ids["eom"])),
        add_bos=_flag(checkpoint, "add_bos_token", add_bos) and ids["bos"] is not None,
        strip_space=strip_space,
        chat_templates=_chat_templates(checkpoint),
        special_texts=special_texts,
        warnings=(*warnings, *told),
    )


def _chat_templates(checkpoint: Checkpoint) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    named = [key for key in checkpoint.metadata if key.startswith(prefix + ".")]
    templates = {key[len(prefix) + 1 :]: _text(checkpoint, key) for key in named}
    default = _text(checkpoint, prefix)
    return {**templates, "default": default} if default else templates
