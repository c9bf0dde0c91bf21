"""What trained runs tell about their quantization: disorder and scales by layer, accuracy against bits and size."""

import csv
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qtdog.analysis.pictures import save_picture
from qtdog.analysis.probe import run_label
from qtdog.errors import UserError
from qtdog.files import REMEDY, csv_text, read_sealed
from qtdog.log import Log
from qtdog.methods.presets import find_method
from qtdog.results.runs import ModelCard, checkpoint_records, find_runs, read_card
from qtdog.results.statistics import Cell
from qtdog.results.variants import described, distinguishing_settings, settings_of

FLOAT_BITS = 32
LEGEND = 12  # lines of a panel that a legend can name

Kind = tuple[str, str, int, int]  # data set, method, bits of a weight, of an input
Rows = list[list[Any]]  # of one run: step, scale, the number that is plotted, and others


@dataclass
class DiagnosticsConfig:
    """Settings of `qtdog diagnostics`."""

    runs: Annotated[list[str], "run folders, or folders that hold them"] = field(default_factory=list)
    output_dir: Annotated[str, "where plots and numbers go"] = "diagnostics"
    format: Annotated[Literal["png", "svg", "pdf"], "of the plots"] = "png"


def diagnose(config: DiagnosticsConfig) -> list[Path]:
    """Plot what the runs have recorded; returns the paths of the numbers."""
    log = Log()
    cards = {folder: read_card(folder) for folder in find_runs(config.runs)}
    written = []
    for name, history in HISTORIES.items():
        rows = {folder: history.read(folder) for folder in cards}
        rows = {folder: lines for folder, lines in rows.items() if lines}
        if rows:
            picture = Path(config.output_dir) / f"{name}.{config.format}"
            written.append(save_picture(picture, history.plot(rows, cards), history.csv(rows, cards)))
        else:
            log(f"no plot of {name}: {history.absent}")
    points = accuracy_points(cards, log)
    if points:
        picture = Path(config.output_dir) / f"bits.{config.format}"
        numbers = csv_text(list(Point.__annotations__), [list(vars(point).values()) for point in points])
        written.append(save_picture(picture, plot_accuracy(points), numbers))
    for table in written:
        log(f"plot: {table.with_suffix('.' + config.format)}, numbers: {table}")
    return written


# Histories of scales ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """Something that runs record of every scale as they train."""

    read: Callable[[Path], Rows]
    columns: Sequence[str]  # of the rows
    level: Callable[[ModelCard], float]  # where a line is drawn across
    label: str
    absent: str  # why there may be none

    def csv(self, rows: Mapping[Path, Rows], cards: Mapping[Path, ModelCard]) -> str:
        """The rows of all runs."""
        lines = [[f, run_label(cards[f]), cards[f].target, *row] for f, own in rows.items() for row in own]
        return csv_text(["run", "method", "target", *self.columns], lines)

    def plot(self, rows: Mapping[Path, Rows], cards: Mapping[Path, ModelCard]) -> Figure:
        """A panel a run, a line a scale, its color by the layer's place in the network; those of inputs are dashed."""
        figure = Figure(figsize=(8, 3 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), 1, squeeze=False).flat
        colors, crowded = matplotlib.colormaps["viridis"], False
        for panel, (folder, own) in zip(panels, rows.items(), strict=True):
            scales = list(dict.fromkeys(scale for _, scale, *_ in own))
            layers = list(dict.fromkeys(scale.rpartition(".")[0] for scale in scales))
            for scale in scales:
                x, y = zip(*((step, value) for step, name, value, *_ in own if name == scale), strict=True)
                layer, _, kind = scale.rpartition(".")
                color = colors(layers.index(layer) / max(len(layers) - 1, 1))
                style = "--" if kind == "act_scale" else "-"
                panel.plot(x, y, style, color=color, linewidth=1, marker=".", label=scale)
            panel.axhline(self.level(cards[folder]), color="red", linewidth=0.8)
            panel.set_title(f"{run_label(cards[folder])}, target {cards[folder].target}", fontsize="small")
            panel.set(xlabel="step", ylabel=self.label)
            if len(scales) > LEGEND:
                crowded = True
            else:
                panel.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
        if crowded:
            depth = ScalarMappable(cmap=colors)
            figure.colorbar(depth, ax=figure.axes, label="layer, from the input (0) to the output (1)")
        return figure


def read_disorder(folder: Path) -> Rows:
    """disorder.csv: step, scale, disorder, share that is frozen."""
    file = folder / "disorder.csv"
    if not file.is_file():
        return []
    try:
        rows = csv.DictReader(read_sealed(file).decode().splitlines())
        return [[int(r["steps"]), r["scale"], float(r["disorder"]), float(r["frozen"])] for r in rows]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{file} is damaged ({error}): {REMEDY}") from error


def read_scales(folder: Path) -> Rows:
    """Of each checkpoint: step, scale, its mean relative to the first checkpoint's, mean, least, greatest."""
    first: dict[str, float] = {}
    rows = []
    try:
        for record in checkpoint_records(folder):
            for name, mean, least, greatest in record.get("scales", []):
                rows.append([record["step"], name, mean / first.setdefault(name, mean), mean, least, greatest])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the records in {folder} are damaged ({error}): {REMEDY}") from error
    return rows


HISTORIES = {
    "disorder": History(
        read_disorder,
        ["step", "scale", "disorder", "frozen"],
        lambda card: card.run.step["disorder_threshold"],
        "disorder (share of sign flips)",
        "no run of GAQAT or FQAT among these has finished a window",
    ),
    "scales": History(
        read_scales,
        ["step", "scale", "relative", "mean", "least", "greatest"],
        lambda card: 1.0,
        "mean scale / its first value",
        "no run among these has recorded learned scales",
    ),
}


# Accuracy against bits and size ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The runs of a method at one number of bits, 32 for float: mean size, and target accuracy in percent."""

    dataset: str
    method: str
    weight_bits: int
    act_bits: int
    nbytes: float
    size: float  # relative to the float model
    targets: int
    trials: int
    accuracy: float
    stderr: float | None  # over trials, as in the tables; None for one trial


def accuracy_points(cards: Mapping[Path, ModelCard], log: Log) -> list[Point]:
    """A point for each data set, method or variant of it, and bits.

    A trial's value is the mean over targets of the mean over seeds; it counts if it has all targets that its method
    was run on. Of several hyper-parameters those with the best source validation count.
    """
    accuracies: dict[Kind, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    sizes: dict[Kind, list[int]] = defaultdict(list)
    floats, targets = {}, defaultdict(set)
    for kind, card in best_hparams(cards):
        accuracies[kind][card.run.trial_seed][card.target].append(100 * card.target_accuracy)
        sizes[kind].append(card.nbytes)
        floats[kind] = card.float_nbytes
        targets[kind[:2]].add(card.target)
    points = []
    for kind, trials in sorted(accuracies.items()):
        wanted = targets[kind[:2]]
        whole = {t: fmean(map(fmean, own.values())) for t, own in trials.items() if own.keys() == wanted}
        if not whole:
            dataset, method, bits, _ = kind
            log(f"bits: {method} at {bits} bit on {dataset} left out, no trial has all targets {sorted(wanted)}")
            continue
        cell, nbytes = Cell(whole), fmean(sizes[kind])
        stderr = cell.stderr if len(whole) > 1 else None
        points.append(Point(*kind, nbytes, nbytes / floats[kind], len(wanted), len(whole), cell.mean, stderr))
    return points


def kinds_of(cards: Mapping[Path, ModelCard]) -> dict[Path, Kind]:
    """(data set, method or variant of it, bits of weights, of inputs) of each run."""
    names = distinguishing_settings((folder, card.dataset, card.run) for folder, card in cards.items())
    kinds = {}
    for folder, card in cards.items():
        others = [name for name in names[card.run.method] if name not in ("weight_bits", "act_bits")]
        method = ", ".join(filter(None, [find_method(card.run.method).label, described(settings_of(card.run), others)]))
        q = card.quantization or {"weight_bits": FLOAT_BITS, "act_bits": None}
        kinds[folder] = (card.dataset, method, q["weight_bits"], q["act_bits"] or FLOAT_BITS)
    return kinds


def best_hparams(cards: Mapping[Path, ModelCard]) -> list[tuple[Kind, ModelCard]]:
    """For each kind, trial, target and seed the run with the best source validation."""
    best: dict[tuple[Any, ...], tuple[Kind, ModelCard]] = {}
    for folder, kind in kinds_of(cards).items():
        card = cards[folder]
        place = (kind, card.run.trial_seed, card.target, card.run.seed)
        if place not in best or card.source_validation_accuracy > best[place][1].source_validation_accuracy:
            best[place] = (kind, card)
    return list(best.values())


def plot_accuracy(points: Sequence[Point]) -> Figure:
    """Target accuracy against the bits of a weight and against the size; float methods are lines across."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_bits, by_size = figure.subplots(1, 2, sharey=True)
    datasets = {p.dataset for p in points}
    for index, ((dataset, method), line) in enumerate(groupby(points, lambda p: (p.dataset, p.method))):
        own, color = list(line), f"C{index}"
        label = method if len(datasets) == 1 else f"{method}, {dataset}"
        y, error = [p.accuracy for p in own], [p.stderr or 0 for p in own]
        if own[0].weight_bits == FLOAT_BITS:
            by_bits.axhline(y[0], color=color, linestyle="--", label=label)
        else:
            by_bits.errorbar([p.weight_bits for p in own], y, error, color=color, marker="o", capsize=2, label=label)
        by_size.errorbar([p.size for p in own], y, error, color=color, marker="o", capsize=2, label=label)
    by_bits.set(xlabel="bits of a weight", ylabel="target accuracy, %")
    by_bits.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_size.set(xlabel="size / size of the float model")
    by_bits.legend(fontsize="small")
    return figure
