# SPDX-License-Identifier: Apache-2.0
"""Debian's Chromium, driven by Playwright; every console error of a page fails its test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
PHONE = {"width": 390, "height": 844}


@contextmanager
def page(**options: Any) -> Iterator[Any]:
    """A page in a fresh browser; expects no error or warning on its console.

    Failed requests are logged by the browser itself and are left to the tests.
    """
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing; install it with `apt-get install chromium`")
    api = pytest.importorskip("playwright.sync_api")
    problems: list[str] = []

    def note(message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            problems.append(message.text)

    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            tab = chromium.new_context(**options).new_page()
            tab.set_default_timeout(30_000)
            tab.on("console", note)
            tab.on("pageerror", lambda error: problems.append(str(error)))
            yield tab
        finally:
            chromium.close()
    assert problems == []


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Poll from here: the page's security policy forbids Playwright's own way, by `eval`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there in time"
        time.sleep(0.05)


def number(tab: Any, name: str) -> float:
    """The number on the page, as the API gave it."""
    return float(tab.get_attribute(f"#{name}", "data-value") or "nan")
