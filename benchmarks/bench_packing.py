"""Codes and their packed bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels.ops import reference
from qkernels.ops.packing import dequantize_packed, pack, quantize, unpack

from .contest import Contest

OURS = "qkernels"
COUNT = {"quick": 512 * 512 * 9, "large": 2**25}
CHANNELS = 512


def parameters() -> pytest.MarkDecorator:
    full = [(7, "large"), *((bits, "quick") for bits in (2, 3, 4, 5, 6, 8))]
    return pytest.mark.parametrize(
        "bits, size", [(7, "quick"), *(pytest.param(*values, marks=pytest.mark.full) for values in full)]
    )


def begin(contest: Contest, bits: int, size: str, make: Callable[[int], Any]) -> tuple[list[Any], int]:
    """Input sets of COUNT[size] codes."""
    count = COUNT[size]
    contest.parameters, contest.size = f"{bits} bit, {count:,} codes", count
    return contest.rotate(lambda: make(count)), count


def random_codes(count: int, bits: int, device: str) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (count,), dtype=torch.int8, device=device)


def compare(contest: Contest, work: Callable[[int], Tensor], in_pytorch: Callable[[int], Tensor]) -> None:
    """Ours against the reference in plain PyTorch, as it is and compiled."""
    expected = in_pytorch(0)
    contest.ours(OURS, work, expected, 1e-6)
    contest.peer("PyTorch ops", lambda: in_pytorch, expected)
    contest.slow_peer("PyTorch ops, compiled", lambda: torch.compile(in_pytorch), expected)
    contest.measure(base=OURS)


@parameters()
def bench_pack(contest: Contest, device: str, bits: int, size: str) -> None:
    """pack: codes to bits

    Ratios are times over ours.
    """
    sets, _ = begin(contest, bits, size, lambda count: random_codes(count, bits, device))
    compare(contest, lambda i: pack(sets[i], bits), lambda i: reference.pack(sets[i], bits))


@parameters()
def bench_unpack(contest: Contest, device: str, bits: int, size: str) -> None:
    """unpack: bits to codes

    Ratios are times over ours.
    """
    sets, count = begin(contest, bits, size, lambda count: pack(random_codes(count, bits, device), bits))
    compare(
        contest,
        lambda i: unpack(sets[i], bits, (count,)),
        lambda i: reference.unpack(sets[i], bits, count, True),
    )


@parameters()
def bench_dequantize_packed(contest: Contest, device: str, bits: int, size: str) -> None:
    """dequantize_packed: bits to float32 weights

    512 channels with a scale each. Ratios are times over ours. Multiplying codes that were never packed is a floor.
    """
    sets, count = begin(contest, bits, size, lambda count: pack(random_codes(count, bits, device), bits)[None])
    scale = torch.rand(1, CHANNELS, device=device) + 0.1
    codes = [unpack(packed, bits, (count,)).view(1, CHANNELS, -1) for packed in sets]
    contest.peer("int8 codes * scale", lambda: lambda i: codes[i] * scale[..., None])
    compare(
        contest,
        lambda i: dequantize_packed(sets[i], scale, bits, count),
        lambda i: reference.dequantize_packed(sets[i], scale, bits, count, torch.float32),
    )


@parameters()
def bench_quantize(contest: Contest, device: str, bits: int, size: str) -> None:
    """quantize: float32 to codes

    512 channels with a scale each. Ratios are times over ours.
    """
    sets, _ = begin(contest, bits, size, lambda count: torch.randn(CHANNELS, count // CHANNELS, device=device))
    scale = torch.rand(CHANNELS, device=device) * 0.1 + 0.05
    codes = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    compare(
        contest,
        lambda i: quantize(sets[i], scale, *codes, axis=0),
        lambda i: reference.quantize(sets[i], scale, *codes, 0),
    )
