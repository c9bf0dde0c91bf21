"""smoke.py has cases for every op, finds what is wrong, and goes on; its first cases, and on a GPU all of them."""

import argparse
import json
import re
import subprocess
import sys
import time

import pytest
import smoke
import torch

import emulated_cuda
import smoke_cases
from qkernels import backends

FIRST = smoke_cases.cases()[: len(smoke_cases.PARAMETERS)]
CASES = [pair for pair in smoke.todo(list(smoke.BACKENDS)) if smoke.GPU or pair[1] in FIRST]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # numpy's, where the interpreter computes with NaN
@pytest.mark.parametrize(("backend", "case"), [pytest.param(*pair, id=f"{pair[0].name} {pair[1]}") for pair in CASES])
def test_case(backend, case):
    if backend.name == "emulated" and (why := emulated_cuda.why_not()) is not None:
        pytest.skip(why)
    if backend.name == "triton":
        pytest.importorskip("triton")
    assert (wrong := smoke.check(backend, case)) is None, wrong


def test_every_op_has_cases():
    assert {case.op for case in FIRST} == set(smoke_cases.PROBLEMS) == set(backends.SCHEMAS) - set(backends.FOR_CPUS)


@pytest.mark.parametrize("op", smoke_cases.PARAMETERS)
def test_every_value_of_every_parameter_occurs(op):
    cases = list(smoke_cases.cases_of(op))
    for parameters in smoke_cases.PARAMETERS[op]:
        for name, values in parameters.items():
            assert {str(case.parameters[name]) for case in cases} == set(map(str, values)), name


def in_reference(op):
    return backends.implementation(op, "reference")


CASE = smoke_cases.Case("quantize", {"x_dtype": torch.float32, "layout": "contiguous", "axis": 0, "dtype": torch.int8})


def with_mistake(mistake):
    """A backend that makes a mistake in its result."""
    return smoke.Backend("mistaken", "cpu", lambda op: lambda *arguments: mistake(in_reference(op)(*arguments)))


def one_off(codes):
    codes[1, 2, 3, 4] += 1
    return codes


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (
            one_off,
            r"result 0 1 of 5040 elements are wrong, the first at \[1, 2, 3, 4\]: expected (-?\d+), got (-?\d+) ",
        ),
        (lambda codes: codes.int(), "is int32 .*, expected int8"),
        (lambda codes: codes[:2], r"is int8 \[2, 24, 5, 7\], expected int8 \[6, 24, 5, 7\]"),
        (lambda codes: smoke_cases.laid_out(codes, "channels_last"), "is laid out with strides"),
    ],
)
def test_mistakes_are_told(mistake, told):
    assert smoke.check(with_mistake(lambda codes: codes), CASE) is None
    wrong = smoke.check(with_mistake(mistake), CASE)
    found = re.search(told, wrong or "right")
    assert found, wrong
    assert "x = float32 (6, 24, 5, 7) strides (840, 35, 7, 1)\n" in wrong
    if found.groups():
        assert int(found[2]) == int(found[1]) + 1


def test_an_error_is_told_with_the_arguments():
    def failing(op):
        raise RuntimeError("no such kernel")

    wrong = smoke.check(smoke.Backend("failing", "cpu", failing), CASE)
    assert wrong.startswith("RuntimeError: no such kernel\n") and "qmax = 127" in wrong


def test_what_is_unaligned_stays_so():
    for layout in smoke_cases.LAYOUTS:
        t = smoke_cases.laid_out(torch.randn(2, 3, 4, 5), layout)
        copy = smoke.on("cpu", t)
        assert torch.equal(copy, t) and copy.stride() == t.stride() and copy.storage_offset() == t.storage_offset()


def test_a_process_that_dies_is_followed_by_another(monkeypatch, capfd, tmp_path):
    """The first one dies in its first case; the next passes the second."""
    names = ["mean_abs: a", "mean_abs: b"]
    results = tmp_path / "smoke.jsonl"

    def start(arguments, share):
        begun = len(results.read_text().splitlines())
        row = {"case": names[begun], "backend": "triton", "op": "mean_abs", "share": 0}
        end = {"wrong": None, "seconds": 0.1} if begun else {}
        script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + chr(10)); sys.exit(int(sys.argv[3]))"
        return subprocess.Popen(
            [sys.executable, "-c", script, str(results), json.dumps(row | end), str(int(not begun))]
        )

    monkeypatch.setattr(smoke, "start_share", start)
    monkeypatch.setattr(smoke, "todo", lambda names_of_backends: [(smoke.BACKENDS["triton"], CASE)] * 2)
    arguments = argparse.Namespace(results=results, processes=1, backends=["triton"], until=time.time() + 60)
    assert not smoke.run_all(arguments)
    told = capfd.readouterr().out
    assert "FAILED mean_abs: a: the process ended in it" in told
    assert "1 passed, 1 failed, 0 not reached" in told
