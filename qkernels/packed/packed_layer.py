"""PackedLayer: the members of an ensemble side by side in one layer, their weights as packed bits.

Images come and go as [M, N, ...]; with `shared` all members see the same [N, ...]. The kernels take the members folded
into the batch, [M * N, ...].
With an `input_scale` a layer works on integer activations: it takes codes, or floats that it quantizes itself, and
with an `output_scale` gives codes to the next.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.geometry import Geometry
from ..ops.packed_conv2d import ACTIVATIONS, Activation, packed_conv2d, packed_conv2d_int8
from ..ops.packed_panels import packed_panels
from ..ops.packing import codes_dtype, dequantize_packed, pack, packed_bytes, quantize
from ..quantize.codes import weight_codes
from ..quantize.layers import QuantizedLayer
from ..quantize.quantizers import positive_scale
from .kinds import Expected, LayerKind, ProgramError, Settings, shown

INTEGERS = (torch.int8, torch.uint8)


class Run(NamedTuple):
    """Successive members whose weights have the same bits: one launch."""

    members: slice
    bits: int
    bytes: slice


def runs_of(bits: Sequence[int], count: int) -> list[Run]:
    """The runs of equal bits, each member having `count` codes."""
    runs: list[Run] = []
    start = 0
    for member, b in enumerate(bits):
        end = start + packed_bytes(count, b)
        if runs and runs[-1].bits == b:
            last = runs.pop()
            runs.append(Run(slice(last.members.start, member + 1), b, slice(last.bytes.start, end)))
        else:
            runs.append(Run(slice(member, member + 1), b, slice(start, end)))
        start = end
    return runs


def images_of(x: Tensor, members: int, run: slice) -> Tensor:
    """The part of x [M * N, ...] that belongs to the members of a run."""
    images = x.shape[0] // members
    return x[run.start * images : run.stop * images]


def _of(by_member: Tensor | None, run: Run) -> Tensor | None:
    """The part that belongs to the members of a run, where there is one."""
    return None if by_member is None else by_member[run.members]


def _version(t: Tensor) -> int:
    """How often a tensor was written to, where that is counted."""
    return 0 if t.is_inference() else t._version


def quantize_members(x: Tensor, scale: Tensor, code_range: tuple[int, int]) -> Tensor:
    """Codes of x [M * N, ...], each member with its own scale [M]."""
    return quantize(x.unflatten(0, (scale.shape[0], -1)), scale, *code_range, axis=0).flatten(0, 1)


def dequantize_members(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [M * N, ...] times their member's scale [M]."""
    by_member = codes.unflatten(0, (scale.shape[0], -1))
    return (by_member * scale.view(-1, *[1] * codes.dim())).to(dtype).flatten(0, 1)


class PackedLayer(LayerKind):
    """What both layers share: M packed weights, their scales and biases, and what follows in the kernel's epilogue.

    Attributes:
        bits: of each member's weight.
        weight_packed: uint8, the members' packed codes one after another.
        weight_panels: what `keep_panels_` made of them.
        weight_scale, bias: float32 [M, C_out]; a batch norm that followed is folded into them.
        input_scale, residual_scale, output_scale: float32 [M], of integer activations; None for floats.
        input_range, output_range: of their codes.
        activation, shared: see `ops.packed_conv2d`.
        alone: whether it stands in a model of PyTorch's, as its only member: it takes and gives [N, ...].
        like_torch: see `stand_alone_`.
        float_dtype: of what an integer layer gives that does not give codes.
        changes: how often one of these was set, for those who remember what they were.
    """

    weight_packed: Tensor
    weight_panels: Tensor | None
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    residual_scale: Tensor | None
    output_scale: Tensor | None
    changes: int = 0

    def __init__(
        self, in_channels: int, out_channels: int, geometry: Geometry, bias: bool, bits: Sequence[int]
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.geometry = geometry
        self.bits = tuple(bits)
        self.count = 1
        for n in geometry.weight_shape(out_channels, in_channels):
            self.count *= n
        self.runs = runs_of(self.bits, self.count)
        self.activation: Activation = "none"
        self.one_input_scale = False
        self.input_range = (0, 255)
        self.output_range = (0, 255)
        self.float_dtype = torch.float32
        self.alone = self.like_torch = False
        self.register_buffer("weight_packed", torch.zeros(self.runs[-1].bytes.stop, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(self.members, out_channels))
        self.register_buffer("bias", torch.zeros(self.members, out_channels) if bias else None)
        for name in ("input_scale", "residual_scale", "output_scale"):
            self.register_buffer(name, None)
        self.register_buffer("weight_panels", None, persistent=False)
        self._panels_are_of: tuple[Tensor, int] | None = None  # the packed weights, and how often they were written to

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__["changes"] = self.changes + 1

    @property
    def members(self) -> int:
        return len(self.bits)

    def stand_alone_(self, like_torch: bool = True) -> "PackedLayer":
        """Take the place of a layer in a model: what comes has no dimension of members. Returns self.

        `like_torch`: have a bias [C_out], and give contiguous images for contiguous ones, since the model's code may
        look at them. In files of version 1 such layers did not.
        """
        self.alone = self.shared = True
        self.like_torch = like_torch
        if like_torch and self.bias is not None:
            self.bias = self.bias[0]
        return self

    @property
    def biases(self) -> Tensor | None:
        """Of the members: [M, C_out]."""
        return self.bias[None] if self.like_torch and self.bias is not None else self.bias

    @property
    def weight(self) -> Tensor:
        """Dequantized, as the layer in whose place this one stands has it."""
        if not self.alone:
            raise AttributeError(f"{type(self).__name__} of several members has no weight; see dequantized_weight")
        return self.dequantized_weight()[0].movedim(-1, 1)

    def geometry_of(self, height: int, width: int) -> Geometry:
        """Of images of that size."""
        return self.geometry

    def _lead(self, lead: Sequence[int]) -> tuple[int, ...]:
        """The leading dimensions of the result, of those of x."""
        return (self.members, *lead) if self.shared and not self.alone else tuple(lead)

    @torch.no_grad()
    def pack_(self, layers: Sequence[QuantizedLayer]) -> None:
        """Take over the weights of `layers`, one a member."""
        packed, scales = [], []
        for layer, bits in zip(layers, self.bits, strict=True):
            codes, scale = weight_codes(layer)
            # To the order [C_out, h, w, C_in / groups] of the packed codes.
            packed.append(pack(codes.movedim(1, -1), bits))
            scales.append(scale)
        self.weight_packed = torch.cat(packed)
        self.weight_scale = torch.stack(scales)

    def fill_(self, layers: Sequence[QuantizedLayer]) -> None:
        """Take over weights, biases and what is known of the inputs."""
        self.pack_(layers)
        if self.bias is not None:
            self.bias = torch.stack([layer.bias.detach().float() for layer in layers])  # type: ignore[operator]
        if layers[0].act_quantizer is not None:
            ranges = {layer.act_range for layer in layers}
            (code_range,) = ranges
            assert code_range is not None
            self.quantize_input_(
                torch.stack([positive_scale(layer.act_scale.detach()).squeeze(0) for layer in layers]), code_range
            )

    def quantize_input_(self, scale: Tensor, code_range: tuple[int, int]) -> None:
        """Work on integer activations from now on, with scales float32 [M] for codes in `code_range`."""
        self.input_scale, self.input_range = scale.float().contiguous(), code_range
        self._compare_input_scales()

    def _compare_input_scales(self) -> None:
        """Find out whether all members have one input scale: then images that they share are quantized once.

        It is kept, since to look in each forward would wait for the GPU.
        """
        scale = self.input_scale
        self.one_input_scale = scale is not None and bool((scale == scale[0]).all())

    @torch.no_grad()
    def rescale_(self, factor: Tensor, shift: Tensor) -> None:
        """Fold y * factor + shift (float64 [M, C_out]) into the scale and the bias: the codes do not change."""
        bias = 0 if self.bias is None else self.bias.double()
        self.bias = (bias * factor + shift).float()
        self.weight_scale = (self.weight_scale.double() * factor).float()

    def keep_panels_(self, keep: bool = True) -> None:
        """Have the weights unpacked beside their bits, as the kernels for codes read them; or no longer."""
        self.weight_panels = self._panels_are_of = None
        depth = self.in_channels // self.geometry.groups
        if not keep or self.input_scale is None or self.alone or (depth == 1 and self.geometry.groups > 1):
            return  # depthwise kernels have no panels
        g = self.geometry
        of_window = (self.out_channels, depth)
        parts = [
            packed_panels(
                self.weight_packed[run.bytes].view(run.members.stop - run.members.start, -1),
                *(*of_window, run.bits, g.kernel, g.dilation, g.groups),
            )
            for run in self.runs
        ]
        self.weight_panels = torch.cat(parts)
        self._panels_are_of = (self.weight_packed, _version(self.weight_packed))

    @property
    def has_panels(self) -> bool:
        """Whether panels are kept, and are those of the weights."""
        of = self._panels_are_of
        return of is not None and of[0] is self.weight_packed and of[1] == _version(self.weight_packed)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The members' weights with everything folded in: [M, C_out, h, w, C_in / groups]."""
        weights = [
            dequantize_packed(
                self.weight_packed[run.bytes].view(run.members.stop - run.members.start, -1),
                self.weight_scale[run.members],
                run.bits,
                self.count,
                dtype,
            )
            for run in self.runs
        ]
        shape = self.geometry.weight_shape(self.out_channels, self.in_channels)
        return torch.cat(weights).view(self.members, *shape)

    def _convolve(self, x: Tensor, residual: Tensor | None, geometry: Geometry) -> Tensor:
        """Images [M * N, C_in, H, W] to [M * N, C_out, H', W'], with all that follows in the epilogue."""
        if residual is None or residual.shape[1:] == (self.out_channels, *geometry.output_size(*x.shape[2:])):
            return self._launch(x, residual, geometry, self.activation, self.output_scale)
        # The kernels add images of the same size alone; whatever else broadcasts is added here.
        y = self._launch(x, None, geometry, "none", None)
        if self.residual_scale is not None:
            residual = dequantize_members(residual, self.residual_scale, y.dtype)
        y = ACTIVATIONS[self.activation]((y + residual).float()).to(y.dtype)
        return y if self.output_scale is None else quantize_members(y, self.output_scale, self.output_range)

    def _launch(
        self, x: Tensor, residual: Tensor | None, geometry: Geometry, activation: Activation, out_scale: Tensor | None
    ) -> Tensor:
        """One launch for each run of equal bits."""
        shared = self.shared
        if self.input_scale is not None and x.dtype not in INTEGERS:
            if shared and self.one_input_scale:
                x = quantize(x, self.input_scale[0], *self.input_range)
            else:
                # Members whose scales differ do not share codes.
                x, shared = (x.repeat(self.members, 1, 1, 1), False) if shared else (x, False)
                x = quantize_members(x, self.input_scale, self.input_range)
        results = []
        for run in self.runs:
            images = x if shared else images_of(x, self.members, run.members)
            added = None if residual is None else images_of(residual, self.members, run.members)
            packed = self.weight_packed[run.bytes].view(run.members.stop - run.members.start, -1)
            weights = (packed, self.weight_scale[run.members], _of(self.biases, run), run.bits, geometry)
            if self.input_scale is None:
                y = packed_conv2d(images, *weights, residual=added, shared=shared, activation=activation)
            else:
                y = packed_conv2d_int8(
                    images,
                    self.input_scale[run.members],
                    *weights,
                    residual=added,
                    residual_scale=None if residual is None else _of(self.residual_scale, run),
                    out_scale=_of(out_scale, run),
                    code_range=self.output_range,
                    shared=shared,
                    activation=activation,
                    out_dtype=self.float_dtype if out_scale is None else codes_dtype(self.output_range[0]),
                )
            results.append(y)
        return results[0] if len(results) == 1 else torch.cat(results)

    def settings(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "bits": list(self.bits),
            "activation": self.activation,
            "input_range": list(self.input_range),
            "output_range": list(self.output_range),
        }

    def _follow(self, settings: Settings) -> None:
        """Take over what both kinds of layers have."""
        self.activation = settings.choice("activation", tuple(ACTIVATIONS))
        for key in ("input_range", "output_range"):
            qmin, qmax = settings.numbers(key, 2, -128)
            if qmin >= qmax or qmax > (127 if qmin < 0 else 255):
                raise ProgramError(f"{key} [{qmin}, {qmax}] fits neither int8 nor uint8")
            setattr(self, key, (qmin, qmax))

    def expected(self, members: int) -> dict[str, Expected]:
        by_channel, by_member = [self.members, self.out_channels], [self.members]
        scales = ("input_scale", "residual_scale", "output_scale")
        return {
            "weight_packed": Expected(torch.uint8, list(self.weight_packed.shape)),
            "weight_scale": Expected(torch.float32, by_channel),
            "weight_shape": Expected(torch.int64, [4]),
            "bias": Expected(torch.float32, by_channel[1:] if self.like_torch else by_channel, optional=True),
            **{name: Expected(torch.float32, by_member, optional=True) for name in scales},
        }

    def take(self, name: str, t: Tensor) -> None:
        if name != "weight_shape":
            super().take(name, t)
        elif not t.is_meta and tuple(t.tolist()) != (
            shape := self.geometry.weight_shape(self.out_channels, self.in_channels)
        ):
            raise ProgramError(f"is {t.tolist()}, but the layer's weight has shape {list(shape)}")

    def check(self) -> None:
        if self.output_scale is not None and self.input_scale is None:
            raise ProgramError("gives codes but takes none: it has no input_scale")
        for scale in (self.input_scale, self.residual_scale, self.output_scale):
            if scale is not None and not bool((scale > 0).all()):
                raise ProgramError("has an activation scale that is not positive")
        self._compare_input_scales()

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLayer":
        # `.half()` is about the activations, whose dtype x brings: scales and biases move, but stay float32.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        if self.weight_packed is not before["weight_packed"]:
            self.keep_panels_(False)
        for name, buffer in before.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.to(self.weight_packed.device)
        return self

    def extra_repr(self) -> str:
        g = self.geometry
        bits = self.bits[0] if len(set(self.bits)) == 1 else list(self.bits)
        parts = [f"{self.in_channels}, {self.out_channels}", f"members={self.members}, bits={bits}"]
        parts += [
            f"{name}={getattr(g, name)}"
            for name in ("kernel", "stride", "padding", "dilation", "groups")
            if getattr(g, name) != getattr(Geometry(), name)
        ]
        parts += [f"activation={self.activation}"] * (self.activation != "none")
        parts += ["integer"] * (self.input_scale is not None)
        return ", ".join(parts)


def bits_of(settings: Settings, members: int) -> list[int]:
    """Of each member's weight."""
    bits = settings.get("bits")
    if not isinstance(bits, list) or len(bits) != members:
        raise ProgramError(f"has bits {shown(bits)} for {members} members")
    if not all(type(b) is int and 2 <= b <= 8 for b in bits):
        raise ProgramError(f"has bits {shown(bits)}; each is 2..8")
    return bits
