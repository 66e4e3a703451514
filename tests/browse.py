"""Opens each page of a built site in Chromium, wide and narrow, and says what is wrong there.

    python tests/browse.py SITE SCREENSHOTS

`make docs-check` runs it. Wrong is: an error or warning in the console, a request that failed or
went elsewhere, a link within the site that leads nowhere, an address that is none, a page that is
wider than the screen, an image without pixels, and a search that does not find Adam.
"""

from __future__ import annotations

import functools
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

from playwright.sync_api import Browser, sync_playwright

SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
# Widths are of the page; links and ids are of what scripts have made of it.
LOOK = """() => ({
    width: document.documentElement.scrollWidth,
    links: [...document.querySelectorAll("a[href]")].map(a => [a.href, a.getAttribute("href")]),
    ids: [...document.querySelectorAll("[id], a[name]")].map(e => e.id || e.name),
    blank: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
    text: document.querySelector("article").innerText.length,
})"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """A line a request would hide what is wrong."""


def look(browser: Browser, address: str, screen: str, picture: Path) -> tuple[Any, list[str]]:
    """What there is on a page, and what is wrong as it stands alone."""
    width, height = SCREENS[screen]
    page = browser.new_page(viewport={"width": width, "height": height})
    wrong: list[str] = []
    page.on(
        "console",
        lambda said: said.type in ("error", "warning") and wrong.append(f"console: {said.text}"),
    )
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("requestfailed", lambda request: wrong.append(f"not fetched: {request.url}"))
    page.on(
        "response",
        lambda got: got.status >= 400 and wrong.append(f"{got.status}: {got.url}"),
    )
    host = urlsplit(address).netloc
    page.on(
        "request",
        lambda asked: (
            urlsplit(asked.url).scheme in ("http", "https")
            and urlsplit(asked.url).netloc != host
            and wrong.append(f"fetched from elsewhere: {asked.url}")
        ),
    )
    page.goto(address, wait_until="networkidle")
    found = page.evaluate(LOOK)
    page.screenshot(path=picture, full_page=True)
    page.close()
    if found["width"] > width:
        wrong.append(f"{found['width']} pixels wide on a screen of {width}")
    wrong += [f"empty image: {source}" for source in found["blank"]]
    if found["text"] < 100:
        wrong.append("hardly a word on it")
    return found, wrong


def dead(pages: dict[str, Any], site: Path, root: str) -> Iterator[tuple[str, str]]:
    """Pairs of a page and what is wrong with a link on it."""
    for address, found in pages.items():
        for link, written in found["links"]:
            target, name = urldefrag(link)
            if not target.startswith(root):
                parts = urlsplit(written)  # before the browser has mended it
                if parts.scheme not in ("http", "https", "mailto") or not (
                    parts.netloc or parts.path
                ):
                    yield address, f"no address: {written}"
            elif not (site / urlsplit(target).path.lstrip("/")).exists():
                yield address, f"dead link: {written}"
            elif name and target in pages and name not in pages[target]["ids"]:
                yield address, f"nothing of that name: {written}"


def searched(browser: Browser, root: str, picture: Path) -> Iterator[str]:
    page = browser.new_page()
    page.goto(f"{root}index.html", wait_until="networkidle")
    page.get_by_placeholder("Search").first.click()
    page.keyboard.type("global_clipnorm")
    try:
        page.wait_for_selector(".md-search-result__item", timeout=10_000)
    except Exception as error:
        yield f"the search finds nothing: {error}"
    page.screenshot(path=picture)
    page.close()


def main(site: Path, pictures: Path) -> int:
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site.resolve()))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}/"
    # 404.html is for a server of another place: its links are absolute.
    files = [p for p in sorted(site.rglob("*.html")) if p.name != "404.html"]
    faults: list[tuple[str, str]] = []
    pages: dict[str, Any] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for file in files:
            name = file.relative_to(site).as_posix()
            for screen in SCREENS:
                picture = pictures / f"{name.replace('/', '-').removesuffix('.html')}-{screen}.png"
                pages[root + name], wrong = look(browser, root + name, screen, picture)
                faults += [(f"{name} ({screen})", each) for each in wrong]
        faults += [("search", each) for each in searched(browser, root, pictures / "search.png")]
        browser.close()
    server.shutdown()
    faults += [(page.removeprefix(root), each) for page, each in dead(pages, site, root)]
    for page, fault in faults:
        print(f"{page}: {fault}")
    links = sum(len(found["links"]) for found in pages.values())
    print(f"{len(files)} pages, {links} links, {len(faults)} faults; pictures in {pictures}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
