"""Samples of a running server: what it is asked, what counts as the policy, and what becomes of failures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.schema import Message
from tests.support.openai_server import Reply, Seen, Upstream, error, openai_server
from tests.support.tiny import make_tiny_model
from trainer.errors import InputError, StageError
from trainer.policy.requests import SamplerServer, SampleSettings, response_seed
from trainer.policy.sampling import Sampled, SampleStats, sample_responses
from trainer.policy.tokenizers import chat_ids, load_tokenizer
from trainer.run.files import read_records
from trainer.run.records import Instruction
from trainer.sample import main

INSTRUCTIONS = [Instruction(id=f"q{n}", prompt=f"What is {n}? " + "the quick fox " * n) for n in range(5)]
Rule = Callable[[Seen], Reply | None]


def answer(seen: Seen, finish: str | None = "stop", choices: int = 1) -> Reply:
    """A reply whose text is the seed; it counts a prompt of ids exactly."""
    text = f"seed {seen.body['seed']}"
    chat = seen.path.endswith("/chat/completions")
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    counted = 9 if chat else len(seen.body["prompt"])
    return Reply(
        body={
            "choices": [{"index": 0, "finish_reason": finish, **choice}] * choices,
            "usage": {"prompt_tokens": counted, "completion_tokens": 4},
        }
    )


def by_rule(rule: Rule = lambda _: None) -> Rule:
    """Answers every question for a response unless the rule does."""

    def reply(seen: Seen) -> Reply | None:
        return (rule(seen) or answer(seen)) if seen.body else None

    return reply


def after_probe(rule: Rule) -> Rule:
    """The rule for all requests but the probe, which asks for one token."""
    return by_rule(lambda seen: None if seen.body["max_tokens"] == 1 else rule(seen))


@pytest.fixture
def server(tiny_model: Path) -> Iterator[Upstream]:
    """A server that has the tiny model, loaded from its folder."""
    with openai_server() as upstream:
        upstream.models = [{"id": "policy", "root": str(tiny_model), "max_model_len": 1024}]
        upstream.always = by_rule()
        yield upstream


@pytest.fixture
def sample(tiny_model: Path, server: Upstream, tmp_path: Path) -> Callable[..., SampleStats]:
    """A function that samples from the server into tmp_path/samples.jsonl."""

    def run(policy: Path = tiny_model, samples: int = 2, **options: Any) -> SampleStats:
        where = SamplerServer(**{"url": server.url, "patience": 0.0, **options})
        settings = SampleSettings(samples=samples, max_new_tokens=12, top_p=0.9, server=where)
        return sample_responses(policy, INSTRUCTIONS, tmp_path / "samples.jsonl", settings)

    return run


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.policy.server.wait_after", lambda *_: 0.001)


def lines(tmp_path: Path) -> list[Sampled]:
    """The samples written."""
    return read_records(tmp_path / "samples.jsonl", Sampled)


def test_each_response_is_asked_with_its_own_seed(
    sample: Callable[..., SampleStats], server: Upstream, tiny_model: Path, tmp_path: Path
) -> None:
    """The prompt goes as token ids, with the limits of the settings and nothing of the server's own."""
    stats = sample()

    assert (stats.samples, stats.failed, stats.cut_off) == (10, 0, 0)
    texts = {line.key: line.response for line in lines(tmp_path)}
    assert texts == {
        (one.id, k): f"seed {response_seed(42, one.id, k) % 2**31}" for one in INSTRUCTIONS for k in (0, 1)
    }
    tokenizer = load_tokenizer(tiny_model)
    prompts = [chat_ids(tokenizer, [Message(role="user", content=one.prompt)]) for one in INSTRUCTIONS]
    asked = [seen.body for seen in server.asked[1:]]
    assert all(body["prompt"] in prompts for body in asked)
    wanted = {"model": "policy", "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.0}
    assert all(wanted.items() <= body.items() for body in asked)


def test_the_file_is_in_the_order_of_the_prompts(sample: Callable[..., SampleStats], tmp_path: Path) -> None:
    """Longest first, as in this process, in whatever order the answers come; a token that ended one is not counted."""
    sample()

    assert [line.id for line in lines(tmp_path)] == [f"q{n}" for n in (4, 3, 2, 1, 0) for _ in "01"]
    assert {(line.tokens, line.finish) for line in lines(tmp_path)} == {(3, "stop")}


def test_a_cut_off_response_is_marked(sample: Callable[..., SampleStats], server: Upstream, tmp_path: Path) -> None:
    """The finish reason `length` is kept."""
    server.always = by_rule(lambda seen: answer(seen, finish="length"))

    stats = sample()

    assert stats.cut_off == 10
    assert {(line.tokens, line.finish) for line in lines(tmp_path)} == {(4, "length")}


def test_a_server_without_token_ids_gets_messages(sample: Callable[..., SampleStats], server: Upstream) -> None:
    """And one that refuses further fields gets OpenAI's alone."""

    def strict(seen: Seen) -> Reply | None:
        if seen.path == "/v1/completions":
            return error(404, "no such route")
        return error(400, "unrecognized field") if "top_k" in seen.body else None

    server.always = by_rule(strict)

    sample()

    body = server.asked[-1].body
    assert body["messages"][0]["content"].startswith("What is ")
    assert {"top_k", "stop_token_ids", "chat_template_kwargs"}.isdisjoint(body)


def test_token_ids_that_are_read_as_something_else_are_not_sent(
    sample: Callable[..., SampleStats], server: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that counts another number of tokens gets messages, and what it counts there is said."""

    def miscounting(seen: Seen) -> Reply | None:
        if seen.path == "/v1/chat/completions":
            return None
        reply = answer(seen)
        reply.body["usage"]["prompt_tokens"] += 1
        return reply

    server.always = by_rule(miscounting)

    sample()

    assert server.asked[-1].path == "/v1/chat/completions"
    assert "Warning: it counts 9 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "failure",
    [
        error(429, "slow down", {"Retry-After": "0"}),
        error(500, "oops"),
        error(503, "loading"),
        Reply(body={"choices": []}),
        Reply(body={"choices": [{"text": "half", "finish_reason": "abort"}]}),
        Reply(body=b"<html>"),
        Reply(headers={"Content-Length": "999"}, body=b"{"),
    ],
    ids=["429", "500", "503", "no-choice", "aborted", "no-json", "cut"],
)
def test_what_may_pass_is_asked_again(
    failure: Reply, sample: Callable[..., SampleStats], server: Upstream, tmp_path: Path
) -> None:
    """Every third request fails once, and in the end every sample is there."""
    count = iter(range(1000))
    server.always = after_probe(lambda _: failure if next(count) % 3 == 0 else None)

    stats = sample(patience=30.0)

    assert (stats.samples, stats.failed) == (10, 0)
    assert all(line.response.startswith("seed ") for line in lines(tmp_path))


def test_a_refused_prompt_stops_the_run_and_is_asked_again(
    sample: Callable[..., SampleStats], server: Upstream, tmp_path: Path
) -> None:
    """Nothing is made up for it; what the others gave is kept and not asked again."""
    longest = {"prompt": 0}

    def refusing(seen: Seen) -> Reply | None:
        longest["prompt"] = max(longest["prompt"], len(seen.body["prompt"]))
        return error(400, "too long") if len(seen.body["prompt"]) == longest["prompt"] else None

    server.always = after_probe(refusing)
    with pytest.raises(StageError, match=r"1 instructions failed, the first q4: the server answers 400 too long"):
        sample(samples=64)  # one instruction at a time: the longest is the first
    assert lines(tmp_path) == []

    server.always = by_rule()
    assert sample(samples=64).samples == 5 * 64


def test_few_failed_prompts_are_counted(
    sample: Callable[..., SampleStats],
    server: Upstream,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They get no samples, and the run goes on."""
    monkeypatch.setattr("trainer.policy.server.MOST_FAILED", 0.3)
    seeds = {response_seed(42, "q2", k) % 2**31 for k in (0, 1)}
    server.always = after_probe(lambda seen: error(500) if seen.body["seed"] in seeds else None)

    stats = sample()

    assert (stats.failed, stats.instructions, stats.samples) == (1, 4, 8)
    assert "q2" not in {line.id for line in lines(tmp_path)}


@pytest.mark.parametrize(
    ("failure", "said"),
    [(error(503, "draining"), "503"), (error(401, "no"), "401.*SAMPLER_API_KEY"), (error(402, "pay"), "402")],
)
def test_a_server_that_gives_no_more_stops_the_run(
    failure: Reply, said: str, sample: Callable[..., SampleStats], server: Upstream, tmp_path: Path
) -> None:
    """What it gave is kept, and the same command goes on from there, asking only for what is missing."""
    count = iter(range(1000))
    server.always = after_probe(lambda _: failure if next(count) >= 64 else None)
    with pytest.raises(StageError, match=said):
        sample(samples=64)
    assert {line.id for line in lines(tmp_path)} == {"q4"}

    server.always = by_rule()
    server.seen.clear()
    sample(samples=64)

    assert len(server.asked) == 1 + 4 * 64
    assert len(lines(tmp_path)) == 5 * 64


def test_a_server_that_is_away_is_a_stage_error(tiny_model: Path, tmp_path: Path) -> None:
    """The error names it."""
    settings = SampleSettings(server=SamplerServer("http://127.0.0.1:1/v1"))

    with pytest.raises(StageError, match=r"no responses from http://127\.0\.0\.1:1/v1: .*is it running"):
        sample_responses(tiny_model, INSTRUCTIONS, tmp_path / "s.jsonl", settings)


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        ([{"id": "other"}], {}, "serves other, and the policy is .*--sampler-model"),
        ([{"id": "other"}, {"id": "third"}], {"model": "policy"}, "does not serve policy: it serves other, third"),
        ([{"id": "policy", "root": "/elsewhere"}], {}, "--sampler-model"),
        ([], {}, "does not list its models"),
    ],
)
def test_another_model_is_refused(
    models: list[dict[str, Any]],
    options: dict[str, Any],
    said: str,
    sample: Callable[..., SampleStats],
    server: Upstream,
) -> None:
    """Before anything is asked."""
    server.models = models

    with pytest.raises(StageError, match=said):
        sample(**options)
    assert server.asked == []


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ({"id": "p", "root": "{folder}"}, {}, "loaded from the policy's folder"),
        ({"id": "{folder}"}, {}, "loaded from the policy's folder"),
        ({"id": "org/{name}"}, {}, "cannot be seen"),
        ({"id": "x"}, {"model": "x"}, "as --sampler-model says"),
    ],
)
def test_what_is_known_of_the_model_is_said(
    model: dict[str, str],
    options: dict[str, Any],
    said: str,
    sample: Callable[..., SampleStats],
    server: Upstream,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its folder proves it, its name is a sign, and the user may know better."""
    server.models = [{key: value.format(folder=tiny_model, name=tiny_model.name) for key, value in model.items()}]

    sample(**options)

    assert said in capsys.readouterr().err


def test_a_model_with_too_short_a_context_is_refused(sample: Callable[..., SampleStats], server: Upstream) -> None:
    """The longest prompt decides."""
    server.models[0]["max_model_len"] = 20

    with pytest.raises(StageError, match=r"reads 20 tokens.*longer context"):
        sample()


def test_a_base_model_needs_token_ids(server: Upstream, sample: Callable[..., SampleStats], tmp_path: Path) -> None:
    """A server cannot know the plain template that the trainer gives it."""
    folder = make_tiny_model(tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    server.always = by_rule(lambda seen: error(404, "no such route") if "prompt" in seen.body else None)

    with pytest.raises(StageError, match="404"):
        sample(folder, model="policy")


def test_the_key_is_sent_and_never_shown(
    sample: Callable[..., SampleStats], server: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from the variable or the settings."""
    server.key = "secret-1"
    monkeypatch.setenv("SAMPLER_API_KEY", "secret-2")
    with pytest.raises(StageError) as refused:
        sample()

    assert "secret" not in str(refused.value)
    assert sample(key="secret-1").samples == 10


@pytest.mark.parametrize("where", [{"url": "nowhere"}, {"url": "ftp://x/"}, {"key": "käse"}])
def test_an_unusable_address_or_key_is_bad_input(where: dict[str, str], sample: Callable[..., SampleStats]) -> None:
    """The error does not quote a key."""
    with pytest.raises(InputError) as problem:
        sample(**where)

    assert "käse" not in str(problem.value)


def command(model: Path, tmp_path: Path) -> list[str]:
    """Arguments that sample the instructions into tmp_path/out."""
    (tmp_path / "i.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in INSTRUCTIONS))
    files = ["--instructions", str(tmp_path / "i.jsonl"), "--output", str(tmp_path / "out")]
    return ["--model", str(model), *files, "--max-new-tokens", "4", "--samples", "2"]


def test_the_command_takes_an_address(server: Upstream, tiny_model: Path, tmp_path: Path) -> None:
    """A run resumes at another address, as where a server is decides nothing; its key is written nowhere."""
    flags = command(tiny_model, tmp_path)
    with openai_server() as broken:
        broken.models, broken.always = server.models, lambda seen: error(401) if seen.body else None
        first = main([*flags, "--sampler-url", broken.url, "--sampler-key", "secret"])

    second = main([*flags, "--sampler-url", server.url, "--sampler-key", "secret"])

    assert (first, second) == (1, 0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sampler"] == "server"
    assert all(b"secret" not in file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file())


def test_a_server_of_its_own_is_started_and_stopped(tiny_model: Path, tmp_path: Path) -> None:
    """With the policy's folder and a free port; its output goes to sampler.log."""
    script = tmp_path / "serve.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "from tests.support.openai_server import _Server, Upstream\n"
        "from tests.trainer.test_sampler_server import by_rule\n"
        "upstream = Upstream(models=[{'id': sys.argv[1]}], always=by_rule())\n"
        "print('serving', sys.argv[1], flush=True)\n"
        "class Here(_Server):\n"
        "    def server_bind(self):\n"
        "        self.server_address = ('127.0.0.1', int(sys.argv[2]))\n"
        "        super().server_bind()\n"
        "Here(upstream).serve_forever()\n"
    )
    started = f"env PYTHONPATH={Path.cwd()} {sys.executable} {script} {{model}} {{port}}"

    code = main([*command(tiny_model, tmp_path), "--sampler", "vllm", "--sampler-command", started])

    assert code == 0
    assert len(read_records(tmp_path / "out" / "samples.jsonl", Sampled)) == 2 * len(INSTRUCTIONS)
    assert f"serving {tiny_model}" in (tmp_path / "out" / "sampler.log").read_text()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--sampler", "vllm"], 2, "pip install vllm"),
        (["--sampler", "vllm", "--sampler-command", "false {model} {port}"], 1, "ended with exit code 1"),
        (["--sampler", "vllm", "--sampler-command", "false"], 2, "must hold {model} and {port}"),
        (["--sampler-model", "x"], 2, "go with --sampler-url"),
        (["--sampler-url", "http://127.0.0.1:1", "--sampler-patience", "-1"], 2, "0 or more seconds"),
    ],
)
def test_a_server_that_cannot_be_had_is_a_plain_error(
    flags: list[str], code: int, said: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what to do."""
    assert main([*command(tiny_model, tmp_path), *flags]) == code
    assert said in capsys.readouterr().err
