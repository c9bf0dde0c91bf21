"""`python -m benchmarks`, end to end on its smallest case."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import roofline

ROOT = Path(__file__).parents[2]
UNPACK = "bench_packing.py::bench_unpack"


@pytest.fixture
def run(monkeypatch, capfd):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", "--threads", "1", *arguments])
        command.main()
        return capfd.readouterr().out

    monkeypatch.setitem(roofline.ORDER, "cpu", 128)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # in its presence pytest-benchmark measures nothing
    return run


@pytest.mark.slow
def test_list(run):
    quick, full = run("--list"), run("--list", "--full")
    assert "bench_packed_ensemble.py::bench_packed_ensemble\n    batch1\n    batch8\n" in quick
    assert len(quick.splitlines()) < len(full.splitlines())
    assert "\n    resnet50-224" not in full  # the step for a GPU


@pytest.mark.slow
def test_smallest_case(run, tmp_path):
    arguments = ("--case", "bench_unpack.*7-quick", "--seconds", "0.2", "--results", str(tmp_path))
    assert "PyTorch ops" in run(*arguments)
    (file,) = tmp_path.iterdir()
    results = json.loads(file.read_text())
    assert results["device"] == "cpu" and {"bandwidth", "float32", "int8"} <= set(results["roofline"])
    assert results["cases"][UNPACK]["text"].startswith("unpack: ")
    (row,) = results["cases"][UNPACK]["rows"]
    assert row["contenders"]["qkernels"]["ratio"][1] == 1
    assert row["absent"].pop("PyTorch ops, compiled") == "slow: only with --full or --slow"
    # Where others keep the machine busy, its one run may have seemed too slow to repeat.
    assert {*row["contenders"], *row["absent"]} == {"qkernels", "PyTorch ops"}
    assert row["commit"] and row["versions"]["torch"]


def test_a_row_is_replaced_and_others_stay():
    cases = {"other": {"text": "", "rows": []}}
    for milliseconds in (1, 2):
        row = {"case": "one", "text": "words", "parameters": "small", "allocator": "default", "ms": milliseconds}
        command.merge(cases, [row], full=False)
    assert set(cases) == {"other", "one"}
    assert [row["ms"] for row in cases["one"]["rows"]] == [2]


def test_a_slow_hour_does_not_lower_the_roofline():
    """Or rows of a faster one would lie above it."""
    assert command.best_rates({"bandwidth": 2.0, "int8": 5.0}, {"bandwidth": 3.0}) == {"bandwidth": 3.0, "int8": 5.0}


def test_every_file_is_run():
    assert set(command.FILES) == {p.name for p in (ROOT / "benchmarks").glob("bench_*.py")}
