"""How the loss rises around trained weights (QT-DoG, Eq. 5).

F_gamma(w) = E over directions d with ||d|| = 1 of L(w + gamma d) - L(w), with d Gaussian, normalized over all
parameters together. For a quantized model, w are the dequantized weights, the norm layers and the head; scales are not
perturbed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from qtdog.analysis.pictures import picture_path, save_picture
from qtdog.analysis.probe import MeasureConfig, Probe, gaussian, movable, norm, probes
from qtdog.analysis.resumable import Partial, Recall, measured_anew
from qtdog.errors import UserError
from qtdog.files import csv_text
from qtdog.log import PRINT, Log


def direction(parameters: Sequence[Tensor], seed: int, index: int) -> list[Tensor]:
    """The `index`-th random direction: Gaussian tensors of the parameters' shapes, norm 1 over all of them."""
    drawn = gaussian(parameters, seed, index)
    length = norm(drawn)
    return [(d / length).to(p) for d, p in zip(drawn, parameters, strict=True)]


def loss_increase(
    losses: Callable[[], Sequence[float]],
    parameters: Sequence[Tensor],
    radii: Sequence[float],
    directions: int,
    seed: int = 0,
    recall: Recall = measured_anew,
    progress: Callable[[Iterable[int]], Iterator[int]] = iter,
) -> tuple[list[float], Tensor]:
    """Eq. 5 for several losses of the same parameters at once.

    Args:
        losses: evaluates the losses at the parameters' present values.
        parameters: moved in place, and back exactly where they were at the end.
        radii: gamma, in units of the weights' Euclidean norm.
        directions: number of random directions.
        recall: knows which directions were measured before.
        progress: wraps the range of directions, e.g. in a progress bar.

    Returns:
        The losses at radius 0, and increases float64 [losses, radii, directions].
    """
    at_zero = recall("center", losses)
    along = []
    with movable(parameters) as move:

        def losses_along(index: int) -> list[float]:
            """Of all radii, those of a radius together."""
            step, found = direction(parameters, seed, index), []
            for radius in radii:
                move((radius, step))
                found += list(losses()) if radius else at_zero
            return found

        for k in progress(range(directions)):
            what = f"seed {seed} direction {k} at {' '.join(map(str, radii))}"
            along.append(recall(what, partial(losses_along, k)))
    measured = torch.tensor(along, dtype=torch.float64).view(directions, len(radii), len(at_zero))
    return at_zero, measured.permute(2, 1, 0) - torch.tensor(at_zero, dtype=torch.float64)[:, None, None]


@dataclass(frozen=True)
class Curve:
    """One run's loss increase on one side, by radius. `members` is what it shares with the runs of other seeds."""

    run: str
    method: str
    members: str
    side: str
    target: str
    loss: float
    weight_norm: float
    radii: list[float]
    mean: list[float]
    stderr: list[float]


@dataclass
class FlatnessConfig(MeasureConfig):
    """Settings of `qtdog flatness`."""

    output: Annotated[str, "the plot (.png, .svg or .pdf); the numbers go beside it as .csv"] = "flatness.png"
    radii: Annotated[list[float], "distances gamma from the trained weights"] = field(
        default_factory=lambda: [float(r) for r in range(0, 61, 5)]
    )
    directions: Annotated[int, "random directions"] = 100


def measure(probe: Probe, config: FlatnessConfig, recall: Recall) -> list[Curve]:
    """The curves of one run: source and target."""
    parameters = [p.detach() for p in probe.model.parameters()]
    at_zero, increases = loss_increase(
        probe.losses,
        parameters,
        config.radii,
        config.directions,
        config.seed,
        recall,
        lambda directions: iter(
            tqdm(directions, desc=f"flatness {probe.label}", unit="direction", leave=False, disable=None)
        ),
    )
    run, target, length = str(probe.folder), probe.card.target, norm(parameters)
    mean = increases.mean(-1)
    stderr = increases.std(-1, correction=0) / math.sqrt(config.directions)
    return [
        Curve(
            run,
            probe.label,
            probe.members,
            side,
            target,
            loss,
            length,
            config.radii,
            mean[i].tolist(),
            stderr[i].tolist(),
        )
        for i, (side, loss) in enumerate(zip(probe.sides, at_zero, strict=True))
    ]


def measure_flatness(config: FlatnessConfig, log: Log = PRINT) -> tuple[Path, list[Curve]]:
    """Measure all runs, write the plot, and the numbers as .csv beside it; returns the plot's path and the numbers."""
    if config.directions < 1 or not config.radii or min(config.radii) < 0:
        raise UserError("--directions must be at least 1 and --radii not negative")
    picture = picture_path(config.output)
    kept = Partial(picture.with_suffix(".csv"))
    curves = []
    for probe in probes(config, log):
        measured = measure(probe, config, kept.of(probe.key))
        for curve in measured:
            log(
                f"{curve.method}, {curve.side} ({curve.target} left out): loss {curve.loss:.4f}, "
                f"{curve.mean[-1]:+.4f} at radius {curve.radii[-1]:g} (||w|| = {curve.weight_norm:.1f})"
            )
        curves += measured
    table = save_picture(picture, plot(curves), curves_csv(curves))
    kept.forget()
    log(f"plot: {picture}\nnumbers: {table}")
    return picture, curves


def curves_csv(curves: Sequence[Curve]) -> str:
    """One line a curve and radius."""
    rows = [
        [c.run, c.method, c.target, c.side, c.weight_norm, c.loss, radius, mean, stderr]
        for c in curves
        for radius, mean, stderr in zip(c.radii, c.mean, c.stderr, strict=True)
    ]
    return csv_text(["run", "method", "target", "side", "weight_norm", "loss", "radius", "increase", "stderr"], rows)


def plot(curves: Sequence[Curve]) -> Figure:
    """Loss increase against radius: sources left, target right.

    A single run is a line with its standard error over the directions; runs that differ in their seed only are thin
    lines with their mean, and a band of one standard deviation of the runs.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    colors = matplotlib.color_sequences["tab10"]
    targets = {c.target for c in curves}
    for axis, side in zip(axes, ("source", "target"), strict=True):
        groups: dict[tuple[str, str], list[Curve]] = defaultdict(list)
        for c in curves:
            if c.side == side:
                groups[c.members, c.target].append(c)
        for index, ((label, target), members) in enumerate(groups.items()):
            color, first = colors[index % len(colors)], members[0]
            means = torch.tensor([c.mean for c in members])
            if len(members) == 1:
                label, band, marker = first.method, torch.tensor(first.stderr), "o"
            else:
                label, band, marker = f"{label}, {len(members)} seeds", means.std(0), ""
                axis.plot(first.radii, means.T, color=color, linewidth=0.6, alpha=0.6)
            if len(targets) > 1:
                label += f", target {target}"
            mean = means.mean(0)
            axis.plot(first.radii, mean, color=color, marker=marker, markersize=3, label=label)
            axis.fill_between(first.radii, mean - band, mean + band, color=color, alpha=0.2, linewidth=0)
    for axis, title in zip(axes, ("source domains (validation part)", "target domain"), strict=True):
        axis.set(title=title, xlabel=r"radius $\gamma$", ylabel=r"$F_\gamma(w)$: increase of the loss")
        axis.legend(fontsize="small")
    return figure
