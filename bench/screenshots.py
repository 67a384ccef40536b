"""Screenshots of the page at / and its states, from headless Chromium: laptop and phone, light and dark.

    python -m bench.screenshots                                    # a service with made-up scores
    python -m bench.screenshots --url http://127.0.0.1:8000        # a running service
    python -m bench.screenshots --file runs/X/report.html          # a report instead

The README shows docs/images/playground-1280.png, of the default model:

    python -m bench.screenshots --url URL --out docs/images --only playground --widths 1280 --schemes light

Needs Chromium (`apt-get install chromium`); Playwright's own download is not used.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from playwright.sync_api import Browser, Page, Route, sync_playwright

from bench.support.process import running_service

Scheme: TypeAlias = Literal["light", "dark"]

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
WIDTHS: Final = (1280, 390)
# Milliseconds to wait for a page, or for a slow model's answer.
PATIENCE = 300_000


def find_chromium() -> str:
    """The browser's path. Raises RuntimeError, which says how to install it."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise RuntimeError(f"no {' or '.join(NAMES)} on PATH: apt-get install -y --no-install-recommends chromium")
    return path


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Headless Chromium that can reach this machine's loopback address only."""
    with sync_playwright() as playwright:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=[rules])
        try:
            yield browser
        finally:
            browser.close()


def playground(page: Page) -> None:
    """The page's example, judged a second time: answers that are known do not show how busy this machine is."""
    _example(page)
    page.reload()
    page.wait_for_function("document.querySelectorAll('.meter svg').length === 4")
    _example(page)
    page.wait_for_timeout(4_500)  # two more samples of the load, which include this call


def two(page: Page) -> None:
    """Two responses, one of them clearly better."""
    fill(page, "What is 17 * 6?", "17 * 6 = 102", "17 * 6 = 96")
    _edit_comparison(page, [1.3, -0.9])
    _run(page)


def sixteen(page: Page) -> None:
    """As many responses as there may be."""
    fill(page, "Name a prime number.", *(f"{number} is a prime number." for number in range(2, 18)))
    _run(page)


def close(page: Page) -> None:
    """A difference too small to call."""
    fill(page, "Which is the better greeting?", "Good morning!", "Good morning to you.", "What?")
    _edit_comparison(page, [0.083, 0.071, -1.4])
    _run(page)


def biased(page: Page) -> None:
    """A judge that goes by the order alone."""
    fill(page, "Which is the better greeting?", "Good morning!", "Good morning to you.", "What?")
    bias = {"pairs": 3, "flips": 3, "flip_rate": 1.0, "first_log_odds": 1.42}
    _edit_comparison(page, [0.3, 0.1, -0.4], position_bias=bias)
    page.get_by_label("Pairwise").check()
    _run(page)


def faint(page: Page) -> None:
    """A model that hardly meant to answer."""
    fill(page, "2 + 2?", "4")
    _edit_answers(page, "**/score", lambda body: {**body, "label_mass": 0.021, "label_is_argmax": False})
    _run(page)


def failed(page: Page) -> None:
    """A request that the service refuses, at the end of a long form."""
    fill(page, "A long question. " * 200, "4")
    page.get_by_text("Instruction, layout and labels").click()
    page.get_by_label("Labels for yes").fill("certainly so, no doubt at all")
    page.locator("#run").click()
    page.locator(".failure").wait_for()


def gone(page: Page) -> None:
    """A service that no longer answers."""
    _example(page)
    page.route("**/metrics", lambda route: route.abort())
    page.locator("#model.down").wait_for()


def key(page: Page) -> None:
    """A service that does not accept the key."""
    body = {"error": {"code": "unauthorized", "message": "Not a valid API key.", "type": "authentication_error"}}
    page.route("**/v1/models", lambda route: route.fulfill(status=401, json=body))
    page.evaluate("sessionStorage.setItem('judge.key', 'wrong')")
    page.reload()
    page.locator("#model.down").wait_for()


def decisions(page: Page) -> None:
    """A question of each kind about one input."""
    page.get_by_role("tab", name="Typed decisions").click()
    page.locator("#decide-example").click()
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#decided h2").wait_for()


def upload(page: Page) -> None:
    """A file with rows of each kind, and one that cannot be used."""
    rows: list[dict[str, Any]] = [
        {"prompt": "What is the capital of France?", "responses": ["Paris.", "Lyon.", "It lies on the Seine: Paris."]},
        {"prompt": [{"role": "user", "content": "Translate to French: good morning"}], "response": "Bonjour"},
        {"prompt": "What is 2 + 2?"},
        *({"prompt": f"What is {number} + 1?", "response": str(number + 1)} for number in range(6)),
    ]
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    page.get_by_role("tab", name="Score a file").click()
    sent = {"name": "answers.jsonl", "mimeType": "application/jsonl", "buffer": content.encode()}
    page.locator("#file").set_input_files(files=[sent])  # type: ignore[list-item]
    page.get_by_role("button", name="Score", exact=True).click()
    page.locator("#scored h2").wait_for()
    page.locator("#downloads").wait_for()


SCENES: Final[dict[str, Callable[[Page], None]]] = {
    scene.__name__: scene
    for scene in (playground, two, sixteen, close, biased, faint, failed, gone, key, decisions, upload)
}


def _example(page: Page) -> None:
    page.locator("#example").click()
    _run(page)


def fill(page: Page, prompt: str, *responses: str) -> None:
    """Fill in a prompt and as many responses."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    while page.locator("#responses textarea").count() < len(responses):
        page.get_by_role("button", name="Add a response").click()
    while page.locator("#responses textarea").count() > len(responses):
        page.get_by_role("button", name="Remove response 1").click()
    for number, text in enumerate(responses, 1):
        page.get_by_label(f"Response {number}", exact=True).fill(text)


def _run(page: Page) -> None:
    page.locator("#run").click()
    page.locator("#results h2").wait_for()


def _edit_comparison(page: Page, log_odds: Sequence[float], **fields: Any) -> None:
    """Have the service answer comparisons with these log-odds, best first, and these fields."""
    sigmoid = [[1 / (1 + 2.718281828459045 ** (b - a)) for b in log_odds] for a in log_odds]

    def edited(body: dict[str, Any]) -> dict[str, Any]:
        scores = [
            {**score, "log_odds": value, "score": 1 / (1 + 2.718281828459045**-value)}
            for score, value in zip(body["scores"], log_odds, strict=True)
        ]
        order = list(range(len(log_odds)))
        return {**body, "best": 0, "ranking": order, "scores": scores, "win_probability": sigmoid, **fields}

    _edit_answers(page, "**/compare", edited)


def _edit_answers(page: Page, pattern: str, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    def handle(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json=edit(answer.json()))

    page.route(pattern, handle)


def take_all(browser: Browser, scenes: Sequence[str], url: str, options: argparse.Namespace) -> None:
    """Take every scene at every width in every scheme."""
    for name in scenes:
        for width in options.widths:
            for scheme in options.schemes:
                # The screenshot is as high as the page, whatever the viewport's height.
                page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
                page.set_default_timeout(PATIENCE)
                page.goto(url)
                if name in SCENES:
                    SCENES[name](page)
                page.evaluate("document.activeElement.blur()")
                path = options.out / f"{name}-{width}{'-dark' if scheme == 'dark' else ''}.png"
                page.screenshot(path=path, full_page=True)
                page.close()
                print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Take the screenshots; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.screenshots", description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="URL of a running service without keys; unset: start one with made-up scores")
    parser.add_argument("--file", type=Path, help="take this HTML file instead, such as a run's report.html")
    parser.add_argument("--out", type=Path, default=Path("screenshots"), help="folder for the screenshots")
    parser.add_argument("--only", choices=SCENES, nargs="+", default=list(SCENES), help="take only these")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="in pixels (default: 1280 390)")
    parser.add_argument("--schemes", choices=get_args(Scheme), nargs="+", default=list(get_args(Scheme)))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    with open_browser() as browser:
        if options.file:
            take_all(browser, [options.file.stem], options.file.absolute().as_uri(), options)
        elif options.url:
            take_all(browser, options.only, options.url, options)
        else:
            with running_service("--engine", "fake") as service:
                take_all(browser, options.only, service.url, options)
    return 0


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
