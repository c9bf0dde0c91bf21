"""QuantizedLayer: what a quantized layer has and does beside its float type."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, fx, nn

from ..ops.mean_abs import mean_abs
from .described import Described, as_tensor, described, from_tensor
from .quantizers import INQ, LSQ, ActivationLSQ, code_range, positive_scale, scale_of_mean
from .reading import ReadWeight
from .sharding import fill_, whole

UNDECIDED = -1  # act_signed before the first training batch; then 0 (unsigned) or 1 (signed)
STATE = "_extra_state"  # what PyTorch calls the entry of a state dict that is neither a Parameter nor a buffer
# Copies of layers whose input has no scale yet: they get the layer's when it has one.
_WAITING_COPIES: "WeakKeyDictionary[QuantizedLayer, WeakSet[QuantizedLayer]]" = WeakKeyDictionary()


def multiply_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies: autocast's where it is on, so that no second pass converts."""
    device = t.device.type
    if t.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return t.dtype


class QuantizedLayer(nn.Module):
    """What a quantized layer adds to its float type.

    For its weight: `weight_quantizer`, and `weight_scale` beside the weight's Parameter. Whoever reads `weight` gets
    the quantized weight, be it the forward of the float type or code that never calls the layer; `latent_weight` is
    the Parameter behind it, which optimizers and state dicts have. INQ also keeps `weight_frozen`, the level of each
    frozen weight and infinity for the free ones.

    For its input, where `act_quantizer` is not None: `act_scale` ([1], float32) and `act_signed` (0-d int8, which also
    says whether the first training batch was seen), with `act_range`, the (qmin, qmax) that follows from it or None
    before that batch. The scale is a Parameter from the start, so that an optimizer made at any time holds it.

    While `enabled` is False the layer computes what its float type does; see `enable_` and `disable_`.

    A layer takes its float type's arguments, and quantizers (default: LSQ() for the weight, none for the input).

    The float type's state-dict keys stay as they are. A float checkpoint loads strictly, and the scales start anew:
    those of weights from the loaded weights, those of inputs from the next training batch. A quantized one restores
    them, and whether the layer is enabled; one of other bits is refused.
    """

    float_type: ClassVar[type[nn.Module]]
    weight_name: ClassVar[str] = "weight"  # what the float type calls the Parameter that is quantized
    channel_axis: ClassVar[int] = 0  # its dimension that counts output channels
    quantizes_input: ClassVar[bool] = True  # whether the forward goes by `quantized_input`

    weight = ReadWeight()
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
    act_start: Tensor | None  # in the forward in which it started, the scale that it starts from
    enabled: bool
    started: bool  # whether it has ever been enabled: until then its scales are placeholders
    in_forward: bool  # whether its own forward runs, so that what is read is not for others
    fused_before: bool  # whether its last forward recorded gradients with a fused weight
    weight_was_read: bool  # whether somebody has read the weight before the input's scale started

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
        self.enabled = self.started = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float type's, of the quantized input; it finds the quantized weight where it looks for its weight."""
        traced = next((value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)), None)
        if traced is not None:  # torch.fx traces: the layer is one node
            tracer: Any = traced.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        if args:
            args = (self.quantized_input(args[0]), *args[1:])
        elif (name := "input" if "input" in kwargs else "x") in kwargs:
            kwargs[name] = self.quantized_input(kwargs[name])
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        own = self.__dict__
        own["in_forward"] = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            own["in_forward"] = False

    # Of the weight --------------------------------------------------------------------------------------------------

    @property
    def latent_weight(self) -> nn.Parameter:
        """The Parameter that is trained, of which `weight` is the quantized value."""
        return self._parameters[self.weight_name]  # type: ignore[return-value]

    def float_weight(self) -> Tensor:
        """What the float type multiplies by, which is what is quantized: by default the Parameter as it is."""
        return self.latent_weight

    def quantizes_alike(self, quantizer: LSQ | INQ) -> bool:
        """Whether it quantizes its weight so already."""
        return self.weight_quantizer == replace(quantizer, channel_axis=self.channel_axis)

    def quantize_weight_(self, quantizer: LSQ | INQ) -> None:
        """Begin to quantize the weight with `quantizer`, the scale starting from the weight as it is."""
        self._drop("weight_frozen")
        self.weight_quantizer = quantizer = replace(quantizer, channel_axis=self.channel_axis)
        self.fused_weight = None
        self.fused_before = self.in_forward = False
        latent = self.latent_weight
        if latent.is_meta:
            shape = (1,) if quantizer.axis is None else (latent.shape[quantizer.axis],)
            scale = torch.empty(shape, dtype=latent.dtype, device="meta")
        else:
            scale = self.first_weight_scale()
        learned, before = quantizer.learn_scale and latent.requires_grad, self._parameters.get("weight_scale")
        if before is None or (before.shape, before.dtype) != (scale.shape, scale.dtype):
            self.weight_scale = nn.Parameter(scale, requires_grad=learned)
        else:  # of other bits: whoever holds the Parameter goes on to do so
            with torch.no_grad():
                fill_(before, scale)
            before.requires_grad_(learned)
        if isinstance(quantizer, INQ):
            self.register_buffer("weight_frozen", torch.full_like(latent, torch.inf, requires_grad=False))

    @torch.no_grad()
    def first_weight_scale(self) -> Tensor:
        """The scale that the weight as it is starts from."""
        with torch.autocast(self.latent_weight.device.type, enabled=False):
            return self.weight_quantizer.init_scale(whole(self.float_weight()))

    def quantized_weight(self) -> Tensor:
        """The fake-quantized weight, of the Parameter's shape; differentiable in that and in `weight_scale`.

        Of INQ: the frozen weights at their levels, whatever an optimizer does to the Parameter, and the free ones as
        they are.
        """
        if self.fused_weight is not None:
            self._note_fused()
            return self.fused_weight
        weight = self.float_weight()
        if not self.enabled:
            return weight
        if isinstance(self.weight_quantizer, INQ):
            weight = torch.where(self.weight_frozen.isinf(), weight, self.weight_frozen)
            return weight.to(multiply_dtype(weight))
        if self._is_recomputed():
            with torch.no_grad():
                weight = self.weight_quantizer(weight, positive_scale(self.weight_scale), multiply_dtype(weight))
            return weight.requires_grad_()
        return self.weight_quantizer(weight, positive_scale(self.weight_scale), multiply_dtype(weight))

    # Activation checkpointing computes a forward again in the backward pass, when what was fused is gone. It wants to
    # find as many tensors saved as before, and uses none but their values: so weight and scale are then leaves. (Unless
    # it is the reentrant kind, whose first forward records no gradient and whose second one does.)

    def _note_fused(self) -> None:
        if not torch.compiler.is_compiling():
            self.fused_before = torch.is_grad_enabled()

    def _is_recomputed(self) -> bool:
        if torch.compiler.is_compiling() or not self.fused_before:
            return False
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            return True
        self.fused_before = False
        return False

    # Of the input ---------------------------------------------------------------------------------------------------

    def quantize_input_(self, quantizer: ActivationLSQ | None) -> None:
        """Begin to quantize the input with `quantizer`, from the next training batch on; None leaves it float."""
        self.act_quantizer = quantizer if self.quantizes_input else None
        self.act_range = None
        self.act_start = self.fused_act_scale = None
        self.weight_was_read = False
        if self.act_quantizer is None:
            self._drop("act_scale", "act_signed")
        else:
            device = self.latent_weight.device
            self.act_scale = nn.Parameter(torch.ones(1, device=device), requires_grad=self.act_quantizer.learn_scale)
            self.register_buffer("act_signed", torch.full((), UNDECIDED, dtype=torch.int8, device=device))

    def quantized_input(self, x: Tensor) -> Tensor:
        """The fake-quantized input; x itself where activations stay float. Differentiable in x and `act_scale`.

        The first batch in training mode starts the scale, unless it is empty or not finite. Until then x stays float,
        in eval mode with a warning.
        """
        if self.act_quantizer is None or not self.enabled:
            return x
        if self.act_range is None:
            if torch.compiler.is_compiling():  # not @torch.compiler.disable: that imports the compiler with this file
                raise RuntimeError("the first training batch decides an input's range: run one before compiling")
            self._follow_act_signed()  # somebody may have loaded it without asking this layer
            if self.act_range is None and not self._start_act_scale(x):
                return x
            assert self.act_range is not None
        scale = self.fused_act_scale
        if scale is None and self._is_recomputed():
            scale = positive_scale(self.act_scale.detach()).requires_grad_()
        elif scale is None:
            scale = positive_scale(self.act_scale)
        return self.act_quantizer(x, scale, self.act_range, multiply_dtype(x))

    @torch.no_grad()
    def _start_act_scale(self, x: Tensor) -> bool:
        """Take scale and sign from x, over all processes of a distributed run: each sees its part of the batch.

        Returns:
            Whether x could decide.
        """
        if not self.training:
            warnings.warn(
                "evaluated before the first training batch: inputs whose scale is not initialized stay float",
                stacklevel=2,
            )
            return False
        assert self.act_quantizer is not None
        total = mean_abs(x) * x.numel()
        found = torch.stack([total, (x < 0).any().float(), torch.tensor(float(x.numel()), device=x.device)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(found)
        total, negative, count = found
        mean = total / count
        if not mean.isfinite():
            return False
        signed = self.act_quantizer.signed
        decided = bool(negative > 0) if signed is None else signed
        scale = scale_of_mean(mean, code_range(self.act_quantizer.bits, decided)[1])
        self._set_act_scale(decided, scale.view(1))
        return True

    def _set_act_scale(self, signed: bool, scale: Tensor) -> None:
        """Start with a scale, and so do copies that wait for one."""
        if self.act_quantizer is not None and self.act_range is None:
            self.act_signed.fill_(signed)
            fill_(self.act_scale, scale)
            self.act_start = scale
            self._follow_act_signed()
        for copied in _WAITING_COPIES.pop(self, ()):
            copied._set_act_scale(signed, scale)

    def _follow_act_signed(self) -> None:
        """Bring `act_range`, plain numbers that a compiler can see, in line with the stored `act_signed`."""
        if self.act_quantizer is not None and not self.act_signed.is_meta:
            signed = int(self.act_signed)
            self.act_range = None if signed == UNDECIDED else code_range(self.act_quantizer.bits, bool(signed))

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedLayer":
        copied: QuantizedLayer = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        if self.act_quantizer is not None and self.act_range is None:
            _WAITING_COPIES.setdefault(self, WeakSet()).add(copied)
        return copied

    # Its life -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def enable_(self) -> None:
        """Quantize from now on; the first time, scales start: the weight's now, the input's with the next batch."""
        if not self.started:
            fill_(self.weight_scale, self.first_weight_scale())
            if self.act_quantizer is not None:
                self.act_signed.fill_(UNDECIDED)
                self._follow_act_signed()
        self.enabled = self.started = True

    @torch.no_grad()
    def dequantize_(self) -> None:
        """Become the float type, in place, with the weight that is computed with now."""
        if self.enabled:
            with torch.autocast(self.latent_weight.device.type, enabled=False):
                self.latent_weight.copy_(self.quantized_weight())
        self.forget_()

    def forget_(self) -> None:
        """Become the float type, in place, with the latent weight."""
        self._drop("weight_scale", "weight_frozen", "weight_quantizer", "fused_weight")
        self._drop("act_scale", "act_signed", "act_quantizer", "act_range", "act_start", "fused_act_scale")
        self._drop("weight_was_read", "fused_before", "in_forward", "enabled", "started")
        self.__class__ = self.float_type  # type: ignore[assignment]

    def _drop(self, *names: str) -> None:
        for name in names:
            if hasattr(self, name):
                delattr(self, name)

    # Its state ------------------------------------------------------------------------------------------------------

    def described(self) -> Described:
        """How the layer is quantized, in plain types."""
        return described(self.weight_quantizer, self.act_quantizer, self.enabled, self.started)

    def get_extra_state(self) -> Tensor:
        """`described` as a tensor, for state dicts."""
        return as_tensor(self.described())

    def set_extra_state(self, state: Tensor) -> None:
        """Whether it is enabled; all else was compared before."""
        own = from_tensor(state)
        self.enabled, self.started = own["enabled"], own["started"]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        state_dict = dict(state_dict)
        for name in ("weight_scale", "act_scale"):  # of files from before they had a dimension
            scale = state_dict.get(prefix + name)
            if scale is not None and scale.dim() == 0:
                state_dict[prefix + name] = scale.view(1)
        if prefix + STATE in state_dict:
            other, own = from_tensor(state_dict[prefix + STATE]), self.described()
            if apart := [key for key in ("weight", "input") if other[key] != own[key]]:
                key = apart[0]
                errors.append(
                    f"{prefix.rstrip('.')}: the {key} of the checkpoint is {other[key] or 'float'}, that of the model "
                    f"{own[key] or 'float'}: quantize the model as the checkpoint is, by "
                    "qkernels.quantize_like_(model, state_dict)"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + self.weight_name in state_dict:
            added = ("weight_scale", "weight_frozen", "act_scale", "act_signed", STATE)
            anew = {name for name in added if (prefix + name) not in state_dict}
            missing[:] = [key for key in missing if key not in {prefix + name for name in anew}]
            with torch.no_grad():
                if "weight_scale" in anew:
                    fill_(self.weight_scale, self.first_weight_scale())
                elif STATE in anew:  # of files from before a layer said so
                    self.enabled = self.started = True
                if "weight_frozen" in anew and hasattr(self, "weight_frozen"):
                    self.weight_frozen.fill_(torch.inf)
                if anew & {"act_scale", "act_signed"} and self.act_quantizer is not None:
                    self.act_signed.fill_(UNDECIDED)
        self._follow_act_signed()

    def extra_repr(self) -> str:
        q = self.weight_quantizer
        fixed = "" if q.learn_scale else ", fixed scale"
        act = f", input={self.act_quantizer.bits} bit" if self.act_quantizer else ""
        kind = " INQ" if isinstance(q, INQ) else ""
        off = "" if self.enabled else ", not enabled"
        return f"{super().extra_repr()}, weight={q.bits} bit{kind} per {q.granularity}{fixed}{act}{off}"


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(name, layer) of every quantized layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLayer))
