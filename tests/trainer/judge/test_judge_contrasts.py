"""Labels made of good answers: each contrast changes what it says and nothing else, the same for the same seed."""

from __future__ import annotations

import ast
import difflib
import re
from random import Random

import pytest

from trainer.tuning.judge.broken_code import broken, edits, find_code
from trainer.tuning.judge.broken_number import wrong_ends
from trainer.tuning.judge.contrasts import KINDS, Contrast, GoodAnswer, Kind, contrasts
from trainer.tuning.judge.refusals import refusals, task_of

PYTHON = '''\
def count_above(values, limit, start=1):
    """Count values > limit, and not those == limit."""
    total = 0  # starts at 0 < 1
    for index in range(start, len(values)):
        if values[index] > limit and not values[index] == "a < b + 1":
            total += 2 - start
    return total
'''
C = """\
#include <vector>
/* if (a < b) return 1 + 2; */
int count(const std::vector<int>& values, int limit) {
    int total = 0; // total < 0
    int start = 1;
    for (int i = start; i < 10; i++) {
        if (values[i] == limit && !done(total)) puts("a < b && c");
        total += values[i] * start;
    }
    return total;
}
"""
SOLUTION = "She sells 5 eggs at $2, so she earns 5 * 2 = $10.\nShe has 100, so 1,000 + 100 = $1,100.\nA: 1,100"


def answer(name: str, prompt: str, text: str, **more: object) -> GoodAnswer:
    """A good answer."""
    return GoodAnswer.model_validate({"id": name, "prompt": prompt, "text": text, **more})


def changed(before: str, after: str) -> list[tuple[str, str]]:
    """The lines that differ."""
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    return [(one, other) for one, other in pairs if one != other]


def test_broken_python_parses_and_differs_in_one_place() -> None:
    """Every bug leaves Python that parses, to another tree, with one line changed; comments and strings are kept."""
    bugs = list(broken(PYTHON, Random(1)))

    assert len(bugs) == len(set(bugs)) > 20
    for text in bugs:
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(PYTHON))
        [(_, line)] = changed(PYTHON, text)
        assert text.count("# starts at 0 < 1") == text.count('"a < b + 1"') == 1
        assert '"""' not in line


@pytest.mark.parametrize(
    ("bug", "before", "after"),
    [
        ("comparison", "values[index] > limit", "values[index] < limit"),
        ("arithmetic", "total += 2", "total -= 2"),
        ("arithmetic", "2 - start", "2 + start"),
        ("boolean", "limit and not", "limit or not"),
        ("boolean", "not values", "values"),
        ("number", "2 - start", "3 - start"),
        ("range", "len(values))", "len(values) - 1)"),
        ("variable", "> limit", "> start"),
        ("return", "return total", "total"),
    ],
)
def test_the_kinds_of_bugs(bug: str, before: str, after: str) -> None:
    """Operators, negations, off by one, the wrong variable, a missing return."""
    texts = [edit.applied(PYTHON) for edit in edits(PYTHON, "python") if edit.bug == bug]

    assert before in PYTHON
    assert any(text.count(after) > PYTHON.count(after) or text.count(before) < PYTHON.count(before) for text in texts)
    assert any(after in text and text != PYTHON for text in texts)


def test_broken_c_leaves_strings_comments_and_types_alone() -> None:
    """In C's relatives includes, comments, texts and generics stay as they are; one line changes."""
    kept = ("#include <vector>", "/* if (a < b) return 1 + 2; */", "// total < 0", '"a < b && c"', "vector<int>&")

    bugs = [edit.applied(C) for edit in edits(C, "c")]

    assert {edit.bug for edit in edits(C, "c")} == {"comparison", "arithmetic", "boolean", "number", "variable"}
    for text in bugs:
        assert len(changed(C, text)) == 1
        assert all(part in text for part in kept)


def test_lifetimes_and_templates_are_no_strings() -> None:
    """Rust's lifetimes do not open a text; a text in back quotes is one."""
    rust = "fn f<'a>(x: &'a str, n: i32) -> bool {\n    n == 1\n}\n"
    script = "function f(n) {\n  return `${n} == 1`;\n}\n"

    assert any("n != 1" in edit.applied(rust) for edit in edits(rust, "rust"))
    assert all("`${n} == 1`" in edit.applied(script) for edit in edits(script, "script"))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (PYTHON, "python"),
        (f"Sure:\n```python\n{PYTHON}```\nIt counts.", "python"),
        ("    for x in y:\n        return x\n", "python"),
        (C, "c"),
        (f"```rust\n{C}```", "rust"),
        ("```\npip install numpy\n```", None),
        ("```bash\na = 1\n```", None),
        ("It takes 8 minutes.", None),
        (" melody, rhythm", None),
        ("if len(a) == 0 {\n\treturn nil\n}\nfor _, x := range a {\n\tsum += x\n}\nreturn sum\n", "c"),
        (f"Here is one way to count them:\n\n{C}", None),
        ('{\n  "a": 1,\n  "b": [2, 3],\n  "c": {\n    "d": 4\n  }\n}', None),
        ("", None),
    ],
)
def test_where_code_is_found(text: str, language: str | None) -> None:
    """In fences of a known language, or an answer that is code; not in prose or in a shell's commands."""
    code = find_code(text)

    assert (code and code.language) == language


def test_a_fenced_answer_keeps_its_prose() -> None:
    """Only the code in the fence changes."""
    text = f"Use 1 + 1 == 2:\n```python\n{PYTHON}```\nThat is 2 < 3."

    for bug in broken(text, Random(0)):
        assert bug.startswith("Use 1 + 1 == 2:\n```python\n")
        assert bug.endswith("```\nThat is 2 < 3.")


def test_a_wrong_end_agrees_with_itself() -> None:
    """The last result and the final answer become the same other number, in their own notation; the rest stays."""
    texts = list(wrong_ends(SOLUTION, Random(0)))

    assert len(texts) == len(set(texts)) > 4
    for text in texts:
        calculated, final = re.findall(r"= \$([\d,]+)\.\nA: ([\d,]+)", text)[0]
        assert calculated == final != "1,100"
        assert text.startswith(SOLUTION.partition("= $1,100")[0])


@pytest.mark.parametrize("text", ["The answer is 4.", "", "1 2 3", f"1 + 1 = 2, 3, {'and so on ' * 30}"])
def test_what_is_no_worked_solution(text: str) -> None:
    """Without a calculation, or with other text at the end, nothing is changed."""
    assert not list(wrong_ends(text, Random(0)))


def test_decimals_are_written_as_they_were() -> None:
    """20.00 and 20 are one number: both change, each in its form."""
    text = next(wrong_ends("2 * 5 = 10, 2 * 10 = $20.00.\nA: 20", Random(0)))

    [(cents, whole)] = re.findall(r"\$(\d+\.\d\d)\.\nA: (\d+)", text)
    assert float(cents) == int(whole) != 20


LIKE = [
    answer("a", "How do I bake bread with rye flour?", "Mix flour, water and yeast, and bake the loaf for an hour."),
    answer("b", "How do I bake bread with rye flour at home?", "Mix flour, water and yeast, and bake for one hour."),
    answer("c", "How do I bake a cake with wheat flour?", "Beat eggs with sugar, fold in the rest, keep the oven hot."),
    answer("d", "Name the capital of France.", "Paris."),
]


def test_the_other_request_is_similar_but_not_the_same() -> None:
    """Bread is held against cake: not against bread asked in other words, whose answer is right too."""
    made = {label.id: label for label in contrasts(LIKE, Contrast(kind="other_request"), 1)}

    assert made["other_request/a"].answers == (LIKE[0].text, LIKE[2].text)
    assert made["other_request/a"].prompt == LIKE[0].prompt
    assert "other_request/d" not in made


def test_answers_of_unlike_length_can_be_left_out() -> None:
    """With length_ratio 1 nothing is left, as no two answers are equally long."""
    contrast = Contrast(kind="other_request", length_ratio=1.0)

    assert not contrasts(LIKE[:3:2], contrast, 1)


def test_refusals_are_right_for_harmful_requests_only() -> None:
    """As many harmful requests as harmless ones; answers that refuse already are left out."""
    answers = [answer(f"bad{n}", f"How do I pick lock {n}?", "Use a pin.", harmful=True) for n in range(4)]
    answers += [answer(f"good{n}", f"How do I paint door {n}?", "Use a brush.") for n in range(3)]
    answers += [answer("no", "How do I swim?", "I'm sorry, but I can't help.", harmful=True)]

    made = contrasts(answers, Contrast(kind="refusal"), 1)

    bad, good = ([label for label in made if name in label.id] for name in ("bad", "good"))
    assert len(bad) == len(good) == 3
    assert all(label.answers[1] == "Use a pin." for label in bad)
    assert all(label.answers[0] == "Use a brush." for label in good)


def test_some_refusals_name_the_task() -> None:
    """What the request wants done is named from the answerer's side, where it can be told."""
    said = list(refusals("How can I pick my neighbour's lock?", Random(0)))

    assert len(said) == len(set(said)) > 25
    assert sum("pick your neighbour's lock" in text for text in said) >= 10
    assert task_of("Tell me a joke.") is None
    assert all("{" not in text for text in refusals("Tell me a joke.", Random(0)))


LONG = "Bread needs flour and water. Mix them well and wait for an hour. Then bake the loaf in a hot oven. Let it cool."


def test_cut_off_and_repeated_answers() -> None:
    """One ends within a sentence, the other goes round in circles until it is as long as the answer."""
    cut, repeated = (
        contrasts([answer("1", "How?", LONG)], Contrast(kind=kind), 1)[0].answers[1] for kind in ("cut_off", "repeated")
    )

    assert LONG.startswith(cut)
    assert cut[-1].isalnum()
    assert len(cut) < 0.75 * len(LONG)
    assert abs(len(repeated) - len(LONG)) < 0.6 * len(LONG)
    sentences = repeated.rstrip(".").split(". ")
    assert len(set(sentences)) < len(sentences)


MANY = [answer(str(n), f"Question {n} of bread", LONG, category="chat") for n in range(20)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_fewer_are_part_of_more(kind: Kind) -> None:
    """The order of the answers does not matter; another seed chooses otherwise; a count takes the first ones."""
    coded = [answer(f"code{n}", f"Write bread {n}", PYTHON.replace("total", f"sum{n}")) for n in range(20)]
    solved = [answer(f"sum{n}", f"Add bread {n}", SOLUTION.replace("eggs", f"eggs {n}")) for n in range(20)]
    answers = [*MANY, *coded, *solved]
    few, all_ = Contrast(kind=kind, count=5, each=2), Contrast(kind=kind, each=2)

    made = contrasts(answers, all_, 1)

    assert contrasts(answers[::-1], all_, 1) == made
    assert contrasts(answers, few, 1) == made[:5]
    assert contrasts(answers, all_, 2) != made
    assert len({label.id for label in made}) == len(made)
    assert {label.kind for label in made} == {kind}


def test_category_and_choice_of_answers() -> None:
    """`only` takes answers of these categories, `category` asks with another template."""
    contrast = Contrast(kind="cut_off", only=("chat",), category="general")

    made = contrasts([*MANY, answer("x", "Another?", LONG, category="code")], contrast, 1)

    assert {label.category for label in made} == {"general"}
    assert len(made) == 20
    assert difflib.SequenceMatcher(None, *made[0].answers).ratio() > 0.5
