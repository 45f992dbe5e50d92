"""The page in a browser: nothing of a repo's runs, nothing is fetched, and it is not empty. With controls that do run.

The browser is a headless Chromium; without one these tests are skipped, and say so.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import isohub
from isohub import errors
from tests.comparison.conftest import Compared, git

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

PAYLOADS = (
    "<script>document.title='owned'</script>",
    "\"'><img src=x onerror=\"document.title='owned'\">",
    "<img src='http://127.0.0.1:PORT/seen'>",
    "</code></td></table><iframe src='http://127.0.0.1:PORT/seen'></iframe>",
    "<style>@import 'http://127.0.0.1:PORT/seen';</style>",
    "{{ 7*7 }}{% for x in y %}",
    "$\\\\frac{1}{0}$",
    "\\u202egnp.exe\\x1b[2J\\u2066",
)
HUBCONF = """
import torch
from torch import nn

PAYLOADS = {payloads!r}
CHANGE = {change}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for number, text in enumerate(PAYLOADS):
            text = text.encode().decode("unicode_escape").replace(".", ",")
            self.register_buffer(text, torch.arange(4.0) + CHANGE * (number + 1))
            kind = type(text, (nn.Identity,), {{"extra_repr": lambda self, text=text: text + str(CHANGE)}})
            self.add_module(f"m{{number}} " + text, kind())

    def forward(self, x):
        answer = {{text: x + CHANGE for text in PAYLOADS}}
        answer["text"] = "".join(PAYLOADS) + str(CHANGE)
        return answer


def model():
    if CHANGE == 2:
        raise type(PAYLOADS[0], (RuntimeError,), {{}})("".join(PAYLOADS))
    return Net()
"""


class Seen(ThreadingHTTPServer):
    """A server that knows what it was asked."""

    def __init__(self) -> None:
        paths = self.paths = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paths.append(self.path)
                self.send_error(404)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def server() -> Iterator[Seen]:
    with Seen() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, session: isohub.Session, server: Seen) -> isohub.Comparison:
    repo = tmp_path_factory.mktemp("hostile") / "repo"
    repo.mkdir()
    git(repo, "init", "--quiet")
    payloads = [text.replace("PORT", str(server.server_port)) for text in PAYLOADS]
    for change in range(3):
        (repo / "hubconf.py").write_text(HUBCONF.format(payloads=payloads, change=change))
        if change == 1:
            for number, text in enumerate(payloads):
                name = text.encode().decode("unicode_escape").replace("/", "_").replace("\\", "_")
                (repo / f"{number}{name}\n.py").write_text("x\n")
        git(repo, "add", "--all")
        git(repo, "commit", "--quiet", "-m", "x")
        git(repo, "tag", f"t{change}")
    refs = [f"{repo}:t{number}" for number in range(3)]
    return isohub.compare(refs, "model", "randn(3)", repeats=3, session=session)


class Parser(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, (value or "")[:19]) for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.words += data


TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "p",
    "code",
    "div",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "figure",
    "picture",
    "source",
    "img",
    "figcaption",
    "footer",
}


def test_a_hostile_repo_s_page_holds_text_alone(hostile: isohub.Comparison) -> None:
    page = hostile.to_html()
    found = Parser(page)
    assert found.tags == TAGS
    names = {name for name, _ in found.attributes}
    assert names == {"lang", "charset", "http-equiv", "content", "name", "class", "src", "srcset", "media", "alt"}
    assert {value for name, value in found.attributes if name in ("src", "srcset")} == {"data:image/svg+xml;"}
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert "<script>document.title='owned'</script>" in found.words
    assert "{{ 7*7 }}{% for x in y %}" in found.words
    assert "\\u202egnp.exe\\x1b[2J\\u2066" in found.words
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)
    for picture in re.findall(r"base64,([A-Za-z0-9+/=]+)", page):
        svg = base64.b64decode(picture).decode()
        assert "owned" not in svg  # letters are outlines
        assert not re.search(r"<script|<foreignObject|<image|href=\"(?!#)|\son\w+=", svg)


def test_a_hostile_repo_s_other_forms(hostile: isohub.Comparison) -> None:
    for text in (str(hostile), hostile.to_markdown(), hostile.to_json(), hostile._repr_html_(), repr(hostile)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert Parser(hostile._repr_html_()).tags <= TAGS | {"b", "h4"}


def browse(page: Path, *options: str, profile: Path) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


@needs_chromium
def test_nothing_of_it_runs_or_is_fetched_in_a_browser(
    hostile: isohub.Comparison, server: Seen, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(hostile.to_html(), encoding="utf-8")
    port = str(server.server_port)
    (tmp_path / "control.html").write_text("<title>x</title>" + "".join(PAYLOADS[:5]).replace("PORT", port))
    server.paths.clear()
    shown = browse(tmp_path / "page.html", "--dump-dom", profile=tmp_path / "profile")
    assert "<title>compare model</title>" in shown
    assert Parser(shown).tags == TAGS
    assert server.paths == []
    shown = browse(tmp_path / "control.html", "--dump-dom", profile=tmp_path / "profile")
    assert "<title>owned</title>" in shown
    assert "/seen" in server.paths


@needs_chromium
@pytest.mark.parametrize("width", [1200, 390])
def test_it_is_seen_on_a_wall_and_on_a_phone(compared: Compared, tmp_path: Path, width: int) -> None:
    from PIL import Image

    compared("base", "values", "broken", repeats=5).save(tmp_path / "page.html")
    picture = tmp_path / "page.png"
    options = f"--screenshot={picture}", f"--window-size={width},1200"
    browse(tmp_path / "page.html", *options, profile=tmp_path / "profile")
    shown = Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")
    assert shown.size == (width, 1200)
    colours = {colour for _, colour in shown.getcolors(1 << 22)}
    assert (31, 111, 235) in colours  # a plot's bars
    assert len(colours) > 50
    if width == 390:  # nothing but tables, which scroll by themselves, is wider than a phone
        right = shown.crop((width - 6, 0, width, 60))
        assert len(right.getcolors()) == 1


def test_a_page_is_the_same_whenever_it_is_made(compared: Compared) -> None:
    found = compared("base", "values")
    assert found.to_html() == found.to_html()


def test_what_is_not_installed_is_said(compared: Compared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = compared("base", "same")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else object())
    with pytest.raises(errors.MissingExtraError, match="needs matplotlib") as caught:
        found.save(tmp_path / "page.html")
    assert caught.value.hint == "python -m pip install 'isohub[report]'"
    assert isinstance(caught.value, ImportError)
    assert list(tmp_path.iterdir()) == []
