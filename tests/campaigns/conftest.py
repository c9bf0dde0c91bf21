"""Each campaign enters what it came to, for docs/reliability.md: `make campaigns` runs all and writes that page."""

import json
import os
import platform
import time
from pathlib import Path

import pytest
import torch

from qkernels.ops import library

FIGURES = Path(__file__).parents[2] / "docs" / "reliability" / "figures.json"
WRITES = "CAMPAIGN_FIGURES"  # set where the figures are to be kept


@pytest.fixture
def figures(request):
    """Enters a campaign under its name: figures("mutated files", cases=10_000, outcomes={"refused": 9_000, ...})."""
    began = time.monotonic()

    def enter(name: str, cases: int, outcomes: dict[str, int]) -> None:
        entry = {"cases": cases, "outcomes": outcomes, "seconds": round(time.monotonic() - began)}
        print(f"\n{name}: {entry}")
        if os.environ.get(WRITES) and request.node.get_closest_marker("nightly"):
            known = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {"campaigns": {}}
            known["machine"] = {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cpu": " ".join(library.cpu_features()),
            }
            known["campaigns"][name] = entry
            FIGURES.parent.mkdir(exist_ok=True)
            FIGURES.write_text(json.dumps(known, indent=1) + "\n")

    return enter
