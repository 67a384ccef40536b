"""Screenshots of the page at /, from headless Chromium: laptop and phone, light and dark.

    python -m bench.screenshots                                    # a service with made-up scores
    python -m bench.screenshots --url http://127.0.0.1:8000        # a running service

The README shows docs/images/playground-1280.png: `--out docs/images --only playground-1280`.

Needs Chromium (`apt-get install chromium`); Playwright's own download is not used.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, sync_playwright

from bench.support.process import running_service
from client import Judge

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Name: width, colours and mode.
PICTURES: dict[str, tuple[int, Literal["light", "dark"], str]] = {
    "playground-1280": (1280, "light", "pointwise"),
    "playground-1280-dark": (1280, "dark", "pairwise"),
    "playground-390": (390, "light", "pointwise"),
    "playground-390-dark": (390, "dark", "pairwise"),
}
# Traffic for the live panel to show: for so many seconds, with pauses of so many milliseconds.
SECONDS, PAUSE = 20.0, 150
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


def take(page: Page, url: str, path: Path, *, mode: str) -> None:
    """Run the page's example in `mode`, send some traffic, and save a screenshot of the whole page."""
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.get_by_role("button", name="Fill in an example").click()
    page.locator(f"input[value={mode}]").check()
    page.get_by_role("button", name="Run", exact=True).click()
    page.locator("#results h2").wait_for()
    with Judge(url) as judge:
        number, end = 0, time.monotonic() + SECONDS
        while time.monotonic() < end:
            number += 1
            # A new prompt each time: cached scores make no load.
            judge.compare(f"{path.stem}: {number} + 1?", ["2", "I cannot know.", "It depends."])
            page.wait_for_timeout(PAUSE)
    # Time for two more samples, which include the last calls.
    page.wait_for_timeout(4_500)
    page.evaluate("document.activeElement.blur()")
    page.screenshot(path=path, full_page=True)
    print(path)


def take_all(url: str, out: Path, names: Sequence[str]) -> None:
    """Take the screenshots with these names."""
    out.mkdir(parents=True, exist_ok=True)
    with open_browser() as browser:
        for name in names:
            width, scheme, mode = PICTURES[name]
            # The screenshot is as high as the page, whatever the viewport's height.
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            take(page, url, out / f"{name}.png", mode=mode)
            page.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Take the screenshots; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.screenshots", description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="URL of a running service without keys; unset: start one with made-up scores")
    parser.add_argument("--out", type=Path, default=Path("screenshots"), help="folder for the screenshots")
    parser.add_argument("--only", choices=PICTURES, nargs="+", default=list(PICTURES), help="take only these")
    options = parser.parse_args(argv)
    if options.url:
        take_all(options.url, options.out, options.only)
    else:
        with running_service("--engine", "fake") as service:
            take_all(service.url, options.out, options.only)
    return 0


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
