"""Write the table of docs/reliability.md from docs/reliability/figures.json, which `make campaigns` has written."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).parent
FIGURES, PAGE = DOCS / "reliability" / "figures.json", DOCS / "reliability.md"


def table() -> str:
    """Markdown: a line a campaign, and on what they ran."""
    figures = json.loads(FIGURES.read_text())
    machine = figures["machine"]
    lines = ["| campaign | cases | what came of them | seconds |", "|---|---:|---|---:|"]
    for name, entry in sorted(figures["campaigns"].items()):
        outcomes = ", ".join(f"{count:,} {what}" for what, count in entry["outcomes"].items())
        lines.append(f"| {name} | {entry['cases']:,} | {outcomes} | {entry['seconds']:,} |")
    ran_on = f"PyTorch {machine['torch']}, Python {machine['python']}, a CPU with {machine['cpu'] or 'no vectors'}."
    return "\n".join([*lines, "", ran_on])


def page(text: str) -> str:
    """The page with the table of today."""
    return re.sub(r"(<!-- figures -->\n).*?(\n<!-- end -->)", rf"\g<1>{table()}\g<2>", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
