"""The hook of mkdocs.yml: makes pages that GitHub shows as they are into pages of the site.

Headings get the anchors that GitHub gives them. Links may leave docs/: a few files of the repository are on
the site too, and a link to any other becomes its text and the path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Pages of the site that do not lie in docs/.
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
PICTURES = "benchmarks/results/"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def anchor(title: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def address(path: str) -> str | None:
    """Where a file of the repository is on the site, as mkdocs names sources; None if it is not there."""
    if path in PAGES:
        return path
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith(PICTURES) and path.endswith(".png"):
        return path.removeprefix("benchmarks/")
    return None


def for_site(markdown: str, page: str) -> str:
    """A page with its links as the site has them.

    Args:
        page: path of the page's source in the repository.
    """

    def replace(match: re.Match) -> str:
        picture, text, link, heading = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
        if not (ROOT / path).exists():
            return match[0]  # for mkdocs to report
        target = address(path)
        if target is None:
            return text if path in text else f"{text} (`{path}`)"
        relative = posixpath.relpath(target, posixpath.dirname(address(page)) or ".")
        return f"{picture}[{text}]({relative}{heading or ''})"

    return LINK.sub(replace, markdown)


def on_config(config):
    config.mdx_configs.setdefault("toc", {})["slugify"] = lambda title, separator: anchor(title)
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    pictures = (path.relative_to(ROOT).as_posix() for path in (ROOT / PICTURES).glob("*.png"))
    for path in (*PAGES, *pictures):
        files.append(File.generated(config, address(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    return for_site(markdown, source)
