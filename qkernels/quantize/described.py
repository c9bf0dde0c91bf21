"""How a layer is quantized, in plain types: what its state dict says of it, beside tensors."""

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .quantizers import INQ, LSQ, ActivationLSQ

Described = dict[str, Any]
BYTES = 512  # of every description, so that those of two models have one shape: averages of state dicts ask for that
KINDS: dict[str, type[LSQ] | type[INQ]] = {"lsq": LSQ, "inq": INQ}


def described(weight: LSQ | INQ, input: ActivationLSQ | None, enabled: bool, started: bool) -> Described:
    """Quantizers and what became of them, for JSON."""
    kind = next(name for name, kind in KINDS.items() if type(weight) is kind)
    return {
        "weight": {"quantizer": kind, **asdict(weight)},
        "input": None if input is None else asdict(input),
        "enabled": enabled,
        "started": started,
    }


def quantizers(plain: Described) -> tuple[LSQ | INQ, ActivationLSQ | None]:
    """Those of weight and input that were described.

    Raises:
        ValueError: for what is no description.
    """
    try:
        weight, input = dict(plain["weight"]), plain["input"]
        kind = KINDS[weight.pop("quantizer")]
        return kind(**weight), None if input is None else ActivationLSQ(**input)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a description of a quantized layer: {plain}") from error


def as_tensor(plain: Described) -> Tensor:
    """A description as uint8 [BYTES], JSON and then spaces: a tensor, as state dicts and safetensors want it."""
    text = json.dumps(plain).encode().ljust(BYTES)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def from_tensor(state: Tensor) -> Described:
    """Inverse of `as_tensor`.

    Raises:
        ValueError: for a tensor that holds something else.
    """
    try:
        plain = json.loads(bytes(state.tolist()))
        quantizers(plain)
        if type(plain["enabled"]) is not bool or type(plain["started"]) is not bool:
            raise ValueError(f"not a description of a quantized layer: {plain}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("a quantized layer's state does not say how it is quantized") from error
    return plain
