"""docs/models.md from docs/models/networks.json."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from .judging import LARGEST_DIFFERENCE, Row

DOCS = Path(__file__).parents[2] / "docs"
ROWS, PAGE = DOCS / "models" / "networks.json", DOCS / "models.md"
INTRODUCTION = """# Models

Look up your backbone before you start. The smallest network of every module of timm and of torchvision's
classification models, and the well-known ones, with random weights, were quantized to 7 bit, trained a step with fused
weights, packed with a second member, saved, and loaded in a fresh process. `python -m benchmarks.zoo` makes this
page anew; `python -m benchmarks.zoo NAME` adds networks or judges them again.

- **quantized**: the share of its parameters; the rest are the last layer, norms, biases and embeddings. **scales**:
  those with a gradient after the step, of all; stochastic depth may leave out layers, then there were up to ten.
- **packed**: in one graph of all members; or the members in turn, with the reason, which costs speed and needs the
  model's code to load, and changes no answer. **difference**: of the packed members' logits to those of the quantized
  models, relative to the largest, on other images than it was packed with. **integers**: how far 8-bit activations
  move the logits; with random weights this says no more than that they run.
"""


def read_rows() -> dict[str, Row]:
    """The committed rows, by name."""
    return {plain["name"]: Row(**plain) for plain in json.loads(ROWS.read_text())["networks"]}


def write_rows(rows: dict[str, Row]) -> None:
    """The rows, and the page of them."""
    versions = {name: version(name) for name in ("torch", "timm", "torchvision")}
    networks = [asdict(rows[name]) for name in sorted(rows, key=lambda name: (rows[name].family, name))]
    ROWS.write_text(json.dumps({"versions": versions, "networks": networks}, indent=1) + "\n")
    PAGE.write_text(page())


def page() -> str:
    """The page as text."""
    rows = list(read_rows().values())
    versions = ", ".join(f"{name} {of}" for name, of in json.loads(ROWS.read_text())["versions"].items())
    lines = [
        INTRODUCTION,
        f"Of {len(rows)} networks {sum(row.trains for row in rows)} train all their scales; "
        f"{sum(row.packs for row in rows)} pack with logits within {LARGEST_DIFFERENCE:g} and load with the same bits, "
        f"{sum(row.packs and row.in_turn is None for row in rows)} of them in one graph. {versions}.\n",
        "| network | family | image | parameters | quantized | scales | packed | difference | loads | integers |",
        "|---|---|---:|---:|---:|---:|---|---:|---|---:|",
        *map(line, rows),
    ]
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    """One network."""
    packed = "one graph" if row.in_turn is None else f"in turn: {row.in_turn}"
    if row.moved is not None:
        packed += f"; one ulp of the images moves its own logits by {row.moved:.0e}"
    if row.error:
        packed = f"**failed**: {row.error}"
    cells = [
        f"`{row.name}`",
        row.family,
        str(row.image or ""),
        f"{row.parameters / 1e6:.1f} M",
        f"{row.quantized:.1%}",
        f"{row.trained}/{row.scales}",
        packed.replace("|", "\\|").replace("<", "&lt;"),
        "" if row.difference is None else f"{row.difference:.0e}",
        "yes" if row.loads else "no",
        "" if row.integers is None else f"{row.integers:.0e}",
    ]
    return f"| {' | '.join(cells)} |"
