"""Which kernels are profiled, and what is read from ncu's table."""

import json
import sys

import pytest

from benchmarks import profile

COLUMNS = {  # name: unit, then the values of two kernels
    "ID": ("", "0", "1"),
    "Kernel Name": ("", "void forward_rows<float>(const float *, int)", "fold_kernel"),
    "dram__bytes_read.sum": ("Mbyte", "1,200.5", "n/a"),
    "dram__bytes_write.sum": ("Kbyte", "500", "0"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "81.2", "1"),
    "gpu__time_duration.sum": ("us", "612.25", "3"),
    "launch__registers_per_thread": ("register/thread", "40", "16"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "22.5", "2"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "93.1", "10"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "0.25", "1.5"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "12.5", "0.5"),
}
TABLE = zip(*([name, *values] for name, values in COLUMNS.items()), strict=True)
NCU = "\n".join(["==PROF== Connected", "the program's", *(",".join(f'"{cell}"' for cell in row) for row in TABLE)])


def row(parameters, milliseconds, megabytes, **changes):
    times = {"milliseconds": [milliseconds] * 3, "ratio": [1.0] * 3}
    work = {"ours": [[megabytes * 10**6, 1, "float32"]]}
    return {
        "parameters": parameters,
        "id": parameters,
        "base": "ours",
        "contenders": {"ours": times},
        "work": work,
    } | changes


@pytest.fixture
def results():
    """At 1 GB/s a megabyte takes a millisecond."""
    network = row("network", 1000.0, 1)
    network["work"]["ours"] *= 50
    cases = {
        "bench_a.py::bench_fast": [row("fast", 10.0, 9)],
        "bench_a.py::bench_slow": [row("slow", 10.0, 5), row("slower", 10.0, 4), row("no id", 10.0, 1, id=None)],
        "bench_b.py::bench_tiny": [row("tiny", 1.0, 0.001)],
        "bench_b.py::bench_network": [network],
        "bench_b.py::bench_steps": [row("steps", 10.0, 1, work={})],
    }
    return {
        "roofline": {"bandwidth": 1e9, "float32": 1e12},
        "cases": {name: {"text": "", "rows": rows} for name, rows in cases.items()},
    }


def test_the_farthest_of_each_benchmark(results):
    found = profile.farthest(results, 3)
    assert [(slow.parameters, round(slow.share, 2)) for slow in found] == [("slower", 0.4), ("fast", 0.9)]
    assert [slow.parameters for slow in profile.farthest(results, 1)] == ["slower"]


def test_what_ncu_prints():
    rows = profile.kernels(NCU)
    assert rows[0]["dram__bytes_read.sum"] == "1200500000" and rows[0]["gpu__time_duration.sum"] == "612250"
    _, forward, fold = profile.table_lines(rows)
    assert forward.split()[:8] == ["void", "forward_rows", "612.2", "1201.0", "81%", "22%", "93%", "40"]
    assert forward.endswith("  long_scoreboard 12.5, barrier 0.2")
    assert fold.split()[:2] == ["fold_kernel", "3.0"] and "nan" in fold
    assert profile.kernels("no table here") == []


@pytest.fixture
def run(results, monkeypatch, tmp_path, capsys):
    """main() with an `ncu` that runs a Python script; its status and what it prints."""
    (tmp_path / "results.json").write_text(json.dumps(results))

    def run(script, *more):
        ncu = script and [sys.executable, "-c", script]
        monkeypatch.setattr(profile, "find_ncu", lambda: ncu)
        monkeypatch.setattr(profile, "command_of", lambda ncu, slow: ncu)
        monkeypatch.setattr(sys, "argv", ["profile", str(tmp_path / "results.json"), *more])
        profile.main()
        return capsys.readouterr().out

    return run


def test_each_kernel_gets_a_line(run, tmp_path):
    told = run(f"print({NCU!r})", "--out", str(tmp_path))
    assert told.count("forward_rows") == 2 and "40% of the roofline: bench_a.py::bench_slow, slower" in told
    assert "long_scoreboard" in (tmp_path / "ncu-2.csv").read_text()


def test_what_cannot_be_profiled_is_said(run):
    assert "ncu is not here" in run(None)
    assert "may not read the counters here (ERR_NVGPUCTRPERM)" in run("print('==ERROR== ERR_NVGPUCTRPERM - no')")
    assert run("import time; time.sleep(30)", "--limit", "0.2").count("stopped after") == 2
    assert "0% of the roofline" in run(None, "--list")
    with pytest.raises(SystemExit, match="no kernel was profiled:\nwhy"):
        run("print('why')")


def test_the_command_looks_at_one_case():
    slow = profile.Slow("bench_a.py::bench_slow", "bits7-rows1", "", 0.5)
    command = profile.command_of("/bin/ncu", slow)
    assert command[0] == "/bin/ncu" and command[-1].endswith("benchmarks/bench_a.py::bench_slow")
    assert r"--case=bench_a\.py::bench_slow\[bits7\-rows1\]" in command and "--profile" in command
