"""Classifies instructions into categories by asking the judge four yes-no questions about each.

For every category but `general` the judge is asked "is this request about …?", by one inline template with the
category's description as the response. The four log-odds are compared with those of EXAMPLES of each category: the
instruction gets the category with the nearest centroid, each question scaled by its standard deviation over all
examples (nearest-centroid classification, Tibshirani et al. 2002, without the shrinkage). This cancels that a judge
says yes more readily to one question than to another, as all judges do; the largest log-odds alone, or their distance
from those of an empty request, were right less often. If a question could not be judged, the instruction gets no
category.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Final, TypeAlias

from client.labels.records import Score, count_by
from client.runs.progress import OnProgress
from client.schema import Format, InlineTemplate, Labels, ModelInfo, TemplatesResult
from trainer.errors import StageError
from trainer.labels.labelers import JUDGE_OF_ARM, JudgeOptions, LabelOptions, ServiceLabeler, connected, shown_url
from trainer.labels.labeling import Labelling, label_samples
from trainer.run.records import Instruction, Sample

# The log-odds of the questions, in the order of DESCRIPTIONS.
QuestionLogOdds: TypeAlias = tuple[float, ...]

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
    """The judge to ask; `max_failures` is the share of questions that may fail."""

    judge: JudgeOptions
    max_failures: float = 0.02


@dataclass(frozen=True, slots=True)
class CategoryResult:
    """The category of each instruction that could be judged, by id, and how many questions failed, by error code."""

    by_id: Mapping[str, str]
    failures: Mapping[str, int]


def categorise(
    instructions: Sequence[Instruction], options: CategoryOptions, path: Path, on_progress: OnProgress | None = None
) -> CategoryResult:
    """Ask the judge about each instruction. A Score line per question is appended to `path`, where a rerun resumes.

    A line's `sample` is the question's index in DESCRIPTIONS; the examples come first. Of an instruction longer than
    the judge's limit the end is judged. Raises StageError as `label_samples` does.
    """

    async def ask() -> list[Score]:
        async with connected(options.judge) as (judge, info):
            _require_yes_no(info, options.judge)
            label_options = LabelOptions(
                judge=options.judge, template=question_template(info.default_format), truncation="prompt_left"
            )
            labeler = ServiceLabeler(judge, info, TemplatesResult(templates=[], categories=[]), label_options)
            all_instructions = [*_example_instructions(), *instructions]
            task = Labelling(all_instructions, _questions(all_instructions), path, options.max_failures)
            return await label_samples(labeler, task, on_progress)

    return classify(instructions, asyncio.run(ask()))


def classify(instructions: Sequence[Instruction], scores: Sequence[Score]) -> CategoryResult:
    """The categories that follow from the scores of `categorise`. Raises StageError if an example was not judged."""
    log_odds = _complete_answers(scores)
    examples: dict[str, list[QuestionLogOdds]] = {}
    for example in _example_instructions():
        if example.id not in log_odds:
            raise StageError(
                "the judge gave no answer about an example, with which instructions are compared to find their "
                "category: rerun, or give the instructions a column category"
            )
        examples.setdefault(example.category, []).append(log_odds[example.id])
    centroids = _Centroids(examples)
    by_id = {one.id: centroids.nearest(log_odds[one.id]) for one in instructions if one.id in log_odds}
    return CategoryResult(by_id, count_by(score.error.code for score in scores if score.error is not None))


def _complete_answers(scores: Sequence[Score]) -> dict[str, QuestionLogOdds]:
    """The log-odds by instruction id, of those for which every question was judged."""
    answers: dict[str, dict[int, float]] = {}
    for score in scores:
        if score.log_odds is not None:
            answers.setdefault(score.id, {})[score.sample] = score.log_odds
    questions = range(len(DESCRIPTIONS))
    return {
        name: tuple(of_question[index] for index in questions)
        for name, of_question in answers.items()
        if len(of_question) == len(questions)
    }


def question_template(prompt_format: Format) -> InlineTemplate:
    """The question as a template, for a model that is asked in this format."""
    return InlineTemplate(format=prompt_format, layout=_LAYOUTS[prompt_format], labels=_LABELS[prompt_format])


class _Centroids:
    """The mean answers to the examples of each category, each question scaled by its standard deviation."""

    def __init__(self, examples: Mapping[str, Sequence[QuestionLogOdds]]) -> None:
        columns = zip(*(answers for group in examples.values() for answers in group), strict=True)
        self._deviations = [pstdev(column) or 1.0 for column in columns]
        self._centroids = {
            category: [fmean(column) for column in zip(*group, strict=True)] for category, group in examples.items()
        }

    def nearest(self, answers: QuestionLogOdds) -> str:
        """The category with the nearest centroid; the first of equally near ones."""
        return min(self._centroids, key=lambda category: self._distance(answers, self._centroids[category]))

    def _distance(self, answers: QuestionLogOdds, centroid: Sequence[float]) -> float:
        scaled = zip(answers, centroid, self._deviations, strict=True)
        return sum(((answer - mean) / deviation) ** 2 for answer, mean, deviation in scaled)


def _example_instructions() -> list[Instruction]:
    return [
        Instruction(id=f"<example {category} {number}>", prompt=prompt, category=category)
        for category, prompts in EXAMPLES.items()
        for number, prompt in enumerate(prompts)
    ]


def _questions(instructions: Sequence[Instruction]) -> list[Sample]:
    """Each category's description as a response to each instruction."""
    return [
        Sample(id=instruction.id, sample=index, response=description, tokens=0, finish="stop")
        for instruction in instructions
        for index, description in enumerate(DESCRIPTIONS.values())
    ]


def _require_yes_no(info: ModelInfo, judge: JudgeOptions) -> None:
    required = JUDGE_OF_ARM["ipo"]
    if info.judge != required:
        raise StageError(
            f"instructions without a category need a service whose judge is {required}, and {shown_url(judge)} runs "
            f"{info.judge}: give them a category column, or have them categorised by another --judge-url first"
        )
