"""QConfig: how a model is quantized."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from .quantizers import INQ, LSQ, ActivationLSQ, GradScale, Granularity

LayerPolicy = Literal["same", "float"] | int


@dataclass(frozen=True)
class QConfig:
    """How `quantize_` quantizes a model.

    Args:
        weight_bits: 2..8.
        act_bits: of each quantized layer's input, 2..8; None leaves activations float.
        act_signed: whether the codes of an input have a sign; None lets the first training batch decide for each layer
            (unsigned if nothing in it is negative, as after ReLU).
        quantizer: of weights, "lsq" (learned scales) or "inq" (powers of two, see `INQ` and `snap_`).
        granularity: one weight scale an output "channel", or one a "tensor".
        narrow: leave out the least weight code, for a symmetric range; INQ's is symmetric anyway.
        learn_scale: False keeps the scales where they started; INQ's always stay.
        grad_scale: the N of LSQ's gradient factor for weights, see `LSQ`.
        first_layer, last_layer: "same" as the others, "float", or their own number of bits, which is that of their
            input too where `act_bits` is given; first and last by the order in which the model registers its layers,
            those that cannot be quantized among them. Heads beside each other, of as many classes, are all last. The
            default is QT-DoG's: only the classifier stays float.
        overrides: layer name, or "re:" and a pattern for `re.fullmatch`, to bits (as for the first layer), a QConfig,
            or None for float. An exact name goes before a pattern, an earlier pattern before a later one, and all
            before first and last.

    Raises:
        ValueError: for bits outside 2..8 or an unknown choice.
    """

    weight_bits: int = 7
    act_bits: int | None = None
    act_signed: bool | None = None
    quantizer: Literal["lsq", "inq"] = "lsq"
    granularity: Granularity = "channel"
    narrow: bool = False
    learn_scale: bool = True
    grad_scale: GradScale = "tensor"
    first_layer: LayerPolicy = "same"
    last_layer: LayerPolicy = "float"
    overrides: Mapping[str, "QConfig | int | None"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "weight_bits": tuple(range(2, 9)),
            "act_bits": (None, *range(2, 9)),
            "act_signed": (None, False, True),
            "quantizer": ("lsq", "inq"),
            "granularity": ("channel", "tensor"),
            "grad_scale": ("tensor", "scale", "none"),
            "first_layer": ("same", "float", *range(2, 9)),
            "last_layer": ("same", "float", *range(2, 9)),
        }
        chosen = {name: getattr(self, name) for name in choices}
        for name, layer in self.overrides.items():
            if layer is not None and not isinstance(layer, QConfig):
                choices[f"overrides[{name!r}]"] = choices["weight_bits"]
                chosen[f"overrides[{name!r}]"] = layer
        for name, allowed in choices.items():
            if chosen[name] not in allowed:
                raise ValueError(f"QConfig: {name}={chosen[name]!r}; choose one of {allowed}")

    def weight_quantizer(self) -> LSQ | INQ:
        """Of one layer's weight."""
        if self.quantizer == "inq":
            return INQ(self.weight_bits, self.granularity)
        return LSQ(self.weight_bits, self.granularity, self.narrow, self.learn_scale, self.grad_scale)

    def act_quantizer(self) -> ActivationLSQ | None:
        """Of one layer's input; None leaves it float."""
        return None if self.act_bits is None else ActivationLSQ(self.act_bits, self.act_signed, self.learn_scale)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON and YAML."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["overrides"] = {k: v.to_dict() if isinstance(v, QConfig) else v for k, v in self.overrides.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "QConfig":
        """From plain types, as `dataclasses.asdict` or a JSON file has them."""
        overrides = {
            name: cls.from_dict(layer) if isinstance(layer, Mapping) else layer
            for name, layer in plain.get("overrides", {}).items()
        }
        return cls(**{**plain, "overrides": overrides})


def layer_config(config: QConfig, layer: LayerPolicy | QConfig | None) -> QConfig | None:
    """What one layer gets: a QConfig, or None for float."""
    if layer is None or layer == "float":
        return None
    if isinstance(layer, QConfig):
        return layer
    if layer == "same":
        return config
    bits = int(layer)
    return replace(config, weight_bits=bits, act_bits=None if config.act_bits is None else bits)
