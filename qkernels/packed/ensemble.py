"""PackedEnsemble: M quantized networks as one, with packed weights."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..quantize.layers import QuantizedLayer, quantized_layers
from . import file, loading
from .answers import called, mean_of
from .examples import answered
from .file import Contents, nbytes_of, works_on_integers
from .forms import NOTHING_IN_EVAL
from .fusion import FusionReport
from .integer import IntegerReport, Method, to_integer_
from .packed_layer import PackedLayer
from .packing import pack_models

Combine = Literal["logits", "probs"]


class PackedEnsemble(nn.Module):
    """M quantized networks that answer together: their weights stay packed in memory and in the file.

    `ensemble(x)` gives the mean of the members' logits, as EoQ does; `member_logits(x)` each member's. The activations
    have x's dtype, whatever it is; scales and biases are float32. Gradients there are none.

    Attributes:
        members: M.
        program: the network that computes all members, [N, ...] to [M, N, classes].
        report: what was packed and fused.
        info: what `save` wrote beside the network (classes, domains, preprocessing, ...), plain types.

    Source: EoQ is section 3.3 of QT-DoG (Javed et al., ICML 2025).
    """

    def __init__(
        self, program: nn.Module, members: int, report: FusionReport, info: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.program = program
        self.members = members
        self.report = report
        self.info = info or {}
        self.eval()

    @classmethod
    def from_models(cls, models: Sequence[nn.Module], example: Any = None, **info: Any) -> "PackedEnsemble":
        """Pack trained models of one architecture; they may differ in the bits of each layer, and are left as they are.

        Batch norms are folded as in eval mode. Layers that `quantize_` left float stay float. What comes of it is
        compared with the models on two batches of random images: if one graph for all members does not answer as they
        do, they run in turn, and `report.in_turn` says why.

        Args:
            models: quantized by `quantize_`; on one device.
            example: what a model takes: images [N, ...], or a tuple of arguments, or a mapping of those by name. By
                default images of the size that the model's configuration or its first layer tells of.
            info: plain values to save with the network, such as classes=["dog", ...].

        Raises:
            ValueError: if the models differ in more than their weights and bits, or nothing in them is quantized.
        """
        _check_alike(models, example)
        program, report = pack_models(models, example)
        return cls(program, len(models), report, info)

    @torch.no_grad()
    def member_logits(self, x: Any) -> Any:
        """Images [N, ...] to each member's logits [M, N, classes].

        Members that run in turn take what their model takes: a tuple has its arguments, a mapping those with names.
        Where they answer with a structure, its tensors are stacked, [M, ...]; where these have other shapes in each
        member, they are a list.

        Raises:
            PackedFileError: if a network from a file would take more memory than it may: see `load`.
        """
        return called(self.program, x)

    def forward(self, x: Any, combine: Combine = "logits") -> Any:
        """Images [N, ...] to [N, classes]: the mean of the members' logits, or of their probabilities ("probs").

        Of a structure, the mean of each tensor in it.
        """
        if combine not in ("logits", "probs"):
            raise ValueError(f'combine must be "logits" or "probs", got {combine!r}')
        logits = self.member_logits(x)
        if combine == "logits":
            return mean_of(logits)
        if not isinstance(logits, Tensor):
            raise ValueError(f"the members answer with a {type(logits).__name__}, of which there are no probabilities")
        return logits.softmax(-1).mean(0)

    def unpack_(self, keep: bool = True) -> "PackedEnsemble":
        """Keep the weights of integer layers unpacked, at 8 bits, beside their packed bits; or no longer. Returns self.

        On a CPU a forward unpacks the weights that it reads. For one image, or small ones, that is up to a quarter of
        its time, which this saves; `nbytes` tells what it costs. Answers stay the same, to the bit. A file holds the
        packed bits alone, and what is loaded, copied to another device, or given other weights is unpacked anew by
        another call.

        Raises:
            ValueError: if no layer works on integers, or the ensemble is not on a CPU.
        """
        layers = [layer for layer in self.program.modules() if isinstance(layer, PackedLayer)]
        if not self.integer:
            raise ValueError("unpack_: weights are kept unpacked for integer layers; call to_integer_ first")
        if any(not layer.weight_packed.is_cpu for layer in layers):
            raise ValueError("unpack_: weights are kept unpacked on a CPU; a GPU's kernels read the packed bits")
        for layer in layers:
            layer.keep_panels_(keep)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: weights, packed and unpacked (`unpack_`), scales, biases and what stays float."""
        panels = [layer.weight_panels for layer in self.program.modules() if isinstance(layer, PackedLayer)]
        return nbytes_of(self.program) + sum(t.nbytes for t in panels if t is not None)

    @property
    def integer(self) -> bool:
        """Whether layers work on integer activations."""
        return works_on_integers(self.program)

    def to_integer_(
        self,
        batches: Iterable[Tensor],
        method: Method = "mse",
        percentile: float = 99.99,
        bits: int = 8,
        float_dtype: torch.dtype = torch.float32,
    ) -> IntegerReport:
        """Let the packed layers work on integer activations from now on, with scales found on images.

        Each member's activations get one scale a tensor. Layers hand codes to the next where they can. Inputs whose
        scale was learned in training (`QConfig(act_bits=...)`) keep it.

        Args:
            batches: images [N, ...], a list or a data loader of some hundreds; read three times.
            method: "mse" takes the scale of the least squared error, "percentile" the one that clips what lies beyond
                `percentile`, "max" the one that clips nothing.
            bits: of the activations.
            float_dtype: of the activations where floats remain (between layers that cannot be connected).

        Returns:
            What this changes on the calibration images: look at it.
        """
        return to_integer_(self.program, self.members, batches, method, percentile, bits, float_dtype)

    def save(self, path: str | Path, **info: Any) -> Path:
        """Write the folder `path`: model.safetensors, config.json and README.md (docs/format.md). Returns it.

        `info` is saved with the network, over what it has already.
        """
        return file.save(Contents(self.program, self.members, self.report, {**self.info, **info}), Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module | None = None,
        *,
        max_bytes: int | None = None,
        public_key: str | Path | None = None,
    ) -> "PackedEnsemble":
        """Read what `save` wrote; neither the training code nor the model's is needed.

        The file may come from anyone: it is data, and nothing in it becomes code. Its tensors are read into memory of
        their own. What answering to images may take beside them is limited (`packed.memory.MemoryLimit`).

        Args:
            path: the folder, or its model.safetensors.
            model: only for an ensemble whose members run in turn: a float model of their architecture.
            max_bytes: instead of that limit; the tensors may take no more, either.
            public_key: a PEM file; whoever owns the key must have signed the ensemble (`sign_packed_file`).

        Raises:
            PackedFileError: if the file is truncated, corrupt or not what it claims to be, takes too much memory, or
                is not signed so.
        """
        return cls(*loading.load(Path(path), model, max_bytes, public_key))

    def extra_repr(self) -> str:
        return f"members={self.members}, nbytes={self.nbytes:,}, integer={self.integer}"


# Attributes of modules that change nothing in evaluation.
_OF_TRAINING = (
    *("training", "inplace", "momentum", "drop_prob"),
    *("started", "in_forward", "fused_before", "weight_was_read"),
)


def _description(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Name -> what must agree between members: each module's type, the shapes of its parameters, its settings.

    What modules with children have beside these shows in their graphs, which `Stacker` compares.
    """
    description: dict[str, tuple[Any, ...]] = {}
    for name, module in model.named_modules():
        parameters = {key: t for key, t in module._parameters.items() if t is not None}
        if isinstance(module, QuantizedLayer):  # scales may be one a channel or one a tensor
            parameters = {key: t for key, t in parameters.items() if key not in ("weight_scale", "act_scale")}
        settings = {}
        if not any(module.children()) and type(module) not in NOTHING_IN_EVAL:
            settings = {key: value for key, value in vars(module).items() if not key.startswith("_") and _plain(value)}
        description[name] = (
            f"{type(module).__module__}.{type(module).__qualname__}",
            {key: tuple(t.shape) for key, t in parameters.items()},
            {key: value for key, value in settings.items() if key not in _OF_TRAINING},
        )
    return description


def _difference(own: tuple[Any, ...], first: tuple[Any, ...]) -> str:
    """What two descriptions of a module do not have in common."""
    for a, b in zip_longest(own, first, fillvalue="nothing"):
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            apart = [key for key in a | b if a.get(key) != b.get(key)]
            return "; ".join(f"{key} {a.get(key)} and {b.get(key)}" for key in apart)
        if a != b:
            return f"{a} and {b}"
    return ""


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _check_alike(models: Sequence[nn.Module], example: Any) -> None:
    if not models:
        raise ValueError("PackedEnsemble: no models to pack")
    descriptions = [_description(model) for model in models]
    if example is not None and any(own != descriptions[0] for own in descriptions):
        # What answering leaves behind is no setting.
        descriptions = [_description(answered(model, example)) for model in models]
    first = descriptions[0]
    for index, model in enumerate(models):
        if not any(layer.enabled for _, layer in quantized_layers(model)):
            raise ValueError(
                f"PackedEnsemble: models[{index}] has no quantized layers: quantize_ or enable_ it, and train"
            )
        own = descriptions[index]
        for name in first.keys() | own.keys():
            if first.get(name) != own.get(name):
                raise ValueError(
                    f"PackedEnsemble: models[{index}] differs from models[0] at {name or 'the root'}: "
                    f"{_difference(own.get(name, ()), first.get(name, ()))}"
                )
        for name, layer in quantized_layers(model):
            if layer.enabled and layer.act_quantizer is not None and layer.act_range is None:
                raise ValueError(
                    f"PackedEnsemble: models[{index}].{name} has not started to quantize its input; train it"
                )
    devices = {p.device for model in models for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"PackedEnsemble: the models are on {', '.join(map(str, devices))}; move them to one device")
