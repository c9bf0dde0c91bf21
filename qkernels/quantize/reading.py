"""Who reads the weight of a quantized layer gets the quantized one: see `QuantizedLayer.weight`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_sharded

WeightReader = Callable[[Any], Any]  # from a quantized layer to what stands for its weight
_READERS: list[WeightReader] = []


@contextmanager
def weights_read_by(reader: WeightReader) -> Iterator[None]:
    """Within, the weight of an enabled quantized layer is what `reader` makes of the layer: for those who trace."""
    _READERS.append(reader)
    try:
        yield
    finally:
        _READERS.pop()


class QuantizedWeight(Tensor):
    """The weight of a quantized layer as others than the layer read it: computed for them, and lost after use.

    It multiplies, slices and differentiates as any tensor does, and the results are plain tensors. What would be
    lost with it is refused, and what can only mean the Parameter behind it goes to that: `grad`, `requires_grad_`.
    """

    layer: Any
    _is_param = True  # for isinstance(..., nn.Parameter) and `get_parameter`, as before the layer was quantized

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # There is one, so that PyTorch's fused paths of attention and of transformer layers, which would pass by the
        # layers' forward and with it by their inputs' quantizers, leave the weight alone.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @property
    def data(self) -> Any:  # type: ignore[override]
        raise _no_place(self.layer, "data")

    @data.setter
    def data(self, value: Any) -> None:
        raise _no_place(self.layer, "data")

    @property
    def grad(self) -> Any:  # type: ignore[override]
        return self.layer.latent_weight.grad

    @grad.setter
    def grad(self, value: Any) -> None:
        self.layer.latent_weight.grad = value

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self.layer.latent_weight.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.layer.latent_weight.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> "QuantizedWeight":
        self.layer.latent_weight.requires_grad_(requires_grad)
        return self


def _no_place(layer: Any, what: str) -> RuntimeError:
    return RuntimeError(
        f"{type(layer).__name__}.{layer.weight_name} is quantized anew whenever it is read, so {what} of it would be "
        "lost: change or read `latent_weight`, the Parameter behind it, or call qkernels.dequantize_ first"
    )


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: QuantizedWeight, *args: Any, **kwargs: Any) -> Any:
        raise _no_place(self.layer, f"{name}()")

    return refuse


for _name in dir(Tensor):
    in_place = _name.endswith("_") and not _name.startswith("_") and _name != "requires_grad_"
    if in_place or _name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"):
        setattr(QuantizedWeight, _name, _refusing(_name))


def weight_as_read(layer: Any) -> Any:
    """The quantized weight of an enabled layer, for whoever reads it.

    Raises:
        RuntimeError: while torch.fx traces, since a graph would keep the value of now.
    """
    if _READERS:
        return _READERS[-1](layer)
    if torch.compiler.is_compiling():
        return layer.quantized_weight()
    if torch.fx._symbolic_trace.is_fx_symbolic_tracing() and not _follows_tensors():
        raise RuntimeError(
            f"torch.fx cannot trace code that reads the weight of a quantized layer ({type(layer).__name__}) without "
            "calling the layer: trace the float model and quantize the traced one, or use torch.export"
        )
    if layer.act_quantizer is not None and layer.act_range is None:
        layer.weight_was_read = True
    weight = layer.quantized_weight()
    if type(weight) is not Tensor:  # but FSDP's, a fake one, a functional one
        return weight
    read = weight.as_subclass(QuantizedWeight)
    read.layer = layer
    return read


def _follows_tensors() -> bool:
    """Whether what traces sees each operation on tensors (make_fx), not the Python code alone."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


class ReadWeight:
    """The attribute `weight` of quantized layers, or what it is called: the Parameter behind it while it is float."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        own = layer.__dict__["_parameters"]
        latent, scale = own.get(self.name), own.get("weight_scale")
        nothing_yet = latent is None or latent.is_meta or scale is None or scale.is_meta
        # FSDP's parts of a weight multiply nothing either.
        if nothing_yet or is_sharded(latent) or not layer.__dict__.get("enabled", False):
            return nn.Module.__getattr__(layer, self.name)
        try:
            return layer.quantized_weight() if layer.__dict__["in_forward"] else weight_as_read(layer)
        except AttributeError as error:  # after which Python would ask nn.Module, which has the float weight
            raise RuntimeError(f"{type(layer).__name__}.{self.name}: {error}") from error

    def __set__(self, layer: nn.Module, value: Any) -> None:
        # Parameters do not come by here, but into nn.Module's own list.
        raise RuntimeError(
            f"{type(layer).__name__}.{self.name} cannot be recomputed before each forward (pruning, weight_norm, "
            "spectral_norm): make that permanent, then quantize"
        )
