"""The page as it is served: its files, its policy, what it was built from, and the routes it alone asks."""

import base64
import gzip
import hashlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from seekvl.serve.page import FOLDER, POLICY, page_files, read_page
from tests.serve.conftest import Running, Start

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SOURCES = ROOT / "page"
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
SUMS = "sums.txt"
"""What the build wrote down: a sum of every source and of every built file."""


def test_browsers_get_the_page_and_others_the_routes(server: Running) -> None:
    page = server.ask("GET", "/", headers=HTML)
    assert page.headers["content-type"].startswith("text/html")
    assert page.content == page_files()["index.html"].content
    listed = server.ask("GET", "/", headers={"Accept": "*/*"})
    assert "POST /v1/chat/completions" in listed.json()["routes"]
    assert "accept" in listed.headers["vary"].lower()


def test_every_file_of_the_page_has_a_strict_policy(server: Running) -> None:
    for path, file in page_files().items():
        found = server.ask("GET", f"/page/{path}")
        assert found.content == file.content
        assert found.headers["content-security-policy"] == POLICY
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["content-type"].split(";")[0] == file.kind
        assert file.kind != "application/octet-stream"
    assert "unsafe" not in POLICY
    assert "default-src 'self'" in POLICY
    assert "frame-ancestors 'none'" in POLICY


def test_the_page_holds_no_inline_script_or_style_and_names_no_other_host() -> None:
    index = page_files()["index.html"].content.decode()
    assert re.search(r"<script(?![^>]*\bsrc=)", index) is None
    assert "<style" not in index
    assert re.search(r"\bon\w+=", index) is None
    for source in re.findall(r'(?:src|href)="([^"]*)"', index):
        assert source.startswith("/page/")
        assert source.removeprefix("/page/") in page_files()


def test_a_copy_that_is_still_good_is_not_sent_again(server: Running) -> None:
    first = server.ask("GET", "/page/page.js")
    again = server.ask("GET", "/page/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["../page.py", "..%2fpage.py", "%2e%2e/page.py", "/etc/passwd", "", "x"])
def test_nothing_beside_the_page_is_served(server: Running, path: str) -> None:
    found = server.ask("GET", f"/page/{path}")
    assert found.status_code == 404
    assert b"import" not in found.content


def test_the_examples_are_those_of_the_repository() -> None:
    for name in ("chart.png", "shapes.png", "sign.png"):
        assert page_files()[f"examples/{name}"].content == (EXAMPLES / name).read_bytes()


def test_files_that_are_not_there_are_not_served(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.css").write_text("x")
    assert {path: file.kind for path, file in read_page(tmp_path).items()} == {"a/b.css": "text/css"}
    assert read_page(tmp_path / "none") == {}
    assert FOLDER.is_dir()


def test_the_page_opens_without_a_key_and_asks_for_it(start: Start) -> None:
    guarded = start(api_keys=("secret",))
    assert guarded.ask("GET", "/", headers=HTML).status_code == 200
    assert guarded.ask("GET", "/page/page.js").status_code == 200
    assert guarded.ask("GET", "/", headers={"Accept": "application/json, text/html;q=0.5"}).status_code == 401
    for route in ("/v1/page/picture", "/v1/page/pdf"):
        assert guarded.ask("POST", route, json={}).status_code == 401


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x.png", "http://169.254.169.254/", "file:///etc/hostname", "data:image/png,x"]
)
def test_pictures_are_fetched_for_the_page_under_the_same_rules(server: Running, url: str) -> None:
    found = server.ask("POST", "/v1/page/picture", json={"url": url})
    assert found.status_code == 400
    assert found.json()["error"]["code"] == "invalid_image"


def test_a_picture_comes_as_it_is(start: Start) -> None:
    local = start(file_root=EXAMPLES)
    address = (EXAMPLES / "sign.png").as_uri()
    found = local.ask("POST", "/v1/page/picture", json={"url": address})
    assert found.content == (EXAMPLES / "sign.png").read_bytes()
    assert found.headers["content-type"] == "image/png"


def test_what_the_model_saw_is_told_with_its_tiles(server: Running) -> None:
    asked = {"model": "seekvl/seekvl-nano", "messages": shown("sign.png"), "temperature": 0}
    (seen,) = server.ask("POST", "/v1/chat/completions", json=asked).json()["pictures"]
    assert seen["tile"] == 256
    assert seen["tile_tokens"] == seen["tokens"] == 100
    assert server.ask("GET", "/v1/models").json()["data"][0]["context_length"] > 1000


def shown(name: str) -> list[dict[str, object]]:
    data = io.BytesIO()
    with Image.open(EXAMPLES / name) as picture:
        picture.save(data, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Where is the sign?"}]
    return [{"role": "user", "content": parts}]


# What it was built from


def sums(folder: Path) -> dict[str, str]:
    """The files below a folder, but for packages, what an editor hides, and the sums themselves."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    hidden = re.compile(r"(?:^|/)(?:node_modules/|\.)")
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
        if name != SUMS and not hidden.search(name)
    }


def noted() -> dict[str, dict[str, str]]:
    """The two lists of the build, by their headings."""
    found: dict[str, dict[str, str]] = {}
    heading = ""
    for line in (FOLDER / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        if name:
            found[heading][name] = digest
        else:
            heading = line
            found[heading] = {}
    return found


def test_the_built_page_is_that_of_its_sources() -> None:
    assert noted()["sources"] == sums(SOURCES), "page/ has changed since it was built: make page"
    assert noted()["built"] == sums(FOLDER), "built files were changed by hand: make page"


def test_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    vite = SOURCES / "node_modules" / "vite" / "bin" / "vite.js"
    if shutil.which("node") is None or not vite.exists():
        pytest.skip("needs Node and the packages of page/: make page")
    command = ["node", str(vite), "build", "--outDir", str(tmp_path), "--emptyOutDir"]
    built = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    again = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
    assert set(again) == set(page_files())
    for name, path in again.items():
        assert path.read_bytes() == page_files()[name].content, name


def test_the_size_of_the_page_is_the_documented_one() -> None:
    stated = re.search(r"(\d+) KB, (\d+) KB compressed", (ROOT / "docs" / "serving.md").read_text())
    assert stated
    loaded = [page_files()[name].content for name in ("index.html", "page.js", "page.css", "icon.svg")]
    for size, words in zip(
        (sum(map(len, loaded)), sum(len(gzip.compress(file)) for file in loaded)),
        stated.groups(),
        strict=True,
    ):
        assert size / 1000 == pytest.approx(int(words), rel=0.05)
