"""Callers' keys and their rate limits. No spelling of an empty key opens the service."""

from __future__ import annotations

import base64

import httpx
import pytest
import requests
from pydantic import SecretStr, ValidationError
from starlette.responses import PlainTextResponse

from client.errors import ErrorCode
from service.cli import settings_from
from service.errors import ServiceError
from service.http.middleware import Authentication
from service.http.rate_limit import RateLimiter
from service.settings import Settings, WorkerSettings
from service.telemetry.metrics import Metrics
from tests.support.fleet import run_module
from tests.support.live import PAIR, live_service, outcome

BLANK = [
    "",
    " ",
    ",",
    "secret,",
    "secret, ",
    ",secret",
    "secret,,other",
    "secret,\n",
    "secret,\t",
    "secret,\u00a0",
    "\n",
]
UNSENDABLE = [
    "se cret",
    "se\ncret",
    "s\u00e9cret",
    "secret,\u200b",
    "\ufeffsecret",
    '["secret", ""]',
    "secret\0",
    '""',
    "'secret'",
]


@pytest.mark.parametrize("way", ["flag", "environment"])
@pytest.mark.parametrize("value", BLANK + UNSENDABLE)
def test_a_list_with_an_invalid_key_is_refused_at_startup(
    way: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With status 2 and one line that names the setting but does not repeat its value."""
    by_flag = way == "flag" or "\0" in value
    if not by_flag:
        monkeypatch.setenv("JUDGE_API_KEY", value)

    with pytest.raises(SystemExit) as ended:
        settings_from(Settings, ["--api-key", value] if by_flag else [])

    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("--api-key: " if by_flag else "JUDGE_API_KEY: ") == error.count("\n") == 1
    assert "cret" not in error


def test_a_repeated_flag_makes_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    """So `--api-key secret --api-key ""` has a blank key."""
    with pytest.raises(SystemExit) as ended:
        settings_from(Settings, ["--api-key", "secret", "--api-key", ""])

    assert ended.value.code == 2
    assert "blank" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", " ", ["secret", ""], ["secret", " "], [SecretStr("secret"), SecretStr("")]])
def test_a_blank_key_given_in_code_is_refused(value: object) -> None:
    """As text, in lists and as secrets. The error does not show the value."""
    with pytest.raises(ValidationError, match="blank") as refused:
        Settings(api_key=value)

    assert "secret" not in str(refused.value)


def test_white_space_around_keys_is_stripped() -> None:
    """Files end in a newline, and people put a space after a comma."""
    keys = Settings(api_key="first, second\n").api_key

    assert [key.get_secret_value() for key in keys] == ["first", "second"]


def test_a_service_does_not_start_with_a_blank_key() -> None:
    """The process ends with one line and no traceback."""
    ended = run_module("service", "--engine", "fake", "--port", "0", env={"JUDGE_API_KEY": "secret, "})

    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "JUDGE_API_KEY" in ended.stderr


@pytest.mark.parametrize("name", ["template_file", "calibration_file"])
def test_a_list_of_files_may_be_empty_but_has_no_blank_entry(name: str) -> None:
    """Compose passes unset variables as empty ones. A blank entry among others is a mistake, not the current folder."""
    assert getattr(Settings(**{name: " "}), name) == []
    with pytest.raises(ValidationError, match="blank"):
        Settings(**{name: "a.toml, "})


def test_a_workers_list_of_files_may_be_empty_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs read the same variables."""
    monkeypatch.setenv("JUDGE_TEMPLATE_FILE", "")

    assert settings_from(WorkerSettings, []).template_file == []


@pytest.mark.parametrize(
    "header", [{}, *({"Authorization": value} for value in ("Bearer", "Bearer ", "Bearer \u00a0", ""))]
)
async def test_an_empty_key_is_never_valid_whatever_was_configured(header: dict[str, str]) -> None:
    """The middleware does not rely on the settings' checks."""
    guard = Authentication(PlainTextResponse("judged"), ["", "secret"], Metrics())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://judge") as http:
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in header.items()]
        bare = await http.get("/score", headers=encoded)
        good = await http.get("/score", headers={"Authorization": "Bearer secret"})

    assert (bare.status_code, good.status_code) == (401, 200)


def test_without_a_valid_key_nothing_is_judged() -> None:
    """Every route except the operational ones needs a key; a wrong key is refused like none."""
    with live_service(api_key="first-key,second-key") as live:
        routes = [
            (method, path)
            for path, methods in live.http.get("/openapi.json").json()["paths"].items()
            for method in methods
            if path not in ("/health", "/ready", "/metrics")
        ]
        bare = [live.http.request(method, path, json=PAIR) for method, path in routes]
        wrong = live.http.post("/score", json=PAIR, headers={"Authorization": "Bearer first-kex"})
        basic = live.http.post("/score", json=PAIR, headers={"Authorization": "Basic first-key"})
        right = [
            live.http.post("/score", json=PAIR, headers={"Authorization": f"Bearer {k}-key"})
            for k in ("first", "second")
        ]
        health = live.http.get("/health")

    assert {path for _, path in routes} >= {"/score", "/compare/batch", "/templates", "/v1/models"}
    assert {answer.status_code for answer in bare} == {401}
    assert {outcome(answer)[:2] for answer in (wrong, basic)} == {(401, "unauthorized")}
    assert {answer.headers["www-authenticate"] for answer in bare} == {"Bearer"}
    assert [answer.status_code for answer in (*right, health)] == [200, 200, 200]


def basic(credentials: str) -> str:
    """The header that HTTP libraries send for these credentials in a URL."""
    return f"Basic {base64.b64encode(credentials.encode()).decode()}"


@pytest.mark.parametrize("header", [basic(":secret"), basic("anyone:secret"), basic(":secret").replace("B", "b", 1)])
def test_a_key_may_be_the_password_of_basic_authentication(header: str) -> None:
    """Whatever the user is called."""
    with live_service(api_key="other,secret") as live:
        assert live.http.post("/score", json=PAIR, headers={"Authorization": header}).status_code == 200


BAD_BASIC = [
    "Basic",
    "Basic :secret",
    "Basic secret",
    "Basic \u00e9",
    basic("secret"),
    basic("secret:"),
    basic(":"),
    basic(":secret "),
    basic(":secret:"),
    basic(":secrets"),
    basic(":secret")[:-1],
    basic(":secret").replace("Basic", "Digest"),
]


@pytest.mark.parametrize("header", BAD_BASIC)
def test_other_credentials_are_refused(header: str) -> None:
    """Not base64, no password, another one, or another scheme. The refusal does not repeat them."""
    with live_service(api_key="secret") as live:
        answer = live.http.post("/score", json=PAIR, headers=[(b"Authorization", header.encode("latin-1"))])

    assert outcome(answer)[:2] == (401, "unauthorized")
    assert "secret" not in answer.text


def test_a_key_in_the_url_reaches_the_service_and_no_log_line(capfd: pytest.CaptureFixture[str]) -> None:
    """httpx and requests make Basic authentication of it, on every route; it counts against its rate."""
    with live_service(api_key="a-secret", rate_limit=2, log_level="debug") as live:
        base = live.url.replace("http://", "http://:a-secret@")
        sample = {"prompt": "What is 2+2?", "response": "4", "label": None}
        with httpx.Client() as http:
            answers = [http.post(f"{base}/remote_rm?value=score", json=sample)]
        with requests.Session() as session:
            answers += [session.post(f"{base}/remote_rm", json=sample), session.post(f"{base}/score", json=PAIR)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert "a-secret" not in "".join(capfd.readouterr())


def test_a_key_over_its_rate_is_429() -> None:
    """The answer says how long to wait; other keys are not affected."""
    with live_service(api_key="a,b", rate_limit=3) as live:
        first, *later = [
            live.http.post("/score/batch", json={"items": [PAIR] * 3}, headers={"Authorization": f"Bearer {key}"})
            for key in ("a", "a", "b")
        ]

    assert first.status_code == later[1].status_code == 200
    assert outcome(later[0])[:2] == (429, "rate_limited")
    assert int(later[0].headers["retry-after"]) >= 1


def test_a_spent_key_is_refused_until_it_refills() -> None:
    """At 60 per minute: 60 at once, then one per second."""
    now = [0.0]
    limiter = RateLimiter(60, clock=lambda: now[0])
    limiter.spend("key", 60)

    with pytest.raises(ServiceError) as refused:
        limiter.spend("key", 1)
    assert (refused.value.code, refused.value.retry_after) == (ErrorCode.RATE_LIMITED, 1.0)
    now[0] = 1.0
    limiter.spend("key", 1)


def test_keys_do_not_share_a_bucket() -> None:
    """One key's judgements do not count against another."""
    limiter = RateLimiter(10, clock=lambda: 0.0)
    limiter.spend("greedy", 10)
    limiter.spend("modest", 1)

    with pytest.raises(ServiceError):
        limiter.spend("greedy", 1)


def test_a_large_request_passes_and_leaves_a_debt() -> None:
    """After a batch of 120 at 60 per minute, the key waits a minute longer."""
    now = [0.0]
    limiter = RateLimiter(60, clock=lambda: now[0])
    limiter.spend("key", 120)

    with pytest.raises(ServiceError) as refused:
        limiter.spend("key", 1)
    assert refused.value.retry_after == 61.0
