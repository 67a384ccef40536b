"""The vLLM engine, for real: beside the torch engine, as a worker behind the whole service, and when it is killed.

`make test-vllm` runs these where vLLM is installed; nothing here is skipped where it is not. Models are a tiny one made
on the spot and SmolLM2, fetched once into the user's cache; JUDGE_TEST_PAIRS says how many samples it reads.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from bench.support.process import free_port
from bench.vllm_agreement import compare, judge_prompts, side, torch_loader, vllm_loader
from client.errors import ErrorCode
from service.engine.contract import ClassifyItem, Generated, GenerateItem, ItemFailure, LabelLogprobs, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.torch.generate import TorchGenerator
from service.engine.vllm.config import Lora, VllmOptions, VllmStartError
from service.engine.vllm.engine import VllmEngine
from service.judge.readers import LabelReader
from service.models.resolve import resolve
from service.questions import Predicate
from service.worker.loop import STALLED_STATUS
from tests.support.fleet import Api, Program
from tests.support.live import wait_for
from tests.support.redis_server import RedisServer
from tests.support.reference import rewardbench_pairs
from tests.support.tiny import tiny_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    # vLLM's imports warn of many things that are not ours.
    pytest.mark.filterwarnings("default"),
]

SMOLLM = "smollm2-135m-instruct"
PAIRS = int(os.environ.get("JUDGE_TEST_PAIRS", "8"))
# Compiled graphs take a minute at each start, and change nothing that is looked at here.
EAGER = {"enforce_eager": True}
START_SECONDS = 900.0
VOCABULARY = 600
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module", autouse=True)
def modest() -> Iterator[None]:
    """A cache of 1 GiB; and threads left where the system puts them: bound ones wait for each other when it is busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        yield


@pytest.fixture(scope="module")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with heads of 64: vLLM's kernels for CPUs know no smaller ones than 32."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = tiny_tokenizer(2048)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(vllm_model: Path) -> Iterator[VllmEngine]:
    """vLLM with the random model in fp32; prompts of up to 255 tokens."""
    engine = VllmEngine.load(vllm_model, VllmOptions(task="labels", max_tokens=255, dtype="float32", extra=EAGER))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def writer(vllm_model: Path) -> Iterator[VllmEngine]:
    """The same for text; prompt and text together have up to 255 tokens."""
    engine = VllmEngine.load(vllm_model, VllmOptions(task="generate", max_tokens=255, dtype="float32", extra=EAGER))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def torch_engine(vllm_model: Path) -> TorchEngine:
    """The torch engine with the same."""
    return TorchEngine.load(vllm_model, dtype="float32", max_tokens=255)


def items(count: int, longest: int = 255) -> list[ScoreItem]:
    """Prompts of different lengths up to the longest, with one to three labels."""
    lengths = [1 + (longest - 1) * number // max(1, count - 1) for number in range(count)]
    return [
        ScoreItem([(7 * place + 13 * number) % VOCABULARY for place in range(length)], (5, 0, 77)[: 1 + number % 3])
        for number, length in enumerate(lengths)
    ]


def test_labels_have_the_torch_engines_probabilities(engine: VllmEngine, torch_engine: TorchEngine) -> None:
    """In fp32 to 1e-3, the longest prompt included; the likeliest token is the same."""
    work = items(17)

    ours, theirs = engine.run(work), torch_engine.run(work)

    assert [answer.argmax_id for answer in answered(ours)] == [answer.argmax_id for answer in theirs]
    for one, other in zip(answered(ours), theirs, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def answered(answers: list[LabelLogprobs | ItemFailure]) -> list[LabelLogprobs]:
    """All of them, none a failure."""
    found = [answer for answer in answers if isinstance(answer, LabelLogprobs)]
    assert len(found) == len(answers)
    return found


def test_what_was_read_before_is_not_read_again(engine: VllmEngine) -> None:
    """And the answer says so; the numbers stay."""
    item = ScoreItem([3, 1, *range(200, 450)], (5, 6))

    first, second = answered(engine.run([item]) + engine.run([item]))

    assert (first.cached_tokens, second.cached_tokens) == (0, 128)
    assert second.logprobs == pytest.approx(first.logprobs, abs=1e-4)

    engine.forget()
    (third,) = answered(engine.run([item]))
    assert third.cached_tokens == 0


@pytest.mark.parametrize("ids", [[], [1] * 256, [VOCABULARY], [-1]])
def test_items_outside_the_contract_are_refused(engine: VllmEngine, ids: list[int]) -> None:
    """Before vLLM sees them: empty, longer than the limit, no token of the vocabulary."""
    with pytest.raises(ValueError, match=r"reads 1 to|vocabulary"):
        engine.run([ScoreItem(ids, (5,))])


def test_an_item_past_its_deadline_fails_alone(engine: VllmEngine) -> None:
    """Its neighbours are answered, and the deadlines hold for one call only."""
    work = items(3)
    engine.set_deadlines([time.monotonic() + 60, time.monotonic() - 1, time.monotonic() + 60])

    one, late, other = engine.run(work)

    assert isinstance(late, ItemFailure)
    assert late.code is ErrorCode.DEADLINE_EXCEEDED
    assert len(answered([one, other])) == 2
    assert len(answered(engine.run(work))) == 3


def test_a_text_is_stopped_at_its_deadline(writer: VllmEngine) -> None:
    """vLLM gives up the request, and the next call does not wait for it."""
    item = GenerateItem([1, 2, 3], 250, (), temperature=1.0)
    writer.set_deadlines([time.monotonic() + 0.05])

    (late,) = writer.run([item])

    assert isinstance(late, ItemFailure)
    assert writer._llm.get_num_unfinished_requests() == 0


def test_a_seed_decides_the_text(writer: VllmEngine) -> None:
    """The same seed writes the same, another one something else."""
    texts = writer.run([GenerateItem([1, 2, 3], 20, (), temperature=1.0, seed=seed) for seed in (1, 1, 2**62)])

    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_greedy_texts_are_the_torch_engines(writer: VllmEngine, vllm_model: Path) -> None:
    """Token by token, also where a stop token ends them: it is not part of the text."""
    long = GenerateItem([9, 8, 7, 6], 12, ())
    (text,) = written(writer, long)
    stopped = GenerateItem([9, 8, 7, 6], 12, (text.token_ids[3],))
    generator = TorchGenerator.load(vllm_model, dtype="float32", max_tokens=255)

    assert [text, *written(writer, stopped)] == generator.run([long, stopped])


def test_an_engine_does_its_own_task_alone(engine: VllmEngine, writer: VllmEngine) -> None:
    """An item of another one is refused."""
    with pytest.raises(ValueError, match="answers ScoreItem only"):
        engine.run([GenerateItem([1, 2], 3, ())])
    with pytest.raises(ValueError, match="answers GenerateItem only"):
        writer.run([ScoreItem([1, 2], (5,))])


def written(engine: VllmEngine, item: GenerateItem) -> list[Generated]:
    """The text, without the count of cached tokens, which is the engine's own."""
    (text,) = engine.run([item])
    assert isinstance(text, Generated)
    return [Generated(text.token_ids, text.ended)]


def test_a_reward_models_logit_is_raw(tmp_path: Path) -> None:
    """As the torch engine has it, not squeezed into a probability."""
    torch.manual_seed(0)
    config: Any = LlamaConfig(vocab_size=VOCABULARY, num_labels=1, **SHAPE)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    work = [ClassifyItem(item.token_ids) for item in items(5, longest=200)]

    theirs = TorchEngine.load(tmp_path, "classify", dtype="float32", device="cpu").run(work)
    engine = VllmEngine.load(tmp_path, VllmOptions(task="classify", max_tokens=256, dtype="float32", extra=EAGER))
    ours = engine.run(work)
    engine.close()

    assert [getattr(answer, "logit", None) for answer in ours] == [pytest.approx(a.logit, abs=1e-3) for a in theirs]
    assert max(abs(answer.logit) for answer in theirs) > 1


def test_an_adapter_changes_the_numbers_as_merged_weights_do(vllm_model: Path, tmp_path: Path) -> None:
    """A LoRA by vLLM, against the torch engine on the same weights added up."""
    merged = write_adapter(vllm_model, tmp_path / "adapter", tmp_path / "merged")
    work = items(3)

    bare, theirs = [TorchEngine.load(folder, dtype="float32").run(work) for folder in (vllm_model, merged)]
    lora = Lora("mine", tmp_path / "adapter")
    engine = VllmEngine.load(
        vllm_model, VllmOptions(task="labels", max_tokens=255, dtype="float32", lora=lora, extra=EAGER)
    )
    ours = answered(engine.run(work))
    engine.close()

    assert [a.logprobs for a in ours] == [pytest.approx(a.logprobs, abs=1e-3) for a in theirs]
    assert abs(bare[-1].logprobs[0] - theirs[-1].logprobs[0]) > 0.01


def write_adapter(base: Path, adapter: Path, merged: Path) -> Path:
    """A random adapter of rank 4 as PEFT writes it, and the model with it added to its weights."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    tensors = {}
    for number, layer in enumerate(model.model.layers):
        weight = layer.self_attn.q_proj.weight
        down, up = torch.randn(4, weight.shape[1]) / 4, torch.randn(weight.shape[0], 4) / 4
        weight.data += 2 * up @ down
        name = f"base_model.model.model.layers.{number}.self_attn.q_proj"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model.save_pretrained(merged)
    return merged


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quantization": "nonsense"}, "quantization"),
        ({"extra": {"nonsense": 1}}, "no such argument.*nonsense"),
        ({"task": "classify"}, "not a reward model"),
        ({"deterministic": True}, "needs a GPU"),
        ({"max_tokens": 10**6}, "max_model_len"),
    ],
)
def test_a_start_that_must_fail_says_why(vllm_model: Path, more: dict[str, Any], message: str) -> None:
    """Before any process is started."""
    options = VllmOptions(**{"task": "labels", "max_tokens": 255, **more})

    with pytest.raises(VllmStartError, match=message):
        VllmEngine.load(vllm_model, options)


def test_a_model_that_kills_vllm_is_found_out_at_start(tiny_model: Path) -> None:
    """Its heads of 16 have no kernel, which is not known before the first prompt; workers would die one by one."""
    options = VllmOptions(task="labels", max_tokens=255, dtype="float32", extra=EAGER)

    with pytest.raises(VllmStartError, match="died of the first prompt"):
        VllmEngine.load(tiny_model, options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_real_model_judges_alike_on_both_engines(dtype: str, tmp_path: Path) -> None:
    """SmolLM2 on RewardBench: the same ranking in bf16, the same numbers to 1e-3 in fp32."""
    folder = resolve(SMOLLM).path
    prompts = judge_prompts(folder, rewardbench_pairs(2 * PAIRS))

    own = side("torch", torch_loader(folder, dtype), prompts, tmp_path / "torch.jsonl")
    other = side("vllm", vllm_loader(folder, dtype, EAGER), prompts, tmp_path / "vllm.jsonl")
    agreement = compare(own, other)

    assert agreement.holds(dtype), agreement


class Stack:
    """An API process and vLLM workers with the random model over one Redis; all are killed in the end."""

    def __init__(self, folder: Path, model: Path, redis: RedisServer) -> None:
        self._folder = folder
        self._redis = redis
        self._flags = ["--engine", "vllm", "--model", str(model), "--dtype", "float32", "--queue-url", redis.url]
        self.workers: list[Program] = []
        api_flags = [*self._flags, "--cache-entries", "0", "--request-timeout", "900"]
        self.api = Api(api_flags, folder / "api.log", free_port())

    def worker(self, *flags: str) -> Program:
        """Start one, and wait until it takes jobs."""
        limits = ["--lease-seconds", "2", "--batch-tokens", "2000"]
        args = ["--vllm-args", '{"enforce_eager": true, "max_num_batched_tokens": 512}', *limits, *flags]
        log = self._folder / f"worker{len(self.workers)}.log"
        worker = Program(["service.worker", *self._flags, *args], log)
        self.workers.append(worker)
        wait_for(lambda: not worker.alive or "working" in worker.output, START_SECONDS)
        assert worker.alive, worker.output
        return worker

    def end(self) -> None:
        """Kill what still runs."""
        for program in [self.api, *self.workers]:
            program.kill()

    def answered_tokens(self) -> int:
        """Tokens of all jobs answered so far."""
        with self._redis.client() as client:
            return sum(int(client.get(key)) for key in client.scan_iter("judge:*:done"))

    def batch(self, count: int) -> dict[str, Any]:
        """A batch request of so many long items, all different."""
        filler = "the quick brown fox jumps over the lazy dog " * 20
        items = [{"prompt": f"{number} {filler}", "response": f"{number}"} for number in range(count)]
        answer = httpx.post(f"{self.api.url}/score/batch", json={"items": items}, timeout=900)
        result: dict[str, Any] = answer.raise_for_status().json()
        return result


@pytest.fixture
def stack(vllm_model: Path, redis_server: RedisServer, tmp_path: Path) -> Iterator[Stack]:
    """With no worker yet."""
    stack = Stack(tmp_path, vllm_model, redis_server)
    try:
        wait_for(lambda: stack.api.status("/health") == 200, 120)
        yield stack
    finally:
        stack.end()


def test_the_whole_service_judges_with_vllm(stack: Stack, vllm_model: Path, torch_engine: TorchEngine) -> None:
    """API, Redis, worker: the torch engine's numbers come back, and a SIGTERM ends all of it in good order."""
    worker = stack.worker()
    answer = httpx.post(f"{stack.api.url}/score", json={"prompt": "2+2?", "response": "4"}, timeout=60).json()
    (prompt,) = judge_prompts(vllm_model, [("2+2?", "4")])
    info = httpx.get(f"{stack.api.url}/v1/models").json()["data"][0]
    core = core_of(worker)
    worker.terminate()

    assert info["engine"] == "vllm"
    (own,) = torch_engine.run([prompt])
    expected = LabelReader().judgement(Predicate.of(["Yes"], ["No"]), prompt, [own]).log_odds
    assert answer["log_odds"] == pytest.approx(expected, abs=1e-3)
    assert worker.wait(60) == 0
    assert wait_for(lambda: gone(core), 20)


def core_of(worker: Program) -> psutil.Process:
    """vLLM's own process, a child of the worker."""
    children = psutil.Process(worker.process.pid).children(recursive=True)
    (core,) = [child for child in children if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
    return core


@contextmanager
def asked_for(count: int, stack: Stack) -> Iterator[Future[dict[str, Any]]]:
    """The answer to come of a batch, of which some items are answered already."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(stack.batch, count)
        wait_for(lambda: stack.answered_tokens() > 0 or future.done(), 120)
        assert not future.done()
        yield future


def gone(process: psutil.Process) -> bool:
    """Ended, if perhaps not yet reaped."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_killed_worker_loses_nothing(stack: Stack) -> None:
    """kill -9 in mid-batch: another worker answers the rest, and vLLM's own processes do not outlive theirs."""
    first = stack.worker()
    core = core_of(first)
    with asked_for(300, stack) as answer:
        first.kill()
        stack.worker()
        results = answer.result(900)["results"]

    assert [result["index"] for result in results if "result" in result] == list(range(300))
    assert gone(core)


def test_a_worker_whose_vllm_dies_ends(stack: Stack) -> None:
    """kill -9 of vLLM's process in mid-batch: the worker ends with the status of a stall, and answers no failures."""
    first = stack.worker()
    with asked_for(300, stack) as answer:
        core_of(first).kill()
        status = first.wait(60)
        stack.worker()
        results = answer.result(900)["results"]

    assert status == STALLED_STATUS
    assert [result["index"] for result in results if "result" in result] == list(range(300))
