"""The upstream engine before a real vLLM server: the torch engine's numbers, and what the recorded conversation says.

`make test-vllm` runs these where vLLM is installed. The server is vLLM's own, with SmolLM2 in fp32.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.support.process import free_port
from client.chat import stop_ids
from service.engine.contract import AnyAnswer, Engine, Generated, GeneratedText, ItemFailure, LabelLogprobs, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.torch.generate import TorchGenerator
from service.judge.readers import LabelReader, Sampling, TextReader
from service.loading.upstream import find_upstream, load_upstream
from service.models.resolve import resolve
from service.prompts.builder import PromptBuilder
from service.prompts.text_builder import Prompt
from service.settings import Settings
from tests.engine.upstream.makers import CONVERSATION, failed, served
from tests.engine.upstream.openai_recording import prompts_of, recorded
from tests.engine.vllm import START_SECONDS, VLLM_MARKS
from tests.support.fleet import Program
from tests.support.live import wait_for
from tests.support.openai_server import Upstream

pytestmark = VLLM_MARKS

SMOLLM = "smollm2-135m-instruct"
FLAGS = ["--dtype", "float32", "--max-model-len", "1025", "--max-num-batched-tokens", "1025", "--enforce-eager"]


@pytest.fixture(scope="module")
def folder() -> Path:
    """SmolLM2's folder."""
    return resolve(SMOLLM).path


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server's base address."""
    base = f"http://127.0.0.1:{(port := free_port())}/v1"
    flags = ["--model", str(folder), "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    server = Program(["vllm.entrypoints.openai.api_server", *flags, *FLAGS], log, {"VLLM_NO_USAGE_STATS": "1"})
    try:
        wait_for(lambda: not server.alive or "startup complete" in server.output, START_SECONDS)
        assert server.alive, server.output
        yield base
    finally:
        children = psutil.Process(server.process.pid).children(recursive=True) if server.alive else []
        server.process.send_signal(signal.SIGTERM)
        psutil.wait_procs(children, 30)
        for process in children:
            if process.is_running():
                process.kill()
        server.kill()


@pytest.fixture(scope="module")
def torch_engine(folder: Path) -> TorchEngine:
    """The torch engine with the same model in fp32."""
    return TorchEngine.load(folder, dtype="float32", max_tokens=1000)


def settings(url: str, **more: Any) -> Settings:
    """The upstream engine's, with patience for a busy machine."""
    return Settings(engine="upstream", upstream_url=url, upstream_timeout=900, **more)


def started(config: Settings) -> tuple[Engine, list[Prompt]]:
    """The engine, and the prompts as it takes them."""
    model = find_upstream(config)
    return load_upstream(config, model), prompts_of(model)


def test_ids_give_the_torch_engines_probabilities(url: str, folder: Path, torch_engine: TorchEngine) -> None:
    """Of labels however unlikely, and of more than one request holds, in fp32 to 1e-3; and the same likeliest token."""
    engine, prompts = started(settings(url, model=str(folder)))
    items = [ScoreItem(prompt.token_ids, (*prompt.label_ids, *range(20_000, 20_200))) for prompt in prompts]

    answers = engine.run(items)
    engine.close()

    for answer, own in zip(answers, torch_engine.run(items), strict=True):
        assert isinstance(answer, LabelLogprobs)
        assert answer.logprobs == pytest.approx(own.logprobs, abs=1e-3)
        assert answer.argmax_id == own.argmax_id


def test_the_server_still_says_what_was_recorded(url: str, folder: Path) -> None:
    """The same requests, and numbers within 1e-3 of those in tests/data; the chat API draws one token of its list."""
    now = recorded(url, folder)

    for way in ("completions", "chat"):
        for new, old in zip(now[way], CONVERSATION[way], strict=True):
            said, known = numbers(new["answer"]), numbers(old["answer"])
            assert new["request"] == old["request"]
            assert len(said.keys() & known.keys()) >= len(known) - 2
            assert [said[t] for t in said if t in known] == pytest.approx(
                [known[t] for t in said if t in known], abs=1e-3
            )
            assert new["torch"]["logprobs"] == pytest.approx(old["torch"]["logprobs"], abs=1e-3)


def numbers(answer: Any) -> dict[str, float]:
    """The log-probabilities in an answer by token, in either form."""
    logprobs = answer["choices"][0]["logprobs"]
    if "top_logprobs" in logprobs:
        return dict(logprobs["top_logprobs"][0])
    return {entry["token"]: entry["logprob"] for entry in logprobs["content"][0]["top_logprobs"]}


def test_one_token_of_the_chat_api_is_not_both_labels(url: str) -> None:
    """The missing one is an error, or the floor where there is one."""
    strict, prompts = started(settings(url, upstream_top_logprobs=1))
    lenient, _ = started(settings(url, upstream_top_logprobs=1, floor=-20.0))
    items = [item for prompt in prompts for item in LabelReader().items(prompt)]

    missing, floored = strict.run(items), lenient.run(items)
    for engine in (strict, lenient):
        engine.close()

    assert {str(failed(answer)) for answer in missing} == {"label_not_returned"}
    assert all(isinstance(answer, ItemFailure) or answer.floored for answer in floored)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_greedy_texts_are_the_torch_engines(url: str, folder: Path, api: str) -> None:
    """Sent as ids or as text, read back as text."""
    ids = settings(url, self_reward_mode="parsed", judge="self-reward", model=str(folder))
    tokenizer = find_upstream(ids).tokenizer
    config = ids if api == "completions" else settings(url, self_reward_mode="parsed", judge="self-reward")
    engine, prompts = started(config)
    generator = TorchGenerator.load(folder, dtype="float32", max_tokens=1000)
    reader = TextReader(Sampling(1, 12, stop_ids(tokenizer, folder)), PromptBuilder(tokenizer, 1000).text_of)

    answers = engine.run([item for prompt in prompts[:3] for item in reader.items(prompt)])
    own = generator.run([item for prompt in prompts_of(find_upstream(ids))[:3] for item in reader.items(prompt)])
    engine.close()
    generator.close()

    assert [said(tokenizer, answer) for answer in answers] == [said(tokenizer, answer) for answer in own]


def said(tokenizer: Any, answer: AnyAnswer | ItemFailure) -> tuple[str, bool]:
    """What was written, and whether to its end."""
    if isinstance(answer, GeneratedText):
        return answer.text, answer.ended
    assert isinstance(answer, Generated)
    return str(tokenizer.backend_tokenizer.decode(list(answer.token_ids), skip_special_tokens=False)), answer.ended


def test_a_grade_is_written_over_the_chat_api(url: str) -> None:
    """The self-rewarding judge over the whole service: the text's grade, or an error that says there is none."""
    more = {"judge": "self-reward", "self_reward_mode": "parsed", "self_reward_tokens": 48, "upstream_timeout": 900}
    with served(Upstream(url=url), **more) as http:
        answer = http.post("/score", json={"prompt": "What is 2+2?", "response": "4"}, timeout=900)

    body = answer.json()
    assert body.get("grade") in range(6) or body["error"]["code"] == "unparseable"
