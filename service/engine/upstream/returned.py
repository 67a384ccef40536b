"""What a server's answer says of an item's labels, and the floor for those that it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from client.errors import ErrorCode
from service.engine.contract import LabelLogprobs
from service.engine.upstream.errors import UpstreamError

ZERO_LOGPROB: Final = -9999.0
"""Stands for probability 0: servers send it for that, and it is what a label's spelling gets that was not returned
although another spelling was."""


@dataclass(frozen=True, slots=True)
class Returned:
    """`logprobs`: one per label, None for a label without one. `argmax_id` and `cached_tokens` as in LabelLogprobs.

    `lowest`: no label without a log-probability can have a higher one than this. `listed`: what labels with one are, as
    error messages say it.
    """

    logprobs: Sequence[float | None]
    argmax_id: int
    cached_tokens: int
    lowest: float
    listed: str

    def answer(self, floor: float | None, prompt_tokens: int) -> LabelLogprobs:
        """The item's answer, the floor standing in for missing log-probabilities.

        Raises UpstreamError(LABEL_NOT_RETURNED) if all are missing, or one is and there is no floor.
        """
        logprobs, floored = self._with_floor(floor)
        return LabelLogprobs(logprobs, self.argmax_id, min(self.cached_tokens, prompt_tokens), floored)

    def _with_floor(self, floor: float | None) -> tuple[tuple[float, ...], bool]:
        missing = [index for index, value in enumerate(self.logprobs) if value is None]
        if all(value is None or value <= ZERO_LOGPROB for value in self.logprobs):
            raise UpstreamError(ErrorCode.LABEL_NOT_RETURNED, f"none of the labels is {self.listed}")
        if missing and floor is None:
            problem = (
                f"label {missing[0] + 1} of {len(self.logprobs)} is not {self.listed}, so its probability is not "
                "known; the service's --floor sets one for such cases"
            )
            raise UpstreamError(ErrorCode.LABEL_NOT_RETURNED, problem)
        lower = 0.0 if floor is None else min(floor, self.lowest)
        return tuple(lower if value is None else value for value in self.logprobs), bool(missing)
