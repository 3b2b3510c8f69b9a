"""A page of headless Chromium for tests of what people look at.

A test file that names this module in `pytest_plugins` has the fixture `open_page`. It opens a file
or an address in a window of some width and keeps what a user never sees: errors, and requests that
leave the page. Without playwright or Chromium the tests that ask for it are skipped.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Opened:
    """A page that was opened.

    Attributes:
        page: playwright's page, for clicks, locators and `evaluate`.
        errors: messages of the console's errors and of uncaught exceptions.
        requests: addresses that were asked for, the page's own first.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than its window; 0 where it does not scroll."""
        width = "document.scrollingElement.scrollWidth - document.documentElement.clientWidth"
        return int(self.page.evaluate(width))


OpenPage = Callable[..., Opened]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser, started once for all tests."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[OpenPage]:
    """Open an address: `open_page(path.as_uri(), width=390)`.

    Other keywords are those of `Browser.new_context`. Pages are closed after the test.
    """
    contexts = []

    def open_it(address: str, width: int = 1280, height: int = 900, **options: Any) -> Opened:
        size = {"width": width, "height": height}
        context = chromium.new_context(viewport=size, **options)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("console", lambda said: _keep(opened, said.type, said.text))
        opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.goto(address)
        return opened

    yield open_it
    for context in contexts:
        context.close()


def _keep(opened: Opened, kind: str, text: str) -> None:
    """Keep what the console says if it is an error."""
    if kind == "error":
        opened.errors.append(text)
