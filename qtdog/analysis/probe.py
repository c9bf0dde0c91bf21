"""Trained runs, opened so that the loss around their weights can be measured."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

import qkernels as qk
from qtdog.config import Device
from qtdog.data import DomainSet
from qtdog.data.loaders import EvaluationImages, Part, fits_in_memory
from qtdog.data.splits import seed_hash
from qtdog.environment import pick_device, pick_workers
from qtdog.errors import UserError
from qtdog.log import Log
from qtdog.methods.presets import find_method
from qtdog.results.data_of_runs import DataOfRuns
from qtdog.results.runs import ModelCard, find_runs, load_model, read_card
from qtdog.training.evaluation import mean_loss


@dataclass(frozen=True)
class Probe:
    """A run's selected model and the images that its loss is measured on.

    `sides` are "source", the source domains' out parts, and "target", the target's in part. `key` names what is
    measured: the same for the same model on the same images.
    """

    folder: Path
    card: ModelCard
    model: nn.Module
    sides: dict[str, list[EvaluationImages]]
    device: torch.device
    key: str

    @property
    def label(self) -> str:
        return run_label(self.card)

    @property
    def members(self) -> str:
        return members_label(self.card)

    def losses(self) -> list[float]:
        """Mean cross-entropy in nats on each side, at the weights' present values."""
        return [mean_loss(self.model, images, self.device) for images in self.sides.values()]


def run_label(card: ModelCard) -> str:
    """What to call a run in a plot: `QT-DoG 7 bit trial 0 seed 1`; with quantized inputs, `GAQAT 4/4 bit ...`."""
    return f"{members_label(card)} seed {card.run.seed}"


def members_label(card: ModelCard) -> str:
    """What to call the runs that differ in their seed only: `QT-DoG 7 bit trial 0`."""
    bits = ""
    if card.quantization is not None:
        inputs = card.quantization["act_bits"]
        bits = f" {card.quantization['weight_bits']}{f'/{inputs}' if inputs else ''} bit"
    return f"{find_method(card.run.method).label}{bits} trial {card.run.trial_seed}"


@dataclass
class MeasureConfig:
    """What the commands that measure the loss around trained weights have in common."""

    runs: Annotated[list[str], "run folders, or folders that hold them; runs of one target domain are compared"] = (
        field(default_factory=list)
    )
    output: Annotated[str, "the plot (.png, .svg or .pdf); the numbers go beside it as .csv"] = ""
    max_images: Annotated[int | None, "images of each domain that the loss is measured on (None: all)"] = None
    seed: Annotated[int, "of the random directions, the same for all runs of one architecture"] = 0
    data_dir: Annotated[str | None, "root of the data, if it has moved since training"] = None
    device: Annotated[Device, "where to run; auto is cuda if there is one"] = "auto"
    num_workers: Annotated[int | None, "processes that read images, at most the CPU cores"] = None


def probes(config: MeasureConfig, log: Log, plain: bool = True) -> Iterator[Probe]:
    """The runs of `config`, one at a time, with plain weights (see `plain_`) or as they were trained."""
    if config.max_images is not None and config.max_images < 1:
        raise UserError(f"--max-images must be at least 1, not {config.max_images}")
    device = pick_device(config.device)
    data = DataOfRuns(config.data_dir, log)
    for folder in find_runs(config.runs):
        card = read_card(folder)
        parts = data.parts_of(folder, card)
        model = load_model(folder, device)
        yield Probe(
            folder,
            card,
            plain_(model) if plain else model,
            measured_images(card, data.of(card), parts, config),
            device,
            f"{folder.resolve()} of {card.date}, {config.max_images or 'all'} images a domain",
        )


def measured_images(
    card: ModelCard, dataset: DomainSet, parts: dict[str, Part], config: MeasureConfig
) -> dict[str, list[EvaluationImages]]:
    """Both sides' images, of each domain at most --max-images."""
    names = {
        "source": [f"env{env}_out" for env in card.source_envs],
        "target": [f"env{env}_in" for env in card.run.test_envs],
    }
    sides = {
        side: [Part(parts[n].domain, parts[n].env, parts[n].indices[: config.max_images]) for n in chosen]
        for side, chosen in names.items()
    }
    keep = fits_in_memory(sum(len(p.indices) for side in sides.values() for p in side), dataset.image_shape)
    workers = pick_workers(config.num_workers, card.preprocessing is not None)
    return {side: [EvaluationImages(part, workers, keep) for part in chosen] for side, chosen in sides.items()}


def plain_(model: nn.Module) -> nn.Module:
    """In place, quantized weights become plain ones of the same values; inputs stay quantized. Returns `model`.

    What comes out is the loss of the quantized model, as a function of float weights that may be moved freely and
    differentiated twice. To derivatives, rounding an input is the identity (the straight-through estimator).
    """
    for _, layer in qk.quantized_layers(model):
        if layer.act_quantizer is not None:
            assert layer.act_range is not None  # a trained model has seen inputs
            layer.register_forward_pre_hook(input_rounding(layer.act_quantizer, layer.act_scale, layer.act_range))
    return qk.dequantize_(model)


def input_rounding(quantizer: qk.ActivationLSQ, scale: Tensor, codes: tuple[int, int]) -> Callable[..., Tensor]:
    """A forward pre-hook that quantizes a layer's input as `quantizer` does, and may be differentiated twice."""
    scale = qk.positive_scale(scale.detach())
    least, greatest = (code * scale.item() for code in codes)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        inside = args[0].clamp(least, greatest)
        # The difference is 0: the value is exactly that of the quantizer.
        return quantizer(args[0].detach(), scale, codes) + (inside - inside.detach())

    return hook


def gaussian(parameters: Sequence[Tensor], seed: int, index: int) -> list[Tensor]:
    """The `index`-th list of standard normal tensors of the parameters' shapes, float32 on the CPU.

    Drawn in the parameters' order, so that models of one architecture get the same.
    """
    generator = torch.Generator().manual_seed(seed_hash(seed, "direction", index))
    return [torch.randn(p.shape, generator=generator) for p in parameters]


def norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all elements together."""
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


@contextmanager
def movable(parameters: Sequence[Tensor]) -> Iterator[Callable[..., None]]:
    """Within, `move((a, d), (b, e))` puts the parameters a d + b e from where they were; they come back exactly."""
    before = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def move(*steps: tuple[float, Sequence[Tensor]]) -> None:
        for i, p in enumerate(parameters):
            p.copy_(before[i])
            for length, direction in steps:
                p.add_(direction[i], alpha=length)

    try:
        yield move
    finally:
        move()
