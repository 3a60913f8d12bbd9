"""The documentation as a site: it builds without a warning, loads nothing from elsewhere, and what it quotes and runs is true."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gearnn_ray
from tests import tiny
from tests.conftest import ROOT

DOCS = ROOT / "docs"


# ── the site ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: uv sync --group docs")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: uv sync --group docs")
    built = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(built)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return built


class _Loaded(HTMLParser):
    """What a browser fetches for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag in ("script", "img", "iframe", "video", "source"):
            self.addresses.append(named.get("src") or "")
        if tag == "link" and named.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.addresses.append(named.get("href") or "")


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text())
        assert not [address for address in loaded.addresses if re.match(r"(https?:)?//", address)], page.name
    assert "url(http" not in (DOCS / "site.css").read_text()


def test_links_of_the_repository_are_links_of_the_site(site: Path) -> None:
    start = (site / "index.html").read_text()
    assert 'href="footage.html"' in start  # docs/footage.md in the README
    assert 'href="results/camvid.html"' in start
    serving = (site / "serving.html").read_text()
    assert 'href="files/gearnn_ray/service/detections.schema.json"' in serving  # a file beside the documentation
    assert json.loads((site / "files/gearnn_ray/service/detections.schema.json").read_text())


def test_lists_within_lists_are_such_on_the_site(site: Path) -> None:
    text = (site / "footage.html").read_text()
    assert re.search(r"<ul>\s*<li>black frames", text)


def test_the_reference_has_every_public_name() -> None:
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", (DOCS / "reference.md").read_text(), re.M)
    assert set(gearnn_ray.__all__) <= set(shown)


def test_the_options_of_every_job_are_on_the_site() -> None:
    jobs = set(re.findall(r"_run\((\w+Config),", (ROOT / "gearnn_ray/cli/main.py").read_text()))
    shown = re.findall(r"^::: gearnn_ray\.config\.\w+\.(\w+)$", (DOCS / "options.md").read_text(), re.M)
    assert jobs
    assert jobs <= set(shown)


# ── troubleshooting ──────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _templates(least: int) -> tuple[re.Pattern[str], ...]:
    """The texts of the code with anything where they have a value. least: characters in a row that they give themselves."""
    found = set[str]()
    for path in (ROOT / "gearnn_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
            literal = [
                piece.value if isinstance(piece, ast.Constant) and isinstance(piece.value, str) else "" for piece in pieces
            ]
            if max(map(len, literal), default=0) >= least:
                found.add("".join(re.escape(piece) or ".*" for piece in literal))
    return tuple(map(re.compile, sorted(found)))


def _is_said(text: str, least: int = 15) -> bool:
    return any(template.fullmatch(text) for template in _templates(least))


@pytest.mark.parametrize("sentence", re.findall(r"^> (.+)$", (DOCS / "troubleshooting.md").read_text(), re.M))
def test_the_code_still_says_what_troubleshooting_quotes(sentence: str) -> None:
    ends = [sentence[at.end() :] for at in re.finditer(": ", sentence)]
    # a sentence may be made of a beginning and an end
    assert _is_said(sentence) or (_is_said(sentence, 10) and any(map(_is_said, ends)))


# ── the tutorial ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.timeout(600)
def test_the_tutorial_runs_on_a_network_and_footage_of_ones_own(tmp_path: Path, ray_cluster: Mapping[str, str]) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: uv sync --group docs")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: uv sync --group docs")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: uv sync --group docs")
    network = "tests.nets:small"
    tiny.write_weights(tmp_path / "network.safetensors")
    random = np.random.default_rng(0)
    for clip in ("monday", "tuesday"):
        (tmp_path / "walks" / clip).mkdir(parents=True)
        for number in range(4):
            blocks = random.integers(0, 256, (6, 8, 3)).astype(np.uint8)
            Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8))).save(tmp_path / "walks" / clip / f"{number}.png")
    program = tmp_path / "bin" / "gearnn"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom gearnn_ray.cli.commands import main\nsys.exit(main())\n")
    program.chmod(0o755)

    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    (given,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    given.source = (
        f"footage, network, weights, num_classes = 'walks', {network!r}, 'network.safetensors', 3\n"
        "levels, budget, epochs = ['jpeg-10'], '20%', 1"
    )
    paths = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, **ray_cluster, **paths, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)})

    assert gearnn_ray.Store(tmp_path / "artifacts").pull("tutorial:latest").levels == ("jpeg-10",)
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "JPEG quality 10: found jpeg-10, answered by jpeg-10" in printed
