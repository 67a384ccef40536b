"""Error codes on the wire: each has its status, its type and the exception that the client raises."""

from __future__ import annotations

import re

import pytest

import client.errors
from client.errors import RETRYABLE_STATUS, STATUS, TYPE, ErrorCode, class_of_status

# The tree in the docstring of client.errors, as {status: class name}.
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
    """A code goes over HTTP with a status and a type, and comes out as the class that the docstring names for it."""
    status = STATUS[code]

    assert code in CODES[status]
    assert TYPE[status].endswith("_error")
    assert class_of_status(status).__name__ == DOCUMENTED.get(status, "JudgeAPIError")


def test_no_code_has_gone() -> None:
    """The codes on the wire are exactly these: one may be added here, none may change its meaning."""
    assert set(STATUS) == set(ErrorCode) == set().union(*CODES.values())


def test_the_docstring_names_all_the_classes() -> None:
    """The tree in the docstring has each subclass of JudgeAPIError once, at the status that leads to it."""
    subclasses = {kind.__name__ for kind in client.errors.JudgeAPIError.__subclasses__()}

    assert set(DOCUMENTED.values()) == subclasses
    assert len(DOCUMENTED) == len(subclasses)


@pytest.mark.parametrize(("status", "name"), [(502, "InternalServerError"), (599, "InternalServerError")])
def test_every_other_5xx_is_the_services_failure(status: int, name: str) -> None:
    """A status that has no class of its own goes by its hundred."""
    assert class_of_status(status).__name__ == name


@pytest.mark.parametrize("status", [302, 403, 405, 408, 418])
def test_every_other_status_is_a_plain_api_error(status: int) -> None:
    """What is neither in the tree nor a 5xx is a JudgeAPIError."""
    assert class_of_status(status) is client.errors.JudgeAPIError


def test_what_may_pass_by_itself() -> None:
    """Asking again is worth it after these statuses, and no others."""
    assert set(RETRYABLE_STATUS) == {429, 502, 503, 504}


def test_an_api_error_tells_all_it_knows() -> None:
    """The text of an exception has the status, the code, the message, the field and the request's id."""
    error = class_of_status(400)(
        "too long", status=400, code="context_length_exceeded", param="prompt", request_id="r1"
    )

    assert str(error) == "400 context_length_exceeded: too long (param: prompt) [request r1]"
