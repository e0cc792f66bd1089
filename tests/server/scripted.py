"""A server over a real engine whose one rank says what it was told to: no torch, no model, real HTTP on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from multitensor.engine.async_engine import AsyncEngine
from multitensor.engine.batch import SamplingSetup, StepInput, StepMasks, StepOutput, TokenLogprobs
from multitensor.engine.engine import Engine
from multitensor.engine.prepare import Prepared, prepare
from multitensor.errors import RankFailed
from multitensor.formats.tokenizer import Tokenizer, load_tokenizer
from multitensor.server.app import create_app
from multitensor.server.settings import ServerSettings
from synthetic import write_gguf

TEXT = "The tide comes in."
HIDDEN = 64


@dataclass
class Script:
    """What the rank does. text: what it writes, then end-of-text, whatever it is asked. step_seconds: each takes so
    long. fail: the next step's result is a rank's death. setups: every sampling setup that it was given."""

    text: str = TEXT
    step_seconds: float = 0.0
    fail: bool = False
    setups: list[SamplingSetup] = field(default_factory=list)


class ScriptedExecutor:
    """One rank that samples the script's next token wherever a step samples."""

    def __init__(self, script: Script, tokenizer: Tokenizer) -> None:
        self._script = script
        self._tokenizer = tokenizer
        self._queue: deque[StepInput] = deque()
        self._late_masks: dict[int, dict[int, np.ndarray]] = {}
        self._setups: dict[int, SamplingSetup] = {}
        self._said: dict[int, int] = {}
        self._texts: dict[int, list[int]] = {}

    def start(self, plan: Any, config: Any, progress: Any = None) -> None: ...

    def check(self) -> None: ...

    def rank_seconds(self) -> tuple[tuple[float, float | None], ...]:
        return ((0.5, 0.25),)

    def send_masks(self, masks: StepMasks) -> None:
        self._late_masks[masks.step] = masks.masks

    def submit(self, step: StepInput) -> None:
        self._queue.append(step)

    def collect(self) -> StepOutput:
        time.sleep(self._script.step_seconds)
        if self._script.fail:
            self._script.fail = False
            raise RankFailed("rank 0 of 1 was killed (signal 9) at /secret/place")
        step = self._queue.popleft()
        masks = {**step.masks, **self._late_masks.pop(step.step, {})}
        for setup in step.setups:
            self._setups[setup.slot] = setup
            self._script.setups.append(setup)
            self._said[setup.slot] = 0
            self._texts[setup.slot] = [*self._tokenizer.encode(self._script.text), min(self._tokenizer.eos_ids)]
        output = StepOutput(step.step, np.full(len(step.slots), -1, np.int32))
        for row, slot in enumerate(step.slots.tolist()):
            if row in step.pooled:
                output.sums[row] = np.array([3, 4] * (HIDDEN // 2), np.float32) * int(step.query_lens[row])
            if step.sample[row]:
                output.token_ids[row] = self._next(slot, masks.get(row))
                k = self._setups[slot].logprobs
                if k >= 0:
                    best = [(int(output.token_ids[row]) + i) % 256 for i in range(k)]
                    output.logprobs[row] = TokenLogprobs(-0.5, best, [-0.5 - i for i in range(k)], 1)
        return output

    def _next(self, slot: int, mask: np.ndarray | None) -> int:
        """What the script says; the first token that a grammar allows where it does not allow that."""
        said = self._said[slot]
        self._said[slot] += 1
        token = self._texts[slot][said % len(self._texts[slot])]
        if mask is None or mask[token >> 5] >> (token & 31) & 1:
            return token
        return int(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0])

    def call(self, method: str, **arguments: Any) -> list[Any]:
        return [{"weights_bytes": 1 << 20, "kv_bytes": 2}]

    def close(self) -> None: ...


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_model(folder: Path, prefix: str = "") -> Path:
    """prefix: stands before the chat template."""
    template = prefix + CHAT_TEMPLATE
    return write_gguf(folder / "scripted.gguf", hidden=HIDDEN, no_vocab=False, context=2048, chat_template=template)


def make_opener(model: Path, script: Script) -> tuple[Prepared, Callable[[], Engine]]:
    prepared = prepare(model, devices="cpu:1", max_model_len=1024, max_num_seqs=8)
    tokenizer = load_tokenizer(prepared.checkpoint)
    assert tokenizer is not None

    def open_engine() -> Engine:
        return Engine(ScriptedExecutor(script, tokenizer), prepared.plan, prepared.config, tokenizer)

    return prepared, open_engine


class Server:
    """uvicorn on a thread, over a scripted (or any) engine."""

    def __init__(self, open_engine: Callable[[], Engine], settings: ServerSettings, **options: Any) -> None:
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self.port: int = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.engine = AsyncEngine(open_engine, backoff=0.1, **options)
        self.app: Any = None
        self._settings = settings
        self._server: uvicorn.Server | None = None
        self._failure: BaseException | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._up.wait(60), "the server did not start"
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"

    async def _run(self) -> None:
        try:
            await self.engine.start()
            self.app = create_app(self.engine, self._settings)
            config = uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=2, lifespan="on")
            self._server = uvicorn.Server(config)
            serving = asyncio.create_task(self._server.serve([self._sock]))
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.01)
            self._up.set()
            await serving
        except BaseException as error:
            self._failure = error
        finally:
            self._up.set()
            await self.engine.stop()


@contextlib.contextmanager
def scripted_server(model: Path, script: Script | None = None, **settings: Any) -> Iterator[Server]:
    _, open_engine = make_opener(model, script or Script())
    with Server(open_engine, ServerSettings(model_name="tide", **settings)) as server:
        yield server


def eventually(check: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def texts(chunks: Sequence[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
