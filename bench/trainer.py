"""Samples and labelled pairs a second: the trainer against a plain loop that takes one sequence at a time.

    python -m bench.trainer --judge-url URL [--model FOLDER] [--judge-model FOLDER] [--instructions N] [--rounds N]

The plain loop is what published scripts do: `generate` for one response, then one forward of the judge for each of them
and the softmax of its last position. It reads the very tokens that the service reads for the same response. Both loops
get the same instructions; rounds are interleaved (plain, ours, plain, …) and medians are printed, because machines
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from client.chat import stop_ids
from client.runtime.cli import judge_address
from service.judge.template_files import load_library
from service.models import resolve as models
from service.models.tokenizers import load_tokenizer as load_judge_tokenizer
from service.prompts.builder import PromptBuilder
from trainer.labels.labelers import JudgeOptions, LabelOptions
from trainer.labels.labeling import run_labelling
from trainer.labels.pairs import PairOptions, make_pairs
from trainer.policy.models import choose_device, choose_dtype, load_model, quiet_libraries
from trainer.policy.samplers import SampleSettings, make_sampler, response_seed
from trainer.policy.sampling import distinct_samples, sampling_request
from trainer.policy.tokenizers import load_tokenizer
from trainer.run.records import Instruction, Sample, Score

DATA = Path(__file__).parents[2] / "shared" / "data" / "instructions.jsonl"
LONGEST_PROMPT = 1500


@dataclass(frozen=True, slots=True)
class Way:
    """How samples are made and judged: both take a seed, and what they need is loaded."""

    sample: Callable[[int], list[Sample]]
    label: Callable[[Sequence[Sample]], list[Score]]


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
    judge_address(parser)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="policy: known name, hub id or folder")
    parser.add_argument("--judge-model", help="the service's model, for the plain loop (default: --model)")
    parser.add_argument("--instructions", type=int, default=16, help="in each round")
    parser.add_argument("--samples", type=int, default=4, help="of each instruction")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    policy = models.resolve(args.model).path
    judge = models.resolve(args.judge_model or args.model).path
    asked = instructions(args.instructions)
    settings = SampleSettings(samples=args.samples, max_new_tokens=args.max_new_tokens)
    with quiet_libraries():
        ways = {
            "one at a time": plain(policy, judge, asked, settings),
            "trainer and service": ours(policy, asked, settings, JudgeOptions(args.judge_url, args.api_key)),
        }
        found = interleaved(ways, asked, args.rounds)
    title = f"{args.model}: {len(asked)} instructions, {args.samples} samples of at most {args.max_new_tokens} tokens"
    Console(width=110).print(table(found, f"{title}, median of {args.rounds} rounds"))
    return 0


def instructions(count: int) -> list[Instruction]:
    """Real instructions where ../shared/data holds them, every so many-th of them, else made-up ones."""
    if not DATA.exists():
        return [Instruction(id=f"{n}", prompt=f"Explain the number {n} in three sentences.") for n in range(count)]
    rows = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
    short = [row for row in rows if len(row["prompt"]) <= LONGEST_PROMPT]
    return [Instruction(**row) for row in short[:: max(1, len(short) // count)][:count]]


def plain(policy: Path, judge: Path, asked: Sequence[Instruction], settings: SampleSettings) -> Way:
    """One response by `generate`, one judgement by one forward, one after the other."""
    import torch

    device = choose_device()
    tokenizer, model = load_tokenizer(policy), load_model(policy, choose_dtype("auto", device), device)
    judging = model if judge == policy else load_model(judge, choose_dtype("auto", device), device)
    prompts = PromptBuilder(load_judge_tokenizer(judge), judging.config.max_position_embeddings)
    library = load_library("chat" if prompts.has_chat_template else "raw")
    ends = stop_ids(tokenizer, policy)

    def sample(seed: int) -> list[Sample]:
        found = []
        for one in asked:
            ids = torch.tensor([sampling_request(tokenizer, one, settings).token_ids], device=device)
            for number in range(settings.samples):
                torch.manual_seed(response_seed(seed, one.id, number))
                with torch.inference_mode():
                    row = model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        do_sample=True,
                        temperature=settings.temperature,
                        top_k=0,
                        max_new_tokens=settings.max_new_tokens,
                        eos_token_id=list(ends),
                        pad_token_id=tokenizer.pad_token_id,
                    )[0, ids.shape[1] :].tolist()
                text = tokenizer.decode([token for token in row if token not in ends])
                ended = bool(row) and row[-1] in ends
                found.append(
                    Sample(
                        id=one.id, sample=number, response=text, tokens=len(row), finish="stop" if ended else "length"
                    )
                )
        return found

    def label(samples: Sequence[Sample]) -> list[Score]:
        by_id = {one.id: one.prompt for one in asked}
        found = []
        for one in samples:
            if not one.response.strip():
                continue
            prompt = prompts.build(library.default("pointwise"), by_id[one.id], [one.response], "error")
            with torch.inference_mode():
                logits = judging(torch.tensor([list(prompt.token_ids)], device=device)).logits[0, -1].float()
            chances = logits.softmax(dim=-1)
            first = prompt.spellings[0]
            sides = (prompt.label_ids[:first], prompt.label_ids[first:])
            yes, no = (float(chances[list(ids)].sum()) for ids in sides)
            score = yes / (yes + no)
            log_odds = float(torch.logit(torch.tensor(score, dtype=torch.float64), eps=1e-12))
            found.append(Score(id=one.id, sample=one.sample, log_odds=log_odds, score=score))
        return found

    return Way(sample, label)


def ours(policy: Path, asked: Sequence[Instruction], settings: SampleSettings, judge: JudgeOptions) -> Way:
    """The trainer's sampler in batches, and the service in bulk."""
    tokenizer = load_tokenizer(policy)
    rows, draw = make_sampler(policy, tokenizer, settings)
    options = LabelOptions(judge=judge, template="general", max_failures=1.0)

    def sample(seed: int) -> list[Sample]:
        own = SampleSettings(samples=settings.samples, max_new_tokens=settings.max_new_tokens, seed=seed)
        ordered = sorted((sampling_request(tokenizer, one, own) for one in asked), key=lambda one: -len(one.token_ids))
        width, found = max(1, rows // settings.samples), list[Sample]()
        for batch in (ordered[start : start + width] for start in range(0, len(ordered), width)):
            for one, responses in zip(batch, draw(batch), strict=True):
                found += distinct_samples(one.id, responses, tokenizer)
        return found

    def label(samples: Sequence[Sample]) -> list[Score]:
        with tempfile.TemporaryDirectory() as folder:
            return run_labelling(options, asked, samples, Path(folder) / "scores.jsonl")

    return Way(sample, label)


def interleaved(ways: dict[str, Way], asked: Sequence[Instruction], rounds: int) -> dict[str, list[Round]]:
    """Every way once in each round, after a first round that is not counted."""
    found: dict[str, list[Round]] = {name: [] for name in ways}
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
                found[name].append(Round(len(samples), tokens, len(pairs), sampled - started, labelled - sampled))
            sys.stderr.write(f"round {number} {name}: {sampled - started:.1f} s + {labelled - sampled:.1f} s\n")
    return found


def table(found: dict[str, list[Round]], title: str) -> Table:
    """Medians over the rounds, and how many times as fast each way is as the first."""
    measures: dict[str, Callable[[Round], float]] = {
        "samples/s": lambda one: one.samples / one.sampling,
        "tokens/s": lambda one: one.tokens / one.sampling,
        "judgements/s": lambda one: one.samples / one.labelling,
        "labelled pairs/s": lambda one: one.pairs / (one.sampling + one.labelling),
    }
    medians: dict[str, list[float]] = {
        name: [statistics.median(map(measure, rounds)) for measure in measures.values()]
        for name, rounds in found.items()
    }
    first = next(iter(medians.values()))
    result = Table("", *measures, title=title, title_justify="left")
    for name, values in medians.items():
        cells: list[Any] = [f"{value:.2f} ({value / base:.1f}x)" for value, base in zip(values, first, strict=True)]
        result.add_row(name, *cells)
    return result


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
