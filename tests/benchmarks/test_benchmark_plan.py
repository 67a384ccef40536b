"""Which question is asked of which subset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.benchmarks.paper import PaperPrompts
from client.benchmarks.questions import PlanError, Question, by_category, from_map, load_candidates
from client.benchmarks.scoring.rewardbench import WEIGHTS
from client.schema import InlineTemplate
from tests.benchmarks.makers import PAPER, paper_file


def inline(question: Question) -> InlineTemplate:
    """The question's own template."""
    assert isinstance(question.template, InlineTemplate)
    return question.template


def test_each_subset_is_asked_by_its_category() -> None:
    """The default plan depends on nothing but the category of a subset."""
    plan = by_category(["hep-go", "xstest"], lambda subset: "code" if subset.startswith("hep") else "safety")

    assert plan == {"hep-go": Question(category="code"), "xstest": Question(category="safety")}


def test_a_map_takes_the_first_pattern_that_fits(tmp_path: Path) -> None:
    """Patterns are tried in the order of the file, and * is for the rest."""
    file = tmp_path / "map.json"
    file.write_text('{"hep-*": {"template": "code@1"}, "*": {"category": "chat"}}')

    plan = from_map(["hep-go", "alpacaeval-easy"], file)

    assert plan == {"hep-go": Question(template="code@1"), "alpacaeval-easy": Question(category="chat")}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"hep-*": {"category": "code"}}', "no question for subset other"),
        ('{"*": {"category": "code", "template": "x"}}', "either category or template"),
        ('{"*": {"instruction": "x"}}', "either category or template"),
        ('{"*": {"template": {"layout": ""}}}', "layout"),
        ('{"*": {"template": ["x", 1]}}', "list of names"),
        ("[]", "object"),
        ("{", "JSON"),
    ],
)
def test_a_map_that_cannot_work_says_why(tmp_path: Path, text: str, problem: str) -> None:
    """Every mistake in a map is named with its file."""
    file = tmp_path / "map.json"
    file.write_text(text)

    with pytest.raises(PlanError, match=problem) as caught:
        from_map(["other"], file)

    assert "map.json" in str(caught.value)


def test_the_papers_prompts_are_raw_text_as_published(tmp_path: Path) -> None:
    """Raw, the authors' layout keeps its trailing space, and their labels begin with one."""
    plan = PaperPrompts.load(paper_file(tmp_path)).plan(["one", "two"], "rewardbench", "raw", "own", 0)

    assert inline(plan["two"]).format == "raw"
    assert inline(plan["two"]).layout == PAPER["rewardbench"]["layout"]  # type: ignore[index]
    assert inline(plan["two"]).instruction == "Is two fine?"
    assert inline(plan["two"]).labels.yes == [" Yes"]


def test_the_papers_prompts_as_chat_end_where_the_answer_begins(tmp_path: Path) -> None:
    """In a chat turn nothing trails the question, and the labels stand at the start of the answer."""
    plan = PaperPrompts.load(paper_file(tmp_path)).plan(["one"], "rewardbench", "chat", "own", 0)

    assert inline(plan["one"]).layout.endswith("{response}")
    assert inline(plan["one"]).labels.no == ["No"]


def test_shuffled_prompts_are_the_same_prompts_in_other_places(tmp_path: Path) -> None:
    """Each instruction is used once, decided by the seed, and a question is called by where it comes from."""
    prompts = PaperPrompts.load(paper_file(tmp_path))

    plan = prompts.plan(["one", "two", "three"], "rewardbench", "raw", "shuffled", 1)

    assert sorted(inline(question).instruction for question in plan.values()) == sorted(
        PAPER["rewardbench"]["instructions"].values()  # type: ignore[index]
    )
    assert plan == prompts.plan(["one", "two", "three"], "rewardbench", "raw", "shuffled", 1)
    assert any(subset not in str(question) for subset, question in plan.items())


def test_one_prompt_for_all_is_the_papers_generic_one(tmp_path: Path) -> None:
    """The study `same` asks everything by the default candidate."""
    plan = PaperPrompts.load(paper_file(tmp_path)).plan(["one", "unheard-of"], "rewardbench", "chat", "same", 0)

    assert {inline(question).instruction for question in plan.values()} == {"Is it fine?"}


def test_rm_bench_has_prompts_of_its_own(tmp_path: Path) -> None:
    """RM-Bench's domains are found under the authors' names, in the layout that asks last."""
    plan = PaperPrompts.load(paper_file(tmp_path)).plan(["chat"], "rmbench", "raw", "own", 0)

    assert inline(plan["chat"]).instruction == "Is it right?"
    assert inline(plan["chat"]).layout == "{prompt} {response} {instruction}"


def test_a_subset_that_the_paper_does_not_know_is_refused(tmp_path: Path) -> None:
    """No prompt is made up for it."""
    prompts = PaperPrompts.load(paper_file(tmp_path))

    with pytest.raises(PlanError, match="no instruction for subset four"):
        prompts.plan(["four"], "rewardbench", "raw", "own", 0)


def test_a_file_that_is_not_the_papers_is_refused(tmp_path: Path) -> None:
    """A missing part is named."""
    with pytest.raises(PlanError, match=r"paper\.json.*labels"):
        PaperPrompts.load(paper_file(tmp_path, labels=None))


def test_candidates_shared_by_subsets_are_tried_once(tmp_path: Path) -> None:
    """The pool of a category holds each text once, in the order of its subsets."""
    candidates = PaperPrompts.load(paper_file(tmp_path)).candidates_for(["one", "two"], "chat")

    assert [inline(question).instruction for question in candidates] == ["a", "b", "c"]


def test_candidates_of_ones_own_are_names_or_templates(tmp_path: Path) -> None:
    """A file may mix templates that the service knows with new ones."""
    file = tmp_path / "candidates.json"
    own = {"name": "short", "template": {"layout": "{prompt} {response} Good?"}}
    file.write_text(json.dumps({"code": ["code@1", own]}))

    first, second = load_candidates(file)["code"]

    assert first == Question(template="code@1")
    assert str(second) == "short"


def test_the_published_file_covers_both_benchmarks() -> None:
    """Every subset of RewardBench and every domain of RM-Bench has its instruction in the authors' own file."""
    file = Path(__file__).parents[2] / "../shared/data/paper_templates.json"
    if not file.exists():
        pytest.skip("the shared data is not here")

    prompts = PaperPrompts.load(file)

    assert set(prompts.plan(WEIGHTS, "rewardbench", "raw", "own", 0)) == set(WEIGHTS)
    assert len(prompts.plan(["chat", "code", "math", "safety-refuse", "safety-response"], "rmbench", "raw", "own", 0))


def test_several_templates_are_one_question(tmp_path: Path) -> None:
    """A list in a map or among candidates is a panel, asked as the list, and described by one name."""
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"*": {"template": ["general@3", "math@2"]}}))

    question = from_map(["a"], file)["a"]

    assert question == Question(template="general@3,math@2")
    assert question.asked == ["general@3", "math@2"]
    assert question.described() == {"template": "general@3,math@2"}
    assert Question(template="general@3").asked == "general@3"
