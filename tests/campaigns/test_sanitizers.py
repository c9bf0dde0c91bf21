"""The C++ for CPUs under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`, which finds nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = 2000  # hostile ones, of each op and instruction set
SECONDS = 3000
ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
@pytest.mark.timeout(SECONDS)
def test_the_sanitizers_find_nothing(figures):
    result = subprocess.run(
        [ROOT / ".ci" / "sanitize", str(CALLS)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    (tests,) = re.findall(r"(\d+) passed", result.stdout)
    calls = sum(map(int, re.findall(r"^(\d+) calls in", result.stdout, re.MULTILINE)))
    assert calls
    figures("sanitizers: tests and hostile calls", int(tests) + calls, {"findings": 0})
