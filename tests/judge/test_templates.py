"""Templates: the built-in ones, those of files, those that come with a request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.errors import ErrorCode
from client.schema import InlineTemplate, Labels
from service.errors import ServiceError
from service.judge.template_files import load_library
from service.judge.templates import Template, TemplateLibrary, from_inline
from service.questions import Layout, Predicate

PAPER = Path(__file__).parents[2] / "../shared/data/paper_templates.json"
OWN = {"name": "law", "version": 1, "category": "law", "instruction": "Judge as a lawyer."}
LAYOUT = "{instruction} {prompt} {response}"


@pytest.fixture(scope="module")
def library() -> TemplateLibrary:
    """The built-in templates for a model with a chat template."""
    return load_library("chat")


def write(folder: Path, *entries: dict[str, Any], name: str = "own.json") -> Path:
    """A file of templates."""
    path = folder / name
    path.write_text(json.dumps({"templates": entries}), encoding="utf-8")
    return path


def own(name: str, text: str, instruction: str, yes: list[str], no: list[str]) -> Template:
    """A raw template for one response, as a file's or a request's becomes."""
    return Template(
        name=name,
        version=1,
        mode="pointwise",
        format="raw",
        text=text,
        slots=("prompt", "response"),
        instruction=instruction,
        question=Predicate.of(yes, no),
        inline=name == "inline",
    )


def inline(layout: str, instruction: str = "") -> Template:
    """A template as it comes with a request."""
    return from_inline(InlineTemplate(layout=layout, instruction=instruction))


def test_five_categories_are_built_in(library: TemplateLibrary) -> None:
    """The built-in categories are general, chat, code, math and safety."""
    assert library.categories() == ["chat", "code", "general", "math", "safety"]


@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_every_category_has_a_template_in_both_modes(library: TemplateLibrary, mode: Any) -> None:
    """Each category can be judged pointwise and pairwise, by a template made for that mode."""
    modes = {library.for_category(category, mode).mode for category in library.categories()}

    assert modes == {mode}


@pytest.mark.parametrize(("form", "labels"), [("chat", ("Yes", "No")), ("raw", (" Yes", " No"))])
def test_labels_suit_the_format(form: Any, labels: tuple[str, str]) -> None:
    """A built-in template has labels that are natural where its format's layout ends."""
    template = load_library(form).default("pointwise")

    assert (template.format, template.yes, template.no) == (form, (labels[0],), (labels[1],))


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_built_in_layouts_do_not_end_in_space(form: Any) -> None:
    """No layout of our own ends in white space, which would make the label's token an unlikely one."""
    layouts = [template.text for template in load_library(form).all() if template.name != "rerank-qwen3"]

    assert [layout for layout in layouts if layout != layout.rstrip()] == []


def test_a_pairwise_yes_means_that_the_first_is_better(library: TemplateLibrary) -> None:
    """The yes side of a pairwise template is A."""
    template = library.default("pairwise")

    assert (template.id, template.yes, template.no) == ("pairwise-general@1", ("A",), ("B",))


def test_a_name_means_the_newest_version(tmp_path: Path) -> None:
    """`general` is the newest version, `general@1` stays what it was, and the category moves to the newest too."""
    newer = {"name": "general", "version": 99, "category": "general", "instruction": "Newer."}

    library = load_library("chat", [write(tmp_path, newer)])

    assert library.get("general").version == library.default("pointwise").version == 99
    assert library.get("general@1").version == 1


def test_versions_are_numbers_not_text(tmp_path: Path) -> None:
    """Version 10 is newer than version 9."""
    entries = [OWN | {"version": version} for version in (10, 9)]

    library = load_library("chat", [write(tmp_path, *entries)])

    assert library.get("law").id == "law@10"


@pytest.mark.parametrize("name", ["nonsense", "general@98", "general@", "inline", ""])
def test_an_unknown_name_is_not_found(library: TemplateLibrary, name: str) -> None:
    """A name that no template has is refused, and not repeated."""
    with pytest.raises(ServiceError) as caught:
        library.get(name)

    assert (caught.value.code, caught.value.param) == (ErrorCode.TEMPLATE_NOT_FOUND, "template")
    assert "nonsense" not in caught.value.message


def test_an_unknown_category_is_told_the_known_ones(library: TemplateLibrary) -> None:
    """The refusal of a category lists those that there are."""
    with pytest.raises(ServiceError, match="chat, code, general, math, safety") as caught:
        library.for_category("poetry", "pointwise")

    assert (caught.value.code, caught.value.param) == (ErrorCode.TEMPLATE_NOT_FOUND, "category")


def test_a_file_adds_a_category(tmp_path: Path) -> None:
    """A template without a layout takes the built-in one of the model's format; its category can be asked for."""
    library = load_library("raw", [write(tmp_path, OWN)])

    template = library.for_category("law", "pointwise")

    assert (template.id, template.format, template.yes) == ("law@1", "raw", (" Yes",))
    assert template.text == library.get("general@1").text


def test_a_category_need_not_have_both_modes(tmp_path: Path) -> None:
    """A category with a pointwise template only is refused for pairwise judgements."""
    library = load_library("chat", [write(tmp_path, OWN)])

    with pytest.raises(ServiceError, match="pairwise"):
        library.for_category("law", "pairwise")


@pytest.mark.parametrize(("form", "labels"), [("chat", ("Yes",)), ("raw", (" Yes",))])
def test_a_frame_goes_with_the_models_format(tmp_path: Path, form: Any, labels: tuple[str]) -> None:
    """In the frame question-last the instruction comes after the response, whatever the format."""
    path = write(tmp_path, {"name": "late", "version": 1, "instruction": "Is it true?", "frame": "question-last"})

    template = load_library(form, [path]).get("late")

    assert template.parts[1::2] == ["prompt", "response", "instruction"]
    assert (template.format, template.yes) == (form, labels)


@pytest.mark.parametrize(
    ("form", "end"), [("chat", "\n\nIs it legal?"), ("raw", "\n\nQuestion: Is it legal?\nVerdict:")]
)
def test_a_template_may_ask_a_question_of_its_own(tmp_path: Path, form: Any, end: str) -> None:
    """The question takes the place of the frame's, whatever the format; the rest of the frame stays."""
    path = write(tmp_path, OWN | {"question": "Is it legal?"})

    template = load_library(form, [path]).get("law")

    assert template.text == "{instruction}\n\nRequest:\n{prompt}\n\nAnswer:\n{response}" + end


def test_toml_reads_as_json_does(tmp_path: Path) -> None:
    """The same template can be written in TOML."""
    path = tmp_path / "own.toml"
    path.write_text(
        "[[templates]]\nname = 'law'\nversion = 1\nformat = 'raw'\nlayout = '{prompt}{response}'\n"
        "labels = { yes = [' good', ' fine'], no = [' bad'] }\n",
        encoding="utf-8",
    )

    template = load_library("chat", [path]).get("law")

    assert template == own("law", "{prompt}{response}", "", [" good", " fine"], [" bad"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"colour": "red"}, "colour"),
        ({"version": 0}, "version"),
        ({"version": "1"}, "version"),
        ({"name": "law@1"}, "name"),
        ({"name": "inline"}, "inline"),
        ({"mode": "listwise"}, "mode"),
        ({"labels": {"yes": ["Yes"], "no": []}}, "labels"),
        ({"layout": LAYOUT}, "format"),
        ({"frame": "upside-down"}, "frame"),
        ({"frame": "question-last", "mode": "pairwise"}, "pointwise"),
        ({"mode": "choice", "layout": "{prompt}{question}{options}", "format": "raw"}, "frame instruction-first"),
        ({"question": "Legal?", "frame": "question-last"}, "question is for"),
        ({"question": "Legal?", "mode": "pairwise"}, "question is for"),
        ({"question": "Legal?", "layout": LAYOUT, "format": "raw"}, "question is for"),
        ({"question": "Is {response} legal?"}, "exactly once"),
        ({"layout": "{instruction} {prompt}", "format": "raw"}, "response"),
        ({"layout": LAYOUT + "{response}", "format": "raw"}, "exactly once"),
        ({"layout": LAYOUT + "{instruction}", "format": "raw"}, "at most once"),
        ({"layout": "{prompt}{response}", "format": "raw"}, "would not be read"),
        ({"mode": "pairwise", "layout": LAYOUT, "format": "raw"}, "response_a"),
        ({"name": "general"}, "already defined"),
        ({"category": "code"}, "belongs to code"),
    ],
)
def test_a_bad_file_is_refused_by_file_and_template(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    """What is wrong in a file is said with the file's and the template's name."""
    path = write(tmp_path, OWN | change)

    with pytest.raises(ServiceError) as caught:
        load_library("chat", [path])

    assert caught.value.code is ErrorCode.BAD_TEMPLATE
    assert caught.value.message.startswith(f"{path}: template {change.get('name', 'law')}")
    assert problem in caught.value.message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"members": []}, "at least 2"),
        ({"members": ["general@1"]}, "at least 2"),
        ({"members": [f"general@{n}" for n in range(17)]}, "at most 16"),
        ({"members": ["general@1", "general@1"]}, "distinct"),
        ({"members": ["general@1", "general@98"]}, "no template general@98"),
        ({"members": ["general@1", "general"]}, "name and version"),
        ({"members": ["general@1", "two@1"]}, "no template two@1"),
        ({"members": ["general@1", "pairwise-general@1"]}, "one mode"),
        ({"members": ["self-reward@1", "stars@1"]}, "pointwise or pairwise"),
        ({"weights": [1]}, "1 weights for 2 members"),
        ({"weights": [1, -1]}, "weights.1: Input should be greater than or equal to 0.000001"),
        ({"weights": [0, 0]}, "weights.0: Input should be greater than or equal to 0.000001"),
        ({"weights": [1, float("nan")]}, "finite"),
        ({"weights": [1, float("inf")]}, "finite"),
        ({"weights": ["much", 1]}, "number"),
        ({"name": "inline"}, "inline"),
        ({"name": "a,b"}, "pattern"),
        ({"name": "general"}, "already defined"),
        ({"category": "code"}, "belongs to code"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_panel_is_refused_by_file_and_name(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    """Members that cannot be averaged, and weights that are none."""
    path = tmp_path / "own.json"
    panel = {"name": "two", "version": 1, "members": ["general@1", "math@1"]} | change
    stars = OWN | {"name": "stars", "category": None, "mode": "graded"}
    path.write_text(json.dumps({"templates": [stars], "panels": [panel]}), encoding="utf-8")

    with pytest.raises(ServiceError) as caught:
        load_library("chat", [path])

    assert caught.value.code is ErrorCode.BAD_TEMPLATE
    assert caught.value.message.startswith(f"{path}: template {panel['name']}")
    assert problem in caught.value.message


def test_a_panel_is_no_template(tmp_path: Path) -> None:
    """Where one template is needed, a panel is refused with its name; its members may stand in any file."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"panels": [{"name": "two", "version": 1, "members": ["law@1", "general@1"]}]}))

    library = load_library("chat", [path, write(tmp_path, OWN, name="law.json")])

    with pytest.raises(ServiceError, match="two@1 is a panel"):
        library.get("two")
    assert [member.id for member in library.panel("two").members] == ["law@1", "general@1"]
    assert library.panel("law").digest == library.get("law").digest


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"templates": []}', '{"templates": ["law"]}', '{"templates": 1}']
)
def test_a_file_that_is_no_list_of_templates_is_refused(tmp_path: Path, content: str) -> None:
    """Broken JSON and JSON of another shape are refused with the file's name."""
    path = tmp_path / "own.json"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(ServiceError, match=r"own\.json"):
        load_library("chat", [path])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A file that is not there stops the start, with its name."""
    with pytest.raises(ServiceError, match=r"gone\.toml"):
        load_library("chat", [tmp_path / "gone.toml"])


def test_a_file_cannot_reach_other_files(tmp_path: Path) -> None:
    """What looks like an include, a Jinja tag or a format field is plain text."""
    text = "{% include '/etc/passwd' %} {{ prompt }} {0} {prompt.__class__} ${HOME}"
    entry = OWN | {"instruction": text, "layout": text + LAYOUT, "format": "raw"}

    with pytest.raises(ServiceError, match="exactly once"):
        load_library("chat", [write(tmp_path, entry | {"layout": LAYOUT + "{prompt}"})])
    template = load_library("chat", [write(tmp_path, entry | {"layout": "{% x %} {0} " + LAYOUT})]).get("law")

    assert template.instruction == text
    assert template.parts[0] == "{% x %} {0} "


def test_the_papers_prompts_load_as_published() -> None:
    """The authors' file gives raw templates: three groups, and the candidates in RewardBench's layout."""
    if not PAPER.exists():
        pytest.skip("the authors' prompts are not here")
    data = json.loads(PAPER.read_text(encoding="utf-8"))

    library = load_library("chat", [PAPER])

    candidate = library.get("paper/candidates/hep-python/3@1")
    assert (candidate.format, candidate.yes, candidate.no) == ("raw", (" Yes",), (" No",))
    assert candidate.text == data["rewardbench"]["layout"]
    assert candidate.instruction == data["candidates"]["hep-python"][3]
    assert library.get("paper/rmbench/RM-Bench-chat@1").text == data["rmbench"]["layout"]
    assert library.get("paper/self_improve/Math").instruction == data["self_improve"]["instructions"]["Math"]
    assert library.get("paper/candidates/default@1").instruction == data["candidates"]["default"]


def test_an_inline_template_is_taken_as_it_is() -> None:
    """A request's template keeps its format, layout, instruction and labels, and is called `inline`."""
    labels = Labels(yes=[" ok"], no=[" bad", " poor"])

    template = from_inline(InlineTemplate(format="raw", layout=LAYOUT, instruction="Judge.", labels=labels))

    assert template == own("inline", LAYOUT, "Judge.", [" ok"], [" bad", " poor"])
    assert template.id == "inline"


def test_an_inline_template_with_two_responses_is_pairwise() -> None:
    """A layout with {response_a} and {response_b} is for pairwise judgements."""
    assert inline("{prompt} {response_a} {response_b}").mode == "pairwise"


@pytest.mark.parametrize(
    "layout",
    [
        "no slots",
        "{prompt}",
        "{response}",
        "{prompt}{prompt}{response}",
        "{prompt}{response}{response}",
        "{prompt}{response}{instruction}{instruction}",
        "{prompt}{response_a}",
        "{prompt}{response_a}{response_a}{response_b}",
        "{ prompt }{response}",
    ],
)
def test_a_bad_inline_layout_is_refused(layout: str) -> None:
    """A layout whose slots are not right is refused without being repeated."""
    with pytest.raises(ServiceError) as caught:
        inline(layout).check()

    assert (caught.value.code, caught.value.param) == (ErrorCode.BAD_TEMPLATE, "template")


def test_other_braces_are_text() -> None:
    """Braces that are not one of the slots stay in the layout."""
    text = '{"q": "{prompt}", {x}, {response_a}: {response}}'

    parts = Layout(format="raw", text=text, slots=("prompt", "response")).parts

    assert parts == ['{"q": "', "prompt", '", {x}, {response_a}: ', "response", "}"]
