"""The site's pages beside those of this folder: the repository's README, CHANGELOG and CONTRIBUTING, the tutorial's notebook, and
what pages link to elsewhere in the repository. No text stands twice: links are written for the repository, and changed here.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/tutorial.ipynb": "tutorial.md",
}
"""Files of the repository by path, and the page that each one becomes."""

_LINK = re.compile(r"(?P<named>\[[\w./]+\.md)?\]\((?P<path>[^)#:\s]+)(?P<at>#[^)\s]*)?\)")
_INDENT = re.compile(r"^ +", re.M)
_CODE = re.compile(r"(^```.*?^```|^~~~.*?^~~~)", re.S | re.M)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made, and what pages link to outside this folder."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=notebook_text(text) if source.endswith(".ipynb") else text))
    sources = {page: source for source, page in PAGES.items()}
    for file in list(files.documentation_pages()):
        source = sources.get(file.src_uri, f"docs/{file.src_uri}")
        for linked in linked_files(source, file.content_string):
            page = page_of(linked)
            if page.startswith("files/") and files.get_file_from_path(page) is None:
                files.append(File.generated(config, page, abs_src_path=str(ROOT / linked)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links of the repository as links of the site, with titles in place of files' names, and lists indented by two as
    Python-Markdown reads them: by four.
    """
    titles = {path: title for group in config.nav for pages in group.values() for each in pages for title, path in each.items()}
    here = page.file.src_uri
    source = next((source for source, own in PAGES.items() if own == here), f"docs/{here}")

    def replaced(link: re.Match[str]) -> str:
        target = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"])))
        text = f"[{titles.get(target, link['named'][1:])}" if link["named"] else ""
        return f"{text}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{link['at'] or ''})"

    parts = _CODE.split(markdown)  # text, code, text, …
    parts[::2] = [_INDENT.sub(lambda spaces: 2 * spaces[0], _LINK.sub(replaced, text)) for text in parts[::2]]
    return "".join(parts)


def page_of(path: str) -> str:
    """Where the site has a file of the repository."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")


def linked_files(source: str, text: str) -> set[str]:
    """Files of the repository that a page links to, by path. source: the page's own path."""
    links = (link for prose in _CODE.split(text)[::2] for link in _LINK.finditer(prose))
    paths = {posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"])) for link in links}
    return {path for path in paths if (ROOT / path).is_file()}


def notebook_text(text: str) -> str:
    """A notebook as Markdown: its cells in order, with what they printed."""
    parts = list[str]()
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in cell["outputs"])
        if printed.strip():
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts)
