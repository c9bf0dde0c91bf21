"""What is measured: fake-quantizing a whole model's weights, and a whole training step."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.convert import quantized_layers

from .peers import PEERS, QMAX, QMIN
from .timing import interleaved, summary


def _check_same(ours: list[Tensor], peer: list[Tensor], name: str) -> None:
    """A wrong result is not worth timing. Peers that multiply by 1/s put a few elements into a neighboring code."""
    for a, b in zip(ours, peer, strict=True):
        differing = ((a - b).abs() > 1e-4 * a.abs().max()).float().mean().item()
        assert differing < 1e-3, f"{name}: {differing:.2%} of the elements differ"


def weights_of_resnet50(rounds: int) -> dict[str, dict[str, float]]:
    """Forward and backward over the 53 convolution weights of a ResNet-50: float32, 7 bit, one scale a channel."""
    model = timm.create_model("resnet50", num_classes=7)
    weights = [m.weight.detach().requires_grad_() for m in model.modules() if isinstance(m, nn.Conv2d)]
    scales = [qk.init_scale(w, QMAX, 0).requires_grad_() for w in weights]
    upstream = [torch.randn_like(w) for w in weights]
    factors = [(w.numel() * QMAX) ** -0.5 for w in weights]
    layers = len(weights)

    def clear() -> None:
        for t in (*weights, *scales):
            t.grad = None

    def ours() -> list[Tensor]:
        clear()
        ys = qk.fake_quantize_multi(weights, scales, [QMIN] * layers, [QMAX] * layers, 0, factors)
        torch.autograd.backward(ys, upstream)
        return ys

    def layer_by_layer(quantize: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            clear()
            ys = []
            for weight, scale, grad in zip(weights, scales, upstream, strict=True):
                ys.append(quantize(weight, scale))
                ys[-1].backward(grad)
            return ys

        return run

    outputs = [torch.empty_like(w) for w in weights]

    @torch.no_grad()
    def traffic() -> None:
        for out, weight in zip(outputs, weights, strict=True):  # forward: one read, one write
            out.copy_(weight)
        for out, weight, grad in zip(outputs, weights, upstream, strict=True):  # backward: two reads, one write
            torch.add(weight, grad, out=out)

    quantizing: dict[str, Callable[[], list[Tensor]]] = {"fake_quantize_multi": ours}
    quantizing |= {name: layer_by_layer(quantize) for name, quantize in PEERS.items()}
    expected, gradients = ours(), [w.grad for w in weights]
    for name, run in quantizing.items():
        _check_same(expected, run(), name)
        # PyTorch's op decides the edge of the range after rounding; the others must agree on gradients.
        if name != "native op":
            _check_same([g for g in gradients if g is not None], [w.grad for w in weights if w.grad is not None], name)
    contenders: dict[str, Callable[[], object]] = {**quantizing, "copy_, add: same traffic": traffic}
    return summary(interleaved(contenders, rounds), "fake_quantize_multi")


class _PeerConv2d(nn.Conv2d):
    """nn.Conv2d whose weight goes through a peer."""

    quantize: Callable[[Tensor, Tensor], Tensor]
    weight_scale: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.quantize(self.weight, self.weight_scale), self.bias)


def _with_peer(model: nn.Module, quantize: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    for m in model.modules():
        if type(m) is nn.Conv2d:
            m.__class__ = _PeerConv2d
            setattr(m, "quantize", quantize)  # noqa: B010 - a plain assignment is typed as a submodule
            m.weight_scale = nn.Parameter(qk.init_scale(m.weight, QMAX, 0))
    return model


def training_step_of_resnet18(rounds: int) -> dict[str, dict[str, float]]:
    """One Adam step of a ResNet-18 on 32 images of 64x64, float32: float, and 7-bit weights with learned scales."""
    x, y = torch.randn(32, 3, 64, 64), torch.randint(7, (32,))

    def step_of(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return step

    def resnet18() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("resnet18", num_classes=7)

    ours = resnet18()
    qk.quantize_(ours)
    assert len(list(quantized_layers(ours))) == 20
    contenders = {"float": step_of(resnet18()), "qtdog": step_of(qk.fuse_weights_(ours))}
    contenders |= {name: step_of(_with_peer(resnet18(), quantize)) for name, quantize in PEERS.items()}
    return summary(interleaved(contenders, rounds), "float")


CASES = {
    "weights of ResNet-50, forward + backward": weights_of_resnet50,
    "training step of ResNet-18": training_step_of_resnet18,
}
