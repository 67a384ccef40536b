"""Error codes on the wire: each has its status, its type and the exception that the client raises."""

from __future__ import annotations

import re

import pytest

import client.errors
from client.errors import RETRYABLE_STATUS, STATUS, TYPE, ErrorCode, class_of_status

# The tree in client.errors' docstring, as {status: class name}.
DOCUMENTED = {int(status): name for name, status in re.findall(r"── (\w+)\s+(\d{3}) ", client.errors.__doc__ or "")}

CODES = {
    400: {
        "invalid_json",
        "context_length_exceeded",
        "bad_label",
        "bad_template",
        "unsupported_by_judge",
        "invalid_header",
    },
    401: {"unauthorized"},
    404: {"not_found", "template_not_found"},
    405: {"method_not_allowed"},
    408: {"body_timeout"},
    413: {"payload_too_large"},
    415: {"unsupported_media_type"},
    422: {"invalid_request"},
    429: {"rate_limited"},
    500: {"internal_error", "inference_failed", "unparseable", "label_not_returned"},
    503: {"overloaded", "queue_unavailable", "not_ready", "draining"},
    504: {"deadline_exceeded"},
}


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_has_its_status_type_and_exception(code: ErrorCode) -> None:
    """The client raises the class that the docstring gives for the status."""
    status = STATUS[code]

    assert code in CODES[status]
    assert TYPE[status].endswith("_error")
    assert class_of_status(status).__name__ == DOCUMENTED.get(status, "JudgeAPIError")


def test_the_codes_are_exactly_these() -> None:
    """New ones may be added here, but none may change its meaning."""
    assert set(STATUS) == set(ErrorCode) == set().union(*CODES.values())


def test_the_docstring_names_every_class() -> None:
    """The tree has each subclass of JudgeAPIError once, at its status."""
    subclasses = {kind.__name__ for kind in client.errors.JudgeAPIError.__subclasses__()}

    assert set(DOCUMENTED.values()) == subclasses
    assert len(DOCUMENTED) == len(subclasses)


@pytest.mark.parametrize(("status", "name"), [(502, "InternalServerError"), (599, "InternalServerError")])
def test_any_other_5xx_is_an_internal_server_error(status: int, name: str) -> None:
    """A status without a class of its own."""
    assert class_of_status(status).__name__ == name


@pytest.mark.parametrize("status", [302, 403, 405, 408, 418])
def test_any_other_status_is_a_plain_api_error(status: int) -> None:
    """A status that is neither in the tree nor a 5xx."""
    assert class_of_status(status) is client.errors.JudgeAPIError


def test_retryable_statuses_are_exactly_these() -> None:
    """Other errors do not pass by themselves."""
    assert set(RETRYABLE_STATUS) == {429, 502, 503, 504}


def test_the_text_of_an_api_error_has_all_its_fields() -> None:
    """Status, code, message, field and request id."""
    error = class_of_status(400)(
        "too long", status=400, code="context_length_exceeded", param="prompt", request_id="r1"
    )

    assert str(error) == "400 context_length_exceeded: too long (param: prompt) [request r1]"
