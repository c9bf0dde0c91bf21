"""What this machine can do at best, measured: how fast it copies, and how fast it multiplies."""

import warnings
from collections.abc import Callable
from functools import partial

import torch

from .costs import dtype_name
from .timing import Run, seconds_of

COPIED = {"cpu": 2**27, "cuda": 2**31}  # bytes, beyond every cache
ORDER = {"cpu": 2048, "cuda": 8192}  # of the matrices, at most
FIRST_ORDER = 256
LONG = 0.05  # seconds; a product that takes so long tells the rate
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
REPEATS = 7

Multiply = Callable[[int], Run]  # the order of the matrices -> their product


def measure(device: str) -> dict[str, float]:
    """Bytes a second of a copy (read and written) as "bandwidth"; operations a second of matrix products by dtype.

    The best of several runs each: a roof is what the machine reaches when nothing disturbs it. Where PyTorch multiplies
    narrow numbers slower than float32, as on CPUs without instructions for them, float32's is their roof too.
    """
    source = torch.empty(COPIED[device], dtype=torch.uint8, device=device).random_()  # zeros may move faster
    target = torch.zeros_like(source)
    roofline = {"bandwidth": 2 * source.nbytes / _best(lambda: target.copy_(source), device)}
    for dtype in DTYPES[device]:
        roofline[dtype_name(dtype)] = _rate(partial(_floats, dtype, device), device)
    integers: list[Multiply] = [partial(_integers, device)]
    if device == "cpu" and hasattr(torch, "quantize_per_tensor"):
        integers.append(_quantized)
    roofline["int8"] = max(_rate(multiply, device) for multiply in integers)
    narrow = roofline.keys() - {"bandwidth", "float32"}
    return roofline | {name: max(roofline[name], roofline["float32"]) for name in sorted(narrow)}


def _rate(multiply: Multiply, device: str) -> float:
    """Operations a second, of matrices as large as their product is not long."""
    order = FIRST_ORDER
    while True:
        run = multiply(order)
        run()
        if order >= ORDER[device] or seconds_of(run, device) > LONG:
            return 2 * order**3 / _best(run, device)
        order *= 2


def _floats(dtype: torch.dtype, device: str, order: int) -> Run:
    a, b = (torch.randn(order, order, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _integers(device: str, order: int) -> Run:
    a, b = (torch.randint(-64, 64, (order, order), device=device, dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())  # cuBLAS takes int8 with the right matrix by columns alone


def _quantized(order: int) -> Run:
    """PyTorch's int8 linear layer, on CPUs faster than its plain product of int8 matrices."""
    a, b = (torch.randn(order, order) for _ in range(2))
    with warnings.catch_warnings(action="ignore"):  # that newer PyTorch will leave these tensors to others
        x = torch.quantize_per_tensor(a, 0.05, 64, torch.quint8)
        weight = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(b, 0.05, 0, torch.qint8), None)
    return lambda: torch.ops.quantized.linear(x, weight, 1.0, 64)


def _best(run: Run, device: str) -> float:
    run()
    return min(seconds_of(run, device) for _ in range(REPEATS))
