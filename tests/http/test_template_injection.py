"""Templates are text: nothing in a template, its name or its file is interpreted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.errors import ErrorCode
from service.errors import ServiceError
from service.judge.template_files import load_library
from service.judge.templates import Template
from service.prompts.builder import PromptBuilder
from tests.support.live import PAIR, live_service
from tests.support.tiny import tiny_tokenizer

INJECTIONS = [
    "{prompt.__class__}",
    "{0}",
    "{prompt!r:>1000}",
    "{instruction.__init__.__globals__}",
    "{{config}}",
    "{{ 7*7 }}",
    "{% include '/etc/passwd' %}",
    "{% for c in ().__class__.__base__.__subclasses__() %}{{c}}{% endfor %}",
    "${HOME} $(id) `id` %s %(prompt)s",
]


def write_template(folder: Path, **fields: object) -> Path:
    """A file with one template, which is called mine."""
    labels = {"yes": [" Yes"], "no": [" No"]}
    template = {"name": "mine", "version": 1, "format": "raw", "labels": labels, **fields}
    (folder / "mine.json").write_text(json.dumps({"templates": [template]}), encoding="utf-8")
    return folder / "mine.json"


def prompt_text(template: Template, prompt: str, response: str) -> str:
    """What the model reads, decoded from the tokens."""
    tokenizer = tiny_tokenizer()
    built = PromptBuilder(tokenizer, 4096).build(template, prompt, [response], "error")
    return str(tokenizer.backend_tokenizer.decode(list(built.token_ids), skip_special_tokens=False))


@pytest.mark.parametrize("text", INJECTIONS)
def test_a_template_from_a_file_is_listed_as_written(tmp_path: Path, text: str) -> None:
    """Format fields, Jinja and shell syntax are plain text."""
    layout = f"{text} {{instruction}} {{prompt}} {{response}}\nVerdict:"
    file = write_template(tmp_path, layout=layout, instruction=text)
    with live_service(worker=False, template_file=[file]) as live:
        listed = live.http.get("/templates").json()["templates"]

    (mine,) = [template for template in listed if template["name"] == "mine"]
    assert (mine["layout"], mine["instruction"]) == (layout, text)


@pytest.mark.parametrize("form", ["chat", "raw"])
@pytest.mark.parametrize("text", INJECTIONS)
def test_a_templates_text_reaches_the_model_as_written(tmp_path: Path, form: str, text: str) -> None:
    """Neither reading the file nor filling its slots interprets the text."""
    layout = f"{text} {{instruction}} {{prompt}} {{response}}\nVerdict:\n"
    labels = {"yes": ["Yes"], "no": ["No"]}
    file = write_template(tmp_path, format=form, layout=layout, instruction=text, labels=labels)

    assert f"{text} {text} p r\nVerdict:" in prompt_text(load_library("chat", [file]).get("mine"), "p", "r")


@pytest.mark.parametrize("text", INJECTIONS)
def test_a_callers_text_is_not_interpreted_by_the_models_chat_template(text: str) -> None:
    """Its Jinja renders a placeholder; prompt and response reach the model as sent."""
    assert prompt_text(load_library("chat").default("pointwise"), text, text).count(text) == 2


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "..\\..\\boot.ini", "a\0b"])
def test_a_template_name_opens_no_file(name: str) -> None:
    """It is looked up among the loaded templates, and not repeated."""
    with live_service(worker=False) as live:
        answer = live.http.post("/score", json={**PAIR, "template": name})

    assert answer.status_code in (404, 422)
    assert "etc" not in answer.text
    assert "boot" not in answer.text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("deep.toml", "templates = " + "[" * 50_000),
        ("deep.json", '{"templates": ' + "[" * 200_000),
        ("huge.json", '{"templates": [{"name": "x", "version": ' + "9" * 5000 + "}]}"),
        ("device.toml", "\0" * 100),
    ],
)
def test_a_file_that_breaks_the_parser_is_refused_by_name(tmp_path: Path, file: str, content: str) -> None:
    """Extreme nesting and huge numbers are reported like any other mistake."""
    (tmp_path / file).write_text(content, encoding="utf-8")

    with pytest.raises(ServiceError, match=file) as refused:
        load_library("chat", [tmp_path / file])

    assert refused.value.code == ErrorCode.BAD_TEMPLATE
