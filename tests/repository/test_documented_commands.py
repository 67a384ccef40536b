"""Every command and example of README.md and docs/*.md, run against a live service as far as this machine can.

HOW is the list of what is done with which command: a new one that no line of it fits fails here. What would load a real
model, install packages or start containers is read by the program's own parser, or held against the files it is about;
`make test-compose` runs the containers' commands.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from client.__main__ import main as client_main
from client.commands.ask import main as ask_main
from client.commands.catalog import find
from client.schema import ScoreResult
from deploy.compose import load
from service.cli import settings_from
from service.models.__main__ import main as models_main
from service.models.manifest import known_models
from service.settings import Settings, UpstreamKey, WorkerSettings
from tests.benchmarks.makers import SUBSETS
from tests.repository.documents import ROOT, Block, Command, blocks, commands, is_command, lines
from tests.support.live import Live, live_service
from trainer.__main__ import main as trainer_main
from trainer.self_improve import main as loop_main
from trainer.tune_judge import main as tune_main

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Lines of indented blocks that are no commands: formulas and drawings.
PROSE = ("score = P(Yes)", "prompt, response ──>", "next-token log-probabilities", "log_odds = log P(Yes)")
# The flags of docker compose's commands that the documents use (docs.docker.com/reference/cli/docker/compose).
COMPOSE = {
    "up": {"--detach", "--wait"},
    "down": {"--volumes"},
    "logs": {"--follow"},
    "run": {"--rm"},
    "ps": set(),
    "build": set(),
    "stop": set(),
}
# By what template the subsets of the test data are asked.
CATEGORIES = ("chat", "chat", "safety", "code", "math")
STYLES = ["short", "longer", "in markdown"]
# Programs that take minutes or hours.
MEASURING = (
    "bench.amx",
    "bench.checkable_instructions",
    "bench.decision_speed",
    "bench.decisions",
    "bench.dpo_memory",
    "bench.engine",
    "bench.generation",
    "bench.invariance",
    "bench.served_judge",
    "bench.startup",
    "bench.trainer",
    "bench.tuning_labels",
    "bench.vllm_agreement",
    "tests.chaos",
)


@dataclass(frozen=True)
class Site:
    """Where commands are run: a live service, a folder with the files that they name, and a small model."""

    live: Live
    folder: Path
    model: Path

    def here(self, words: list[str]) -> list[str]:
        """The words, about this service, these files and this model."""
        return [self._one(word) for word in words]

    def _one(self, word: str) -> str:
        word = re.sub(r"(http://)?(127\.0\.0\.1|localhost):8000", self.live.url, word)
        word = {"hub": "hub.jsonl", "ORG/NAME": str(self.model), "FOLDER|ORG/NAME": str(self.model)}.get(word, word)
        word = str(ROOT / word) if word.startswith("bench/") else word
        return re.sub(r"^/(data|runs)/", f"{self.folder}/", word)


def rows(live: Live, count: int) -> list[dict[str, Any]]:
    """Pairs over five subsets of RewardBench, chosen by what the service prefers, so that a calibration is found."""
    found = []
    for n in range(count):
        answers = [f"Answer {n}, {side}" for side in "ab"]
        asked = {"prompt": f"Question {n}?", "responses": answers}
        sums = [0.0, 0.0]
        for category in ("general", CATEGORIES[n % 5]):
            scores = live.http.post("/compare", json=asked | {"category": category}).json()["scores"]
            sums = [known + score["log_odds"] for known, score in zip(sums, scores, strict=True)]
        better = sums.index(max(sums))
        both = {"chosen": answers[better], "rejected": answers[1 - better]}
        found.append({"id": f"{n}", "subset": SUBSETS[n % 5], "prompt": asked["prompt"], **both})
    return found


def styled(count: int) -> list[dict[str, Any]]:
    """Samples in the layout of RM-Bench."""
    sides = {"chosen": STYLES, "rejected": [f"wrong, {style}" for style in STYLES]}
    return [{"id": n, "domain": "chat", "prompt": f"Question {n}?", **sides} for n in range(count)]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One service for all commands."""
    with live_service() as service:
        yield service


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, live: Live) -> Path:
    """A folder with every file that a command names."""
    folder = tmp_path_factory.mktemp("user")
    text = "".join(json.dumps(row) + "\n" for row in rows(live, 130))
    for name in ("hub.jsonl", "preferences.jsonl", "rewardbench_dev.jsonl", "pairs.jsonl"):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "total_dataset.json").write_text(json.dumps(styled(4)), encoding="utf-8")
    (folder / "instructions.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "category": "chat"}) + "\n" for n in range(120)),
        encoding="utf-8",
    )
    mine, panel = (each.text for each in blocks() if (each.language, each.document) == ("toml", "templates.md"))
    (folder / "mine.toml").write_text(mine, encoding="utf-8")
    (folder / "panel.toml").write_text(panel, encoding="utf-8")
    (folder / "rubric.toml").write_text(block("toml", "tuning.md").text, encoding="utf-8")
    for name, answer in (("answers", "It is number {n}: word{n}."), ("solutions", "def f(x):\n    return x + {n}\n")):
        answers = [
            {"prompt": f"What is thing {n} of group{n % 5}?", "response": answer.format(n=n)} for n in range(10, 30)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    for name in ("mine", "other"):
        command = ["rewardbench", "--judge-url", live.url, "--data", str(folder / "hub.jsonl")]
        assert client_main([*command, "--out", str(folder / "runs" / name)]) == 0
    command = ["calibrate", "--data", str(folder / "pairs.jsonl"), "--judge-url", live.url]
    assert client_main([*command, "--out", str(folder / "calibration.json")]) == 0
    (folder / "judge").mkdir()
    shutil.copy(folder / "calibration.json", folder / "judge")
    return folder


@pytest.fixture
def site(live: Live, files: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The folder's copy of the test's own, as the current one."""
    folder = tmp_path / "user"
    shutil.copytree(files, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JUDGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JUDGE_URL", live.url)
    return Site(live, folder, tiny_model)


def block(language: str, document: str) -> Block:
    """The first such block of the document."""
    return next(each for each in blocks() if (each.language, each.document) == (language, document))


# What is done with a command. Each gets its words behind the part that HOW names.


def asked(words: list[str], site: Site) -> None:
    """curl, really; where it is not installed, the request that it would send."""
    words = site.here(words)
    if shutil.which("curl"):
        done = subprocess.run(["curl", "-sS", "--fail-with-body", *words], capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
    else:
        (url,) = (word for word in words if word.startswith("http"))
        given = {flag: words[words.index(flag) + 1] for flag in ("-X", "-H", "-d") if flag in words}
        header = dict([given["-H"].split(": ")]) if "-H" in given else {}
        answer = httpx.request(given.get("-X", "GET"), url, headers=header, content=given.get("-d")).json()
    assert {"score", "ranking", "templates", "answers", "results"} & set(answer)


def measured(words: list[str], site: Site) -> None:
    """The client's program, really, from a data file of this machine; one that is only named shows its --help."""
    if len(words) == 1:
        helped(client_main)([*words, "--help"], site)
        return
    short = ["--duration", "0.2"] if words[0] == "load" else []
    assert client_main([*site.here(words), *short]) == 0


def told(words: list[str], site: Site) -> None:
    """`judge score` and `judge compare`, really; of the other programs of `judge`, that there is one of that name."""
    if words[0] in ("score", "compare") and len(words) > 1:
        assert ask_main([*words, "--judge-url", site.live.url]) == 0
    elif words[0] != "--help":
        assert find(words) is not None


def measured_in_container(words: list[str], site: Site) -> None:
    """What the image `bench` runs."""
    measured([*words, "--judge-url", site.live.url], site)


def planned(words: list[str], site: Site) -> None:
    """The training loop as far as its plan: files are read, the model is looked at, the judge is asked."""
    assert loop_main([*site.here(words), "--judge-url", site.live.url, "--dry-run"]) == 0


def counted(words: list[str], site: Site) -> None:
    """A judge's training as far as its plan: labels are read, prompts are built, memory is estimated."""
    assert tune_main([*site.here(words), "--dry-run"]) == 0


def helped(main: Callable[[list[str]], int]) -> Callable[[list[str], Site], None]:
    """The program's --help, really."""

    def check(words: list[str], _: Site) -> None:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0

    return check


def configured(cls: type[Settings] | type[WorkerSettings]) -> Callable[[list[str], Site], None]:
    """The flags are read by the program's own settings; files that they name are loaded by a service."""

    def check(words: list[str], _: Site) -> None:
        settings = settings_from(cls, words)
        named = {"template_file": settings.template_file, "calibration_file": getattr(settings, "calibration_file", [])}
        with live_service(**named) as started:
            assert started.http.get("/ready").status_code == 200

    return check


def looked_up(words: list[str], site: Site) -> None:
    """`list` really, `check` with a tiny model; the others about a model that is known and not on this machine."""
    command, *names = words
    if command == "check":
        assert models_main([command, str(site.model)]) == 0
        return
    assert set(names) <= set(known_models())
    if command != "fetch":  # that one would download it
        assert models_main(words) == (0 if command == "list" else 1)


def made(words: list[str], _: Site) -> None:
    """The target is there, and so are the programs that it runs."""
    target, *variables = words
    assert all(re.search(rf"^{each.partition('=')[0]} \?=", MAKEFILE, re.M) for each in variables)
    recipe = re.search(rf"^{re.escape(target)}:[^\n]*##[^\n]*\n((?:\t.*\n|\n)*)", MAKEFILE, re.M)
    assert recipe, target
    assert all(find_spec(module) for module in re.findall(r"python -m (?!pip|venv)([\w.]+)", recipe[1]))


def made_really(words: list[str], _: Site) -> None:
    """make itself."""
    said = subprocess.run(["make", *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "install" in said


def installed(words: list[str], _: Site) -> None:
    """The extras and constraint files are this project's."""
    extras = {extra for word in words for extra in re.findall(r"\[([\w,]+)\]", word) for extra in extra.split(",")}
    assert extras <= set(PYPROJECT["project"]["optional-dependencies"])
    constraints = [ROOT / words[n + 1] for n, word in enumerate(words) if word == "-c"]
    assert all(each.is_file() for each in constraints)
    pins = (ROOT / "constraints/base.txt").read_text(encoding="utf-8").splitlines()
    assert {word for word in words if "==" in word} <= set(pins)


def composed(words: list[str], site: Site) -> None:
    """Services and profiles are those of docker-compose.yml, flags those of docker compose."""
    services = load({})
    profiles = [words[n + 1] for n, word in enumerate(words) if word == "--profile"]
    assert set(profiles) <= {profile for service in services.values() for profile in service.profiles}
    command, *rest = words[2 * len(profiles) :]
    flags = [word for word in rest if word.startswith("--")] if command != "run" else rest[:1]
    assert set(flags) <= COMPOSE[command]
    named = [word for word in rest if word not in flags] if command != "run" else rest[1:2]
    assert set(named) <= set(services)
    assert all(not services[name].profiles or set(services[name].profiles) & set(profiles) for name in named)
    if command == "run":
        {"bench": measured_in_container, "trainer": planned}[named[0]](rest[2:], site)


def saved(words: list[str], _: Site) -> None:
    """The volume and the image are those of docker-compose.yml."""
    file = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    volume, image = words[words.index("--volume") + 1], words[words.index("--entrypoint") + 2]
    assert volume.split(":")[0].removeprefix(f"{file['name']}_") in file["volumes"]
    assert image in {service.image.split(":")[0] for service in load({}).values()}


def charted(words: list[str], _: Site) -> None:
    """The chart is there, and has the values that are set; `make test-deployment` renders it."""
    chart = yaml.safe_load((ROOT / words[1] / "values.yaml").read_text(encoding="utf-8"))
    for number, word in enumerate(words):
        if word == "--set":
            value: Any = chart
            for name in words[number + 1].partition("=")[0].split("."):
                value = value[name]


def enabled(words: list[str], _: Site) -> None:
    """The unit is one of deploy/systemd."""
    unit = re.sub(r"@.*\.", "@.", words[-1])
    assert (ROOT / "deploy" / "systemd" / unit).is_file()


def copied(words: list[str], _: Site) -> None:
    """What is copied is there."""
    assert list(ROOT.glob(words[0]))


def launched(words: list[str], _: Site) -> None:
    """The configuration is there, and the module."""
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    assert find_spec(words[words.index("-m") + 1])


def known_to_pip(words: list[str], _: Site) -> None:
    """A command of pip's own."""
    assert words == ["freeze"]


def explained(module: str, words: list[str], _: Site) -> None:
    """A program that measures for minutes: it is there, and its --help names the flags, or that of its command."""
    command = list(takewhile(lambda word: not word.startswith(("-", "[")), words))
    shown = subprocess.run(
        [sys.executable, "-m", module, *command, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert {word.strip("[]") for word in words if word.strip("[]").startswith("--")} <= set(
        re.findall(r"--[\w-]+", shown)
    )


HOW: list[tuple[str, Callable[[list[str], Site], None]]] = [
    ("curl", asked),
    ("judge", told),
    ("python -m client", measured),
    ("python -m trainer.self_improve", planned),
    ("python -m trainer.tune_judge", counted),
    ("python -m trainer.evaluate", partial(explained, "trainer.evaluate")),
    ("python -m trainer", helped(trainer_main)),
    ("python -m service --help", helped(lambda _: bool(settings_from(Settings, ["--help"])))),
    ("python -m service.models", looked_up),
    ("python -m service.worker", configured(WorkerSettings)),
    ("python -m service", configured(Settings)),
    *((f"python -m {module}", partial(explained, module)) for module in (*MEASURING, "deploy.package")),
    ("make help", made_really),
    ("make", made),
    ("pip install", installed),
    ("pip", known_to_pip),
    ("docker compose", composed),
    ("docker run", saved),
    ("accelerate launch", launched),
    ("helm install", charted),
    ("systemctl enable", enabled),
    ("cp", copied),
]


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_documented_command_works(command: Command, site: Site) -> None:
    """It is run, or checked as HOW says."""
    start, check = next((s, c) for s, c in HOW if list(command.words[: len(s.split())]) == s.split())

    check(list(command.words[len(start.split()) :]), site)


@pytest.mark.parametrize("command", [each for each in commands() if each.environment], ids=str)
def test_a_documented_variable_is_one(command: Command) -> None:
    """What is set before a command is a setting of the service, or a variable of docker-compose.yml."""
    known = {f"JUDGE_{name.upper()}" for cls in (Settings, WorkerSettings, UpstreamKey) for name in cls.model_fields}
    compose = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text(encoding="utf-8")))

    assert set(command.environment) <= known | compose


@pytest.mark.parametrize(("document", "line"), [each for each in lines() if not is_command(each[1])])
def test_what_is_no_command_is_known(document: str, line: str) -> None:
    """A program that is new to the documents does not pass for prose."""
    assert line.startswith(PROSE), document


def test_no_block_is_in_a_language_that_nothing_here_reads() -> None:
    """A new kind of example needs a test."""
    assert {each.language for each in blocks()} == {"", "json", "python", "toml", "yaml"}


@pytest.mark.parametrize("example", [b for b in blocks() if b.language == "python"], ids=lambda b: b.document)
def test_a_python_example_runs(example: Block, live: Live) -> None:
    """As it stands, but for the address; it prints something."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(example.text.replace("http://127.0.0.1:8000", live.url), example.document, "exec"), {})

    assert said.getvalue().strip()


def test_the_example_of_an_answer_has_the_fields_of_one() -> None:
    """README's result, shortened by dots, is no other than the contract's."""
    shown = json.loads(block("json", "README.md").text.replace(", …", ""))

    assert set(shown) <= set(ScoreResult.model_fields)


def test_the_example_of_a_template_is_accepted(live: Live) -> None:
    """As a request's, and from a file: its category can be asked for."""
    sent = json.loads(block("json", "templates.md").text)

    assert live.http.post("/score", json=sent).status_code == 200


def test_the_example_of_a_template_file_is_loaded(files: Path) -> None:
    """Its category can be asked for."""
    with live_service(template_file=[files / "mine.toml"]) as started:
        answer = started.http.post("/score", json={"prompt": "p", "response": "r", "category": "poetry"})

    assert answer.json()["template"] == "haiku@1"


def test_the_example_of_an_override_names_services_that_are_there() -> None:
    """Compose's own tag aside it is YAML, and what it extends exists."""
    shown = yaml.safe_load(block("yaml", "operations.md").text.replace("!override ", ""))["services"]

    assert {"worker", *(each["extends"]["service"] for each in shown.values() if "extends" in each)} <= set(load({}))


@pytest.mark.parametrize("document", sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")}), ids=lambda d: d.name)
def test_links_within_the_project_lead_somewhere(document: Path) -> None:
    """A file that is linked, or shown as a picture, is there."""
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8"))

    assert [each for each in targets if not (document.parent / each).exists()] == []
