"""The judge of `service --engine fake` behind LitServe, to compare: the same request, prompt, numbers and bounds of a
batch, with LitServe's HTTP, queue and batching in place of ours. Needs `pip install litserve`.

    python -m bench.support.litserve_judge PORT
"""

# No `from __future__ import annotations`: LitServe reads decode_request's annotation as a type.
import sys
from typing import Any

import litserve

from client.schema import ScoreRequest
from service.engine.fake import FakeEngine, fake_tokenizer
from service.judge.readers import LabelReader
from service.judge.template_files import load_library
from service.prompts.builder import JudgePrompt, PromptBuilder

# What our worker has by default.
MAX_BATCH = 256
LINGER_SECONDS = 0.002


class JudgeAPI(litserve.LitAPI):
    """Validate and render each request, judge them together."""

    def setup(self, device: str) -> None:  # noqa: ARG002 LitServe's signature
        """In the worker process."""
        self.prompts = PromptBuilder(fake_tokenizer(), 4096)
        self.template = load_library("chat").default("pointwise")
        self.engine = FakeEngine()
        self.reader = LabelReader()

    def decode_request(self, request: dict[str, Any]) -> JudgePrompt:
        """From JSON to a prompt."""
        asked = ScoreRequest.model_validate(request)
        return self.prompts.build(self.template, asked.prompt, [asked.response], asked.truncation)

    def batch(self, inputs: list[JudgePrompt]) -> list[JudgePrompt]:
        """Prompts stay apart."""
        return inputs

    def predict(self, prompts: list[JudgePrompt]) -> list[dict[str, Any]]:
        """One call of the engine."""
        answers = self.engine.run(prompts)
        verdicts = [
            self.reader.judgement(self.template.question, prompt, [answer])
            for answer, prompt in zip(answers, prompts, strict=True)
        ]
        return [
            {
                "score": verdict.score,
                "log_odds": verdict.log_odds,
                "yes_logprob": verdict.yes_logprob,
                "no_logprob": verdict.no_logprob,
                "label_mass": verdict.label_mass,
            }
            for verdict in verdicts
        ]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One answer for each request."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """JSON already."""
        return output


if __name__ == "__main__":
    api = JudgeAPI(max_batch_size=MAX_BATCH, batch_timeout=LINGER_SECONDS, api_path="/score")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
