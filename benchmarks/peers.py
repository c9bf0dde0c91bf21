"""The other ways to do the same: of fake-quantizing a tensor, of training a quantized model, of asking five models."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk
from qkernels import backends
from qkernels.quantize.quantizers import code_range

from .contest import Absent
from .machine import version_of

torch._dynamo.config.recompile_limit = 64  # the compiled peer gets its best: one kernel for each shape
torch._functorch.config.donated_buffer = False  # a backward that gives its buffers away cannot run twice

PACKAGES = ("torch", "triton", "timm", "torchao", "brevitas", "onnx", "onnxscript", "onnxruntime")


def versions() -> dict[str, str]:
    """Of everything that is measured; "not installed" where it is not."""
    return {package: version_of(package) or "not installed" for package in PACKAGES}


def require(package: str) -> None:
    """Raises: Absent, where `package` is not installed."""
    if version_of(package) is None:
        raise Absent("not installed")


def require_bfloat16() -> None:
    """Raises: Absent, on a CPU whose bfloat16 PyTorch emulates."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Absent("oneDNN has no bfloat16 on this CPU, and without it PyTorch takes minutes")


# Fake-quantization: (x, float32 scale [C] or [1], qmin, qmax, axis, gradient factor) -> y --------------------------

Quantize = Callable[[Tensor, Tensor, int, int, int | None, float], Tensor]


def eager_lsq(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, factor: float) -> Tensor:
    """LSQ composed of PyTorch ops, as research code writes it."""
    s = scale * factor + (scale - scale * factor).detach()
    if axis is not None:
        s = s.view([-1 if d == axis else 1 for d in range(x.dim())])
    v = (x / s).clamp(qmin, qmax)
    return ((v + (v.round() - v).detach()) * s).to(x.dtype)


def native(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, factor: float) -> Tensor:
    """PyTorch's own op, the one that its learnable fake-quantize module calls."""
    zero_point = torch.zeros_like(scale)
    if axis is None:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, qmin, qmax, factor)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, qmin, qmax, factor)


compiled_lsq = torch.compile(eager_lsq, fullgraph=True, dynamic=False)
"""The eager composition under torch.compile: what fusing can gain without a kernel of one's own."""

FAKE_QUANTIZE: dict[str, Quantize] = {"eager LSQ": eager_lsq, "native op": native, "compiled LSQ": compiled_lsq}


# Our own kernels in Triton, beside those in C++/CUDA that serve the ops where they were built -----------------------

TRITON = "in Triton"


class _FakeQuantizeInTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, factor: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.arguments = (qmin, qmax, axis, factor, False)
        return backends.implementation("fake_quantize", "triton")(x, scale, None, *ctx.arguments, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        backward = backends.implementation("fake_quantize_backward", "triton")
        return *backward(grads[0], x, scale, None, *ctx.arguments, True)[:2], *(None,) * 4


def fake_quantize_in_triton(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, factor: float) -> Tensor:
    return _FakeQuantizeInTriton.apply(x, scale, qmin, qmax, axis, factor)  # type: ignore[no-any-return]


def fake_quantize_multi_in_triton(
    xs: list[Tensor], scales: list[Tensor], grads: list[Tensor], qmin: int, qmax: int, factors: list[float]
) -> list[Tensor]:
    """Forward, then the gradients of xs and scales."""
    codes = ([qmin] * len(xs), [qmax] * len(xs), 0, factors)
    backends.implementation("fake_quantize_multi", "triton")(xs, scales, *codes, None)
    of_xs, of_scales = backends.implementation("fake_quantize_multi_backward", "triton")(
        grads, xs, scales, *codes, True
    )
    return [*of_xs, *of_scales]


# Training: a float model and the bits of weights and inputs -> the same model, quantized ----------------------------

Convert = Callable[[nn.Module, int, int | None], nn.Module]


class _Quantized:
    """What a convolution or linear layer does with a peer's function: its weight and its input go through it."""

    function: Quantize
    weight: Tensor
    weight_scale: Tensor
    weight_bits: int
    act_bits: int | None
    act_range: tuple[int, int] | None = None
    act_scale: Tensor

    def quantized_weight(self) -> Tensor:
        qmin, qmax = code_range(self.weight_bits)
        factor = (self.weight.numel() * qmax) ** -0.5
        return self.function(self.weight, self.weight_scale, qmin, qmax, 0, factor)

    def quantized_input(self, x: Tensor) -> Tensor:
        if self.act_bits is None:
            return x
        if self.act_range is None:  # the first batch decides, as it does for qkernels
            self.act_range = code_range(self.act_bits, bool((x < 0).any()))
            self.act_scale.data.fill_(qk.init_scale(x.detach(), self.act_range[1]))
        factor = (x[0].numel() * self.act_range[1]) ** -0.5
        return self.function(x, self.act_scale, *self.act_range, None, factor)


class _PeerConv2d(_Quantized, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class _PeerLinear(_Quantized, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


_PEER_LAYERS = {nn.Conv2d: _PeerConv2d, nn.Linear: _PeerLinear}


def inner_layers(model: nn.Module) -> list[nn.Module]:
    """All convolutions and linear layers but the classifier: those that `quantize_` quantizes by default."""
    return [m for m in model.modules() if type(m) in _PEER_LAYERS][:-1]


def with_function(function: Quantize) -> Convert:
    """Layers that call `function`."""

    def convert(model: nn.Module, weight_bits: int, act_bits: int | None) -> nn.Module:
        for layer in inner_layers(model):
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            layer.__class__ = _PEER_LAYERS[type(layer)]  # type: ignore[assignment]
            vars(layer).update(function=function, weight_bits=weight_bits, act_bits=act_bits)
            layer.register_parameter(
                "weight_scale", nn.Parameter(qk.init_scale(layer.weight, code_range(weight_bits)[1], 0))
            )
            if act_bits is not None:
                layer.register_parameter("act_scale", nn.Parameter(torch.ones(1, device=layer.weight.device)))
        return model

    return convert


def torchao(model: nn.Module, weight_bits: int, act_bits: int | None) -> nn.Module:
    """torchao's QAT with learned ranges.

    Raises:
        Absent: for networks with convolutions, which it leaves float.
    """
    require("torchao")
    layers = inner_layers(model)
    if sum(isinstance(m, nn.Conv2d) for m in layers) > 1:
        raise Absent("fake-quantizes linear layers alone, and leaves convolutions float")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    def config(bits: int, granularity: str) -> IntxFakeQuantizeConfig:
        return IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), granularity)

    quantize_(
        model,
        QATConfig(
            weight_config=config(weight_bits, "per_channel"),
            activation_config=None if act_bits is None else config(act_bits, "per_token"),
            step="prepare",
        ),
        lambda module, name: isinstance(module, nn.Linear) and any(module is layer for layer in layers),
    )
    return model


def brevitas(model: nn.Module, weight_bits: int, act_bits: int | None) -> nn.Module:
    """brevitas' layers, with learned scales that start from statistics of their own."""
    require("brevitas")
    from brevitas.inject.enum import ScalingImplType
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    owners = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    for layer in inner_layers(model):
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        options = {
            "bias": layer.bias is not None,
            "weight_quant": Int8WeightPerChannelFloat,
            "weight_bit_width": weight_bits,
            "weight_scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS,
            "device": layer.weight.device,
        }
        if act_bits is not None:
            options |= {"input_quant": Int8ActPerTensorFloat, "input_bit_width": act_bits}
        if isinstance(layer, nn.Conv2d):
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            new = QuantConv2d(*(getattr(layer, name) for name in names), **options)
        else:
            new = QuantLinear(layer.in_features, layer.out_features, **options)
        new.weight = layer.weight
        new.bias = layer.bias
        parent, name = owners[layer]
        setattr(parent, name, new)
    return model


TRAINING: dict[str, Convert] = {
    **{name: with_function(function) for name, function in FAKE_QUANTIZE.items()},
    "torchao": torchao,
    "brevitas": brevitas,
}


# Linear layers: weights [M, out, in], from x [M * rows, in] to [M * rows, out] ----------------------------------------


def torchao_int8(weights: Tensor) -> Callable[[Tensor], Tensor]:
    """torchao's weight-only int8, member by member.

    Raises:
        Absent: without torchao.
    """
    require("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layers = nn.ModuleList()
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layers.append(layer)
    quantize_(layers, Int8WeightOnlyConfig())
    return lambda x: torch.cat([layer(rows) for layer, rows in zip(layers, x.chunk(len(layers)), strict=True)])


# Ensembles: members -> images [N, 3, H, W] to the mean of their logits [N, classes] ----------------------------------

Forward = Callable[[Tensor], Tensor]


def in_turn(members: Sequence[Callable[[Tensor], Tensor]]) -> Forward:
    """One member after another."""
    return lambda x: torch.stack([member(x) for member in members]).mean(0)


def vmapped(members: Sequence[nn.Module]) -> Forward:
    """PyTorch's own way to run models of one architecture together: their weights stacked, the forward vmapped."""
    parameters, buffers = torch.func.stack_module_state(list(members))  # type: ignore[arg-type]
    skeleton = members[0]

    def one(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, (p, b), (x,))

    return lambda x: torch.vmap(one, (0, 0, None))(parameters, buffers, x).mean(0)


def compiled_members(members: Sequence[nn.Module]) -> Forward:
    return in_turn([torch.compile(member) for member in members])


def frozen(model: nn.Module) -> Forward:
    """One model compiled for inference: its weights are constants, laid out once as its products want them."""
    return torch.compile(model, options={"freezing": True})


def max_autotuned(model: nn.Module) -> Forward:
    """One model under torch.compile at its best; like everybody else it is captured in a CUDA graph by the contest."""
    return torch.compile(model, mode="max-autotune-no-cudagraphs")


def on_streams(members: Sequence[nn.Module]) -> Forward:
    """Each member on a stream of its own."""
    streams = [torch.cuda.Stream() for _ in members]

    def forward(x: Tensor) -> Tensor:
        current, logits = torch.cuda.current_stream(), []
        for member, stream in zip(members, streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                logits.append(member(x))
        for stream in streams:
            current.wait_stream(stream)
        return torch.stack(logits).mean(0)

    return forward
