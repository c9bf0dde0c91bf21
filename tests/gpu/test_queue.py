"""`.ci/gpu`: its runs fit their time, name what exists, and go on after a part that fails or takes too long."""

import importlib.util
import re
import subprocess
import sys
from argparse import Namespace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from qkernels import backends

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / ".ci" / "gpu").exists(), reason="no .ci beside these tests")


@pytest.fixture
def queue(monkeypatch, tmp_path):
    """.ci/gpu as a module; its logs go to a folder of this test."""
    monkeypatch.setenv("OUT", str(tmp_path))
    loader = SourceFileLoader("gpu_queue", str(ROOT / ".ci" / "gpu"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    monkeypatch.setitem(sys.modules, loader.name, module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    return module


def call(*arguments):
    return subprocess.run([sys.executable, str(ROOT / ".ci" / "gpu"), *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_dry_run_lists_the_parts_in_order(queue, number):
    parts = list(queue.RUNS[number]())
    listed = [text for text in call(number, "--dry-run").stdout.splitlines() if text.startswith("until ")]
    assert listed == [f"until {part.until} s: {part.name}" for part in parts]
    assert [part.until for part in parts] == sorted({part.until for part in parts})
    assert parts[-1].until <= queue.SECONDS == 240


def test_an_unknown_run_is_an_error_that_names_those_there_are():
    process = call("4", "--dry-run")
    assert process.returncode == 2 and "choose from" in process.stderr and "3" in process.stderr


@pytest.mark.slow
def test_files_and_benchmarks_that_are_named_exist(queue):
    asked = Namespace(device="cuda", threads=1, seconds=0.1, full=True, slow="^$")
    found = benchmarks.collect(asked, "").parameters
    names = [f"{name}[{parameters}]" for name in found for parameters in found[name]]
    for part in (part for run in queue.RUNS.values() for part in run()):
        words = part.command
        assert all((ROOT / word).exists() for word in words if word.startswith(("tests/", "benchmarks/"))), part.name
        for case in words[words.index("--case") + 1 :] if "--case" in words else ():
            assert any(re.search(case, name) for name in names), case


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_stop_the_others(queue, monkeypatch, capsys, tmp_path):
    def python(script):
        return [sys.executable, "-c", script]

    fails = queue.Part("fails", 60, python("print('why'); raise SystemExit(3)"))
    hangs = queue.Part("hangs", 1, python("import time; print('begun', flush=True); time.sleep(60)"))
    told = queue.Part("told", 60, [*python("import sys; sys.exit(not 0 < int(sys.argv[1]) < 60)"), "{left}"])
    parts = [fails, hangs, told, queue.Part("lacks", 60, python(""), needs="no-such-program")]
    monkeypatch.setattr(queue, "RUNS", {"1": lambda: parts})
    monkeypatch.setattr(queue, "build", lambda log: None)
    monkeypatch.setattr(queue, "GRACE", 0.5)
    assert not queue.run("1", rehearse=False)
    output = capsys.readouterr().out
    outcomes = [(line.split()[0], line[45:60].strip()) for line in output.splitlines()[-4:]]
    assert outcomes == [("fails", "FAILED (3)"), ("hangs", "OUT OF TIME"), ("told", "passed"), ("lacks", "left out")]
    assert "why" in output and "begun" in (tmp_path / "run-1.log").read_text()
    assert (tmp_path / "run-1-table.txt").read_text().count("\n") >= 3

    monkeypatch.setattr(queue, "RUNS", {"1": lambda: parts[2:]})
    assert queue.run("1", rehearse=False)


def test_what_is_not_served_is_named(queue, monkeypatch):
    """The script that tells whether a build is needed."""

    def answer(*rows):
        monkeypatch.setattr(backends, "report", lambda: rows)
        with pytest.raises(SystemExit) as stopped:
            exec(queue.SERVED, {})
        return stopped.value.code or 0

    def row(device, backend, op="pack"):
        return Namespace(op=op, device=device, backend=backend, reason="why")

    assert answer(row("cpu", "cpp"), row("cuda", "cuda"), row("other", "reference")) == 0
    assert answer(row("cpu", "reference"), row("cuda", "cuda")) == "pack on cpu: why"
    assert answer(row("cuda", "triton", "packed_conv2d"), row("cuda", "triton")) == "pack on cuda: why"


def test_libraries_that_do_not_load_are_built(queue, monkeypatch, tmp_path):
    ran, codes = [], [1, 0, 0]  # what serves, the build, what serves
    monkeypatch.setattr(queue, "execute", lambda command, *rest: ran.append(command) or codes[len(ran) - 1])
    monkeypatch.setattr(queue, "CAPABILITY", "print('9.0')")
    assert "passed" in queue.build(tmp_path / "log")
    assert ran[1][1:] == ["setup.py", "build_ext", "--inplace"] and len(ran) == 3
    ran.clear()
    codes[0] = 0
    assert queue.build(tmp_path / "log") is None and len(ran) == 1
