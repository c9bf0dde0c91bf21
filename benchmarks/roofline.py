"""What this machine can do at best, measured: how fast it copies, and how fast it multiplies."""

import torch

from .costs import dtype_name
from .timing import seconds_of

COPIED = {"cpu": 2**27, "cuda": 2**31}  # bytes, beyond every cache
ORDER = {"cpu": 2048, "cuda": 8192}  # of the matrices
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
REPEATS = 7


def measure(device: str) -> dict[str, float]:
    """Bytes a second of a copy (read and written) as "bandwidth"; operations a second of matrix products by dtype.

    The best of several runs each: a roof is what the machine reaches when nothing disturbs it.
    """
    source = torch.zeros(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    roofline = {"bandwidth": 2 * source.nbytes / _best(lambda: target.copy_(source), device)}
    n = ORDER[device]
    for dtype in DTYPES[device]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        roofline[dtype_name(dtype)] = 2 * n**3 / _best(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    a, b = (torch.randint(-64, 64, (n, n), device=device, dtype=torch.int8) for _ in range(2))
    # cuBLAS takes int8 with the right matrix by columns alone.
    roofline["int8"] = 2 * n**3 / _best(lambda: torch._int_mm(a, b.t()), device)
    return roofline


def _best(run, device: str) -> float:
    run()
    return min(seconds_of(run, device) for _ in range(REPEATS))
