"""The Python API: `LLM`, with vLLM's names and shapes (never imports torch in this process).

What differs from vLLM's `LLM`, beside what engine/request.py says:
- Text prompts never become control tokens: "<|im_end|>" in a prompt is ten characters. Use `chat`, or token ids.
- Unknown keywords raise TypeError; max_model_len defaults to what fits, not to an error when the model's does not.
- `generate` draws no progress bar unless asked (progress=True); results come in the order of the prompts.
- dtype="float32" is the exact mode: no activation is rounded to 8 bits anywhere.
- Not for use by several threads at once. Streams and other calls may be interleaved in one thread.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from multitensor.config import EngineConfig
from multitensor.engine.engine import Engine
from multitensor.engine.executor import Executor, Progress
from multitensor.engine.prompts import (
    Message,
    Prompt,
    decode,
    encode,
    encode_chat,
    id_list,
    params_list,
    parse_prompt,
    progress_bar,
    prompt_list,
    verify_prompts,
)
from multitensor.engine.request import PositionScore, RequestOutput, SamplingParams
from multitensor.engine.request_state import Request
from multitensor.engine.statistics import EngineStats
from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint
from multitensor.sharding.plan import Plan
from multitensor.sharding.report import with_ratios

if TYPE_CHECKING:
    from multitensor.formats.tokenizer import Tokenizer
    from multitensor.sharding.memory import DeviceMemory


class LLM:
    """A model cut over this machine's devices, ready to write.

    model: a .gguf file (any part of a split one) or a Hugging Face folder.
    tensor_parallel_size (alias tensor_parallel): ranks; default every GPU found, or one CPU rank.
    devices: "cpu:2", "cuda:0,cuda:1=24GiB" (a memory cap), or a list of such; one rank each.
    ratio: "3,1", numbers, or a mapping {"attention": ..., "ffn": ..., "experts": ..., "vocabulary": ...}.
    max_model_len (alias context): tokens of prompt and answer together; default the model's own, or what fits.
    dtype: "auto", "float32" (exact mode), "float16", "bfloat16". kv_type: "auto", "f32", "f16", "bf16", "q8", "q4".
    seed: of requests that have none of their own.
    p2p: whether GPUs may use each other's memory: None where a probe finds that it works, False never, True or fail.
    max_batch_tokens: of prompts in one step, at most; default 4096 on GPUs with room for it, else 2048; 512 on CPUs. A
        prompt alone takes them all; beside texts being written it takes 2048 (CPUs: 512) at most, so that these do not
        wait.
    overlap: whether long prompts' sums over GPUs travel while products are computed (not yet measured on GPUs).
    experimental: names of config.EXPERIMENTS, ways that have not run on several GPUs yet.
    step_timeout: seconds after which ranks that do not answer to a step are killed (RankFailed); 0: never; default 120
        on GPUs, 600 and more on CPUs. Compiling kernels at their first use counts.
    Raises InputError, DoesNotFit or RankFailed, each in one line. Use it as a context manager, or call `close`.
    Under torchrun, rank 0's process holds the LLM; in the others this call serves as a rank and exits when it is done.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tensor_parallel_size: int | None = None,
        devices: str | Sequence[str] | None = None,
        ratio: str | Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        max_model_len: int | None = None,
        dtype: str | None = None,
        kv_type: str | None = None,
        seed: int = 0,
        p2p: bool | None = None,
        overlap: bool = False,
        max_batch_tokens: int | None = None,
        experimental: Sequence[str] = (),
        step_timeout: float | None = None,
        tensor_parallel: int | None = None,
        context: int | None = None,
    ) -> None:
        self._start(
            model,
            progress=None,
            tensor_parallel_size=_alias(
                "tensor_parallel_size", tensor_parallel_size, "tensor_parallel", tensor_parallel
            ),
            devices=devices,
            ratio=ratio,
            max_model_len=_alias("max_model_len", max_model_len, "context", context),
            dtype=dtype,
            kv_type=kv_type,
            seed=seed,
            p2p=p2p,
            overlap=overlap,
            max_batch_tokens=max_batch_tokens,
            experimental=experimental,
            step_timeout=step_timeout,
        )

    @classmethod
    def _open(
        cls,
        model: str | Path,
        *,
        progress: Progress | None = None,
        before_ranks: Callable[[Tokenizer | None, Plan], None] | None = None,
        **settings: Any,
    ) -> LLM:
        """As `LLM(model, ...)` for this package's own commands: with a progress callback while loading, a check that
        may raise before any rank starts, and every setting that `prepare` has."""
        llm = cls.__new__(cls)
        llm._start(model, progress=progress, before_ranks=before_ranks, **settings)
        return llm

    @classmethod
    def _from_executor(
        cls,
        executor: Executor,
        plan: Plan,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> LLM:
        """Over an executor whose ranks are ready (tests with ranks as threads). The LLM closes it."""
        llm = cls.__new__(cls)
        llm._attach(Engine(executor, plan, config, tokenizer), tokenizer, checkpoint)
        return llm

    def _start(
        self,
        model: str | Path,
        *,
        progress: Progress | None,
        before_ranks: Callable[[Tokenizer | None, Plan], None] | None = None,
        **settings: Any,
    ) -> None:
        from multitensor.engine.open_engine import engine_opener
        from multitensor.engine.torchrun import torchrun_world

        world = torchrun_world(os.environ)
        if world is not None and world.rank > 0:
            from multitensor.engine.worker import join_torchrun

            join_torchrun()
        if world is not None and not settings.get("devices") and settings.get("tensor_parallel_size") is None:
            settings["tensor_parallel_size"] = world.size  # torchrun's processes are the ranks
        opener = engine_opener(model, progress=progress, **settings)
        if before_ranks is not None:
            before_ranks(opener.tokenizer, opener.prepared.plan)
        self._attach(opener(), opener.tokenizer, opener.prepared.checkpoint)

    def _attach(self, engine: Engine, tokenizer: Tokenizer | None, checkpoint: Checkpoint | None) -> None:
        self._plan = engine.plan
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._opened: Engine | None = engine
        self._in_use = threading.RLock()
        # Also when the last reference goes, or the interpreter, so that no rank outlives it.
        self._finalizer = weakref.finalize(self, engine.close)

    # --- what it is ---

    @property
    def plan(self) -> Plan:
        """Which rank holds which slice of every tensor, the context and the types: see sharding/plan.py."""
        return self._plan

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is worth telling of the plan, the file's vocabulary and the ranks' links, a line each."""
        said = self.reductions()["warning"]
        vocabulary = self._tokenizer.warnings if self._tokenizer is not None else ()
        return (*self._plan.warnings, *vocabulary, *((said,) if said else ()))

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The model file's metadata: GGUF keys, or config.json."""
        return self._checkpoint.metadata if self._checkpoint is not None else {}

    @property
    def has_vocabulary(self) -> bool:
        """False: the file carries no tokenizer; everything works with token ids, and text is refused."""
        return self._tokenizer is not None

    @property
    def memory_plan(self) -> tuple[DeviceMemory, ...]:
        """Bytes a device that the plan foresees: weights by group, KV, buffers."""
        from multitensor.sharding.memory import device_memory

        return device_memory(self._plan)

    @property
    def stats(self) -> EngineStats:
        """Steps, tokens and seconds of prefill and decode since the start."""
        return self._engine.stats

    def memory(self) -> list[dict[str, int | float]]:
        """Bytes that each rank holds, as measured; "weights_over_plan": its weights over those of `memory_plan`."""
        with self._exclusive() as engine:
            return with_ratios(self._plan, engine.call("memory"))

    def reductions(self) -> dict[str, Any]:
        """How sums over ranks travel. "small": those of a decode step, over peer memory, the host's or through NCCL,
        "none" with one rank; "why": why not over peer memory, or None; "warning": what of it is worth one, or None;
        "microseconds": what the ways took when the ranks started; "large", "large_why", "large_microseconds": the same
        of sums of many tokens, where the host's memory was tried; "overlapped_from": tokens of a step from which its
        sums travel while products are computed, None where they never do."""
        with self._exclusive() as engine:
            return engine.call("reductions")[0]

    # --- writing ---

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | Callable[[int, int], None] = False,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continues every prompt; results in the order of the prompts.

        prompts: a text, token ids, or a list of either (vLLM's {"prompt": ...} and {"prompt_token_ids": ...} too).
        sampling_params: for all, or one each; default `SamplingParams()`. A text gets the model's BOS token where the
        model's files ask for one. progress: True draws a bar on stderr; a callable gets (finished, all).
        use_tqdm: vLLM's name for the bar.
        InputError before anything runs when one prompt is wrong, such as longer than the context.
        """
        parsed = [parse_prompt(prompt, self._tokenizer) for prompt in prompt_list(prompts)]
        return self._generate(parsed, sampling_params, progress or use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | Callable[[int, int], None] = False,
        use_tqdm: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation ([{"role": "user", "content": "Hello"}, ...]) or a list of conversations, through the
        model's chat template. What users write never becomes a control token."""
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
            raise InputError(
                f'chat: give a list of messages such as {{"role": "user", "content": ...}}, not {messages!r}'
            )
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        parsed = [
            (None, self.chat_ids(conversation, add_generation_prompt=add_generation_prompt, tools=tools))  # type: ignore[arg-type]
            for conversation in conversations
        ]
        return self._generate(parsed, sampling_params, progress or use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Continues one prompt, yielding at every new token. Each item holds everything so far, as vLLM's do, and what
        is new in `.delta` (of the first continuation; `.outputs[i].delta` for each). The prompt is checked at once, the
        work starts with the first item; closing the generator, or dropping it, cancels the request."""
        text, ids = parse_prompt(prompt, self._tokenizer)
        params = sampling_params or SamplingParams()
        with self._exclusive() as engine:
            engine.check_prompt(ids)
            engine.check_params(params)
        return self._stream(text, ids, params)

    def _stream(
        self, text: str | None, ids: Sequence[int], params: SamplingParams
    ) -> Generator[RequestOutput, None, None]:
        with self._exclusive() as engine:
            request = engine.add_request(ids, params, prompt=text)
        seen = 0
        try:
            while not request.finished:
                with self._exclusive():
                    engine.step()
                # Another stream's steps may have brought tokens too; so look at the request, not at the step's news.
                if request.metrics.output_tokens > seen:
                    seen = request.metrics.output_tokens
                    yield request.output()
            if request.metrics.output_tokens > seen:
                yield request.output()
        finally:
            if not request.finished and self._opened is not None:
                engine.cancel(request)

    def _generate(
        self,
        prompts: Sequence[tuple[str | None, Sequence[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool | Callable[[int, int], None],
    ) -> list[RequestOutput]:
        params = params_list(sampling_params, len(prompts))
        requests: list[Request] = []
        with self._exclusive() as engine, progress_bar(progress) as report:
            for (_, ids), each in zip(prompts, params, strict=True):
                engine.check_prompt(ids)
                engine.check_params(each)
            try:
                for (text, ids), each in zip(prompts, params, strict=True):
                    requests.append(engine.add_request(ids, each, prompt=text))
                engine.run(requests, report)
            except BaseException:
                for request in requests:
                    if not request.finished:
                        engine.cancel(request)
                raise
        return [request.output() for request in requests]

    # --- text and ids ---

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Token ids of the text. special: names of control tokens become those tokens. bos: begin as the model's files
        ask for (with BOS, if they do)."""
        return encode(self._tokenizer, text, special=special, bos=bos)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens left out."""
        return decode(self._tokenizer, ids, self._plan.spec.vocab_size)

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation through the model's chat template, as `chat` and `stream` take them."""
        return encode_chat(self._tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools)

    # --- looking at the model ---

    def score(self, ids: Sequence[int], top: int = 10) -> list[PositionScore]:
        """The model's distribution after each of the ids: `top` best ids with their log-probabilities (natural), and
        that of the id that follows in `ids` (None at the end). Texts longer than a step are computed in chunks."""
        known = id_list(ids)
        if isinstance(top, bool) or not isinstance(top, Integral):
            raise InputError(f"score: top must be an integer, not {top!r}")
        with self._exclusive() as engine:
            request = engine.add_score(known, int(top))
            engine.run([request])
        return request.scores()

    def verify(self, prompts: Sequence[Sequence[int]] | None = None, **options: Any) -> dict[str, Any]:
        """The split model against a whole one that is streamed a layer at a time on the first rank's device; the
        report's "ok" says whether every layer and the logits agree within tolerance.
        prompts: token ids, by default a few short ones. options: see engine/verify.py."""
        with self._exclusive() as engine:
            if prompts is None:
                room = min(engine.context, self._plan.max_batch_tokens) - 1
                chosen = verify_prompts(self._tokenizer, self._plan.spec.vocab_size, room)
            else:
                chosen = [engine.check_prompt(ids) for ids in prompts]
            return engine.call("verify", prompts=chosen, **options)[0]

    # --- its end ---

    def close(self) -> None:
        """Ends the ranks and frees everything; safe to call twice."""
        self._opened = None
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _exclusive(self) -> Iterator[Engine]:
        """The engine, for one thread at a time: two would take each other's results. Raises InputError for the
        second one, and when the LLM is closed."""
        if not self._in_use.acquire(blocking=False):
            raise InputError("this LLM is at work in another thread; use it from one thread at a time")
        try:
            yield self._engine
        finally:
            self._in_use.release()

    @property
    def _engine(self) -> Engine:
        if self._opened is None:
            raise InputError("this LLM is closed; open the model again")
        return self._opened


def _alias(name: str, value: int | None, alias: str, alias_value: int | None) -> int | None:
    if value is not None and alias_value is not None and value != alias_value:
        raise InputError(f"{name}={value} and {alias}={alias_value} are two names of one setting; give one of them")
    return value if value is not None else alias_value
