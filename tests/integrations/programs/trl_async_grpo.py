"""URL MODEL WAY: a step of TRL's AsyncGRPOTrainer whose rewards come from the service at URL.

WAY is "sync" or "async". Real are the trainer, its rollout worker (a spawned process that scores with the pickled
reward function), and the optimizer's step. Stand-ins, because the real ones need a GPU: vLLM's server (an HTTP server
here that samples tokens at random), the check that vLLM is installed, the transfer of weights to vLLM, the attention
kernel (FlashAttention 3; torch's own attention computes the same), and the look-up of the GPU's peak speed.
"""

from __future__ import annotations

import json
import math
import random
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import torch

warnings.simplefilter("ignore")

VOCABULARY = range(3, 380)
PROMPT = [{"role": "user", "content": "Name a prime."}]


class FakeVLLM(BaseHTTPRequestHandler):
    """Completes any prompt with eight random tokens."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        tokens = random.sample(VOCABULARY, 8)
        logprobs = {"token_logprobs": [-math.log(len(VOCABULARY))] * len(tokens)}
        self._answer({"choices": [{"token_ids": tokens, "logprobs": logprobs}]})

    def do_GET(self) -> None:
        self._answer({})

    def _answer(self, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class NoTransfer:
    """The stand-in for the transfer of weights: the fake vLLM has none."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Attention:
    """The one function of the kernel that TRL calls, in torch's operations."""

    @staticmethod
    def flash_attn_varlen_func(
        query: Any, key: Any, value: Any, starts_q: Any, starts_k: Any, *_: Any, softmax_scale: float, **__: Any
    ) -> Any:
        """Causal attention of packed sequences: the last query sees the last key."""
        parts = []
        for (a, b), (c, d) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
            q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            part = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True
            )
            parts.append(part.transpose(0, 1))
        return torch.cat(parts)


def train(url: str, model: str, way: str) -> dict[str, Any]:
    """Train for a step, and return what the trainer logged and what it trained on."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import chat_template_utils
    from trl.experimental.async_grpo import (
        AsyncGRPOConfig,
        AsyncGRPOTrainer,
        async_grpo_trainer,
        async_rollout_worker,
        packing,
    )

    from client.adapters.trl import AsyncJudgeReward, JudgeReward

    async_rollout_worker.is_vllm_available = lambda: True
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None
    packing._flash_attn = Attention
    tokenizer = AutoTokenizer.from_pretrained(model)
    # TRL knows how answers are parsed by the text of known chat templates; Qwen3's are ChatML, as the tiny model's.
    tokenizer.response_template = chat_template_utils.qwen3_template
    vllm = ThreadingHTTPServer(("127.0.0.1", 0), FakeVLLM)
    threading.Thread(target=vllm.serve_forever, daemon=True).start()
    trainer = AsyncGRPOTrainer(
        model,
        reward_funcs={"sync": JudgeReward, "async": AsyncJudgeReward}[way](url),
        args=AsyncGRPOConfig(
            "out",
            vllm_server_base_url=f"http://127.0.0.1:{vllm.server_port}",
            num_generations=4,
            max_completion_length=8,
            max_inflight_tasks=4,
            token_budget=128,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 4, "category": ["math"] * 4}),
        processing_class=tokenizer,
        weight_transfer=NoTransfer(),
    )
    seen = keep_samples(trainer.rollout_worker)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    changed = any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    return {"changed": changed, "step": trainer.state.global_step, "samples": seen, "log": trainer.state.log_history[0]}


def keep_samples(worker: Any) -> list[Any]:
    """A list of the completions and rewards that the worker's process sends, filled as they arrive."""
    seen: list[Any] = []
    get = worker.rollout_buffer.get

    def keeping(*arguments: Any, **named: Any) -> Any:
        sample = get(*arguments, **named)
        seen.append([sample.completion[0]["content"], sample.metrics["rewards/judge_log_odds"]])
        return sample

    worker.rollout_buffer.get = keeping
    return seen


if __name__ == "__main__":
    print(json.dumps(train(*sys.argv[1:])))
