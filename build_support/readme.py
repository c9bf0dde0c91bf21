"""The README as the package index shows it: its links and pictures are those of this version in the repository."""

import re
import tomllib
from pathlib import Path


def readme(root: Path, version: str) -> str:
    """README.md of the checkout `root`, its relative links made absolute."""
    urls = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        kind, query = ("raw", "?sanitize=true") if picture else ("blob", "")  # GitHub serves an SVG as text without
        return f"{picture}[{text}]({urls['Repository']}/{kind}/v{version}/{target}{query})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!\w+:|#)([^)]+)\)", absolute, (root / "README.md").read_text())
