"""QConv2d and QLinear: drop-in subclasses that fake-quantize their weight, and if asked their input, in a forward."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.mean_abs import mean_abs
from .quantizers import INQ, LSQ, ActivationLSQ, code_range, positive_scale, scale_of_mean

UNDECIDED = -1  # act_signed before the first training batch; then 0 (unsigned) or 1 (signed)


def multiply_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies: autocast's where it is on, so that no second pass converts."""
    device = t.device.type
    if t.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return t.dtype


class QuantizedLayer(nn.Module):
    """What a quantized layer adds to its float type.

    For its weight: `weight_quantizer`, and `weight_scale` beside `weight`. INQ also keeps `weight_frozen`, the level of
    each frozen weight and infinity for the free ones.

    For its input, where `act_quantizer` is not None: `act_scale` (0-d, float32) and `act_signed` (0-d int8, which also
    says whether the first training batch was seen), with `act_range`, the (qmin, qmax) that follows from it or None
    before that batch. The scale is a Parameter from the start, so that an optimizer made at any time holds it.

    A layer takes its float type's arguments, and quantizers (default: LSQ() for the weight, none for the input).

    The float type's state-dict keys stay as they are. A float checkpoint loads strictly, and the scales start anew:
    those of weights from the loaded weights, those of inputs from the next training batch. A quantized one restores
    them.
    """

    float_type: ClassVar[type[nn.Module]]
    weight: Tensor  # a Parameter; nn.Conv2d and nn.Linear declare it so
    weight_scale: nn.Parameter
    weight_quantizer: LSQ | INQ
    weight_frozen: Tensor
    # Set for the length of one forward pass by `fuse_weights_`: the fake-quantized weight, and the positive act_scale.
    fused_weight: Tensor | None
    fused_act_scale: Tensor | None
    act_quantizer: ActivationLSQ | None
    act_scale: nn.Parameter
    act_signed: Tensor
    act_range: tuple[int, int] | None

    def __init__(
        self,
        *args: Any,
        quantizer: LSQ | INQ | None = None,
        act_quantizer: ActivationLSQ | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.quantize_weight_(quantizer or LSQ())
        self.quantize_input_(act_quantizer)

    def quantize_weight_(self, quantizer: LSQ | INQ) -> None:
        """Begin to quantize `weight` with `quantizer`, the scale starting from the weight as it is."""
        self.weight_quantizer = quantizer
        self.fused_weight = None
        scale = torch.empty(self.weight.shape[:1] if quantizer.axis == 0 else (), device="meta")
        if not self.weight.is_meta:
            scale = quantizer.init_scale(self.weight)
        self.weight_scale = nn.Parameter(scale, requires_grad=quantizer.learn_scale)
        if isinstance(quantizer, INQ):
            self.register_buffer("weight_frozen", torch.full_like(self.weight, torch.inf, requires_grad=False))

    def quantize_input_(self, quantizer: ActivationLSQ | None) -> None:
        """Begin to quantize the input with `quantizer`, from the next training batch on; None leaves it float."""
        self.act_quantizer = quantizer
        self.act_range = None
        self.fused_act_scale = None
        if quantizer is not None:
            scale = torch.ones((), device=self.weight.device)
            self.act_scale = nn.Parameter(scale, requires_grad=quantizer.learn_scale)
            self.register_buffer("act_signed", torch.full((), UNDECIDED, dtype=torch.int8, device=self.weight.device))

    @torch.no_grad()
    def dequantize_(self) -> None:
        """Write the dequantized values into `weight`, in place, and drop scales and quantizers."""
        with torch.autocast(self.weight.device.type, enabled=False):
            self.weight.copy_(self.quantized_weight())
        added = ("weight_scale", "weight_frozen", "weight_quantizer", "fused_weight")
        for name in (*added, "act_scale", "act_signed", "act_quantizer", "act_range", "fused_act_scale"):
            if hasattr(self, name):
                delattr(self, name)

    def quantized_weight(self) -> Tensor:
        """The fake-quantized weight, of `weight`'s shape; differentiable in `weight` and `weight_scale`.

        Of INQ: the frozen weights at their levels, whatever an optimizer does to `weight`, and the free ones as they
        are.
        """
        if self.fused_weight is not None:
            return self.fused_weight
        if isinstance(self.weight_quantizer, INQ):
            weight = torch.where(self.weight_frozen.isinf(), self.weight, self.weight_frozen)
            return weight.to(multiply_dtype(weight))
        return self.weight_quantizer(self.weight, positive_scale(self.weight_scale), multiply_dtype(self.weight))

    def quantized_input(self, x: Tensor) -> Tensor:
        """The fake-quantized input; x itself where activations stay float. Differentiable in x and `act_scale`.

        Raises:
            RuntimeError: in eval mode before the first training batch.
        """
        if self.act_quantizer is None:
            return x
        if self.act_range is None:
            if torch.compiler.is_compiling():  # not @torch.compiler.disable: that imports the compiler with this file
                raise RuntimeError("the first training batch decides an input's range: run one before compiling")
            self._start_act_scale(x)
            assert self.act_range is not None
        scale = positive_scale(self.act_scale) if self.fused_act_scale is None else self.fused_act_scale
        return self.act_quantizer(x, scale, self.act_range, multiply_dtype(x))

    @torch.no_grad()
    def _start_act_scale(self, x: Tensor) -> None:
        """Take scale and sign from x, over all processes of a distributed run: each sees its part of the batch."""
        if not self.training:
            raise RuntimeError(
                f"{type(self).__name__}: the scale of its input is not initialized: "
                "run a training batch first (model.train()), or load a quantized checkpoint"
            )
        assert self.act_quantizer is not None
        found = torch.stack([mean_abs(x), (x < 0).any().float()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(found)
            found /= torch.distributed.get_world_size()
        mean, negative = found
        signed = self.act_quantizer.signed
        self.act_signed.copy_(negative > 0 if signed is None else torch.tensor(signed))
        self._follow_act_signed()
        assert self.act_range is not None
        self.act_scale.copy_(scale_of_mean(mean, self.act_range[1]))

    def _follow_act_signed(self) -> None:
        """Bring `act_range`, plain numbers that a compiler can see, in line with the stored `act_signed`."""
        if self.act_quantizer is not None and not self.act_signed.is_meta:
            signed = int(self.act_signed)
            self.act_range = None if signed == UNDECIDED else code_range(self.act_quantizer.bits, bool(signed))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if prefix + "weight" in state_dict:
            added = ("weight_scale", "weight_frozen", "act_scale", "act_signed")
            anew = {name for name in added if hasattr(self, name) and prefix + name not in state_dict}
            missing[:] = [key for key in missing if key not in {prefix + name for name in anew}]
            with torch.no_grad():
                if "weight_scale" in anew:
                    self.weight_scale.copy_(self.weight_quantizer.init_scale(self.weight))
                if "weight_frozen" in anew:
                    self.weight_frozen.fill_(torch.inf)
                if anew & {"act_scale", "act_signed"}:
                    self.act_signed.fill_(UNDECIDED)
        self._follow_act_signed()

    def extra_repr(self) -> str:
        q = self.weight_quantizer
        fixed = "" if q.learn_scale else ", fixed scale"
        act = f", input={self.act_quantizer.bits} bit" if self.act_quantizer else ""
        kind = " INQ" if isinstance(q, INQ) else ""
        return f"{super().extra_repr()}, weight={q.bits} bit{kind} per {q.granularity}{fixed}{act}"


class QConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d with a fake-quantized weight; takes all its arguments, and the quantizers.

    `quantize_` turns an nn.Conv2d into one in place; constructing one starts from a new weight.
    """

    float_type = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QLinear(QuantizedLayer, nn.Linear):
    """nn.Linear with a fake-quantized weight; takes all its arguments, and the quantizers."""

    float_type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)
