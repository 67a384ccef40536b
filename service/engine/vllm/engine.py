"""The engine for GPUs: vLLM, whose scheduler and kernels run in processes of their own; this one hands over token ids.

    items ──> one request each, all at once ──> vLLM's scheduler: prefixes shared, steps of a fixed number of tokens
          ──> labels: max_tokens=1, `logprob_token_ids`: exactly the labels' log-probabilities, output layer in fp32
              classify: the head's logit without its activation     generate: a text, with a seed of its own

A thread has the event loop that vLLM wants, so that its death is seen also while nothing is asked.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Coroutine, Sequence
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
    items_of,
)
from service.engine.remote_core import EngineLostError
from service.engine.vllm.config import (
    VllmOptions,
    VllmStartError,
    executor,
    make_config,
    number_format,
    prepare_environment,
    start,
)
from service.engine.vllm.loop_thread import LoopThread
from service.process.orphans import OrphanGuard

Item = TypeVar("Item", bound=TokenItem)
Answer = TypeVar("Answer")

# Steps of vLLM's scheduler that one call fills: what is lost between two calls is then small beside it.
_STEPS: Final = 2
_CLOSE_SECONDS: Final = 30.0
_GREEDY: Final = 1e-5
_PROBE_TOKENS: Final = 8
_LATE: Final = ItemFailure(ErrorCode.DEADLINE_EXCEEDED, "not judged before the deadline")


class VllmEngine:
    """A model that vLLM runs. See `Engine` for the contract and `RemoteCore` for what the worker asks besides.

    Items are independent inside vLLM: what befalls one of them is its own ItemFailure.
    """

    def __init__(self, llm: Any, loop: LoopThread, guard: OrphanGuard, options: VllmOptions) -> None:
        """`llm` is an AsyncLLM that was made on `loop` after `guard`; all are closed with this engine."""
        config = llm.vllm_config
        self.info = EngineInfo(
            "vllm",
            options.task,
            number_format(config, options),
            options.max_tokens,
            options.batch_tokens or _STEPS * config.scheduler_config.max_num_batched_tokens,
            executor(config, deterministic=options.deterministic),
        )
        self._llm = llm
        self._loop = loop
        self._guard = guard
        self._vocabulary: int = config.model_config.get_vocab_size()
        self._lora = _lora_request(options)
        self._numbers = itertools.count()
        self._deadlines: Sequence[float] = ()

    @classmethod
    def load(cls, folder: Path, options: VllmOptions) -> VllmEngine:
        """Start vLLM with the model in `folder`; takes a minute or more. Raises VllmStartError."""
        prepare_environment(options)
        config = make_config(folder, options)
        guard, loop = OrphanGuard(), LoopThread("vllm")
        try:
            engine = cls(loop.run(_started(config)), loop, guard, options)
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
        """One answer per item, in order. Raises EngineLostError; ValueError for an item outside the contract."""
        match self.info.task:
            case "labels":
                return self._answer(items_of(ScoreItem, items), self._read_labels)
            case "classify":
                return self._answer(items_of(ClassifyItem, items), self._read_logit)
            case "generate":
                return self._answer(items_of(GenerateItem, items), self._write)

    def forget(self) -> None:
        """Empty the prefix cache: nothing that comes is spared work by what was read before."""
        if not self._loop.run(self._llm.reset_prefix_cache()):
            raise RuntimeError("vLLM's prefix cache is in use")

    def check(self) -> None:
        """Raises EngineLostError when vLLM's processes are gone."""
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        if self._llm.errored:
            raise EngineLostError("vLLM's engine process ended; its own messages are above")

    def set_deadlines(self, deadlines: Sequence[float]) -> None:
        """See RemoteCore."""
        self._deadlines = deadlines

    def close(self) -> None:
        """End vLLM's processes; the engine cannot be used afterwards."""
        if self._llm is None:
            return
        # Forgotten now: it would end itself again, too late, when the interpreter ends.
        llm, self._llm = self._llm, None
        lost = llm.errored
        try:
            # vLLM's own tasks would take the end for an accident.
            self._loop.cancel_all()
            llm.shutdown(timeout=0 if lost else _CLOSE_SECONDS)
        finally:
            (self._guard.kill_all if lost else self._guard.dismiss)()
            self._loop.close()

    def _probe(self) -> None:
        """Some kernels find out only at their first prompt that they cannot run this model."""
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

    def _answer(
        self, items: Sequence[Item], ask: Callable[[Item], Coroutine[Any, Any, Answer]]
    ) -> list[Answer | ItemFailure]:
        for item in items:
            written = item.max_new_tokens if isinstance(item, GenerateItem) else 0
            check_ids(item.token_ids, self.info.max_tokens - written, self._vocabulary)
            if isinstance(item, ScoreItem):
                check_ids(item.label_ids, len(item.label_ids), self._vocabulary)
        deadlines = self._deadlines if len(self._deadlines) == len(items) else [math.inf] * len(items)
        self._deadlines = ()
        self.check()
        return self._loop.run(_gather([_in_time(ask(item), when) for item, when in zip(items, deadlines, strict=True)]))

    async def _read_labels(self, item: ScoreItem) -> LabelLogprobs:
        params = _sampling(max_tokens=1, temperature=0.0, logprob_token_ids=list(item.label_ids), flat_logprobs=True)
        output = await self._last_output(item, params)
        (completion,) = output.outputs
        found = completion.logprobs
        # The token that was taken, at temperature 0 the likeliest, then the labels as they were asked for.
        argmax, *ids = found.token_ids[: 1 + len(item.label_ids)]
        if tuple(ids) != item.label_ids:
            raise RuntimeError("vLLM gave the probabilities of other tokens than the labels")
        return LabelLogprobs(tuple(found.logprobs[1 : 1 + len(ids)]), argmax, output.num_cached_tokens or 0)

    async def _read_logit(self, item: ClassifyItem) -> Classified:
        from vllm import PoolingParams

        output = await self._last_output(item, PoolingParams(task="classify", use_activation=False))
        return Classified(float(output.outputs.data.reshape(-1)[0]), output.num_cached_tokens or 0)

    async def _write(self, item: GenerateItem) -> Generated:
        params = _sampling(
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
        """What vLLM says when the request is done. Cancelled, it has vLLM stop the request."""
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        prompt = tokens_input(list(item.token_ids))
        ask = self._llm.encode if isinstance(params, PoolingParams) else self._llm.generate
        outputs = ask(prompt, params, str(next(self._numbers)), lora_request=self._lora)
        last = None
        async for output in outputs:
            last = output
        if last is None or not last.finished:
            raise RuntimeError("vLLM ended a request without an answer")
        return last


def _sampling(**wanted: Any) -> Any:
    """vLLM's parameters for token ids that come all at once; nothing but what the item names ends them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True, **wanted
    )


async def _started(config: Any) -> Any:
    return start(config)


async def _gather(asked: Sequence[Coroutine[Any, Any, Answer | ItemFailure]]) -> list[Answer | ItemFailure]:
    """All answers; when the engine is lost, its error, after everything has ended."""
    answers = await asyncio.gather(*asked, return_exceptions=True)
    lost = next((answer for answer in answers if isinstance(answer, BaseException)), None)
    if lost is not None:
        raise lost
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def _in_time(asked: Coroutine[Any, Any, Answer], deadline: float) -> Answer | ItemFailure:
    """The answer, or what befell this item alone. Raises EngineLostError."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        async with asyncio.timeout(None if math.isinf(deadline) else deadline - time.monotonic()):
            return await asked
    except TimeoutError:
        return _LATE
    except EngineDeadError as exc:
        raise EngineLostError("vLLM's engine process ended; its own messages are above") from exc
    except VLLMClientError as exc:
        # Its message may hold token ids, which are the caller's text.
        return ItemFailure(ErrorCode.INFERENCE_FAILED, f"vLLM does not take this item ({type(exc).__name__})")
    except Exception as exc:
        return ItemFailure(ErrorCode.INFERENCE_FAILED, f"the model failed on this item ({type(exc).__name__})")


def _lora_request(options: VllmOptions) -> Any:
    if options.lora is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(options.lora.name, 1, str(options.lora.folder))
