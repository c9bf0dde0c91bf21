"""The plots of docs/performance.md, one of each kind a machine, as SVG."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]
COLORS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
STYLE: Any = {
    "svg.hashsalt": "qtdog",  # the same results give the same file
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}


def write(machine: Row, folder: Path) -> list[tuple[str, str]]:
    """Draw what the machine has results for; returns (file name, title) of each plot."""
    folder.mkdir(exist_ok=True, parents=True)
    written = []
    with plt.rc_context(STYLE):
        for kind, title, draw in (
            ("sizes", "Time of fake_quantize against size", time_against_size),
            ("roofline", "Our kernels below the roofline", below_the_roofline),
            ("steps", "Where the time of a training step goes", step_breakdown),
        ):
            figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
            if draw(axes, machine):
                axes.set_title(f"{title}\n{machine['machine']}", fontsize=11)
                name = f"{machine['name']}-{kind}.svg"
                figure.savefig(folder / name, metadata={"Date": None})
                written.append((name, title))
            plt.close(figure)
    return written


def rows_of(machine: Row, *cases: str) -> Iterator[tuple[str, Row]]:
    """(case, row) of the cases that end so, or of all, with the default allocator."""
    for name, case in machine["cases"].items():
        if not cases or name.endswith(cases):
            yield from ((name, row) for row in case["rows"] if row["allocator"] == "default")


def time_against_size(axes: Axes, machine: Row) -> bool:
    """Forward + backward of single float32 tensors; a line a contender, at each size the median of its shapes."""
    points: dict[str, dict[int, list[float]]] = {}
    for _, row in rows_of(machine, "bench_weight", "bench_activation"):
        if "float32" in row["parameters"] and "forward + backward" in row["parameters"]:
            for name, times in row["contenders"].items():
                points.setdefault(name, {}).setdefault(row["size"], []).append(times["milliseconds"][1])
    for name, of_size in points.items():
        sizes = sorted(of_size)
        axes.loglog(sizes, [median(of_size[size]) for size in sizes], marker="o", markersize=4, label=name)
    axes.set(xlabel="elements", ylabel="forward + backward, ms")
    axes.grid(alpha=0.3)
    if points:
        axes.legend(frameon=False)
    return bool(points)


def below_the_roofline(axes: Axes, machine: Row) -> bool:
    """Operations a second against operations a byte: ours, and the roofs."""
    roofline = machine["roofline"]
    rates = {name: rate for name, rate in roofline.items() if name != "bandwidth"}
    intensities = [2 ** (i / 8) for i in range(-24, 104)]
    for color, (name, rate) in zip(COLORS, rates.items(), strict=False):
        roof = [min(i * roofline["bandwidth"], rate) / 1e9 for i in intensities]
        axes.loglog(intensities, roof, color=color, linewidth=1, label=f"roof, {name}")
    points = [
        (costs, row["contenders"][name]["milliseconds"][1] / 1e3)
        for _, row in rows_of(machine)
        for name, costs in row["work"].items()
    ]
    for costs, seconds in points:
        nbytes, operations = sum(c[0] for c in costs), sum(c[1] for c in costs)
        rate = max(costs, key=lambda cost: cost[1])[2]
        color = COLORS[list(rates).index(rate if rate in rates else "float32")]
        axes.plot(operations / nbytes, operations / seconds / 1e9, "o", color=color, alpha=0.7)
    axes.set(xlabel="operations a byte", ylabel="billion operations a second")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return bool(points)


def step_breakdown(axes: Axes, machine: Row) -> bool:
    """Forward, backward and update of a training step; a bar a contender."""
    labels, bars = [], []
    for case, row in rows_of(machine):
        for name, phases in row["phases"].items():
            labels.append(f"{name}, {case.rpartition('bench_')[2]}, {row['parameters'].partition(',')[0]}")
            bars.append(phases)
    for color, phase in zip(COLORS, bars[0] if bars else (), strict=False):
        before = [sum(list(b.values())[: list(b).index(phase)]) for b in bars]
        axes.barh(labels, [b[phase] for b in bars], left=before, color=color, label=phase)
    axes.set(xlabel="ms")
    axes.invert_yaxis()
    if bars:
        axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.4, -0.28))
    return bool(bars)
