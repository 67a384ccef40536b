"""A small HTTP server with OpenAI's API and System One on loopback, whose answers come from rules of the test's own."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from tests.support.decision_answers import decisions_answer, options_of, systemone_answer

MODEL = "tiny"
# vllm: the ids asked for (at most 128), as `token_id:N`. sglang: text, no ids. llamacpp: lists with ids. strict:
# refuses vLLM's extensions.
Style = Literal["vllm", "sglang", "llamacpp", "strict"]

Ids = Callable[[Sequence[int]], Sequence[float]]
"""From a prompt's ids to the log-probabilities of the next token, over the vocabulary."""
Words = Callable[[str], Sequence[tuple[str, float]]]
"""From a message to the first tokens that its reply may have, with their log-probabilities."""
Shares = Callable[[str, Sequence[str]], Sequence[float]]
"""From a text and the options of a choice to the options' probabilities."""


@dataclass(frozen=True)
class Seen:
    """A request that the server received."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What to send, `after` seconds later."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after: float = 0.0


Script = Reply | Callable[[Seen], Reply | None]


@dataclass
class Upstream:
    """The server: its rules, the requests it has seen, and replies that take precedence over the rules.

    Each question uses up one of `scripts`; `always` is asked about every request. Both may return None, for the rules
    to decide. `name` gives a token's text, for styles that send text; `mass` is the label mass that decisions report.
    """

    ids: Ids | None = None
    words: Words | None = None
    style: Style = "vllm"
    name: Callable[[int], str] = str
    shares: Shares | None = None
    mass: float | None = None
    url: str = ""
    key: str | None = None
    seen: list[Seen] = field(default_factory=list)
    scripts: deque[Script] = field(default_factory=deque)
    always: Callable[[Seen], Reply | None] = lambda _: None
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": MODEL, "max_model_len": 1024}])

    @property
    def asked(self) -> list[Seen]:
        """The requests for log-probabilities or text, probes included."""
        return [seen for seen in self.seen if seen.body]

    def answer(self, seen: Seen) -> Reply:
        """The reply to this request."""
        self.seen.append(seen)
        for script in (self.scripts.popleft() if seen.body and self.scripts else None, self.always):
            reply = script(seen) if callable(script) else script
            if reply is not None:
                return reply
        given = seen.headers.get("Authorization")
        if self.key is not None and given != f"Bearer {self.key}":
            return error(401, f"Incorrect API key provided: {given}", code="invalid_api_key")
        if seen.path == "/v1/models":
            return Reply(body={"object": "list", "data": self.models})
        if seen.body.get("model") not in [model["id"] for model in self.models]:
            return error(404, "no such model", code="model_not_found")
        return self._by_rule(seen)

    def _by_rule(self, seen: Seen) -> Reply:
        if seen.path == "/v1/completions" and self.ids is not None:
            if self.style == "strict" and "logprob_token_ids" in seen.body:
                return error(400, "Unrecognized request argument supplied: logprob_token_ids")
            if self.style == "vllm" and len(seen.body.get("logprob_token_ids", ())) > 128:
                return error(400, "Requested logprob_token_ids of a length which is greater than max allowed: 128")
            return Reply(body=ids_answer(seen.body, self.ids(seen.body["prompt"]), self.style, self.name))
        if seen.path == "/v1/chat/completions" and self.words is not None:
            (message,) = seen.body["messages"]
            return Reply(body=chat_answer(self.words(message["content"]), seen.body["top_logprobs"]))
        if seen.path == "/v1/decisions" and self.shares is not None:
            shares = self.shares(seen.body["input"], options_of(seen.body))
            return Reply(body=decisions_answer(seen.body, shares, self.mass))
        if seen.path == "/v1/systemone" and self.shares is not None:
            shares = self.shares(seen.body["state"], options_of(seen.body))
            return Reply(body=systemone_answer(seen.body, shares, self.mass))
        return error(404, "no such route")


def error(status: int, message: str = "no", headers: Mapping[str, str] | None = None, **more: Any) -> Reply:
    """An error in OpenAI's form."""
    return Reply(status, {"error": {"message": message, "type": "some_error", **more}}, headers or {})


def chat_answer(tokens: Sequence[tuple[str, float]], top: int = 20) -> dict[str, Any]:
    """A chat answer that sampled the most likely of these tokens."""
    best = sorted(tokens, key=lambda token: -token[1])
    entries = [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in best]
    content = [{**entries[0], "top_logprobs": entries[:top]}]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": best[0][0]},
                "logprobs": {"content": content, "refusal": None},
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
    }


def columns_answer(chosen: tuple[str, float], top: Mapping[str, float]) -> dict[str, Any]:
    """A completions answer."""
    logprobs = {"text_offset": [0], "tokens": [chosen[0]], "token_logprobs": [chosen[1]], "top_logprobs": [dict(top)]}
    choice = {"index": 0, "text": "x", "logprobs": logprobs, "finish_reason": "length", "stop_reason": None}
    return {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": [choice], "usage": {}}


def ids_answer(body: Mapping[str, Any], logprobs: Sequence[float], style: Style, name: Callable[[int], str]) -> Any:
    """A completions answer in a server's style."""
    ranked = sorted(range(len(logprobs)), key=lambda token: -logprobs[token])
    best, top = ranked[0], ranked[: body["logprobs"]]
    if style == "llamacpp":
        entries = [{"id": i, "token": name(i), "bytes": [], "logprob": logprobs[i]} for i in top]
        content = [{**entries[0], "top_logprobs": entries}]
        return {"choices": [{"text": "x", "index": 0, "logprobs": {"content": content}, "finish_reason": "length"}]}
    if style == "vllm":
        wanted = [best, *body.get("logprob_token_ids", top)]
        return columns_answer((f"token_id:{best}", logprobs[best]), {f"token_id:{i}": logprobs[i] for i in wanted})
    return columns_answer((name(best), logprobs[best]), {name(i): logprobs[i] for i in reversed(top)})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: Upstream) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream

    def handle_error(self, *_: object) -> None:
        """Silent: tests close connections on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        """Pass the request to the rules, and send their reply."""
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        reply = self.server.upstream.answer(Seen(self.path, dict(self.headers.items()), body))
        time.sleep(reply.after)
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        (self.send_response_only if "Date" in reply.headers else self.send_response)(reply.status)
        for header, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def openai_server(
    *,
    ids: Ids | None = None,
    words: Words | None = None,
    shares: Shares | None = None,
    style: Style = "vllm",
    name: Callable[[int], str] = str,
) -> Iterator[Upstream]:
    """Serve by these rules."""
    upstream = Upstream(ids, words, style, name, shares)
    with _Server(upstream) as server:
        upstream.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield upstream
        finally:
            server.shutdown()
            thread.join()
