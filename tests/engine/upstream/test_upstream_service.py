"""The whole service with the upstream engine, over a server of the test's own, in both ways of asking."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.engine.contract import ScoreItem
from service.engine.torch.engine import TorchEngine
from tests.engine.upstream.makers import CONVERSATION, KEY, served, torch_logprobs, words
from tests.support.openai_server import MODEL, Reply, Seen, Upstream, error, openai_server
from tests.support.reference import paper_file, paper_text


class TinyModel:
    """The tiny model as a server's rule: its own forward in fp32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._one_at_a_time = threading.Lock()

    @torch.no_grad()
    def ids(self, token_ids: Sequence[int]) -> list[float]:
        """The log-probabilities of the next token."""
        with self._one_at_a_time:
            logits = self.model(torch.tensor([list(token_ids)])).logits[0, -1]
        return [float(value) for value in logits.log_softmax(-1)]


PAIRS = [("What is 2+2?", "4"), ("What is 2+2?", "5"), ("Say hi\nnow", "<|im_end|> hi"), ("x" * 300, "naïve 日本語 🙂")]


def ask(prompt: str, response: str, **more: Any) -> dict[str, Any]:
    """The body of a /score request."""
    return {"prompt": prompt, "response": response, **more}


def test_ids_give_the_torch_engines_numbers(tiny_model: Path) -> None:
    """The same prompts, token by token, and the same probabilities to fp32's rounding."""
    with openai_server(ids=TinyModel(tiny_model).ids) as upstream, served(upstream, model=str(tiny_model)) as http:
        results = http.post("/score/batch", json={"items": [ask(*pair) for pair in PAIRS]}).json()["results"]

    sent = [ScoreItem(s.body["prompt"], tuple(s.body["logprob_token_ids"])) for s in upstream.asked[1:]]
    torch_engine = TorchEngine.load(tiny_model, dtype="float32")
    own = [answer.logprobs[0] - answer.logprobs[1] for answer in torch_engine.run(sent)]
    assert sorted(r["result"]["log_odds"] for r in results) == pytest.approx(sorted(own), abs=1e-4)
    assert [r["index"] for r in results] == [0, 1, 2, 3]


def test_chat_judges_as_the_servers_words_say(upstream: Upstream) -> None:
    """Each response gets the numbers of its own message, in whatever order the answers arrive."""
    with served(upstream) as http:
        upstream.always = lambda seen: time.sleep(0.05 * ("2+2" in str(seen.body)))
        results = http.post("/score/batch", json={"items": [ask(*pair) for pair in PAIRS]}).json()["results"]
        info = http.get("/v1/models").json()["data"][0]

    for (prompt, response), result in zip(PAIRS, results, strict=True):
        (message,) = {
            seen.body["messages"][0]["content"]
            for seen in upstream.asked
            if prompt in (text := seen.body["messages"][0]["content"]) and f"{response}\n" in text
        }
        assert result["result"]["no_logprob"] == pytest.approx(dict(words(message))["No"])
    assert (info["id"], info["engine"]) == (MODEL, "upstream")


def test_papers_raw_prompts_are_sent_as_messages(tmp_path: Path) -> None:
    """The paper's GPT variant: the text as it is, and " Yes" is the reply Yes."""
    served_by = openai_server(words=lambda _: [("Yes", -0.5), ("No", -1.0)])
    with served_by as upstream, served(upstream, template_file=[paper_file(tmp_path)]) as http:
        result = http.post("/score", json=ask("Hi", "ho", template="paper/rewardbench/all@1")).json()

    assert result["log_odds"] == pytest.approx(0.5)
    (message,) = upstream.asked[-1].body["messages"]
    assert message["content"] == paper_text("Hi", "ho")


def test_a_requests_own_labels_are_asked_for() -> None:
    """Any word may be a label; what cannot be a reply's first word is refused."""
    layout = {"format": "chat", "layout": "{prompt} {response}", "labels": {"yes": ["Hervorragend"], "no": ["Mäßig"]}}
    wordy = {**layout, "labels": {"yes": ["Very good"], "no": ["Bad"]}}
    served_by = openai_server(words=lambda _: [("Hervorragend", -0.5), ("Mäßig", -1.0), ("Yes", -3), ("No", -4)])
    with served_by as upstream, served(upstream) as http:
        good = http.post("/score", json=ask("Hi", "ho", template=layout)).json()
        bad = http.post("/score", json=ask("Hi", "ho", template=wordy)).json()

    assert good["log_odds"] == pytest.approx(0.5)
    assert bad["error"]["code"] == "bad_label"


def test_control_strings_arrive_as_they_were_written(upstream: Upstream) -> None:
    """The message is the template's text around the caller's, unchanged: the server tokenizes it."""
    text = "<|im_end|>\n<|im_start|>user {response} </s> <s>"
    layout = {"format": "chat", "layout": "Q {prompt} A {response}", "labels": {"yes": ["Yes"], "no": ["No"]}}
    with served(upstream) as http:
        http.post("/score", json=ask(text, text, template=layout)).raise_for_status()

    assert upstream.asked[-1].body["messages"] == [{"role": "user", "content": f"Q {text} A {text}"}]


def test_usage_is_the_estimate(upstream: Upstream) -> None:
    """One token per four bytes of the message. The same text again comes from the score cache."""
    with served(upstream) as http:
        first, again = (http.post("/score", json=ask("Hi 日本", "ho")).json() for _ in range(2))

    (_, asked) = upstream.asked  # the probe goes before
    size = -(-len(asked.body["messages"][0]["content"].encode()) // 4)
    assert (first["usage"]["prompt_tokens"], first["usage"]["cached_tokens"]) == (size, 0)
    assert (again["usage"]["prompt_tokens"], again["usage"]["cached_tokens"]) == (size, size)
    assert first["log_odds"] == again["log_odds"]


def test_max_tokens_bounds_the_estimate(upstream: Upstream) -> None:
    """A longer prompt is refused without asking the server, or cut if the request allows it."""
    long = ask("x" * 4000 + "end", "ho")
    with served(upstream, max_tokens=500) as http:
        refused = http.post("/score", json=long).json()
        cut = http.post("/score", json={**long, "truncation": "prompt_left"}).json()

    assert refused["error"]["code"] == "context_length_exceeded"
    assert cut["truncated"]
    (_, asked) = upstream.asked
    assert len(asked.body["messages"][0]["content"]) in range(1997, 2001)
    assert "xend" in asked.body["messages"][0]["content"]


def test_a_grade_is_parsed_from_the_reply(upstream: Upstream) -> None:
    """Its tokens are counted as the server counts them; the samples are asked for at once, in any order."""
    reply = {"choices": [{"message": {"content": "Fine.\nScore: 4"}, "finish_reason": "stop"}]}
    upstream.always = lambda seen: Reply(body={**reply, "usage": {"completion_tokens": 7}}) if seen.body else None
    with served(upstream, judge="self-reward", self_reward_mode="parsed", self_reward_samples=2) as http:
        result = http.post("/score", json=ask("Hi", "ho")).json()

    assert (result["grade"], result["samples"]) == (4.0, {"drawn": 2, "parsed": 2})
    assert result["usage"]["completion_tokens"] == 14
    assert sorted(seen.body["seed"] for seen in upstream.asked[1:]) == [0, 1]


def test_a_recorded_conversation_is_followed() -> None:
    """Requests are the recorded ones, and judgements the torch engine's for the same model."""
    exchanges = CONVERSATION["chat"]
    name = exchanges[0]["request"]["model"]

    def play(seen: Seen) -> Reply | None:
        return next((Reply(body=e["answer"]) for e in exchanges if e["request"] == seen.body), None)

    with openai_server(words=lambda _: [("Yes", -1.0), ("No", -1.0)]) as upstream:
        upstream.models = [{"id": "another", "object": "model"}, {"id": name, "object": "model"}]
        upstream.always = play
        with served(upstream, upstream_model=name) as http:
            asked = [ask(**exchange["asked"], template=CONVERSATION["template"]) for exchange in exchanges]
            got = [http.post("/score", json=body).json() for body in asked]

    for exchange, result in zip(exchanges, got, strict=True):
        yes, no = torch_logprobs(exchange)
        assert (result["yes_logprob"], result["no_logprob"]) == pytest.approx((yes, no), abs=1e-3)
        assert result["log_odds"] == pytest.approx(yes - no, abs=1e-3)


def test_a_floor_is_said_in_the_answer() -> None:
    """An item without any label fails beside it."""
    replies = {"half": [("Yes", -1.0), ("Maybe", -2.0)], "none": [("Maybe", -1.0)]}
    items = [ask("q", "half"), ask("q", "none")]
    served_by = openai_server(words=lambda m: replies["none" if "none" in m else "half"])
    with served_by as upstream, served(upstream, floor=-20.0) as http:
        half, none = http.post("/score/batch", json={"items": items}).json()["results"]

    assert (half["result"]["log_odds"], half["result"]["floored"]) == (19.0, True)
    assert none["error"]["code"] == "label_not_returned"


def test_a_failure_reaches_its_caller_alone(upstream: Upstream) -> None:
    """A refused prompt, a busy server: each with the code that clients act on."""
    refusals = {"long": error(400, "maximum context length is 9"), "busy": error(429, headers={"Retry-After": "999"})}
    with served(upstream) as http:
        upstream.always = lambda seen: next((refusals[w] for w in refusals if f"{w}-word" in str(seen.body)), None)
        items = [ask("q", "long-word"), ask("q", "fine"), ask("q", "busy-word")]
        long, fine, busy = http.post("/score/batch", json={"items": items}).json()["results"]

    assert long["error"]["code"] == "context_length_exceeded"
    assert "result" in fine
    assert busy["error"]["code"] == "overloaded"


def test_no_key_in_logs_or_errors(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The key goes only to the server, even if the server refuses and quotes it."""
    monkeypatch.setenv("JUDGE_UPSTREAM_API_KEY", f"{KEY}\n")
    with capture_logs() as logs, served(upstream) as http:
        fine = http.post("/score", json=ask("q", "a"))
        upstream.key = "changed"
        refused = http.post("/score", json=ask("q", "b"))

    assert upstream.asked[-1].headers["Authorization"] == f"Bearer {KEY}"
    assert (fine.status_code, refused.status_code) == (200, 500)
    assert "JUDGE_UPSTREAM_API_KEY" in refused.text
    assert KEY not in repr((logs, fine.text, refused.text, capfd.readouterr()))
