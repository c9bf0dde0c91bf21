"""Hostile calls of every op, many of them: none may crash, and each is refused or gives what the reference gives.

The calls follow from FIRST; another one makes others.
"""

import pytest

import hostile_calls
from hostile_calls import Calls
from qkernels.ops import library
from qkernels.ops.schemas import SCHEMAS

CALLS = 10_000  # of each op
FIRST = 0
SECONDS = 1200
ISAS = ("portable", "emulated_amx", "avx2", "avxvnni", "avx512vnni", "amx")

pytestmark = [pytest.mark.nightly, pytest.mark.untraced, pytest.mark.timeout(SECONDS + 60)]


@pytest.mark.parametrize("isa", ISAS)
def test_hostile_calls(isa, figures):
    """Of C++ for the CPU, with the kernels of each instruction set."""
    if library.load("cpp") is not None:
        pytest.skip("the C++ library was not built")
    if isa not in ("portable", "emulated_amx", *library.cpu_features()):
        pytest.skip(f"this CPU lacks {isa}")
    report = hostile_calls.attack(Calls("cpp", count=CALLS, first=FIRST), SECONDS, QKERNELS_CPU_ISA=isa)
    assert not report.failures, report
    figures(f"hostile calls of ops, C++, {isa}", report.outcomes.total(), dict(report.outcomes))
    assert report.outcomes.total() == CALLS * len(SCHEMAS)


def test_hostile_calls_of_triton(figures):
    """Fewer, because they are interpreted."""
    pytest.importorskip("triton")
    report = hostile_calls.attack(Calls("triton", count=CALLS // 50, first=FIRST), SECONDS)
    assert not report.failures, report
    figures("hostile calls of ops, Triton (interpreted)", report.outcomes.total(), dict(report.outcomes))
