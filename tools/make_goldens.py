"""Makes tests/goldens/*.json with llama.cpp: token ids, teacher-forced log-probabilities, greedy continuations.

Run once, with the interpreter of a virtual environment that has llama-cpp-python, from the repository's root:

    python tools/make_goldens.py MODELS COPIES [NAME ...]

MODELS is a folder with smollm2-135m-q4_1.gguf and gemma3-270m-q4_k_m.gguf, COPIES one with float32 copies of the same
names (tools/dequantise_gguf.py). On a CPU llama.cpp rounds activations to 8 bits wherever weights are quantised, which
changes the likeliest token at some 4% of the positions. Therefore two records:

    "exact": from the copy, whose weights have the same values and whose activations are not rounded;
    "shipped": from the file as it is, on the first texts; and how far it is from "exact" ("self_agreement").

KV cache in float32 and flash attention off; everything else is the library's default.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from golden_strings import golden_strings
from golden_texts import PROMPTS, TEXTS
from llama_cpp import Llama

MODELS = ("smollm2-135m-q4_1", "gemma3-270m-q4_k_m")
TOP = 20
CONTINUATION = 48
DIGITS = 5
CONTEXT = 1024
SHIPPED_TEXTS = 3
GGML_TYPE_F32 = 0


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top_ids(logprobs: np.ndarray, count: int) -> np.ndarray:
    """Ids of the most probable tokens, best first, the smaller id first among equals."""
    best = np.argpartition(-logprobs, count)[: count * 2]
    return best[np.lexsort((best, -logprobs[best]))][:count]


def rounded(values: Any) -> list[float]:
    return [round(float(value), DIGITS) for value in values]


def tokenized(llm: Llama) -> list[dict[str, Any]]:
    """For each string its ids without and with control tokens parsed; the second only where it differs."""
    found = []
    for text in golden_strings():
        data = text.encode()
        entry: dict[str, Any] = {"text": text, "ids": llm.tokenize(data, add_bos=False, special=False)}
        special = llm.tokenize(data, add_bos=False, special=True)
        if special != entry["ids"]:
            entry["special"] = special
        found.append(entry)
    return found


def evaluate(llm: Llama, ids: list[int]) -> Iterator[np.ndarray]:
    """Log-probabilities [vocabulary] after each position, one after the other: all at once would fill the memory."""
    llm.reset()
    llm.eval(ids)
    return (log_softmax(llm.scores[i]) for i in range(len(ids)))


def teacher_forced(llm: Llama, given: Sequence[str]) -> list[dict[str, Any]]:
    """For each text its ids, per position the top ids with log-probabilities, and that of each following id."""
    texts = []
    for text in given:
        ids = llm.tokenize(text.encode(), add_bos=True, special=False)
        entry: dict[str, Any] = {"ids": ids, "top_ids": [], "top_logprobs": [], "next_logprobs": []}
        for logprobs, following in zip(evaluate(llm, ids), [*ids[1:], None], strict=True):
            top = top_ids(logprobs, TOP)
            entry["top_ids"].append(top.tolist())
            entry["top_logprobs"].append(rounded(logprobs[top]))
            if following is not None:
                entry["next_logprobs"] += rounded([logprobs[following]])
        texts.append(entry)
    return texts


def perplexity(texts: list[dict[str, Any]]) -> float:
    """Over all texts, of every id but the first of each."""
    following = [value for text in texts for value in text["next_logprobs"]]
    return round(math.exp(-sum(following) / len(following)), DIGITS)


def top1_agreement(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Share of positions with the same likeliest id."""
    pairs = [
        (top[0], other[0])
        for one, two in zip(some, others, strict=True)
        for top, other in zip(one["top_ids"], two["top_ids"], strict=True)
    ]
    return round(sum(top == other for top, other in pairs) / len(pairs), DIGITS)


def continued(llm: Llama, prompt: str) -> dict[str, Any]:
    """Greedy continuation, with the distance in nats between the best and the second token at each step."""
    ids = llm.tokenize(prompt.encode(), add_bos=True, special=False)
    llm.reset()
    llm.eval(ids)
    tokens: list[int] = []
    margins = []
    for _ in range(CONTINUATION):
        logprobs = log_softmax(llm.scores[llm.n_tokens - 1])
        first, second = top_ids(logprobs, 2)
        tokens.append(int(first))
        margins.append(logprobs[first] - logprobs[second])
        llm.eval([int(first)])
    return {"prompt": prompt, "ids": ids, "tokens": tokens, "margins": rounded(margins)}


def opened(path: Path) -> Llama:
    return Llama(
        str(path),
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        n_threads=2,
        n_threads_batch=2,
        logits_all=True,
        flash_attn=False,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )


def make(models: Path, copies: Path, name: str) -> dict[str, Any]:
    llm = opened(copies / f"{name}.gguf")
    texts = teacher_forced(llm, TEXTS)
    continuations = [continued(llm, prompt) for prompt in PROMPTS]
    path = models / f"{name}.gguf"
    llm = opened(path)
    shipped = teacher_forced(llm, TEXTS[:SHIPPED_TEXTS])
    same = texts[:SHIPPED_TEXTS]
    vocabulary = llama_cpp.llama_model_get_vocab(llm._model.model)
    return {
        "made_with": f"llama-cpp-python {llama_cpp.__version__}, CPU, 2 threads, float32 KV cache, flash attention off",
        "command": f"python tools/make_goldens.py MODELS COPIES {name}",
        "model": f"{name}.gguf",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bos_id": llm.token_bos(),
        "add_bos": bool(llama_cpp.llama_vocab_get_add_bos(vocabulary)),
        "end_ids": [i for i in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, i)],
        "strings": tokenized(llm),
        "exact": {"texts": texts, "perplexity": perplexity(texts), "continuations": continuations},
        "shipped": {"texts": shipped, "perplexity": perplexity(shipped)},
        "self_agreement": {
            "top1": top1_agreement(same, shipped),
            "perplexity_ratio": round(perplexity(shipped) / perplexity(same), DIGITS),
        },
    }


def main() -> None:
    models, copies = map(Path, sys.argv[1:3])
    target = Path(__file__).parent.parent / "tests" / "goldens"
    target.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[3:] or MODELS:
        golden = make(models, copies, name)
        text = json.dumps(golden, ensure_ascii=True, separators=(",", ":"))
        (target / f"{name}.json").write_text(text + "\n")
        positions = sum(len(entry["ids"]) for entry in golden["exact"]["texts"])
        print(f"{name}: {len(golden['strings'])} strings, {positions} positions, {golden['self_agreement']}")


if __name__ == "__main__":
    main()
