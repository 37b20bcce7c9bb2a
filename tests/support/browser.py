"""A real browser (headless Chromium), and pages that must neither complain nor ask the network for anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")

#: text elements and how far their colour is from what is behind them (WCAG's contrast ratio), the lowest first
CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((m, n) => n - m);
    return (x + 0.05) / (y + 0.05); };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const box = e.closest("svg") ? e.closest("svg").parentElement : e;
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const style = getComputedStyle(e);
    if (e.tagName === "text") found.push([e.textContent, ratio(rgb(style.fill), behind(box))]);
    else if (["rect", "circle"].includes(e.tagName)) found.push([e.tagName + " " + e.getAttribute("class"),
      1.5 * Math.max(ratio(rgb(style.fill), behind(box)),
        style.stroke === "none" ? 0 : ratio(rgb(style.stroke), behind(box)))]);
    else if (own && !["title", "desc", "STYLE"].includes(e.tagName)) found.push([e.textContent.trim(),
      ratio(rgb(style.color), behind(e))]);
  }
  return found.sort((a, b) => a[1] - b[1]);
}"""


@dataclass
class Visits:
    """Opens pages.

    Attributes:
        faults: errors on the console, exceptions of scripts, and requests to anywhere but the page's own place.
    """

    browser: Any
    faults: list[str] = field(default_factory=list)

    def open(self, url: str, width: int = 1200, scheme: str = "light") -> Any:
        """The page in a window of this width.

        Args:
            url: of a file, or of a server on this machine.
            scheme: the reader's wish, ``light`` or ``dark``.
        """
        page = self.browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        own = url if url.startswith("file:") else "/".join(url.split("/")[:3])

        def asked(request: Any) -> None:
            if not request.url.startswith((own, "data:", "blob:")):
                self.faults.append(f"asked for {request.url}")

        page.on("request", asked)
        page.on("console", lambda m: self.faults.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        page.goto(url)
        return page


def scrolls_sideways(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


def faint(page: Any, least: float = 4.5) -> list[Any]:
    """What is too close in colour to what is behind it: text under 4.5:1, bars and points under 3:1 (WCAG 2.2, AA)."""
    return [row for row in page.evaluate(CONTRASTS) if row[1] < least]


def _launched() -> Iterator[Any]:
    sync_api: Any = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install hf_vitprune[dev]")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


#: one browser a module: its event loop must not outlive it
browser: Callable[..., Any] = pytest.fixture(scope="module")(_launched)


@pytest.fixture
def visits(browser: Any) -> Iterator[Visits]:
    """Opens pages; the test fails where one of them complained or asked the network for something."""
    opened = Visits(browser)
    yield opened
    for context in browser.contexts:
        context.close()
    assert opened.faults == []
