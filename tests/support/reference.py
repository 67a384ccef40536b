"""A second implementation of the scoring rule, as in the paper: one text at a time, fp32, no code of the service.

    p     = softmax(model(tokens(text)).logits[last position])
    score = p(Yes) / (p(Yes) + p(No))

Slow and plain on purpose: the engines are compared with it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny import CORPUS

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@dataclass(frozen=True)
class Judgement:
    """The rule's numbers for one text."""

    score: float
    log_odds: float
    label_mass: float


class Reference:
    """The model and tokenizer in `folder`, in fp32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def label_id(self, label: str) -> int:
        """The token id of a label, which must be a single token."""
        (token_id,) = self.tokenizer(label, add_special_tokens=False).input_ids
        return int(token_id)

    @torch.no_grad()
    def judge(self, text: str, yes: str = " Yes", no: str = " No") -> Judgement:
        """Apply the rule to one text, with one spelling of each label."""
        p = self.model(**self.tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)
        p_yes, p_no = p[self.label_id(yes)].item(), p[self.label_id(no)].item()
        log_odds = torch.logit(torch.tensor(p_yes / (p_yes + p_no), dtype=torch.float64)).item()
        return Judgement(p_yes / (p_yes + p_no), log_odds, p_yes + p_no)


PAPER_LAYOUT = "{instruction}\n    User : {prompt}\n    Response : {response}\n    "
PAPER_INSTRUCTION = "Is this a good answer? Answer with just Yes/No"


def paper_text(prompt: str, response: str) -> str:
    """The text that the paper's method shows to the model."""
    return PAPER_LAYOUT.format(instruction=PAPER_INSTRUCTION, prompt=prompt, response=response)


def paper_file(folder: Path) -> Path:
    """A template file in the paper's own format, with PAPER_INSTRUCTION as rewardbench/all."""
    prompts = {"layout": PAPER_LAYOUT, "instructions": {"all": PAPER_INSTRUCTION}}
    path = folder / "paper.json"
    path.write_text(json.dumps({"labels": {"yes": " Yes", "no": " No"}, "rewardbench": prompts}), encoding="utf-8")
    return path


def generated_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts and responses of 1 to 40 and 1 to 120 words: plain words, code, digits, other scripts, emoji."""
    rng = random.Random(seed)
    words = [*" ".join(CORPUS).split(), "naïve", "日本語", "Ω", "🙂", "\n\n", "\t", "{x}", "<b>", "3.14"]

    def text(longest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    return [(text(40), text(120)) for _ in range(count)]


def rewardbench_pairs(count: int) -> list[tuple[str, str]]:
    """Prompts with a chosen or rejected answer from all over RewardBench; generated ones if its file is missing."""
    path = DATA / "rewardbench_dev.jsonl"
    if not path.exists():
        return generated_pairs(count)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    spread = rows[:: max(1, len(rows) // count)][:count]
    return [(row["prompt"], row["chosen" if index % 2 else "rejected"]) for index, row in enumerate(spread)]
