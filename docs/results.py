"""Write docs/results.md and the README's table from docs/results/*.json, or take over new results.

python docs/results.py
python docs/results.py --add sweep/icon_styles/table.json icon_styles
python docs/results.py --add sweep/icon_styles_int8 icon_styles_int8
"""

import argparse
import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from qtdog.results.statistics import Cell, mean_cell

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
README = DOCS.parent / "README.md"

PUBLISHED = {"SWAD": 3.1, "QT-DoG": 2.4, "EoA": 4.2, "EoQ": 4.6}
EXPERIMENTS = ("icon_styles", "RotatedMNIST", "ColoredMNIST")
Trials = dict[str, float]  # one value a trial


def mean_error(values: Trials, digits: int = 1, sign: str = "") -> str:
    """`60.4 ± 0.3`; no error of a single value."""
    return Cell(values).text(digits, "±", sign)


def label(row: dict[str, Any]) -> str:
    """`QT-DoG` for the method itself, `QT-DoG, rtn-frozen` for what it is compared with."""
    return str(row["label"]).replace(", qat-mode qat", "").replace("qat-mode ", "")


def averages(cells: dict[str, dict[str, Any]], targets: list[str]) -> Trials:
    """For each trial that has all targets the mean over them."""
    mean = mean_cell({target: Cell(cell["trials"]) for target, cell in cells.items()}, targets)
    return {} if mean is None else dict(mean.trials)


def table(result: dict[str, Any]) -> str:
    """Markdown: a line a method."""
    rows = [row for row in result["rows"] if row["selection"] == "source validation"]
    targets = [domain for domain in result["domains"] if any(domain in row["cells"] for row in rows)]
    head = ["", *targets, "average", "gain", "papers", "in-domain", "size"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        average, inside = averages(row["cells"], targets), averages(row["in_domain"], targets)
        erm = averages(erm_beside(row, rows)["cells"], targets)
        gains = {trial: value - erm[trial] for trial, value in average.items() if trial in erm}
        published = PUBLISHED.get(label(row))
        cells = [
            label(row),
            *(mean_error(row["cells"][target]["trials"]) if target in row["cells"] else "X" for target in targets),
            mean_error(average) if average else "X",
            mean_error(gains, sign="+") if gains and row["method"] != "erm" else "",
            f"{published:+.1f}" if published else "",
            mean_error(inside) if inside else "X",
            f"{row['mean_nbytes'] / 1e6:.2f} MB ({row['ratio_to_float']:.2f}x)",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(result: dict[str, Any], file: Path) -> None:
    """Target accuracy against size, a point a method."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    points = []
    for row in result["rows"]:
        average = averages(row["cells"], result["domains"])
        if row["selection"] == "source validation" and average:
            cell = Cell(average)
            points.append((row["ratio_to_float"], cell.mean, cell.stderr, label(row)))
    heights: dict[float, float] = {}  # of the last label at a size
    for size, mean, error, name in sorted(points):
        heights[size] = max(mean, heights.get(size, 0) + 1.2)
        axis.errorbar(size, mean, error, color="C1" if size < 1 else "C0", marker="o", capsize=2)
        axis.annotate(name, (size * 1.06, heights[size]), fontsize=8, verticalalignment="center")
    axis.axvline(1, color="gray", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlim=(0.1, 10), xlabel="size / size of one float model", ylabel="target accuracy, %")
    axis.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
    with matplotlib.rc_context({"svg.hashsalt": "qtdog"}):  # the same file for the same results
        figure.savefig(file, metadata={"Date": None})


def erm_beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of ERM, of several the one whose settings are those of `row`, too."""
    return next(r for r in rows if r["method"] == "erm" and r["variant"] in row["variant"])


def notes(result: dict[str, Any], date: str) -> str:
    """What is special about these runs."""
    told = [note for note in result["notes"] if re.search("^Data:|members|seeds|differ in", note)]
    trials = {len(cell["trials"]) for row in result["rows"] for cell in row["cells"].values()}
    n = " to ".join(str(count) for count in sorted({min(trials), max(trials)}))
    return "\n".join(f"- {note}" for note in [*told, f"n = {n} trials. Measured {date}."])


def flatness(file: Path) -> str:
    """F(gamma) by method, side and radius, mean over the runs."""
    with file.open(newline="") as lines:
        measured = list(csv.DictReader(lines))
    radii = [radius for radius in dict.fromkeys(row["radius"] for row in measured) if float(radius)]
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in measured:
        columns = found[row["side"], row["method"].split(" trial ")[0]]
        columns[row["radius"]][row["run"]] = float(row["increase"])
        columns["loss"][row["run"]], columns["norm"][row["run"]] = float(row["loss"]), float(row["weight_norm"])
    head = ["images", "", "‖w‖", "loss", *(f"F({float(radius):g})" for radius in radii)]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for (side, method), columns in sorted(found.items()):
        cells = [mean_error(columns["norm"], 0), *(mean_error(columns[name], 3) for name in ("loss", *radii))]
        lines.append("| " + " | ".join([side, method, *cells]) + " |")
    return "\n".join(lines)


def integer(result: dict[str, Any]) -> str:
    """How much integer activations change the ensembles' accuracy: all trials and targets."""
    changes: dict[str, list[float]] = defaultdict(list)
    for record in result["ensembles"]:
        for part, change in record["integer_change"].items():
            env, kind = int(part[3]), part.split("_")[1]
            target = record["domains"][env] == record["target"]
            role = "source, held out" if not target else {"in": "target", "out": "target, the rest"}[kind]
            changes[role].append(100 * change)
    lines = ["| images | ensembles and domains | mean change, points | range |", "|---|---:|---:|---:|"]
    for role, values in sorted(changes.items()):
        lines.append(f"| {role} | {len(values)} | {fmean(values):+.2f} | {min(values):+.1f} to {max(values):+.1f} |")
    return "\n".join(lines)


def add(path: Path, name: str) -> None:
    """Keep of a `table.json`, or of a folder of ensembles, what the page shows, and no folders of the machine."""
    if path.is_dir():
        records = [json.loads(file.read_text()) for file in sorted(path.rglob("results.jsonl"))]
        kept = ("integer", "integer_change", "domains", "target", "trial_seed", "members", "target_accuracy")
        ensembles = [{key: record[key] for key in kept} for record in records]
        result = {"date": max(record["date"] for record in records), "ensembles": ensembles}
    else:
        result = json.loads(path.read_text())
        for one in result["tables"]:
            del one["runs"], one["ensembles"]
    text = json.dumps(result, indent=1)
    (RESULTS / f"{name}.json").write_text(re.sub(r"(?<=[ \"])/\S*/", "", text) + "\n")


def page() -> str:
    parts = [text("introduction"), text("conclusions")]
    for name in EXPERIMENTS:
        content = json.loads((RESULTS / f"{name}.json").read_text())
        (result,) = content["tables"]
        parts += [text(name), table(result), "", notes(result, content["date"][:10]), ""]
        if name == "icon_styles":
            parts += ["![Target accuracy against size, a point a method](results/accuracy.svg)", ""]
    content = json.loads((RESULTS / "ablation.json").read_text())
    parts += [text("ablation"), table(content["tables"][0]), "", f"Measured {content['date'][:10]}.", ""]
    parts += [text("flatness"), flatness(RESULTS / "flatness.csv"), ""]
    parts += ["![The same as a plot](results/flatness.svg)", ""]
    content = json.loads((RESULTS / "icon_styles_int8.json").read_text())
    parts += [text("icon_styles_int8"), integer(content), "", f"Measured {content['date'][:10]}.", ""]
    return "\n".join(parts)


def text(name: str) -> str:
    """What a section says before its numbers."""
    return (RESULTS / f"{name}.md").read_text()


def short_table(result: dict[str, Any]) -> str:
    """For the README: averages over the targets, and sizes."""
    lines = ["| | target domain, % | in-domain, % | size |", "|---|---:|---:|---:|"]
    for row in result["rows"]:
        average, inside = (averages(row[cells], result["domains"]) for cells in ("cells", "in_domain"))
        if row["selection"] == "source validation" and average:
            size = f"{row['mean_nbytes'] / 1e6:.2f} MB ({row['ratio_to_float']:.2f}x)"
            lines.append(f"| {label(row)} | {mean_error(average)} | {mean_error(inside)} | {size} |")
    return "\n".join(lines)


def readme(old: str, result: dict[str, Any]) -> str:
    """The README with the present table."""
    block = f"<!-- results -->\n{short_table(result)}\n<!-- /results -->"
    return re.sub("<!-- results -->.*<!-- /results -->", lambda _: block, old, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs=2, metavar=("PATH", "NAME"), help="take over results")
    arguments = parser.parse_args()
    if arguments.add:
        add(Path(arguments.add[0]), arguments.add[1])
    (icon_styles,) = json.loads((RESULTS / "icon_styles.json").read_text())["tables"]
    plot(icon_styles, RESULTS / "accuracy.svg")
    (DOCS / "results.md").write_text(page())
    README.write_text(readme(README.read_text(), icon_styles))


if __name__ == "__main__":
    main()
