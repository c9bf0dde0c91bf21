"""What `quantize_` did, layer by layer, to be printed."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..ops.packing import packed_bytes
from .layers import quantized_layers
from .quantizers import INQ


@dataclass(frozen=True)
class LayerReport:
    name: str
    type: str
    shape: tuple[int, ...]
    bits: int
    granularity: str
    act_bits: int | None

    def __str__(self) -> str:
        return f"{self.bits} bit per {self.granularity}" + (f", input {self.act_bits} bit" if self.act_bits else "")


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_` did. Printing it gives a table.

    Attributes:
        model: the model.
        quantized: its quantized layers, with their bits.
        skipped: name -> why it is float, of the others that own a weight matrix or kernel.
        changed: name -> from what to what, of layers that had been quantized before.
        shares: name -> share in 0..1 of the model's parameters, of all layers above; the rest are norms, biases and
            the like, which stay float.
        nbytes: the model's size when packed.
        enabled: whether quantization has begun; else `enable_` begins it.
    """

    model: nn.Module
    quantized: list[LayerReport]
    skipped: dict[str, str]
    changed: dict[str, str]
    shares: dict[str, float]
    nbytes: int
    enabled: bool

    @property
    def quantized_share(self) -> float:
        """Share in 0..1 of the model's parameters that are quantized."""
        return sum(self.shares[layer.name] for layer in self.quantized)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.quantized] + [len(name) for name in self.skipped])
        lines = [
            f"{layer.name:{width}}  {layer.type:12} {'x'.join(map(str, layer.shape)):>16}  {layer}"
            for layer in self.quantized
        ]
        lines += [
            f"{name:{width}}  float, {self.shares[name]:.1%} of the parameters: {reason}"
            for name, reason in self.skipped.items()
        ]
        lines += [f"{name:{width}}  changed: {change}" for name, change in self.changed.items()]
        lines.append(
            f"{len(self.quantized)} layers quantized with {self.quantized_share:.1%} of the parameters, "
            f"{len(self.skipped)} float, {self.nbytes:,} bytes packed"
            + ("" if self.enabled else "; not enabled: qkernels.enable_ begins")
        )
        return "\n".join(lines)


def reported(model: nn.Module) -> Iterator[LayerReport]:
    """Every quantized layer of a model."""
    for name, m in quantized_layers(model):
        q, act_bits = m.weight_quantizer, m.act_quantizer.bits if m.act_quantizer else None
        shape = tuple(m.latent_weight.shape)
        yield LayerReport(name, m.float_type.__name__, shape, q.bits, q.granularity, act_bits)


def shares(model: nn.Module, names: list[str]) -> dict[str, float]:
    """Share in 0..1 of a model's parameters that the largest tensor of each of these modules is; scales aside."""
    scales = {id(t) for _, m in quantized_layers(model) for t in (m.weight_scale, getattr(m, "act_scale", None))}

    def size(p: Tensor | None) -> int:
        return 0 if p is None or id(p) in scales or is_lazy(p) else p.numel()

    total = sum(map(size, model.parameters()))
    largest = {name: max(map(size, model.get_submodule(name)._parameters.values())) for name in names}
    return {name: n / max(total, 1) for name, n in largest.items()}


def packed_nbytes(model: nn.Module) -> int:
    """Bytes of `model` with each quantized weight at its bits, and everything else as it is in memory.

    The bookkeeping of INQ, which its weights no longer need when all are frozen, does not count.
    """
    bits = {id(layer.latent_weight): layer.weight_quantizer.bits for _, layer in quantized_layers(model)}
    tensors: dict[int, Tensor] = {id(t): t for t in [*model.parameters(), *model.buffers()] if not is_lazy(t)}
    for _, layer in quantized_layers(model):
        if isinstance(layer.weight_quantizer, INQ):
            del tensors[id(layer.weight_frozen)]
    return sum(packed_bytes(t.numel(), bits[key]) if key in bits else t.nbytes for key, t in tensors.items())
