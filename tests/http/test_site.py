"""What browsers elsewhere may do: other origins, a path below a proxy, and the keys that /docs asks for."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.settings import Settings
from tests.support.live import PAIR, live_service

APP = "https://app.example.com"
PREFLIGHT = {
    "Origin": APP,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_a_page_of_a_listed_origin_may_ask() -> None:
    """The preflight needs no key; the answer may be read, and so may its request id and Retry-After."""
    with live_service(cors_origins=[APP], api_key=["secret"]) as live:
        preflight = live.http.options("/score", headers=PREFLIGHT)
        answer = live.http.post("/score", json=PAIR, headers={"Origin": APP, "Authorization": "Bearer secret"})

    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == APP
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == APP
    assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"Authorization": "Bearer secret", "Host": "elsewhere.example.com"}, 400)],
)
def test_a_listed_origin_can_read_refusals(headers: dict[str, str], status: int) -> None:
    """Else a page could only say that something failed."""
    with live_service(cors_origins=[APP], api_key=["secret"], allowed_hosts=["localhost"]) as live:
        refused = live.http.post("/score", json=PAIR, headers={"Origin": APP, **headers})

    assert refused.status_code == status
    assert refused.headers["Access-Control-Allow-Origin"] == APP


@pytest.mark.parametrize("origins", [[], ["https://other.example.com"]])
def test_other_origins_are_not_admitted(origins: list[str]) -> None:
    """A browser then shows the page nothing, and refuses to send its JSON."""
    with live_service(cors_origins=origins) as live:
        preflight = live.http.options("/score", headers=PREFLIGHT)
        answer = live.http.post("/score", json=PAIR, headers={"Origin": APP})

    assert preflight.is_error
    assert "Access-Control-Allow-Origin" not in preflight.headers
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("https://App.example.com:443", "https://app.example.com"),
        ("http://localhost:080", "http://localhost"),
        ("http://localhost:8443", "http://localhost:8443"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ],
)
def test_an_origin_is_compared_as_browsers_send_it(given: str, sent: str) -> None:
    """In lower case, and without the scheme's own port."""
    assert Settings(cors_origins=[given]).cors_origins == [sent]


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "app.example.com",
        f"{APP}/",
        f"{APP}/path",
        "https://*.example.com",
        "null",
        "https://bücher.example",
        "https://app.example.com:0",
        "https://app.example.com:65536",
        "https://user:word@app.example.com",
    ],
)
def test_an_origin_that_would_admit_nobody_or_everybody_is_refused(origin: str) -> None:
    """`*` without keys would let any page use the service through its visitors."""
    with pytest.raises(ValidationError):
        Settings(cors_origins=[origin])


def test_any_origin_may_be_admitted_with_keys() -> None:
    """A page that has no key gets 401."""
    with live_service(cors_origins=["*"], api_key=["secret"]) as live:
        answer = live.http.post("/score", json=PAIR, headers={"Origin": APP})

    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("prefix", ["", "/judge"])
def test_it_serves_below_a_path_whether_the_proxy_strips_it_or_not(prefix: str) -> None:
    """Keys are not asked of /health in either form, and every route answers."""
    with live_service(root_path="/judge/", api_key=["secret"]) as live:
        health = live.http.get(f"{prefix}/health")
        page = live.http.get(f"{prefix}/")
        answer = live.http.post(f"{prefix}/score", json=PAIR, headers={"Authorization": "Bearer secret"})
        described = live.http.get(f"{prefix}/openapi.json").json()

    assert (health.status_code, page.status_code, answer.status_code) == (200, 200, 200)
    assert described["servers"] == [{"url": "/judge"}]


def test_the_prefix_alone_leads_to_the_page() -> None:
    """The page's links are relative, so it needs the slash; longer names are other paths."""
    with live_service(root_path="/judge") as live:
        redirect = live.http.get("/judge")
        other = live.http.get("/judges/health")

    assert redirect.headers["Location"] == "/judge/"
    assert other.status_code == 404


@pytest.mark.parametrize("path", ["judge", "/judge?", "/a b", "//judge", "/.."])
def test_a_prefix_that_is_no_path_is_refused(path: str) -> None:
    """At startup, not at the first request."""
    with pytest.raises(ValidationError, match="/judge"):
        Settings(root_path=path)


def test_the_description_asks_for_a_key_where_one_is_needed() -> None:
    """So /docs has its Authorize button, which an open service does not need."""
    with live_service(api_key=["secret"]) as live:
        closed = live.http.get("/openapi.json").json()
    with live_service() as live:
        open_ = live.http.get("/openapi.json").json()

    assert closed["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert closed["paths"]["/score"]["post"]["security"] == [{"key": []}]
    assert "security" not in closed["paths"]["/health"]["get"]
    assert "securitySchemes" not in open_["components"]


@pytest.mark.parametrize("path", ["/v1", "/score", "/docs"])
def test_a_prefix_that_begins_a_route_is_refused(path: str) -> None:
    """What a proxy has stripped could not be told from what it has not."""
    with pytest.raises(ValueError, match="choose another prefix"), live_service(root_path=path):
        pass
