"""What docs/performance.md and the README begin with: a few lines that tell what to expect, each from the results."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]


class Line(NamedTuple):
    """What was measured where: a case and its parameters in a machine's results, ours, and who counts as a peer."""

    what: str
    machine: str
    case: str
    parameters: str
    ours: str
    peers: str


LSQ = "eager LSQ|native op|compiled LSQ|brevitas"
FIVE = "five|vmap"
ONE = "^one|^ONNX Runtime, (float32|int8)"
AVX512, H200 = "amd-epyc-avx-512-vnni-2-threads", "nvidia-h200"
AMX = "intel-r-xeon-r-processor-amx-2-threads"
LINES = (
    Line("all weights of ResNet-50, both passes", AVX512, "all_weights", "resnet50", "fake_quantize_multi", LSQ),
    Line("the same", H200, "all_weights", "resnet50", "fake_quantize_multi", LSQ),
    Line("QAT step, ResNet-18", AVX512, "qat_step", "resnet18, 32 images of 64x64, float32", "qkernels", LSQ),
    Line("QAT step, ResNet-50", H200, "qat_step", "resnet50, 96 images of 224x224, bfloat16 autocast", "qkernels", LSQ),
    Line(
        "the same, 4-bit weights and inputs",
        H200,
        "w4a4_step",
        "resnet50, 96 images of 224x224, bfloat16 autocast",
        "qkernels",
        LSQ,
    ),
    Line("five 7-bit ResNet-50, integers, 1 image", AVX512, "packed_ensemble", "batch 1", "packed, integer", FIVE),
    Line("the same, 8 images", AVX512, "packed_ensemble", "batch 8", "packed, integer", FIVE),
    Line("the same, 8 images", H200, "packed_ensemble", "batch 8", "packed, integer", FIVE),
    Line(
        "one 7-bit ResNet-50, integers, 1 image",
        AMX,
        "deployed_networks",
        "resnet50, 224 pixels, batch 1",
        "packed, integer, one",
        ONE,
    ),
    Line("five", AMX, "deployed_networks", "resnet50, 224 pixels, batch 1", "packed, integer, five", FIVE),
    Line(
        "the same, 8 images", AMX, "deployed_networks", "resnet50, 224 pixels, batch 8", "packed, integer, five", FIVE
    ),
    Line(
        "integer convolution, 64>64 3x3",
        AVX512,
        "packed_conv",
        "64>64 3x3 at 56, batch 8",
        "packed, integer",
        "convolutions",
    ),
    Line("packed matrix times vector, 2048>1000", AVX512, "packed_gemv", "2048>1000, 1 row", "packed_gemv", "."),
)


def table(machines: dict[str, Row]) -> Iterator[str]:
    """Markdown: a line for each of LINES whose machine has been measured.

    Args:
        machines: results by the names of their files.
    """
    yield "| what | ours, ms | best peer | its time over ours | machine |"
    yield "|---|---:|---|---:|---|"
    for line in LINES:
        if (row := found(machines.get(line.machine), line)) is None:
            continue
        ours = row["contenders"][line.ours]["milliseconds"][1]
        peers = {
            name: times["milliseconds"][1]
            for name, times in row["contenders"].items()
            if name != line.ours and re.search(line.peers, name) and not name.startswith("packed")
        }
        best = min(peers, key=peers.__getitem__)
        times = f"{ours:.3g} | {best} | **{peers[best] / ours:.2f}**"
        yield f"| {line.what} | {times} | {machines[line.machine]['machine']} |"


def found(results: Row | None, line: Line) -> Row | None:
    """The line's row, with the allocator that users have."""
    cases = {} if results is None else results["cases"]
    rows = [row for case, of_case in cases.items() if case.endswith(f"bench_{line.case}") for row in of_case["rows"]]
    return next((r for r in rows if (r["parameters"], r["allocator"]) == (line.parameters, "default")), None)
