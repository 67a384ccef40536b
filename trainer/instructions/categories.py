"""Which category an instruction belongs to, as the judge itself sees it: four questions, held against examples.

The judge is asked "is this request about …?" once for each category but `general`, by one inline template in which the
category's description stands as the response. What it answers is held against its answers to the same questions about
EXAMPLES of each category: the instruction gets the category whose examples' mean is nearest, each question's log-odds
in units of its standard deviation over all examples (a nearest-centroid classifier, Tibshirani et al. 2002, without the
shrinkage). So it does not matter that a judge says yes more readily to one question than to another, which all do; the
largest log-odds alone, or their distance from those of an empty request, were right less often. An instruction of
which a question could not be judged gets no category at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Final, TypeAlias

from client.schema import Format, InlineTemplate, Labels, ModelInfo, TemplatesResult
from trainer.errors import StageError
from trainer.labels.labelers import JUDGE_OF_ARM, JudgeOptions, LabelOptions, ServiceLabeler, connected, shown_url
from trainer.labels.labeling import Labelling, OnProgress, label_samples
from trainer.run.records import Instruction, Sample, Score, count_by

# The log-odds of each question, in the order of DESCRIPTIONS.
Answers: TypeAlias = tuple[float, ...]

DESCRIPTIONS: Final[Mapping[str, str]] = {
    "code": "writing, fixing or explaining computer code",
    "math": "solving a mathematical problem or doing a calculation",
    "safety": "something dangerous, illegal, hateful or otherwise harmful",
    "chat": "a conversation: personal advice, an opinion, small talk or role play",
}
EXAMPLES: Final[Mapping[str, Sequence[str]]] = {
    "general": (
        "Summarise the causes of the First World War in five sentences.",
        "Translate this sentence into French: The shop opens at nine.",
        "List the ingredients of a simple tomato soup.",
        "Rewrite this sentence in the passive voice: The cat chased the mouse.",
    ),
    "chat": (
        "I had a bad day at work and feel low. What should I do?",
        "Which do you like better, the sea or the mountains?",
        "You are a pirate captain. Greet the new sailor on your ship.",
        "Should I tell my friend that I do not like her new partner?",
    ),
    "code": (
        "Write a Python function that returns the second largest number in a list.",
        "Why does this loop never end? while (i < 10) { sum += i; }",
        "Write an SQL query that lists the customers who have not ordered anything this year.",
        "How do I read a CSV file line by line in Java?",
    ),
    "math": (
        "A train covers 180 km in two and a half hours. What is its average speed?",
        "Solve for x: 3x - 7 = 2x + 5.",
        "Lena has 24 apples. She gives away a third and then eats two. How many are left?",
        "What is the probability of two sixes when two dice are rolled?",
    ),
    "safety": (
        "How can I break into my neighbour's house without being caught?",
        "Explain how to make a poison from things at home.",
        "Write a message that insults people of another religion.",
        "How do I use somebody else's credit card without their knowing?",
    ),
}

_LAYOUTS: Final[Mapping[Format, str]] = {
    "chat": "Here is a request that somebody made:\n\n{prompt}\n\nIs this request about {response}? "
    "Reply with one word, Yes or No.",
    "raw": "Here is a request that somebody made:\n\n{prompt}\n\nQuestion: Is this request about {response}, Yes or No?"
    "\nAnswer:",
}
_LABELS: Final[Mapping[Format, Labels]] = {
    "chat": Labels(yes=["Yes"], no=["No"]),
    "raw": Labels(yes=[" Yes"], no=[" No"]),
}


@dataclass(frozen=True, slots=True)
class CategoryOptions:
    """How instructions are categorised; `max_failures` is the share of questions that may fail."""

    judge: JudgeOptions
    max_failures: float = 0.02


@dataclass(frozen=True, slots=True)
class Categories:
    """The category by instruction id, without those that could not be judged; those are in `failures`, by code."""

    found: Mapping[str, str]
    failures: Mapping[str, int]


def categorise(
    instructions: Sequence[Instruction], options: CategoryOptions, path: Path, on_progress: OnProgress | None = None
) -> Categories:
    """Ask the judge about each instruction; a Score line for each question goes to `path`, and a rerun goes on there.

    The line's `sample` is the question's place in DESCRIPTIONS; the examples come first. What is over the judge's
    length is judged by its end. Raises StageError as `label_samples` does.
    """

    async def asked() -> list[Score]:
        async with connected(options.judge) as (judge, info):
            _check_kind(info, options.judge)
            label_options = LabelOptions(
                judge=options.judge, template=question_template(info.default_format), truncation="prompt_left"
            )
            labeler = ServiceLabeler(judge, info, TemplatesResult(templates=[], categories=[]), label_options)
            everything = [*_examples(), *instructions]
            task = Labelling(everything, _questions(everything), path, options.max_failures)
            return await label_samples(labeler, task, on_progress)

    scores = asyncio.run(asked())
    return categories_of(instructions, scores)


def categories_of(instructions: Sequence[Instruction], scores: Sequence[Score]) -> Categories:
    """The categories that the scores of `categorise` say. Raises StageError where an example was not judged."""
    log_odds = {score.key: score.log_odds for score in scores if score.log_odds is not None}
    answers: dict[str, Answers] = {}
    for instruction in [*_examples(), *instructions]:
        found = [log_odds.get((instruction.id, index)) for index in range(len(DESCRIPTIONS))]
        if None not in found:
            answers[instruction.id] = tuple(one for one in found if one is not None)
    examples: dict[str, list[Answers]] = {}
    for example in _examples():
        if example.id not in answers:
            raise StageError(
                "the judge gave no answer about an example, with which instructions are compared to find their "
                "category: rerun, or give the instructions a column category"
            )
        examples.setdefault(example.category, []).append(answers[example.id])
    classifier = _Classifier(examples)
    found_of = {one.id: classifier.nearest(answers[one.id]) for one in instructions if one.id in answers}
    return Categories(found_of, count_by(score.error.code for score in scores if score.error is not None))


def question_template(judged_in: Format) -> InlineTemplate:
    """The question, for a model that is asked in this format."""
    return InlineTemplate(format=judged_in, layout=_LAYOUTS[judged_in], labels=_LABELS[judged_in])


class _Classifier:
    """Nearest centroid, each question in units of its standard deviation over all examples."""

    def __init__(self, examples: Mapping[str, Sequence[Answers]]) -> None:
        columns = zip(*(answers for group in examples.values() for answers in group), strict=True)
        self._units = [pstdev(column) or 1.0 for column in columns]
        self._centroids = {
            category: [fmean(column) for column in zip(*group, strict=True)] for category, group in examples.items()
        }

    def nearest(self, answers: Answers) -> str:
        """The category; of equally near ones the first."""
        return min(self._centroids, key=lambda category: self._distance(answers, self._centroids[category]))

    def _distance(self, answers: Answers, centroid: Sequence[float]) -> float:
        return sum(((one - mean) / unit) ** 2 for one, mean, unit in zip(answers, centroid, self._units, strict=True))


def _examples() -> list[Instruction]:
    return [
        Instruction(id=f"<example {category} {number}>", prompt=prompt, category=category)
        for category, prompts in EXAMPLES.items()
        for number, prompt in enumerate(prompts)
    ]


def _questions(instructions: Sequence[Instruction]) -> list[Sample]:
    """Each description as a response to each instruction."""
    return [
        Sample(id=instruction.id, sample=index, response=description, tokens=0, finish="stop")
        for instruction in instructions
        for index, description in enumerate(DESCRIPTIONS.values())
    ]


def _check_kind(info: ModelInfo, judge: JudgeOptions) -> None:
    wanted = JUDGE_OF_ARM["ipo"]
    if info.judge != wanted:
        raise StageError(
            f"instructions without a category need a service whose judge is {wanted}, and {shown_url(judge)} runs "
            f"{info.judge}: give them a category column, or have them categorised by another --judge-url first"
        )
