"""The loss on a plane through the trained weights, spanned by two filter-normalized random directions.

Source: Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets". Normalized filter by filter, a step of length 1
changes each filter by its own norm, so that surfaces of networks with differently scaled weights may be compared.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from qtdog.analysis.pictures import picture_path, save_picture
from qtdog.analysis.probe import MeasureConfig, Probe, gaussian, movable, probes
from qtdog.analysis.resumable import Partial, Recall, measured_anew
from qtdog.errors import UserError
from qtdog.files import csv_text
from qtdog.log import Log


def filter_normalized(direction: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """`direction` with each filter, a slice [i] of a tensor, scaled to the norm of the weights' filter."""

    def norms(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True)

    moved = [d.to(w) for d, w in zip(direction, weights, strict=True)]
    return [d * norms(w) / norms(d) for d, w in zip(moved, weights, strict=True)]


def surface(
    losses: Callable[[], Sequence[float]],
    weights: Sequence[Tensor],
    axis: Sequence[float],
    seed: int = 0,
    recall: Recall = measured_anew,
    progress: Callable[[Iterable[tuple[float, float]]], Iterable[tuple[float, float]]] = iter,
) -> Tensor:
    """The losses at weights + a d1 + b d2, for all a and b on `axis`.

    Args:
        losses: evaluates the losses at the weights' present values.
        weights: matrices and kernels, at least 2-D; moved in place, and back exactly where they were at the end.
        recall: knows which points were measured before.
        progress: wraps the points (a, b).

    Returns:
        float64 [losses, a, b].
    """
    one, two = (filter_normalized(gaussian(weights, seed, index), weights) for index in (0, 1))
    found = []
    with movable(weights) as move:

        def losses_at(a: float, b: float) -> Sequence[float]:
            move((a, one), (b, two))
            return losses()

        for a, b in progress(list(product(axis, axis))):
            found.append(recall(f"seed {seed} at {a} {b}", partial(losses_at, a, b)))
    return torch.tensor(found, dtype=torch.float64).T.reshape(-1, len(axis), len(axis))


@dataclass(frozen=True)
class Surface:
    """One run's losses on one side, float64 [a, b]."""

    run: str
    method: str
    target: str
    side: str
    losses: Tensor


@dataclass
class LandscapeConfig(MeasureConfig):
    """Settings of `qtdog landscape`."""

    output: Annotated[str, "the plot (.png, .svg or .pdf); the numbers go beside it as .csv"] = "landscape.png"
    grid: Annotated[int, "points a side, odd; the loss is measured at the square of it"] = 21
    span: Annotated[float, "distance of the sides from the trained weights, in norms of each filter"] = 1.0
    quantize_each: Annotated[
        bool, "move the latent weights and quantize them anew at each point (default: move the dequantized weights)"
    ] = False


def measure(probe: Probe, config: LandscapeConfig, axis: Sequence[float], recall: Recall) -> list[Surface]:
    """The surfaces of one run: source and target. Biases, norm layers and scales, of fewer dimensions, stay."""
    found = surface(
        probe.losses,
        [p.detach() for p in probe.model.parameters() if p.dim() >= 2],
        axis,
        config.seed,
        recall,
        lambda points: tqdm(points, desc=f"landscape {probe.label}", unit="point", disable=None),
    )
    run, target = str(probe.folder), probe.card.target
    return [Surface(run, probe.label, target, side, found[i]) for i, side in enumerate(probe.sides)]


def measure_landscape(config: LandscapeConfig) -> tuple[Path, Path]:
    """Measure all runs, write the contour plots and the numbers; returns their paths."""
    if config.grid < 3 or config.grid % 2 == 0:
        raise UserError(f"--grid must be odd, so that the trained weights are on it, and at least 3, not {config.grid}")
    if config.span <= 0:
        raise UserError(f"--span must be positive, not {config.span:g}")
    picture = picture_path(config.output)
    kept = Partial(picture.with_suffix(".csv"))
    log = Log()
    half = config.grid // 2
    axis = [config.span * i / half for i in range(-half, half + 1)]
    surfaces = []
    for probe in probes(config, log, plain=not config.quantize_each):
        if config.quantize_each and probe.card.quantization and probe.card.quantization["quantizer"] == "inq":
            raise UserError(f"--quantize-each: INQ's levels in {probe.folder} are frozen and do not follow the weights")
        how = "quantized at each point" if config.quantize_each else "dequantized"
        measured = measure(probe, config, axis, kept.of(f"{probe.key}, {how}"))
        for each in measured:
            log(
                f"{each.method}, {each.side} ({each.target} left out): loss {each.losses[half, half]:.4f}, "
                f"{each.losses.min():.4f} to {each.losses.max():.4f} on the plane"
            )
        surfaces += measured
    table = save_picture(picture, plot(surfaces, axis), surfaces_csv(surfaces, axis))
    kept.forget()
    log(f"plot: {picture}\nnumbers: {table}")
    return picture, table


def surfaces_csv(surfaces: Sequence[Surface], axis: Sequence[float]) -> str:
    """One line a point; a and b in filter norms."""
    rows = [
        [s.run, s.method, s.target, s.side, a, b, loss]
        for s in surfaces
        for (a, b), loss in zip(product(axis, axis), s.losses.flatten().tolist(), strict=True)
    ]
    return csv_text(["run", "method", "target", "side", "a", "b", "loss"], rows)


def plot(surfaces: Sequence[Surface], axis: Sequence[float]) -> Figure:
    """A row a run, sources left, target right; all panels have the same levels, equally far apart in the logarithm."""
    figure = Figure(figsize=(9, 2 * len(surfaces)), layout="constrained")
    panels = figure.subplots(len(surfaces) // 2, 2, squeeze=False, sharex=True, sharey=True).flat
    everything = np.ma.masked_invalid(torch.stack([s.losses for s in surfaces]).numpy())
    lowest = max(everything.min(), 1e-3)
    levels = np.geomspace(lowest, max(everything.max(), 1.1 * lowest), 16)
    colors = BoundaryNorm(levels, 256)
    for panel, values, s in zip(panels, everything, surfaces, strict=True):
        panel.contourf(axis, axis, values.T, levels, norm=colors, extend="both")
        lines = panel.contour(axis, axis, values.T, levels, colors="white", linewidths=0.5)
        panel.clabel(lines, fmt="%.2g", fontsize="x-small")
        panel.plot(0, 0, marker="+", color="red")
        panel.set_title(f"{s.method}, {s.side} ({s.target} left out)", fontsize="small")
    figure.supxlabel("a (filter norms)", fontsize="small")
    figure.supylabel("b (filter norms)", fontsize="small")
    figure.colorbar(ScalarMappable(colors), ax=figure.axes, label="loss", format="%.3g", aspect=40)
    return figure
