"""Who gives the scores: the arms of an experiment, which differ in nothing else, and the connection to the judge.

ipo            P(Yes)/(P(Yes)+P(No)) from /score, by the template of the instruction's category
self-reward    /score of a service whose --judge is self-reward
reward-model   /score of a service whose --judge is reward-model
random         the control: no judge, numbers from a hash of seed and text
file           no judge either: numbers that the user has from elsewhere (--labels-from), such as a program's checks
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal, TypeAlias

from client.bulk import BulkOptions
from client.errors import JudgeError
from client.judge import AsyncJudge
from client.labels.labelling import Label, Labeler, Text
from client.labels.records import ScoreError
from client.labels.service import JudgeLabeler, LabelQuestion
from client.runtime.cli import CALL_TIMEOUT
from client.schema import InlineTemplate, ModelInfo, TemplatesResult, Truncation
from trainer.errors import StageError
from trainer.labels.from_file import FileLabeler

Arm: TypeAlias = Literal["ipo", "self-reward", "reward-model", "random", "file"]

IPO: Final = "ipo"
RANDOM: Final = "random"
FILE: Final = "file"
# The kind of judge that GET /v1/models must report for each arm.
JUDGE_OF_ARM: Final[Mapping[Arm, str]] = {
    "ipo": "yes-no",
    "self-reward": "self-reward",
    "reward-model": "reward-model",
}
# Half the width of the random numbers, in log-odds. Wide, so that a minimum margin costs this arm few pairs.
RANDOM_SPREAD: Final = 5.0


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """Where the judge is and how hard it may be pressed. `start_timeout` is in seconds; `api_key` as in AsyncJudge;
    `flag` is what gives another address.
    """

    url: str
    api_key: str | None = None
    bulk: BulkOptions = field(default_factory=BulkOptions)
    start_timeout: float = 10.0
    flag: str = "--judge-url"


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """How samples are labelled. `judge` may be None for the arms random and file only.

    `template` is one template for all instructions instead of their categories' (ipo only). `max_failures` is the
    share of samples that may fail; empty responses do not count, since they are the policy's fault.
    """

    labeler: Arm = field(
        default="ipo", metadata={"help": "who says which response is better; `random` is a control, `file` no judge"}
    )
    labels_from: Path | None = field(
        default=None,
        metadata={"help": "JSON lines of prompt, responses, scores: labels from elsewhere (implies --labeler file)"},
    )
    judge: JudgeOptions | None = None
    template: str | InlineTemplate | None = field(
        default=None,
        metadata={"help": "one template for all instructions, instead of their categories'"},
    )
    truncation: Truncation = field(
        default="error", metadata={"help": "texts over the judge's length are a counted failure (error), or cut"}
    )
    overlap: bool = field(
        default=False,
        metadata={
            "help": "label samples while later ones are still being sampled: up to twice as fast if the judge or the "
            "sampler is on another machine; the labels are the same"
        },
    )
    max_failures: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.labeler == FILE) != (self.labels_from is not None):
            raise ValueError("--labeler file goes with --labels-from FILE, and no other labeler does")

    @property
    def asks_judge(self) -> bool:
        """Whether the labels come from a service."""
        return self.labeler in JUDGE_OF_ARM


class RandomLabeler:
    """Log-odds drawn uniformly from ±RANDOM_SPREAD. With one seed, the same text always gets the same number."""

    def __init__(self, seed: int) -> None:
        self.model = RANDOM
        self.fingerprint: str | None = None
        self._seed = seed

    def described(self) -> dict[str, object]:
        """See Labeler."""
        return {"labeler": RANDOM, "seed": self._seed}

    async def labels(self, texts: Sequence[Text]) -> AsyncGenerator[tuple[int, Label | ScoreError], None]:
        """See Labeler."""
        for index, text in enumerate(texts):
            log_odds = RANDOM_SPREAD * (2 * self._uniform(text) - 1)
            score = 1 / (1 + math.exp(-log_odds))
            yield index, Label(log_odds, score, None, f"{RANDOM}@{self._seed}", RANDOM, None)

    def _uniform(self, text: Text) -> float:
        digest = sha256(repr((self._seed, text.prompt, text.response)).encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48


class ServiceLabeler(JudgeLabeler):
    """The labels of a service for an arm; a judge that stays out of reach is a StageError."""

    def __init__(self, judge: AsyncJudge, info: ModelInfo, offered: TemplatesResult, options: LabelOptions) -> None:
        assert options.judge is not None
        question = LabelQuestion(options.template, options.truncation, options.judge.bulk)
        super().__init__(judge, info, offered, question)
        self._labeler, self._address = options.labeler, options.judge

    def described(self) -> dict[str, object]:
        """See Labeler."""
        return {"labeler": self._labeler, **super().described()}

    async def labels(self, texts: Sequence[Text]) -> AsyncGenerator[tuple[int, Label | ScoreError], None]:
        """See Labeler."""
        try:
            async with aclosing(super().labels(texts)) as outcomes:
                async for index, outcome in outcomes:
                    yield index, outcome
        except JudgeError as error:
            raise lost(self._address, error) from error


@asynccontextmanager
async def connected(options: JudgeOptions) -> AsyncIterator[tuple[AsyncJudge, ModelInfo]]:
    """The judge and its model. Raises StageError within `start_timeout` seconds if it cannot judge now."""
    try:
        async with AsyncJudge(options.url, api_key=options.api_key, timeout=options.start_timeout) as judge:
            await judge.ready()
            info = (await judge.models()).data[0]
    except (JudgeError, ValueError) as error:
        raise StageError(
            f"the judge at {shown_url(options)} cannot be used: {error}. Start the service, or give another "
            f"{options.flag}"
        ) from error
    async with AsyncJudge(options.url, api_key=options.api_key, timeout=CALL_TIMEOUT) as judge:
        yield judge, info


@asynccontextmanager
async def open_labeler(options: LabelOptions) -> AsyncIterator[Labeler]:
    """The labeler of `options`. Raises StageError at once if its judge is unreachable or of another kind."""
    if options.labeler == RANDOM:
        yield RandomLabeler(options.seed)
        return
    if options.labels_from is not None:
        yield FileLabeler(options.labels_from)
        return
    if options.judge is None:
        raise StageError(f"the labeler {options.labeler} needs a judge: give --judge-url")
    async with connected(options.judge) as (judge, info):
        wanted = JUDGE_OF_ARM[options.labeler]
        if info.judge != wanted:
            raise StageError(
                f"the labeler {options.labeler} needs a service whose judge is {wanted}, and "
                f"{shown_url(options.judge)} runs {info.judge}: start it with --judge {wanted}, or give another "
                "--labeler"
            )
        yield ServiceLabeler(judge, info, await offered_by(judge, options.judge), options)


def lost(options: JudgeOptions, error: JudgeError) -> StageError:
    """The error for a judge that failed after it had been reachable."""
    return StageError(
        f"the judge at {shown_url(options)} gives no more answers: {error}. Its answers so far are kept: once it "
        "is back, the same command goes on from there"
    )


async def offered_by(judge: AsyncJudge, options: JudgeOptions) -> TemplatesResult:
    """The judge's templates and categories. Raises StageError."""
    try:
        return await judge.templates()
    except JudgeError as error:
        raise lost(options, error) from error


def shown_url(options: JudgeOptions) -> str:
    """The address for messages, without its password."""
    return re.sub(r"//[^/@]*@", "//", options.url)
