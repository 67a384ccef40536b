"""`judge score` and `judge compare`: ask a running service, and print what it says in words."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("judge score")

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

from client.errors import JudgeError
from client.judge import Judge
from client.runtime.cli import add_judge_flags, fail
from client.runtime.parser import Parser
from client.runtime.program import FAILED, OK, USAGE
from client.schema import CompareMode, CompareResult, ScoreResult
from client.verdicts import MARGIN, mass_warning, opinion_of, verdict_of

TIMEOUT: Final = 300.0
# Columns of a response that the table shows.
_SHOWN: Final = 44
_TEXT_HELP: Final = "; @FILE reads it from a file, - from the standard input"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 (the service did not judge) or 2 (usage). The first argument is `score` or `compare`."""
    command, *rest = list(sys.argv[1:] if argv is None else argv)
    args = _ask_parser(command).parse_args(rest)
    try:
        # Once: what is read from a pipe is gone afterwards.
        prompt, responses = _text(args.prompt), [_text(text) for text in args.response]
        with Judge(args.judge_url, api_key=args.api_key, timeout=args.timeout) as judge:
            result = _asked(judge, command, args, prompt, responses)
    except JudgeError as error:
        return fail(error, FAILED)
    except (ValueError, OSError) as error:
        return fail(error, USAGE)
    if args.json:
        lines = [result.model_dump_json(indent=2)]
    elif isinstance(result, ScoreResult):
        lines = score_lines(result)
    else:
        lines = compare_lines(result, responses)
    sys.stdout.write("\n".join(lines) + "\n")
    return OK


def _asked(
    judge: Judge, command: str, args: argparse.Namespace, prompt: str, responses: list[str]
) -> ScoreResult | CompareResult:
    options: dict[str, Any] = {
        name: value for name in ("category", "template", "mode") if (value := getattr(args, name, None)) is not None
    }
    if command == "compare":
        if len(responses) < 2:
            raise ValueError("a comparison needs two responses or more: give --response once for each")
        return judge.compare(prompt, responses, **options)
    if len(responses) > 1:
        raise ValueError("judge score takes one --response; judge compare takes several")
    return judge.score(prompt, responses[0], **options)


def score_lines(result: ScoreResult) -> list[str]:
    """The verdict on one response, for people."""
    lines = [opinion_of(result), "", _score_line("P(Yes)", result.score, result.log_odds, result.label_mass)]
    if result.calibrated is not None:
        lines.append(f"  calibrated  {result.calibrated:.3f}")
    lines.append(f"  asked       {result.template}, {result.model}")
    warning = mass_warning([result.label_mass])
    return [*lines, *(["", warning] if warning else [])]


def compare_lines(result: CompareResult, responses: Sequence[str]) -> list[str]:
    """The verdict on a comparison, for people: the ranking with every response's score."""
    verdict = verdict_of(result)
    lines, digits = [verdict.sentence, ""], len(str(len(responses)))
    for place, index in enumerate(result.ranking, start=1):
        score, text = result.scores[index], _printable(responses[index])
        shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
        lines.append(f"  {place:>{digits}}. {shown:<{_SHOWN}}  {score.score:.3f}  {score.log_odds:+7.3f}")
    lines += ["", f"  P(Yes) and log-odds; gaps under {MARGIN:g} log-odds are not called. Asked: {result.template}, "]
    lines[-1] += f"{result.mode}, {result.model}"
    warning = mass_warning(score.label_mass for score in result.scores)
    return [*lines, *(["", warning] if warning else [])]


def _score_line(name: str, score: float, log_odds: float, mass: float) -> str:
    return f"  {name:<10}  {score:.3f}   log-odds {log_odds:+.3f}   label mass {mass:.3f}"


def _printable(text: str) -> str:
    """In one line, without control characters: an answer must not steer the terminal that shows it."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _text(given: str) -> str:
    """The text that an argument stands for. Raises OSError or ValueError if its file cannot be read."""
    if given == "-":
        if sys.stdin is None:
            raise ValueError("there is no standard input to read")
        return sys.stdin.read()
    if not given.startswith("@"):
        return given
    path = Path(given[1:])
    try:
        # Bytes: reading as text would change the ends of lines, and with them the score.
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None


def _ask_parser(command: str) -> Parser:
    several = command == "compare"
    what = "Which of these responses to a prompt is best?" if several else "How good is this response to this prompt?"
    example = "--response Lyon --response Paris" if several else "--response Paris"
    parser = Parser(
        prog=f"judge {command}",
        description=f"{what} Asks a running service and prints its verdict.",
        epilog=f"Example: judge {command} --prompt 'Capital of France?' {example}",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help=f"the question{_TEXT_HELP}")
    parser.add_argument(
        "--response",
        required=True,
        action="append",
        metavar="TEXT",
        help=("an answer to it; give the flag once for each" if several else "the answer to it") + _TEXT_HELP,
    )
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--category", metavar="NAME", help="ask the built-in template of this category")
    question.add_argument("--template", metavar="NAME", help="ask this template")
    if several:
        parser.add_argument(
            "--mode",
            choices=get_args(CompareMode),
            help="judge each response by itself, or every two side by side (default: whichever the judge is made for)",
        )
    parser.add_argument("--json", action="store_true", help="print the service's answer as it is")
    add_judge_flags(parser)
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help=f"give up after this long ({TIMEOUT:g})"
    )
    return parser


if __name__ == "__main__":
    program.finish(main)
