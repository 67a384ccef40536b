"""A program that evaluates tasks again and again in one folder, killing each run at another point.

    python -m tests.killed_tasks FLAGS…

Each point gets a child, forked after the slow imports; the last one runs to the end. Prints how the children ended.
"""

from __future__ import annotations

import json
import os
import sys

import jinja2  # noqa: F401 (imported before the forks)
import rich.progress  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import service.engine.torch.decoding
import service.engine.torch.loading  # noqa: F401
import trainer.evaluation.tasks.divergence
import trainer.evaluation.tasks.likelihood
import trainer.policy.sampling
from tests.support.killing import Install, before_the_marker, while_writing
from trainer.evaluate import main

LINES_BEFORE = 3


POINTS: tuple[Install, ...] = (
    while_writing(trainer.policy.sampling, LINES_BEFORE),
    before_the_marker(lambda name: name.endswith("answers")),
    while_writing(trainer.evaluation.tasks.likelihood, LINES_BEFORE),
    while_writing(trainer.evaluation.tasks.divergence, LINES_BEFORE),
    before_the_marker(lambda name: name.endswith("items")),
    lambda: None,
)


def _run(install: Install, flags: list[str]) -> int:
    child = os.fork()
    if child == 0:
        install()
        os._exit(main(flags))
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    ends = [_run(install, sys.argv[1:]) for install in POINTS]
    sys.stdout.write(f"\n{json.dumps(ends)}")  # after what the last child has printed
