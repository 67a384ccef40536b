"""The engine for GPUs: vLLM, whose scheduler and kernels run in processes of their own.

    items -> one request each, all at once -> vLLM's scheduler: shared prefixes, steps of a fixed number of tokens
          -> labels: max_tokens=1 and `logprob_token_ids`, which returns exactly the labels; output layer in fp32
             classify: the head's logit without its activation         generate: text with its own seed

The event loop that vLLM needs runs in a thread of its own, so that the death of vLLM's processes is noticed while idle
too.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from client.errors import ErrorCode
from service.engine.contract import (
    AnyAnswer,
    AnyItem,
    Classified,
    ClassifyItem,
    EngineInfo,
    Generated,
    GenerateItem,
    ItemFailure,
    LabelLogprobs,
    ScoreItem,
    TokenItem,
    check_ids,
    check_kind,
    split_labels,
)
from service.engine.remote_core import EngineLostError
from service.engine.vllm.config import (
    VllmOptions,
    VllmStartError,
    dtype_label,
    make_config,
    prepare_environment,
    start_llm,
    vllm_executor,
)
from service.engine.vllm.loop_thread import LoopThread
from service.process.orphans import OrphanGuard

TokenItemT = TypeVar("TokenItemT", bound=TokenItem)
AnswerT = TypeVar("AnswerT")

# How many of the scheduler's steps one batch fills: two make the gap between batches small in comparison.
_STEPS: Final = 2
_CLOSE_SECONDS: Final = 30.0
# vLLM treats lower temperatures as 0.
_GREEDY: Final = 1e-5
_PROBE_TOKENS: Final = 8
_PAST_DEADLINE: Final = ItemFailure(ErrorCode.DEADLINE_EXCEEDED, "not judged before the deadline")
_ENGINE_DIED: Final = "vLLM's engine process ended; its own messages are above"


class VllmEngine:
    """Implements Engine and RemoteCore with vLLM. An item that vLLM refuses or fails on is an ItemFailure."""

    def __init__(self, llm: Any, loop: LoopThread, guard: OrphanGuard, options: VllmOptions) -> None:
        """`llm`: an AsyncLLM created on `loop` while `guard` was active. The engine closes all three."""
        config = llm.vllm_config
        self.info = EngineInfo(
            "vllm",
            options.task,
            dtype_label(config, options),
            options.max_tokens,
            options.batch_tokens or _STEPS * config.scheduler_config.max_num_batched_tokens,
            vllm_executor(config, deterministic=options.deterministic),
        )
        self._llm = llm
        self._loop = loop
        self._guard = guard
        self._vocabulary: int = config.model_config.get_vocab_size()
        self._lora = _lora_request(options)
        self._request_numbers = itertools.count()
        self._deadlines: Sequence[float] = ()

    @classmethod
    def load(cls, folder: Path, options: VllmOptions) -> VllmEngine:
        """Start vLLM with the model in `folder`, which takes a minute or more. Raises VllmStartError."""
        prepare_environment(options)
        config = make_config(folder, options)
        guard, loop = OrphanGuard(), LoopThread("vllm")
        try:
            engine = cls(loop.run(_start_on_loop(config)), loop, guard, options)
        except BaseException:
            guard.kill_all()
            loop.close()
            raise
        try:
            engine._probe()
        except BaseException:
            engine.close()
            raise
        return engine

    def run(self, items: Sequence[AnyItem]) -> Sequence[AnyAnswer | ItemFailure]:
        """See Engine. Raises ValueError for an item outside the contract, EngineLostError if vLLM has died."""
        match self.info.task:
            case "labels":
                return self._answer_all(check_kind(ScoreItem, items), self._score)
            case "classify":
                return self._answer_all(check_kind(ClassifyItem, items), self._classify)
            case "generate":
                return self._answer_all(check_kind(GenerateItem, items), self._generate)

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache. Raises RuntimeError while requests use it."""
        if not self._loop.run(self._llm.reset_prefix_cache()):
            raise RuntimeError("vLLM's prefix cache is in use")

    def unfinished(self) -> int:
        """How many requests vLLM is still working on."""
        return int(self._llm.get_num_unfinished_requests())

    def check(self) -> None:
        """See RemoteCore. Raises RuntimeError if the engine is closed."""
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        if self._llm.errored:
            raise EngineLostError(_ENGINE_DIED)

    def set_deadlines(self, deadlines: Sequence[float]) -> None:
        """See RemoteCore."""
        self._deadlines = deadlines

    def close(self) -> None:
        """End vLLM's processes."""
        if self._llm is None:
            return
        # Dropped now: otherwise its finalizer shuts it down a second time when the interpreter ends.
        llm, self._llm = self._llm, None
        lost = llm.errored
        try:
            # Cancelled first: vLLM's own tasks would report the shutdown as a crash.
            self._loop.cancel_all()
            llm.shutdown(timeout=0 if lost else _CLOSE_SECONDS)
        finally:
            (self._guard.kill_all if lost else self._guard.dismiss)()
            self._loop.close()

    def _probe(self) -> None:
        """Run one small item: some kernels find out only then that they cannot run this model."""
        ids = range(min(_PROBE_TOKENS, self.info.max_tokens - 1, self._vocabulary))
        item: AnyItem
        match self.info.task:
            case "labels":
                item = ScoreItem(ids, (0,))
            case "classify":
                item = ClassifyItem(ids)
            case "generate":
                item = GenerateItem(ids, 1, ())
        try:
            (answer,) = self.run([item])
        except EngineLostError as exc:
            raise VllmStartError("vLLM died of the first prompt: its own messages above name the cause") from exc
        if isinstance(answer, ItemFailure):
            raise VllmStartError(f"vLLM cannot judge with this model: {answer.message}")

    def _answer_all(
        self, items: Sequence[TokenItemT], answer: Callable[[TokenItemT], Coroutine[Any, Any, AnswerT]]
    ) -> list[AnswerT | ItemFailure]:
        for item in items:
            new = item.max_new_tokens if isinstance(item, GenerateItem) else 0
            check_ids(item.token_ids, self.info.max_tokens - new, self._vocabulary)
            if isinstance(item, ScoreItem):
                check_ids(item.label_ids, len(item.label_ids), self._vocabulary)
        deadlines = self._deadlines if len(self._deadlines) == len(items) else [math.inf] * len(items)
        self._deadlines = ()
        self.check()
        return self._loop.run(
            _gather([_within(answer(item), deadline) for item, deadline in zip(items, deadlines, strict=True)])
        )

    async def _score(self, item: ScoreItem) -> LabelLogprobs:
        from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

        # One after the other, so that a later part finds the prompt in the prefix cache.
        parts = [await self._score_part(part) for part in split_labels(item, MAX_LOGPROB_TOKEN_IDS)]
        return replace(parts[0], logprobs=tuple(logprob for part in parts for logprob in part.logprobs))

    async def _score_part(self, item: ScoreItem) -> LabelLogprobs:
        params = _sampling_params(
            max_tokens=1, temperature=0.0, logprob_token_ids=list(item.label_ids), flat_logprobs=True
        )
        output = await self._last_output(item, params)
        (completion,) = output.outputs
        returned = completion.logprobs
        # First the sampled token, which at temperature 0 is the most likely one, then the labels in the item's order.
        argmax_id, *ids = returned.token_ids[: 1 + len(item.label_ids)]
        if tuple(ids) != item.label_ids:
            raise RuntimeError("vLLM gave the probabilities of other tokens than the labels")
        return LabelLogprobs(tuple(returned.logprobs[1 : 1 + len(ids)]), argmax_id, output.num_cached_tokens or 0)

    async def _classify(self, item: ClassifyItem) -> Classified:
        from vllm import PoolingParams

        output = await self._last_output(item, PoolingParams(task="classify", use_activation=False))
        return Classified(float(output.outputs.data.reshape(-1)[0]), output.num_cached_tokens or 0)

    async def _generate(self, item: GenerateItem) -> Generated:
        params = _sampling_params(
            max_tokens=item.max_new_tokens,
            temperature=item.temperature,
            seed=None if item.temperature < _GREEDY else item.seed,
            stop_token_ids=list(item.stop_ids),
        )
        output = await self._last_output(item, params)
        (completion,) = output.outputs
        ids = tuple(completion.token_ids)
        ended = completion.finish_reason == "stop"
        if ended and ids and ids[-1] in item.stop_ids:
            ids = ids[:-1]
        return Generated(ids, ended, output.num_cached_tokens or 0)

    async def _last_output(self, item: TokenItem, params: Any) -> Any:
        """vLLM's output of the finished request. If this is cancelled, vLLM aborts the request."""
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        prompt = tokens_input(list(item.token_ids))
        submit = self._llm.encode if isinstance(params, PoolingParams) else self._llm.generate
        last = None
        async for output in submit(prompt, params, str(next(self._request_numbers)), lora_request=self._lora):
            last = output
        if last is None or not last.finished:
            raise RuntimeError("vLLM ended a request without an answer")
        return last


def _sampling_params(**params: Any) -> Any:
    """vLLM's parameters for one output of token ids, which ends only where the item says so."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True, **params
    )


async def _start_on_loop(config: Any) -> Any:
    return start_llm(config)


async def _gather(answers: Sequence[Coroutine[Any, Any, AnswerT | ItemFailure]]) -> list[AnswerT | ItemFailure]:
    """All answers. Waits until every coroutine has ended before it raises the first one's exception."""
    outcomes = await asyncio.gather(*answers, return_exceptions=True)
    error = next((outcome for outcome in outcomes if isinstance(outcome, BaseException)), None)
    if error is not None:
        raise error
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


async def _within(answer: Coroutine[Any, Any, AnswerT], deadline: float) -> AnswerT | ItemFailure:
    """The answer, or the failure of this item alone. Raises EngineLostError."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        async with asyncio.timeout(None if math.isinf(deadline) else deadline - time.monotonic()):
            return await answer
    except TimeoutError:
        return _PAST_DEADLINE
    except EngineDeadError as exc:
        raise EngineLostError(_ENGINE_DIED) from exc
    except VLLMClientError as exc:
        # Without vLLM's message, which may quote token ids, and those are the caller's text.
        return ItemFailure(ErrorCode.INFERENCE_FAILED, f"vLLM does not take this item ({type(exc).__name__})")
    except Exception as exc:
        return ItemFailure(ErrorCode.INFERENCE_FAILED, f"the model failed on this item ({type(exc).__name__})")


def _lora_request(options: VllmOptions) -> Any:
    if options.lora is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(options.lora.name, 1, str(options.lora.folder))
