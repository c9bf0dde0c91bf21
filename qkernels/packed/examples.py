"""Images, or whatever else a model takes, to trace it with and to compare answers on."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .answers import called

SMALL = (64, 32, 96, 128)
USUAL = (224, 256, 384, 299, 192, 160, 448, 512, 48, 28, 16, 8)
CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def fresh(model: nn.Module) -> nn.Module:
    """A copy in eval mode: what is tried with it does not show on the model."""
    return copy.deepcopy(model).eval()


@torch.no_grad()
def answered(model: nn.Module, inputs: Any) -> nn.Module:
    """A copy that has answered once, where it can: some remember tables or sizes, and do less the next time."""
    copied = fresh(model)
    with contextlib.suppress(Exception):
        called(copied, inputs)
    return copied


class Example:
    """What a model takes.

    Args:
        model: a member.
        given: an example, [N, ...], or a tuple, list or mapping; None to look for images that the model takes.

    Attributes:
        shapes: of images that it takes, without the batch: first small ones, last those that it is made for.
    """

    def __init__(self, model: nn.Module, given: Any) -> None:
        self.given = given
        floats = [t for t in model.parameters() if t.is_floating_point()]
        self.device = floats[0].device if floats else torch.device("cpu")
        self.dtype = given.dtype if isinstance(given, Tensor) else floats[0].dtype if floats else torch.float32
        self.shapes: list[tuple[int, ...]] = []
        if isinstance(given, Tensor):
            self.shapes = [tuple(given.shape[1:])]
        elif given is None:
            self.shapes = self._found(fresh(model))

    def batch(self, shape: Sequence[int], count: int) -> Tensor:
        """So many images [count, *shape] of random numbers; of integers, those of the example."""
        generator = torch.Generator().manual_seed(count)
        if self.dtype.is_floating_point:
            return torch.randn(count, *shape, generator=generator).to(self.device, self.dtype)
        return self.given[torch.randint(len(self.given), (count,), generator=generator)]

    def inputs(self) -> list[Any]:
        """Two batches of different sizes; or the example that was given, if it is no tensor; or none."""
        if self.shapes:
            return [self.batch(self.shapes[-1], count) for count in (2, 3)]
        return [] if self.given is None else [self.given]

    def attempts(self) -> list[tuple[tuple[int, ...], bool]]:
        """Shapes to trace with, and whether all that follows from them is to be constant."""
        return [*((shape, False) for shape in self.shapes), *((shape, True) for shape in self.shapes[-1:])]

    def _found(self, model: nn.Module) -> list[tuple[int, ...]]:
        named = configured(model)
        small = next((shape for shape in self._candidates(model, named) if self._takes(model, shape)), None)
        if small is None:
            return []
        made_for = [named] if named is not None else [(small[0], *[size] * (len(small) - 1)) for size in (224,)]
        last = next((shape for shape in made_for if shape != small and self._takes(model, shape)), None)
        return [small] if last is None else [small, last]

    def _takes(self, model: nn.Module, shape: Sequence[int]) -> bool:
        try:
            with torch.no_grad():
                called(model, self.batch(shape, 2))
        except Exception:  # whatever a model says of images that it does not take
            return False
        return True

    def _candidates(self, model: nn.Module, named: tuple[int, ...] | None) -> Iterator[tuple[int, ...]]:
        if named is not None:
            yield (named[0], *[SMALL[0]] * (len(named) - 1))
            yield named
        for module in model.modules():
            for kind, dims in CONVOLUTIONS.items():
                if isinstance(module, kind):
                    channels = module.in_channels
                    yield from ((channels, *[size] * dims) for size in (SMALL + USUAL if dims < 3 else (16, 32, 8)))
                    return
            if isinstance(module, nn.Linear):
                yield from ((module.in_features,), (8, module.in_features))
                return


def configured(model: Any) -> tuple[int, ...] | None:
    """The shape of the images that a model says it is made for: those of timm and of Hugging Face do."""
    made_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if isinstance(made_for, tuple) and first is not None:
        return first.in_channels, *made_for
    for settings in (getattr(model, "pretrained_cfg", None), getattr(model, "default_cfg", None)):
        if isinstance(settings, dict) and isinstance(settings.get("input_size"), tuple | list):
            return tuple(settings["input_size"])
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    if isinstance(size, int):
        return channels, size, size
    return (channels, *size) if isinstance(size, tuple | list) else None


def other_sizes(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes that a model may take as well where it takes images of any size."""
    if len(shape) < 2:
        return []
    sizes = shape[1:]
    halves = [(shape[0], *(n // 2 for n in sizes))] if min(sizes) >= 32 else []
    # A head on flattened features takes what strides leave the same number of.
    near = [(shape[0], *(n + more for n in sizes)) for more in (32, -1, 1)]
    return [*halves, *near, (shape[0] + 1, *sizes)]
