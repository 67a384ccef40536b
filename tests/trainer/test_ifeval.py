"""IFEval with the real checkers, on answers written by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import InputError
from trainer.evaluation.tasks.items import Check, TaskItem
from trainer.evaluation.tasks.options import TaskOptions

pytest.importorskip("if_verifiable", reason="the extra `evaluation` is not installed")

SENTENCES = {"relation": "less than", "num_sentences": 3}


def written(tmp_path: Path, ids: Any, kwargs: Any, prompt: str = "Write.") -> TaskOptions:
    """Options for a file of one item."""
    file = tmp_path / "ifeval.jsonl"
    file.write_text(json.dumps({"key": 1, "prompt": prompt, "instruction_id_list": ids, "kwargs": kwargs}) + "\n")
    return TaskOptions({"ifeval": str(file)})


def item(tmp_path: Path, *instructions: tuple[str, dict[str, Any]], prompt: str = "Write.") -> TaskItem:
    """An item with these instructions."""
    ids, kwargs = [name for name, _ in instructions], [arguments for _, arguments in instructions]
    return written(tmp_path, ids, kwargs, prompt).read()[0].items[0]


@pytest.mark.parametrize(
    ("name", "kwargs", "response", "strict", "loose"),
    [
        ("punctuation:no_comma", {}, "no comma here", True, True),
        ("punctuation:no_comma", {}, "Well, one\nno comma here", False, True),
        ("startend:quotation", {}, '"All of it."', True, True),
        ("startend:quotation", {}, 'Here you are:\n"All of it."', False, True),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', True, True),
        ("detectable_format:json_format", {}, "Sure!\n" + '{"a": 1}', False, True),
        ("detectable_format:json_format", {}, "{a: 1}", False, False),
        ("change_case:english_lowercase", {}, "all of it is small", True, True),
        ("startend:end_checker", {"end_phrase": "Bye."}, "So it goes. Bye.", True, True),
        ("startend:end_checker", {"end_phrase": "Bye."}, "So it goes. **Bye.**", False, True),
        ("length_constraints:number_sentences", SENTENCES, "Dr. Smith met Mr. Jones. They spoke.", True, True),
        ("length_constraints:number_sentences", SENTENCES, "One. Two. Three.", False, False),
        (
            "change_case:capital_word_frequency",
            {"capital_relation": "at least", "capital_frequency": 2},
            "A B",
            True,
            True,
        ),
        ("keywords:existence", {"keywords": ["cat"]}, "a Cat", True, True),
        ("language:response_language", {"language": "de"}, "Das ist ein deutscher Satz.", True, True),
        ("language:response_language", {"language": "de"}, "This is an English sentence.", False, False),
        ("punctuation:no_comma", {}, "", False, False),
        ("punctuation:no_comma", {}, " \n", False, False),
    ],
)
def test_an_instruction_is_followed_or_not(
    name: str, kwargs: dict[str, Any], response: str, strict: bool, loose: bool, tmp_path: Path
) -> None:
    """Loosely, a first or last line too many and asterisks are forgiven; an empty answer follows nothing."""
    check = item(tmp_path, (name, kwargs)).check(response)

    assert (check.correct, check.loose) == (strict, loose)


def test_all_instructions_of_a_prompt_must_be_followed(tmp_path: Path) -> None:
    """Each has its own verdict, and the prompt's is theirs together."""
    both = item(tmp_path, ("punctuation:no_comma", {}), ("keywords:existence", {"keywords": ["cat"]}))

    check = both.check("one, two and a cat")

    assert check.correct is False
    assert [(one.id, one.strict) for one in check.instructions] == [
        ("punctuation:no_comma", False),
        ("keywords:existence", True),
    ]


def test_verdicts_do_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    """The checkers replace a letter that is none by a random one: here always by the same."""
    arguments = {"letter": "#", "let_relation": "at least", "let_frequency": 2}
    found: list[Check] = []
    for seed in range(20):
        random.seed(seed)
        found.append(item(tmp_path, ("keywords:letter_frequency", arguments)).check("aabbccddeeffgg"))

    state = random.getstate()
    item(tmp_path, ("keywords:letter_frequency", arguments)).check("a")

    assert all(check == found[0] for check in found)
    assert random.getstate() == state


def test_a_checker_that_breaks_gives_no_verdict(tmp_path: Path) -> None:
    """JSON nested far too deep for its parser: the item counts in no mean."""
    check = item(tmp_path, ("detectable_format:json_format", {})).check("[" * 200_000)

    assert check.correct is None
    assert "RecursionError" in (check.error or "")


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        (["punctuation:none"], [{}], "unknown instruction 'punctuation:none'"),
        ([], [], "instruction_id_list must be a list of instruction ids"),
        (["punctuation:no_comma"], [], "kwargs must be a list of 1 objects"),
        (["punctuation:no_comma"], None, "kwargs must be a list of 1 objects"),
        (["keywords:existence"], [{}], "keywords:existence needs keywords in kwargs"),
        (["keywords:existence"], [{"keywords": None}], "keywords:existence needs keywords in kwargs"),
        (["punctuation:no_comma"], [{"commas": 1}], "punctuation:no_comma cannot be checked with these kwargs"),
        (
            ["length_constraints:number_words"],
            [{"relation": "about", "num_words": 5}],
            "length_constraints:number_words cannot be checked with these kwargs",
        ),
        (["language:response_language"], [{"language": "klingon"}], "with these kwargs: KeyError: 'klingon'"),
    ],
)
def test_items_that_cannot_be_checked_are_refused(ids: Any, kwargs: Any, message: str, tmp_path: Path) -> None:
    """Without an argument a checker would draw one and check something else; the error names the line."""
    with pytest.raises(InputError) as raised:
        written(tmp_path, ids, kwargs).read()

    assert message in str(raised.value)
    assert "line 1" in str(raised.value)


def test_arguments_of_other_instructions_may_be_null(tmp_path: Path) -> None:
    """The hub's copy of the data has every argument in every object."""
    given = item(tmp_path, ("keywords:existence", {"keywords": ["cat"], "num_words": None, "letter": None}))

    assert given.check("cat").correct is True
