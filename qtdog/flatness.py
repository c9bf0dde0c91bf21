"""How the loss rises around trained weights (QT-DoG, Eq. 5).

F_gamma(w) = E over directions d with ||d|| = 1 of L(w + gamma d) - L(w), with d Gaussian, normalized over all
parameters together. For a quantized model, w are the dequantized weights, the norm layers and the head; scales are not
perturbed.
"""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import qkernels as qk
from qtdog.config import FlatnessConfig
from qtdog.data import DomainSet
from qtdog.data.loaders import EvaluationImages, Part
from qtdog.data.splits import seed_hash
from qtdog.ensemble import dataset_of
from qtdog.environment import pick_device, pick_workers
from qtdog.errors import UserError
from qtdog.evaluation import domain_parts, sources
from qtdog.presets import METHODS
from qtdog.runs import Log, find_runs, load_model, read_card, replace_file, write_text


def direction(parameters: Sequence[Tensor], seed: int, index: int) -> list[Tensor]:
    """The `index`-th random direction: Gaussian tensors of the parameters' shapes, norm 1 over all of them.

    Drawn on the CPU in the parameters' order, so that models of the same shapes get the same direction.
    """
    generator = torch.Generator().manual_seed(seed_hash(seed, "direction", index))
    drawn = [torch.randn(p.shape, generator=generator) for p in parameters]
    norm = math.sqrt(sum(d.double().square().sum().item() for d in drawn))
    return [(d / norm).to(p) for d, p in zip(drawn, parameters, strict=True)]


@torch.no_grad()
def loss_increase(
    losses: Callable[[], Sequence[float]],
    parameters: Sequence[Tensor],
    radii: Sequence[float],
    directions: int,
    seed: int = 0,
    progress: Callable[[range], Iterator[int]] | None = None,
) -> tuple[list[float], Tensor]:
    """Eq. 5 for several losses of the same parameters at once.

    Args:
        losses: evaluates the losses at the parameters' present values.
        parameters: moved in place, and back exactly where they were at the end.
        radii: gamma, in units of the weights' Euclidean norm.
        directions: number of random directions.
        progress: wraps the range of directions, e.g. in a progress bar.

    Returns:
        The losses at radius 0, and increases float64 [losses, radii, directions].
    """
    before = [p.clone() for p in parameters]
    at_zero = list(losses())
    increases = torch.zeros(len(at_zero), len(radii), directions, dtype=torch.float64)
    try:
        for k in (progress or iter)(range(directions)):
            step = direction(parameters, seed, k)
            for j, radius in enumerate(radii):
                if radius == 0:
                    continue
                for p, start, d in zip(parameters, before, step, strict=True):
                    torch.add(start, d, alpha=radius, out=p)
                increases[:, j, k] = torch.tensor(losses(), dtype=torch.float64) - torch.tensor(
                    at_zero, dtype=torch.float64
                )
    finally:
        for p, start in zip(parameters, before, strict=True):
            p.copy_(start)
    return at_zero, increases


@torch.no_grad()
def mean_loss(model: nn.Module, parts: Sequence[EvaluationImages], device: torch.device) -> float:
    """Cross-entropy per image, in nats, over all images of `parts`."""
    total, count = 0.0, 0
    for images in parts:
        for batch, labels in images:
            logits = model(batch.to(device, memory_format=torch.channels_last))
            total += F.cross_entropy(logits.float(), labels.to(device), reduction="sum").item()
            count += len(labels)
    return total / count


@dataclass(frozen=True)
class Curve:
    """One run's loss increase on one side, by radius."""

    run: str
    method: str
    side: str
    target: str
    loss: float
    weight_norm: float
    radii: list[float]
    mean: list[float]
    stderr: list[float]


def measure(folder: Path, dataset: DomainSet, config: FlatnessConfig, device: torch.device) -> list[Curve]:
    """The curves of one run over its source domains (out parts) and its target domain (in part)."""
    card = read_card(folder)
    run = card.run
    model = qk.dequantize_(load_model(folder, device))
    workers = pick_workers(config.num_workers, card.preprocessing is not None)
    parts = domain_parts(run, dataset)

    def some(name: str) -> EvaluationImages:
        part = parts[name]
        return EvaluationImages(Part(part.domain, part.env, part.indices[: config.max_images]), workers, keep=True)

    sides = {
        "source": [some(f"env{env}_out") for env in sources(run, dataset)],
        "target": [some(f"env{run.test_env}_in")],
    }
    parameters = [p.detach() for p in model.parameters()]
    label = f"{METHODS[run.method].label} seed {run.seed}"
    at_zero, increases = loss_increase(
        lambda: [mean_loss(model, images, device) for images in sides.values()],
        parameters,
        config.radii,
        config.directions,
        config.seed,
        lambda directions: iter(tqdm(directions, desc=f"flatness {label}", unit="direction", disable=None)),
    )
    norm = math.sqrt(sum(p.double().square().sum().item() for p in parameters))
    mean = increases.mean(-1)
    stderr = increases.std(-1, correction=0) / math.sqrt(config.directions)
    return [
        Curve(str(folder), label, side, card.target, loss, norm, config.radii, mean[i].tolist(), stderr[i].tolist())
        for i, (side, loss) in enumerate(zip(sides, at_zero, strict=True))
    ]


def measure_flatness(config: FlatnessConfig) -> tuple[Path, Path]:
    """Measure all runs, write the plot and the numbers; returns their paths."""
    if config.directions < 1 or not config.radii or min(config.radii) < 0:
        raise UserError("--directions must be at least 1 and --radii not negative")
    if config.max_images is not None and config.max_images < 1:
        raise UserError(f"--max-images must be at least 1, not {config.max_images}")
    picture = Path(config.output)
    if picture.suffix.lower() not in {".png", ".pdf", ".svg"}:
        raise UserError(f"--output {config.output} must end in .png, .pdf or .svg")
    log = Log()
    device = pick_device(config.device)
    loaded: dict[tuple[Any, ...], DomainSet] = {}
    curves = []
    for folder in find_runs(config.runs):
        card = read_card(folder)
        key = (card.run.dataset, card.run.data_dir, card.images_as_trained())
        if key not in loaded:
            loaded[key] = dataset_of(card, config.data_dir, log)
        measured = measure(folder, loaded[key], config, device)
        for curve in measured:
            log(
                f"{curve.method}, {curve.side} ({curve.target} left out): loss {curve.loss:.4f}, "
                f"+{curve.mean[-1]:.4f} at radius {curve.radii[-1]:g} (||w|| = {curve.weight_norm:.1f})"
            )
        curves += measured
    table = picture.with_suffix(".csv")
    write_text(table, curves_csv(curves))
    replace_file(picture, lambda temporary: plot(curves).savefig(temporary, format=picture.suffix[1:], dpi=150))
    log(f"plot: {picture}\nnumbers: {table}")
    return picture, table


def curves_csv(curves: Sequence[Curve]) -> str:
    """One line a curve and radius."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "method", "target", "side", "weight_norm", "loss", "radius", "increase", "stderr"])
    for c in curves:
        for radius, mean, stderr in zip(c.radii, c.mean, c.stderr, strict=True):
            writer.writerow([c.run, c.method, c.target, c.side, c.weight_norm, c.loss, radius, mean, stderr])
    return out.getvalue()


def plot(curves: Sequence[Curve]) -> Figure:
    """Loss increase against radius: sources left, target right, one line a run with its standard error."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    colors = matplotlib.color_sequences["tab10"]
    color_of: dict[tuple[str, str], Any] = defaultdict(lambda: colors[len(color_of) % 10])
    targets = {c.target for c in curves}
    for c in curves:
        axis = axes[0 if c.side == "source" else 1]
        color = color_of[c.method, c.target]
        mean, stderr = torch.tensor(c.mean), torch.tensor(c.stderr)
        axis.plot(
            c.radii,
            c.mean,
            color=color,
            marker="o",
            markersize=3,
            label=c.method if len(targets) == 1 else f"{c.method}, target {c.target}",
        )
        axis.fill_between(c.radii, mean - stderr, mean + stderr, color=color, alpha=0.2, linewidth=0)
    for axis, title in zip(axes, ("source domains (validation part)", "target domain"), strict=True):
        axis.set(title=title, xlabel=r"radius $\gamma$", ylabel=r"$F_\gamma(w)$: increase of the loss")
        axis.legend()
    return figure
