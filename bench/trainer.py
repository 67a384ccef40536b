"""Samples and labelled pairs per second: the trainer against a plain loop that handles one sequence at a time.

    python -m bench.trainer --judge-url URL [--model FOLDER] [--judge-model FOLDER] [--instructions N] [--rounds N]

The plain loop is what published scripts do: `generate` one response at a time, then a forward pass of the judge for
each, and the softmax at the last position. It prefills the same tokens as the service does for the same response. Both
loops get the same instructions. Rounds are interleaved (plain, ours, plain, …) and medians printed, because machines
drift. The service runs beside them on the same machine, and every round has its own seed, so that no score comes from a
cache. With a --judge-model other than the service's model, the two loops judge with different models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from client.chat import stop_ids
from client.labels.pairs import PairOptions
from client.labels.records import Score
from client.runtime.cli import add_judge_flags
from service.judge.template_files import load_library
from service.models import resolve as models
from service.models.tokenizers import load_tokenizer as load_judge_tokenizer
from service.prompts.builder import PromptBuilder
from trainer.labels.labelers import JudgeOptions, LabelOptions
from trainer.labels.labeling import run_labelling
from trainer.labels.pairs import make_pairs
from trainer.policy.models import choose_device, choose_dtype, load_model, quiet_libraries
from trainer.policy.requests import SampleSettings, response_seed
from trainer.policy.samplers import make_sampler
from trainer.policy.sampling import distinct_samples, sampling_request
from trainer.policy.tokenizers import load_tokenizer
from trainer.run.records import Instruction, Sample

DATA = Path(__file__).parents[2] / "shared" / "data" / "instructions.jsonl"
LONGEST_PROMPT = 1500


class Way(Protocol):
    """One way to sample and to label, with its models loaded."""

    def sample(self, seed: int) -> list[Sample]:
        """Responses to all instructions."""

    def label(self, samples: Sequence[Sample]) -> list[Score]:
        """A score for each response that is not empty."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one way did in one round; times in seconds."""

    samples: int
    tokens: int
    pairs: int
    sampling: float
    labelling: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_judge_flags(parser)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="policy: known name, hub id or folder")
    parser.add_argument("--judge-model", help="the service's model, for the plain loop (default: --model)")
    parser.add_argument("--instructions", type=int, default=16, help="instructions per round")
    parser.add_argument("--samples", type=int, default=4, help="responses to each instruction")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    policy = models.resolve(args.model).path
    judge = models.resolve(args.judge_model or args.model).path
    asked = instructions(args.instructions)
    settings = SampleSettings(samples=args.samples, max_new_tokens=args.max_new_tokens)
    with quiet_libraries():
        ways: dict[str, Way] = {
            "one at a time": PlainLoop(policy, judge, asked, settings),
            "trainer and service": TrainerAndService(
                policy, asked, settings, JudgeOptions(args.judge_url, args.api_key)
            ),
        }
        rounds = interleaved(ways, asked, args.rounds)
    title = f"{args.model}: {len(asked)} instructions, {args.samples} samples of at most {args.max_new_tokens} tokens"
    Console(width=110).print(table(rounds, f"{title}, median of {args.rounds} rounds"))
    return 0


def instructions(count: int) -> list[Instruction]:
    """Real instructions from ../shared/data, evenly spaced, or made-up ones if it is not there."""
    if not DATA.exists():
        return [Instruction(id=f"{n}", prompt=f"Explain the number {n} in three sentences.") for n in range(count)]
    rows = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
    short = [row for row in rows if len(row["prompt"]) <= LONGEST_PROMPT]
    return [Instruction(**row) for row in short[:: max(1, len(short) // count)][:count]]


class PlainLoop:
    """`generate` for one response, a forward pass for one judgement, one after the other."""

    def __init__(self, policy: Path, judge: Path, asked: Sequence[Instruction], settings: SampleSettings) -> None:
        self._asked, self._settings, self._device = asked, settings, choose_device()
        dtype = choose_dtype("auto", self._device)
        self._tokenizer, self._policy = load_tokenizer(policy), load_model(policy, dtype, self._device)
        self._judge = self._policy if judge == policy else load_model(judge, dtype, self._device)
        self._prompts = PromptBuilder(load_judge_tokenizer(judge), self._judge.config.max_position_embeddings)
        self._template = load_library("chat" if self._prompts.has_chat_template else "raw").default("pointwise")
        self._stops = stop_ids(self._tokenizer, policy)

    def sample(self, seed: int) -> list[Sample]:
        """See Way."""
        return [
            self._respond(instruction, seed, number)
            for instruction in self._asked
            for number in range(self._settings.samples)
        ]

    def _respond(self, instruction: Instruction, seed: int, number: int) -> Sample:
        import torch

        ids = torch.tensor([sampling_request(self._tokenizer, instruction, self._settings).token_ids])
        ids = ids.to(self._device)
        torch.manual_seed(response_seed(seed, instruction.id, number))
        with torch.inference_mode():
            output = self._policy.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=self._settings.temperature,
                top_k=0,
                max_new_tokens=self._settings.max_new_tokens,
                eos_token_id=list(self._stops),
                pad_token_id=self._tokenizer.pad_token_id,
            )
        tokens = output[0, ids.shape[1] :].tolist()
        text = self._tokenizer.decode([token for token in tokens if token not in self._stops])
        finish = "stop" if tokens and tokens[-1] in self._stops else "length"
        return Sample(id=instruction.id, sample=number, response=text, tokens=len(tokens), finish=finish)

    def label(self, samples: Sequence[Sample]) -> list[Score]:
        """See Way."""
        by_id = {instruction.id: instruction.prompt for instruction in self._asked}
        return [self._score(sample, by_id[sample.id]) for sample in samples if sample.response.strip()]

    def _score(self, sample: Sample, question: str) -> Score:
        import torch

        prompt = self._prompts.build(self._template, question, [sample.response], "error")
        with torch.inference_mode():
            logits = self._judge(torch.tensor([list(prompt.token_ids)], device=self._device)).logits[0, -1].float()
        probabilities = logits.softmax(dim=-1)
        first = prompt.spellings[0]
        sides = (prompt.label_ids[:first], prompt.label_ids[first:])
        yes, no = (float(probabilities[list(ids)].sum()) for ids in sides)
        score = yes / (yes + no)
        log_odds = float(torch.logit(torch.tensor(score, dtype=torch.float64), eps=1e-12))
        return Score(id=sample.id, sample=sample.sample, log_odds=log_odds, score=score)


class TrainerAndService:
    """The trainer's sampler in batches, and the service in bulk."""

    def __init__(
        self, policy: Path, asked: Sequence[Instruction], settings: SampleSettings, judge: JudgeOptions
    ) -> None:
        self._asked, self._settings, self._tokenizer = asked, settings, load_tokenizer(policy)
        self._rows, self._sampler = make_sampler(policy, self._tokenizer, settings)
        self._labels = LabelOptions(judge=judge, template="general", max_failures=1.0)

    def sample(self, seed: int) -> list[Sample]:
        """See Way."""
        settings = replace(self._settings, seed=seed)
        requests = [sampling_request(self._tokenizer, instruction, settings) for instruction in self._asked]
        requests.sort(key=lambda request: -len(request.token_ids))
        size, samples = max(1, self._rows // settings.samples), list[Sample]()
        for batch in (requests[start : start + size] for start in range(0, len(requests), size)):
            for request, responses in zip(batch, self._sampler(batch), strict=True):
                samples += distinct_samples(request.id, responses, self._tokenizer)
        return samples

    def label(self, samples: Sequence[Sample]) -> list[Score]:
        """See Way."""
        with tempfile.TemporaryDirectory() as folder:
            return run_labelling(self._labels, self._asked, samples, Path(folder) / "scores.jsonl")


def interleaved(ways: dict[str, Way], asked: Sequence[Instruction], rounds: int) -> dict[str, list[Round]]:
    """Every way once per round, after a warm-up round that is not counted."""
    results: dict[str, list[Round]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            seed = 1000 * number + sum(map(ord, name))
            started = time.perf_counter()
            samples = way.sample(seed)
            sampled = time.perf_counter()
            scores = way.label(samples)
            labelled = time.perf_counter()
            pairs, _ = make_pairs(asked, samples, scores, PairOptions(cut_off="keep"))
            tokens = sum(sample.tokens for sample in samples)
            if number:
                results[name].append(Round(len(samples), tokens, len(pairs), sampled - started, labelled - sampled))
            sys.stderr.write(f"round {number} {name}: {sampled - started:.1f} s + {labelled - sampled:.1f} s\n")
    return results


def table(results: dict[str, list[Round]], title: str) -> Table:
    """Medians over the rounds, and how many times as fast each way is as the first."""
    measures: dict[str, Callable[[Round], float]] = {
        "samples/s": lambda result: result.samples / result.sampling,
        "tokens/s": lambda result: result.tokens / result.sampling,
        "judgements/s": lambda result: result.samples / result.labelling,
        "labelled pairs/s": lambda result: result.pairs / (result.sampling + result.labelling),
    }
    medians: dict[str, list[float]] = {
        name: [statistics.median(map(measure, rounds)) for measure in measures.values()]
        for name, rounds in results.items()
    }
    first = next(iter(medians.values()))
    columns = Table("", *measures, title=title, title_justify="left")
    for name, values in medians.items():
        cells: list[Any] = [f"{value:.2f} ({value / base:.1f}x)" for value, base in zip(values, first, strict=True)]
        columns.add_row(name, *cells)
    return columns


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
