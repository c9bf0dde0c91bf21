"""The programs of docs/recipes.md, what they train on and the losses they have; and the plain loop they are held to."""

import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk

STEPS = 12  # that each recipe trains a member
PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


class Interrupted(Exception):
    """The end of a training that is to be resumed."""


@dataclass
class Recording:
    """Steps of a training: each one's loss, and the batch (images and labels) that it is of."""

    losses: list[float] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)


@contextmanager
def recording(steps: int | None = None) -> Iterator[Recording]:
    """The steps trained within: cross-entropy, of images with three channels. Interrupted after so many, if given."""
    found, cross_entropy, conv2d = Recording(), F.cross_entropy, F.conv2d

    def record_loss(logits, labels, *args, **kwargs):
        loss = cross_entropy(logits, labels, *args, **kwargs)
        if torch.is_grad_enabled():
            if len(found.losses) == steps:
                raise Interrupted
            found.losses.append(loss.item() / (len(labels) if kwargs.get("reduction") == "sum" else 1))
            found.labels.append(labels)
        return loss

    def record_images(x, *args, **kwargs):
        if torch.is_grad_enabled() and x.shape[1] == 3:
            found.images.append(x.detach())
        return conv2d(x, *args, **kwargs)

    with mock.patch.object(F, "cross_entropy", record_loss), mock.patch.object(F, "conv2d", record_images):
        yield found


def programs(title: str) -> list[str]:
    """The Python blocks of a section of the page."""
    (section,) = (part for part in PAGE.read_text().split("\n## ") if part.startswith(f"{title}\n"))
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def run(title: str) -> types.ModuleType:
    """The recipe of a section, which has run, as a module: libraries look for a class in the module that it names."""
    recipe = sys.modules["program"] = types.ModuleType("program")
    (text,) = programs(title)
    exec(compile(text, title, "exec"), vars(recipe))
    return recipe


def quantized(model: nn.Module) -> nn.Module:
    """As the recipes do it, to be enabled later."""
    qk.quantize_(model, qk.QConfig(weight_bits=7), enabled=False)
    return model


def plain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seen: Recording,
    switch: int | None,
    *,
    after: Callable[[int], None] = lambda step: None,
    average: nn.Module | None = None,
    max_norm: float | None = None,
) -> list[float]:
    """Losses of a loop over the batches seen, which begins to quantize before the step `switch`.

    Args:
        after: what else happens, called with each step at its end.
        average: of the model, enabled with it.
        max_norm: of gradients, clipped.
    """
    losses = []
    for step, (images, labels) in enumerate(zip(seen.images, seen.labels, strict=True)):
        if step == switch:
            qk.enable_(model)
            if average is not None:
                qk.enable_(average)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
        after(step)
    return losses
