"""A browser on a running `lbdt app`, for the tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# As root, without a network, and without what it would like to look up at its start.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def served(folder: Path, *options: str, end: int = signal.SIGINT) -> Iterator[str]:
    """The address of an `lbdt app` that runs in `folder`, and is ended by a signal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    errors = (folder / "stderr.txt").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "lbdt", "app", "--port", str(port), *options],
        cwd=folder,
        stderr=errors,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        late = time.monotonic() + 120
        while not _answers(url):
            errors.seek(0)
            assert process.poll() is None and time.monotonic() < late, errors.read()
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        errors.close()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, headless."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def visit(browser: Browser, url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
    """A visitor with a browser context of their own, on the page."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(url)
    button(page, "Generate").wait_for()
    return page


def button(page: Page, name: str) -> Any:
    """A button by its whole name."""
    return page.get_by_role("button", name=name, exact=True)


def status(page: Page, place: str = "status") -> str:
    """What a tab says."""
    return page.locator(f"#{place}").inner_text().strip()


def wait_for(page: Page, text: str, place: str = "status", seconds: float = 20) -> str:
    """Waits until a tab says something that begins so, and returns it."""
    pattern = re.compile("^" + re.escape(text))
    page.locator(f"#{place} .said").filter(has_text=pattern).wait_for(timeout=seconds * 1000)
    return status(page, place)


def settle(page: Page, **values: Any) -> None:
    """Numbers put into the settings, by the ids of their controls."""
    if not page.locator("#seed input").is_visible():
        page.get_by_role("button", name="Settings", exact=False).first.click()
    for name, value in values.items():
        field = page.locator(f"#{name} input[type=number]").first
        # Typed again where the page was not yet listening: then the slider beside it, or a redrawing, says so.
        for _ in range(40):
            field.fill(str(value))
            field.press("Tab")
            page.wait_for_timeout(250)
            shown = page.locator(f"#{name} input").evaluate_all("all => all.map(one => one.value)")
            if set(shown) == {str(value)}:
                break
        assert set(shown) == {str(value)}, (name, shown)


def choose(page: Page, place: str, names: list[str]) -> None:
    """Only these in a list of several, by the keyboard."""
    field = page.locator(f"#{place} input").first
    field.click()
    while page.locator(f"#{place} .token").count():
        field.press("Backspace")
    chosen = page.locator(f"#{place} .token")
    for number, name in enumerate(names, 1):
        for _ in range(20):
            field.fill(name)
            page.wait_for_timeout(150)
            field.press("Enter")
            page.wait_for_timeout(150)
            if chosen.count() == number:
                break
        assert name in chosen.nth(number - 1).inner_text()
    field.press("Escape")


def generate(page: Page) -> str:
    """Presses the button, and returns what is said in the end."""
    # What was said of the picture before must not be taken for this one's.
    page.evaluate("() => { document.querySelector('#status .said').textContent = '' }")
    button(page, "Generate").click()
    return wait_for(page, "Done:")


def download(page: Page, name: str, folder: Path) -> Path:
    """The file behind a button."""
    with page.expect_download() as waiting:
        button(page, name).click()
    target = folder / waiting.value.suggested_filename
    waiting.value.save_as(target)
    return target


def upload(page: Page, name: str, path: Path) -> None:
    """Gives a file to a button."""
    with page.expect_file_chooser() as waiting:
        button(page, name).click()
    waiting.value.set_files(path)


def source(page: Page, place: str) -> str:
    """The address of the picture that is shown."""
    return page.locator(f"#{place} img").first.get_attribute("src") or ""


def fetched(url: str) -> tuple[int, bytes]:
    """What an address answers."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def _answers(url: str) -> bool:
    try:
        return fetched(url)[0] == 200
    except OSError:
        return False
