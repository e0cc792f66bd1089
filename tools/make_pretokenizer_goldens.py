"""Makes tests/goldens/pretokenizers.json with llama.cpp: token ids of one small vocabulary under every pre-tokenizer.

The vocabulary has a token for each byte and merges that reach across words, digits and spaces, so that the ids show
where a pre-tokenizer cuts. Run from the repository's root, in a virtual environment that has llama-cpp-python:

    python tools/make_pretokenizer_goldens.py
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import tempfile
from collections import Counter
from pathlib import Path

import llama_cpp
from golden_strings import golden_strings
from llama_cpp import Llama

MERGES = 1500
# One name for each kind that llama.cpp and this project both know.
# fmt: off
NAMES = (
    "default", "llama-bpe", "dbrx", "glm4", "minicpm5", "qwen2", "qwen35", "ufakzeka", "laguna", "falcon",
    "smollm", "gpt-2", "deepseek-llm", "deepseek-coder", "deepseek-v3", "gpt-4o", "tiny_aya", "tekken", "kimi-k2",
    "bloom", "viking", "superbpe", "bailingmoe", "seed-coder", "exaone-moe", "chameleon",
)
# fmt: on
_STRING, _UINT32, _INT32, _ARRAY = 8, 4, 5, 9


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256)]


def learn_merges(strings: list[str], count: int) -> list[tuple[str, str]]:
    """The most frequent neighbours, again and again, with no word boundaries at all."""
    letters = byte_letters()
    texts = [[letters[byte] for byte in text.encode()] for text in strings]
    merges = []
    for _ in range(count):
        pairs = Counter(pair for text in texts for pair in itertools.pairwise(text))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        texts = [merge(text, best) if best[0] in text else text for text in texts]
    return merges


def merge(text: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(text):
        both = tuple(text[i : i + 2]) == pair
        merged.append(text[i] + text[i + 1] if both else text[i])
        i += 2 if both else 1
    return merged


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def strings_entry(key: str, values: list[str]) -> bytes:
    return entry(key, _ARRAY, struct.pack("<IQ", _STRING, len(values)) + b"".join(map(string, values)))


def vocabulary_file(path: Path, name: str, tokens: list[str], merges: list[tuple[str, str]]) -> None:
    """A GGUF file with a vocabulary and nothing else."""
    kinds = struct.pack("<IQ", _INT32, len(tokens)) + struct.pack(f"<{len(tokens)}i", *[1] * len(tokens))
    entries = [
        entry("general.architecture", _STRING, string("llama")),
        entry("tokenizer.ggml.model", _STRING, string("gpt2")),
        entry("tokenizer.ggml.pre", _STRING, string(name)),
        strings_entry("tokenizer.ggml.tokens", tokens),
        strings_entry("tokenizer.ggml.merges", [" ".join(pair) for pair in merges]),
        entry("tokenizer.ggml.token_type", _ARRAY, kinds),
    ]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries))


def main() -> None:
    # names of control tokens are left out: with merges like these they would become tokens
    strings = [text for text in golden_strings() if text and not re.search(r"<\S*[|_]|\0", text)]
    merges = learn_merges(strings, MERGES)
    strings = strings[::2]
    tokens = byte_letters() + [left + right for left, right in merges]
    tokens = list(dict.fromkeys(tokens))
    ids = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            path = Path(folder) / f"{name}.gguf"
            vocabulary_file(path, name, tokens, merges)
            llm = Llama(str(path), vocab_only=True, verbose=False)
            ids[name] = [llm.tokenize(text.encode(), add_bos=False, special=False) for text in strings]
            print(name, sum(map(len, ids[name])))
    golden = {
        "made_with": f"llama-cpp-python {llama_cpp.__version__}",
        "command": "python tools/make_pretokenizer_goldens.py",
        "merges": [" ".join(pair) for pair in merges],
        "strings": strings,
        "ids": ids,
    }
    target = Path(__file__).parent.parent / "tests" / "goldens" / "pretokenizers.json"
    target.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
