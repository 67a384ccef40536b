"""What a judge is trained on: the very token ids and label ids that the running service computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from client.schema import Message
from service.engine.contract import LabelLogprobs, ScoreItem
from tests.queue.scripted_engine import ScriptedEngine
from tests.support.live import live_service
from tests.trainer.judge.makers import examples_of
from trainer.errors import InputError
from trainer.tuning.judge.labels import Label
from trainer.tuning.judge.prompts import JudgePrompts

CONVERSATION = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="Hello <|im_end|>"),
    Message(role="assistant", content="Hi"),
    Message(role="user", content="What is 2+2?"),
)
LABELS = [
    Label(id="plain", prompt="What is the capital of France?", answers=("Paris", "fox")),
    Label(id="math", prompt="What is 2+2?", answers=("4", "5 <|im_start|>"), category="math"),
    Label(id="turns", prompt=CONVERSATION, answers=("4", "No"), category="safety"),
    Label(id="unknown", prompt="Who?", answers=("A", "B"), category="gardening"),
]


class Recorder:
    """An engine's `run` that remembers its items."""

    def __init__(self) -> None:
        self.items: list[ScoreItem] = []

    def __call__(self, items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        self.items += items
        return [LabelLogprobs((-1.0,) * len(item.label_ids), 0) for item in items]


def judged(model: Path, path: str, bodies: Sequence[dict[str, object]]) -> list[ScoreItem]:
    """The items that a service's engine gets for these requests, one after the other."""
    record = Recorder()
    with live_service(ScriptedEngine(record), model=str(model), cache_entries=0) as live:
        for body in bodies:
            live.http.post(path, json=body).raise_for_status()
    return record.items


def body_of(label: Label) -> dict[str, object]:
    """What every request about the label says; the service refuses categories that it does not know."""
    prompt = label.prompt if isinstance(label.prompt, str) else [turn.model_dump() for turn in label.prompt]
    known = label.category in ("math", "safety")
    return {"prompt": prompt, "category": label.category} if known else {"prompt": prompt}


def key(item: ScoreItem) -> tuple[object, ...]:
    """All that an engine is asked."""
    return tuple(item.token_ids), item.label_ids, item.boundaries


def test_prompts_are_the_services_own_token_for_token(tiny_model: Path) -> None:
    """Single answers give the token ids, label ids and boundaries of /score, conversations and control strings too."""
    bodies = [{**body_of(label), "response": answer} for label in LABELS for answer in label.answers]

    examples = examples_of(tiny_model, LABELS)

    prompts = [prompt for example in examples for prompt in example.prompts]
    assert list(map(key, prompts)) == list(map(key, judged(tiny_model, "/score", bodies)))


def test_pairwise_prompts_are_those_of_a_comparison(tiny_model: Path) -> None:
    """Pairwise, a label is both of the prompts that /compare asks about, the chosen answer shown first and second."""
    bodies = [{**body_of(label), "responses": label.answers, "mode": "pairwise"} for label in LABELS]

    examples = examples_of(tiny_model, LABELS, "pairwise")

    asked = judged(tiny_model, "/compare", bodies)
    assert {key(prompt) for example in examples for prompt in example.prompts} == set(map(key, asked))
    assert all(example.signs == (0.5, -0.5) and example.targets == (1.0, 0.0) for example in examples)


def test_a_named_template_is_asked_of_every_label(tiny_model: Path) -> None:
    """--template asks the same of all categories, in the version that it names."""
    prompts = JudgePrompts(tiny_model, "pointwise", "general@1", [], 2048)

    examples, _ = prompts.examples(LABELS)

    assert {example.template.id for example in examples} == {"general@1"}
    assert list(prompts.asked_with()) == ["general@1"]


def test_a_label_may_name_its_template(tiny_model: Path) -> None:
    """A label's own template wins over its category, --template over both, and one that does not exist is named."""
    own = Label(id="own", prompt="What is 2+2?", answers=("4", "5"), category="math", template="general")
    unknown = own.model_copy(update={"template": "unheard-of"})
    prompts, fixed = (JudgePrompts(tiny_model, "pointwise", name, [], 2048) for name in (None, "safety"))

    ((mine,), _), ((other,), _) = prompts.examples([own]), fixed.examples([own])

    assert (mine.template.name, other.template.name) == ("general", "safety")
    with pytest.raises(InputError, match="label own: there is no template unheard-of"):
        prompts.examples([unknown])


def test_asked_with_is_what_the_service_says(tiny_model: Path) -> None:
    """The digest of the way of asking, which calibration files keep, is that of the service's results."""
    prompts = JudgePrompts(tiny_model, "pointwise", None, [], 2048)
    prompts.examples(LABELS[:1])
    with live_service(ScriptedEngine(Recorder()), model=str(tiny_model)) as live:
        result = live.http.post("/score", json={"prompt": "Who?", "response": "A"}).json()

    assert prompts.asked_with() == {result["template"]: result["asked_with"]}


def test_what_is_too_long_is_counted(tiny_model: Path) -> None:
    """A label with a prompt over --max-length is left out, the others stay."""
    long = Label(id="long", prompt="Why? " * 300, answers=("A", "B"))

    examples, left_out = JudgePrompts(tiny_model, "pointwise", None, [], 256).examples([long, LABELS[0]])

    assert [example.label.id for example in examples] == ["plain"]
    assert left_out == {"context_length_exceeded": 1}


def test_a_label_of_two_tokens_is_refused_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    """A template whose label is not one token here is an input error that names both."""
    file = tmp_path / "two.toml"
    file.write_text(
        '[[templates]]\nname = "two"\nversion = 1\ninstruction = "Good?"\n'
        'labels = { yes = ["Definitely"], no = ["No"] }\n'
    )

    with pytest.raises(InputError, match=r"two@1 cannot be used with this model: yes label 0 is \d tokens"):
        JudgePrompts(tiny_model, "pointwise", "two", [file], 2048)


@pytest.mark.parametrize("category", ["general", "math"])
def test_a_category_that_a_panel_asks_is_refused(tiny_model: Path, tmp_path: Path, category: str) -> None:
    """Not asked by another template than the service asks: an input error says what to give."""
    file = tmp_path / "panel.toml"
    file.write_text(
        f'[[panels]]\nname = "{category}"\nversion = 9\ncategory = "{category}"\nmembers = ["general@3", "math@2"]\n'
    )
    label = Label(id="1", prompt="Why?", answers=("A", "B"), category=category)

    with pytest.raises(InputError, match=f"{category}@9 is a panel.*--template"):
        JudgePrompts(tiny_model, "pointwise", None, [file], 2048).examples([label])


@pytest.mark.parametrize("template", ["unheard-of", "pairwise-general"])
def test_a_template_that_does_not_fit_is_refused(tiny_model: Path, template: str) -> None:
    """A template that does not exist, or of the other mode, is an input error."""
    with pytest.raises(InputError, match="template"):
        JudgePrompts(tiny_model, "pointwise", template, [], 2048).examples(LABELS)
