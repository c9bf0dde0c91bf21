"""Measures packed_gemv on the GPU at hand: the bytes it must read and write over its time, beside a copy's.

Weights come from memory, not from the L2 cache: each launch of a CUDA graph takes another copy of them. Writes JSON to
the path given.
"""

import json
import sys

import torch

import qkernels
from qkernels import backends
from qkernels.packed_ops import packed_bytes

COLD_BYTES = 512 << 20  # several times the largest L2
ROUNDS = 7
CASES = [  # bits, members, rows, in and out features, dtype
    *((7, 5, n, size, torch.bfloat16) for size in (2048, 4096, 8192) for n in (1, 8)),
    *((7, 5, n, 4096, dtype) for n in (1, 4) for dtype in (torch.float16, torch.float32)),
    *((bits, 5, 1, 4096, torch.bfloat16) for bits in (2, 3, 4, 5, 6, 8)),
]


def seconds_each(launches) -> float:
    """The least time of one launch, over replays of a graph that holds them all."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launches[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(launches))
    return min(times)


def copy_bandwidth() -> float:
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_each([lambda: target.copy_(source)] * 2)


def gemv_bandwidth(op, bits, members, rows, size, dtype) -> tuple[float, float]:
    """Microseconds of a launch, bytes a second."""
    nbytes = packed_bytes(size * size, bits)
    copies = max(8, min(64, COLD_BYTES // (members * nbytes) + 1))
    packed = torch.empty(copies, members, nbytes, dtype=torch.uint8, device="cuda").random_()
    x = torch.randn(rows, size, device="cuda").to(dtype)
    scale = torch.full((members, size), 1e-3, device="cuda")
    seconds = seconds_each([lambda p=p: op(x, p, scale, None, bits, True, "none") for p in packed])
    y_bytes = members * rows * size * x.element_size()
    return seconds * 1e6, (members * nbytes + x.nbytes + scale.nbytes + y_bytes) / seconds


def main() -> None:
    copy = copy_bandwidth()
    name = torch.cuda.get_device_name()
    rows = []
    ops = {"triton": backends.implementation("packed_gemv", "triton")}
    if any((r.op, r.device, r.backend) == ("packed_gemv", "cuda", "cuda") for r in qkernels.backends.report()):
        ops["cuda"] = torch.ops.qkernels.packed_gemv.default
    print(f"{name}: a copy moves {copy / 1e12:.2f} TB/s")
    for case in CASES:
        for backend, op in ops.items():
            microseconds, bandwidth = gemv_bandwidth(op, *case)
            keys = ("bits", "members", "rows", "size", "dtype")
            labels = dict(zip(keys, map(str, case), strict=True))
            rows.append({"backend": backend, **labels, "microseconds": microseconds, "bytes_a_second": bandwidth})
            print(backend, *labels.values(), f"{microseconds:.1f} us {bandwidth / 1e12:.2f} TB/s", flush=True)
    with open(sys.argv[1], "w") as file:
        json.dump({"device": name, "copy_bytes_a_second": copy, "packed_gemv": rows}, file, indent=1)


if __name__ == "__main__":
    main()
