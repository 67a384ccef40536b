"""What services say with a tuned judge, against base and adapter in fp32: labels held out, by two routes.

    python -m bench.served_judge --run judge --judge-url http://127.0.0.1:8000 --labels 40

`--run` is the folder of `python -m trainer.tune_judge`; the service has its merged/, or the base and its adapter/.
Margins are the first answer's log-odds minus the second's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from client.judge import Judge
from client.schema import Message
from trainer.policy.models import load_model, quiet_libraries, resolve_model
from trainer.run.files import read_records
from trainer.run.records import ADAPTER_FOLDER, CONFIG_FILE, HELD_OUT_FILE
from trainer.tuning.judge.labels import Label
from trainer.tuning.judge.prompts import Example, JudgePrompts
from trainer.tuning.judge.reader import OwnReader, read_prompts
from trainer.tuning.judge.training import RESULT_FILE


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, and print how far the answers are off."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of a tuning")
    parser.add_argument("--judge-url", required=True, metavar="URL")
    parser.add_argument("--labels", type=int, default=40, help="pairs at most (default: 40)")
    args = parser.parse_args(argv)
    labels = [label for label in read_records(args.run / HELD_OUT_FILE, Label) if label.is_pair][: args.labels]
    asked = json.loads((args.run / CONFIG_FILE).read_bytes())["asked"]
    adapter = args.run / ADAPTER_FOLDER
    if not labels or asked["asking"] != "pointwise" or asked["template_files"] or not adapter.is_dir():
        parser.error(f"{args.run}: not a run with an adapter, built-in pointwise templates and pairs held out")
    base = resolve_model(json.loads((args.run / RESULT_FILE).read_bytes())["base"])
    examples, _ = JudgePrompts(base, "pointwise", asked["template"], [], asked["max_length"]).examples(labels)
    expected = _trained(base, adapter, examples)
    scored, compared = _served(args.judge_url, examples)
    print(f"{len(examples)} pairs, log-odds off by (mean, mean of absolute values, most):")
    for name, served in (("/score", scored), ("/compare", compared)):
        off = [[one - other for one, other in zip(*both, strict=True)] for both in zip(served, expected, strict=True)]
        print(f"{name:10} answers {_told([value for pair in off for value in pair])}")
        print(f"{'':10} margins {_told([first - second for first, second in off])}")
    return 0


def _told(off: Sequence[float]) -> str:
    sizes = [abs(value) for value in off]
    return f"{statistics.mean(off):+.4f} {statistics.mean(sizes):.4f} {max(sizes):.4f}"


def _trained(base: Path, adapter: Path, examples: Sequence[Example]) -> list[list[float]]:
    """Log-odds of each example's answers by transformers' own forward, base and adapter in fp32."""
    from peft import PeftModel

    with quiet_libraries(), torch.inference_mode():
        reader = OwnReader(PeftModel.from_pretrained(load_model(base, torch.float32), str(adapter)))
        return [read_prompts(reader, example.prompts).log_odds.tolist() for example in examples]


def _served(url: str, examples: Sequence[Example]) -> tuple[list[list[float]], list[list[float]]]:
    """The same by a service's /score and /compare."""
    scored, compared = [], []
    with Judge(url, timeout=600) as judge:
        for example in examples:
            label, template = example.label, example.template.id
            prompt: str | list[Message] = label.prompt if isinstance(label.prompt, str) else list(label.prompt)
            answers = [judge.score(prompt, answer, template=template) for answer in label.answers]
            both = judge.compare(prompt, label.answers, template=template)
            scored.append([answer.log_odds for answer in answers])
            compared.append([score.log_odds for score in both.scores])
    return scored, compared


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
