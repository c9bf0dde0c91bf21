from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def write_performance_page(): pass

def result_lines(result: dict[str, Any]):
    yield f"  {result['parameters']}: {result['rounds']} rounds"
    width = max(map(len, [*result["contenders"], *result["absent"]]))
    for name, row in result["contenders"].items():
        low, middle, high = row["ratio"]
        yield f"    {name:{width}} {row['milliseconds'][1]:10.3f} ms {middle:7.2f} ({low:.2f}..{high:.2f})"
    for name, why in result["absent"].items():
        yield f"    {name:{width}} {why}"
    for name, fact in result["facts"].items():
        yield f"    {name}: {fact}"
