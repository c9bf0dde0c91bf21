"""What mkdocs needs to show this repository: pages that lie outside docs/, and links that lead out of it."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "https://github.com/qtdog/qtdog/blob/main/"
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}  # in the repository -> in the site
RELATIVE_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie beside docs/, and the reference, whose names are those that `qkernels` lists."""
    for source, page in OUTSIDE.items():
        text = RELATIVE_LINK.sub(from_root, (ROOT / source).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def from_root(link: re.Match[str]) -> str:
    """A link of a page in the repository's root, as the site has it."""
    target = link[1]
    if target in OUTSIDE:
        return f"]({OUTSIDE[target]})"
    return f"]({target.removeprefix('docs/')})" if target.startswith("docs/") else f"]({BRANCH}{target})"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ lead to the repository; the list of public names is put where a page asks for it."""
    markdown = re.sub(r"\]\((?:\.\./)+(?!performance\.md)([^)]+)\)", lambda link: f"]({BRANCH}{link[1]})", markdown)
    return markdown.replace("<!-- public names -->", "\n\n".join(public_names()))


def public_names() -> list[str]:
    """A directive for each name in `qkernels.__all__`, read without importing the package."""
    source = (ROOT / "qkernels" / "__init__.py").read_text()
    listed = re.search(r"__all__ = \[(.*?)\]", source, re.DOTALL)
    assert listed is not None
    return [f"::: qkernels.{name}" for name in re.findall(r'"(\w+)"', listed[1])]
