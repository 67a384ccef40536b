"""The judge as a reward function for verl (verl 0.9). `client.adapters.verl_manager` has a reward manager beside it.

    reward.custom_reward_function.path=pkg://client.adapters.verl
    +reward.custom_reward_function.reward_kwargs.url=http://judge:8000
    +reward.custom_reward_function.reward_kwargs.unjudged=-20

A reward function of verl does not see the prompt, only the dataset's `extra_info`, so that must hold it: as "question",
or under the name in `prompt_key`. The manager sees it.

verl needs a number for every completion: without `unjudged`, the first that cannot be judged stops the training. With
it, "unjudged" beside the score says for which it stands, and no more than the share `max_failures` may fail, of all
completions so far in the process, but at least of 100.

The key is JUDGE_API_KEY of verl's workers: in verl's settings it would be printed and logged with them.
"""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop, Task
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import cache
from typing import Any, Final
from weakref import WeakKeyDictionary

from client.adapters.dialogues import Dialogue
from client.adapters.rewards import Asked, AsyncRewardFunction, Outcome, RewardOptions, raise_unless_given
from client.judge import AsyncJudge
from client.runtime.cli import default_url
from client.schema import ScoreResult

# verl adds these for functions that ask the reward model which verl runs itself.
_VERLS_OWN: Final = ("reward_router_address", "reward_model_tokenizer")
# Completions on which the share of failures is first taken: one failure among the first few is not "too many".
_FEWEST: Final = 100
# Seconds that a call waits for others to be sent with it: verl starts the calls of a batch almost together.
_GATHER_S: Final = 0.005


class SingleReward(AsyncRewardFunction):
    """Judges one completion a call, as verl asks. Raises as `client.adapters.trl.JudgeReward` does.

    verl starts hundreds of calls at once. Those of the same moment are sent together, which costs a tenth of the time.
    """

    def __init__(self, judge: AsyncJudge | str | None = None, options: RewardOptions | None = None) -> None:
        super().__init__(judge, raise_unless_given(options))
        self._seen = 0
        self._together = Together(self._ask)

    async def score(self, prompt: Dialogue, response: str, extra_info: Mapping[str, Any] | None) -> dict[str, float]:
        """The reward as `score`, and `unjudged`: 1 if it stands for a completion that could not be judged, else 0.

        Every answer has the same entries, as verl makes columns of them.
        """
        columns = {name: [value] for name, value in (extra_info or {}).items()}
        self._seen += 1
        (request,) = self._requests([(prompt, response)], columns)
        outcome = await self._together(request)
        (reward,) = self._rewards([outcome])
        assert reward is not None
        return {"score": float(reward), "unjudged": float(not isinstance(outcome, ScoreResult))}

    def _broken_bound(self, failed: Counter[str], total: int) -> str | None:
        if self.options.unjudged == "raise":
            return super()._broken_bound(failed, total)
        return super()._broken_bound(self.failures, max(self._seen, _FEWEST))


class Together:
    """Asks for the requests of calls that come at the same moment in one go, and hands each its outcome."""

    def __init__(self, ask: Callable[[Sequence[Asked]], Coroutine[Any, Any, list[Outcome]]]) -> None:
        self._ask = ask
        # In each event loop, the requests that wait and the task that will send them.
        self._groups: WeakKeyDictionary[AbstractEventLoop, tuple[list[Asked], Task[list[Outcome]]]] = (
            WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, (self._ask,)

    async def __call__(self, request: Asked) -> Outcome:
        """The request's outcome. Raises what the call for all raises."""
        loop = asyncio.get_running_loop()
        if loop not in self._groups:
            requests: list[Asked] = []
            self._groups[loop] = requests, loop.create_task(self._send(loop, requests))
        requests, sending = self._groups[loop]
        place = len(requests)
        requests.append(request)
        # A caller that leaves does not take the others' answers along.
        return (await asyncio.shield(sending))[place]

    async def _send(self, loop: AbstractEventLoop, requests: Sequence[Asked]) -> list[Outcome]:
        await asyncio.sleep(_GATHER_S)
        del self._groups[loop]
        return await self._ask(requests)


async def compute_score(
    data_source: str,  # noqa: ARG001 (verl passes it)
    solution_str: str,
    ground_truth: object,  # noqa: ARG001 (verl passes it)
    extra_info: Mapping[str, Any] | None = None,
    *,
    prompt_key: str = "question",
    url: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """The answer of `SingleReward.score`, as verl's reward managers want it.

    Args:
        data_source: Not used.
        solution_str: The completion.
        ground_truth: Not used.
        extra_info: The dataset's column of this name, with the prompt (a text or messages) and perhaps a category.
        prompt_key: The prompt's name there.
        url: The service's address; None takes JUDGE_URL from the environment, or http://127.0.0.1:8000.
        **options: Those of `RewardOptions`, a template by its name.

    Raises ValueError if there is no prompt, and as `client.adapters.trl.JudgeReward` does.
    """
    if extra_info is None or prompt_key not in extra_info:
        raise ValueError(f"extra_info has no {prompt_key}: name the entry with the prompt in prompt_key")
    settings = {name: value for name, value in options.items() if name not in _VERLS_OWN}
    reward = single_reward(url, tuple(sorted(settings.items())))
    return await reward.score(as_dialogue(extra_info[prompt_key]), solution_str, extra_info)


@cache
def single_reward(url: str | None, settings: tuple[tuple[str, Any], ...]) -> SingleReward:
    """The process's reward function for these options; it keeps its connections, and counts failures over all calls."""
    return SingleReward(AsyncJudge(url or default_url()), RewardOptions(**dict(settings)))


def as_dialogue(prompt: Any) -> Dialogue:
    """A prompt from verl's columns, where messages may be an array."""
    return prompt if isinstance(prompt, str) else list(prompt)
