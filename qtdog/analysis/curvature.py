"""The Hessian of the loss at trained weights: its trace and its largest eigenvalue, without ever forming it.

For a quantized model, the weights are the dequantized ones, plain floats: a fake quantizer is flat between its levels,
so it has no second derivative to speak of.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from qtdog.analysis.probe import MeasureConfig, Probe, gaussian, norm, probes
from qtdog.analysis.resumable import Partial, Recall
from qtdog.data.loaders import EvaluationImages
from qtdog.data.splits import seed_hash
from qtdog.errors import UserError
from qtdog.files import csv_text, write_text
from qtdog.log import Log

BATCH = 32  # images differentiated together: a double backward pass holds several times the memory of training

Product = Callable[[Sequence[Tensor]], list[Tensor]]


def hessian_product(
    terms: Callable[[], Iterator[Tensor]], parameters: Sequence[Tensor], vector: Sequence[Tensor]
) -> list[Tensor]:
    """H v, in the parameters' shapes, by double backward.

    Args:
        terms: computes the summands of the loss, 0-d, each of which is differentiated before the next is computed.
        parameters: the leaves that H is over.
        vector: v, in the parameters' shapes.
    """
    total = [torch.zeros_like(p) for p in parameters]
    for term in terms():
        gradients = torch.autograd.grad(term, parameters, create_graph=True, materialize_grads=True)
        slope = torch.stack([(g * v).sum() for g, v in zip(gradients, vector, strict=True)]).sum()
        torch._foreach_add_(total, torch.autograd.grad(slope, parameters, materialize_grads=True))
    return total


def dot(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """The inner product over all tensors, in float64."""
    return sum((a.double() * b.double()).sum().item() for a, b in zip(one, two, strict=True))


def rademacher(parameters: Sequence[Tensor], seed: int, index: int) -> list[Tensor]:
    """The `index`-th vector of random signs in the parameters' shapes, the same for models of one architecture."""
    generator = torch.Generator().manual_seed(seed_hash(seed, "signs", index))
    return [(2.0 * torch.randint(2, p.shape, generator=generator) - 1).to(p) for p in parameters]


def trace_sample(product: Product, parameters: Sequence[Tensor], seed: int, index: int) -> float:
    """v.Hv for random signs v: its expectation is the trace of H. Source: Hutchinson 1990."""
    signs = rademacher(parameters, seed, index)
    return dot(signs, product(signs))


def top_eigenvalue(
    product: Product, start: Sequence[Tensor], iterations: int, tolerance: float
) -> tuple[float, float, int]:
    """The eigenvalue of H of the largest magnitude, by power iteration.

    Args:
        start: not orthogonal to the eigenvector, as no random vector is.
        iterations: at most so many products.
        tolerance: stops when the residual is at most this share of the eigenvalue.

    Returns:
        The Rayleigh quotient r = v.Hv, the residual ||Hv - rv|| (H has an eigenvalue at most that far from r), and the
        number of products.
    """
    image, value, residual = list(start), 0.0, math.inf
    for iteration in range(1, iterations + 1):
        length = norm(image)
        if length == 0:
            return 0.0, 0.0, iteration - 1
        vector = [h / length for h in image]
        image = product(vector)
        value = dot(vector, image)
        residual = norm([h - value * v for h, v in zip(image, vector, strict=True)])
        if residual <= tolerance * abs(value):
            return value, residual, iteration
    return value, residual, iterations


@dataclass(frozen=True)
class Curvature:
    """One run's numbers on one side."""

    run: str
    method: str
    target: str
    side: str
    loss: float
    weight_norm: float
    trace: float
    trace_stderr: float
    top_eigenvalue: float
    residual: float
    products: int


def plain_attention() -> AbstractContextManager[None]:
    """Within, attention is computed by plain operations: the fused kernels cannot be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


def loss_terms(model: nn.Module, images: Sequence[EvaluationImages], device: torch.device) -> Iterator[Tensor]:
    """The mean cross-entropy over all images, in parts of at most BATCH images; their sum is the loss."""
    count = sum(len(each.part.indices) for each in images)
    for each in images:
        for batch, labels in each:
            for x, y in zip(batch.split(BATCH), labels.split(BATCH), strict=True):
                logits = model(x.to(device, memory_format=torch.channels_last))
                yield F.cross_entropy(logits.float(), y.to(device), reduction="sum") / count


@dataclass
class CurvatureConfig(MeasureConfig):
    """Settings of `qtdog curvature`."""

    output: Annotated[str, "the numbers, a .csv file"] = "curvature.csv"
    vectors: Annotated[int, "random vectors that estimate the trace (Hutchinson)"] = 20
    iterations: Annotated[int, "products with the Hessian that the power iteration takes at most"] = 50
    tolerance: Annotated[float, "it stops when the residual is this share of the eigenvalue"] = 0.01


def measure(probe: Probe, config: CurvatureConfig, recall: Recall) -> list[Curvature]:
    """Trace and top eigenvalue of one run: source and target."""
    losses = recall("losses", probe.losses)
    bar = tqdm(total=2 * (config.vectors + 1), desc=f"curvature {probe.label}", disable=None)
    with bar, plain_attention():
        return [measure_side(probe, side, losses[i], config, recall, bar) for i, side in enumerate(probe.sides)]


def measure_side(
    probe: Probe, side: str, loss: float, config: CurvatureConfig, recall: Recall, bar: "tqdm[Never]"
) -> Curvature:
    """The numbers of one side, where `loss` is known; `bar` counts random vectors and the power iteration."""
    parameters = list(probe.model.parameters())
    product = partial(hessian_product, partial(loss_terms, probe.model, probe.sides[side], probe.device), parameters)

    def sample(index: int) -> list[float]:
        return [trace_sample(product, parameters, config.seed, index)]

    def eigenvalue() -> tuple[float, float, int]:
        start = [g.to(p) for g, p in zip(gaussian(parameters, config.seed, 0), parameters, strict=True)]
        return top_eigenvalue(product, start, config.iterations, config.tolerance)

    samples = []
    for k in range(config.vectors):
        samples += recall(f"{side}, seed {config.seed} signs {k}", partial(sample, k))
        bar.update()
    how = f"{config.iterations} iterations to {config.tolerance}"
    value, residual, products = recall(f"{side}, seed {config.seed} eigenvalue in {how}", eigenvalue)
    bar.update()
    return Curvature(
        run=str(probe.folder),
        method=probe.label,
        target=probe.card.target,
        side=side,
        loss=loss,
        weight_norm=norm(parameters),
        trace=fmean(samples),
        trace_stderr=stdev(samples) / math.sqrt(len(samples)),
        top_eigenvalue=value,
        residual=residual,
        products=int(products),
    )


def measure_curvature(config: CurvatureConfig) -> Path:
    """Measure all runs, print a table and write it as CSV; returns its path."""
    if config.vectors < 2:
        raise UserError(f"--vectors must be at least 2, for a standard error, not {config.vectors}")
    if config.iterations < 1:
        raise UserError(f"--iterations must be at least 1, not {config.iterations}")
    table = Path(config.output)
    if table.suffix.lower() != ".csv":
        raise UserError(f"--output {config.output} must end in .csv")
    kept = Partial(table)
    log = Log()
    measured = [c for probe in probes(config, log) for c in measure(probe, config, kept.of(probe.key))]
    log(as_text(measured))
    write_text(table, csv_text(list(Curvature.__annotations__), [list(vars(c).values()) for c in measured]))
    kept.forget()
    log(f"numbers: {table}")
    return table


def as_text(measured: Sequence[Curvature]) -> str:
    """For a terminal: a line a run and side."""
    lines = [["run", "left out", "side", "loss", "||w||", "trace", "top eigenvalue", "products"]]
    for c in measured:
        trace, top = f"{c.trace:.4g} +/- {c.trace_stderr:.2g}", f"{c.top_eigenvalue:.4g} (within {c.residual:.2g})"
        loss, length = f"{c.loss:.4f}", f"{c.weight_norm:.1f}"
        lines.append([c.method, c.target, c.side, loss, length, trace, top, str(c.products)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
