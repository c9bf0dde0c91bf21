"""Contenders: what is compared, what is left out and why, and what is measured."""

import time

import pytest
import torch

from benchmarks import gate, machine
from benchmarks.contest import Absent, Contest, difference
from benchmarks.timing import summary


@pytest.fixture
def recorded():
    return {}


@pytest.fixture
def contest(recorded):
    def drive(one_round, rounds):
        for _ in range(rounds):
            one_round()

    return Contest("cpu", seconds=0, drive=drive, record=recorded.update)


def test_a_peer_that_cannot_take_part_is_listed_with_the_reason(contest, recorded):
    def missing():
        raise Absent("not installed")

    def broken():
        raise RuntimeError("no compiler\nlong trace")

    right = torch.ones(3)
    contest.ours("ours", lambda i: right, right)
    contest.peer("missing", missing)
    contest.peer("broken", broken)
    contest.peer("wrong", lambda: lambda i: 2 * right, right)
    contest.peer("fine", lambda: lambda i: right, right)
    contest.slow_peer("slow", lambda: lambda i: right, right)
    contest.measure("ours")
    assert list(recorded["contenders"]) == ["ours", "fine"]
    assert recorded["absent"]["missing"] == "not installed"
    assert recorded["absent"]["broken"] == "RuntimeError: no compiler"
    assert "100.00% of the elements are off" in recorded["absent"]["wrong"]
    assert recorded["absent"]["slow"] == "slow: only with --full or --slow"
    assert recorded["rounds"] == 5 and recorded["contenders"]["ours"]["ratio"] == [1, 1, 1]


def test_slow_peers_take_part_by_name(contest):
    contest.slow = "max-auto"
    for name in ("one, max-autotune", "members compiled"):
        contest.slow_peer(name, lambda: lambda i: torch.ones(1))
    assert list(contest.contenders) == ["one, max-autotune"] and "slow" in contest.absent["members compiled"]


def test_a_peer_that_takes_far_too_long_runs_once(contest, recorded, monkeypatch):
    monkeypatch.setattr("benchmarks.contest.LONG", 0)
    runs = []
    contest.ours("ours", lambda i: torch.ones(3))
    contest.peer("slow", lambda: lambda i: runs.append(time.sleep(0.3)))
    contest.phases["slow"] = {"forward": lambda: runs.append(None)}
    contest.measure("ours")
    assert list(recorded["contenders"]) == ["ours"] and not recorded["phases"] and len(runs) == 1
    assert "too slow to repeat: one run took" in recorded["absent"]["slow"]


def test_ours_must_be_right(contest):
    with pytest.raises(AssertionError, match="off, by up to 1 of the largest"):
        contest.ours("ours", lambda i: torch.zeros(3), torch.ones(3))


def test_difference():
    right = torch.zeros(10_000)
    right[0] = 1
    few = right.clone()
    few[5:10] = 0.5
    assert difference(few, right, 1e-4) is None
    few[5:50] = 0.5
    assert "0.45% of the elements" in difference(few, right, 1e-4)
    assert "nan" in difference(right * torch.nan, right, 1e-4)
    assert "shape" in difference(right[:5], right, 1e-4)


def test_inputs_change_and_exceed_the_caches(contest, monkeypatch):
    monkeypatch.setattr("benchmarks.contest.cache_bytes", lambda device: 1000)
    sets = contest.rotate(lambda: torch.randn(100))
    assert len(sets) == contest.sets == 5
    seen = []
    contest.ours("ours", lambda i: seen.append(i) or sets[i])
    contest.measure("ours")
    assert seen[-5:] == [0, 1, 2, 3, 4]


def test_everybody_settles_before_a_turn(contest, recorded, monkeypatch):
    events = []
    monkeypatch.setattr(time, "sleep", events.append)
    contest.settle = 0.05
    contest.ours("ours", lambda i: events.append("ours"))
    contest.peer("peer", lambda: lambda i: events.append("peer"))
    events.clear()
    contest.measure("ours")
    turns = [0.05, *["ours"] * 3, 0.05, *["peer"] * 3]
    assert events == turns * (1 + recorded["rounds"]) and len(recorded["contenders"]) == 2


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        ("avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8", "AMX"),
        ("avx2 avx512f avx512_vnni amx_bf16 amx_tile", "AVX-512 VNNI"),
        ("avx2 avx512f avx512_vnni amx_int8 amx_tile", "AVX-512 VNNI"),
        ("sse2 avx2", "AVX2"),
        ("asimd", None),
    ],
)
def test_instructions(flags, best, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert machine.instructions() is None
    machine.CPU_INFO.write_text(f"model name : Any\nflags : {flags}\n")
    assert machine.instructions() == best
    assert machine.machine_name("cpu", 2) == ", ".join(filter(None, ("Any", best, "2 threads")))


def test_ratios_are_those_of_a_round():
    found = summary({"ours": [1.0, 10.0, 1.0], "peer": [2.0, 20.0, 2.0]}, "ours")
    assert found["peer"]["ratio"] == [2, 2, 2]
    assert found["peer"]["milliseconds"][1] == 2000


@pytest.mark.slow
@pytest.mark.parametrize("name", gate.GATES)
def test_gates_run(name, monkeypatch):
    monkeypatch.setattr(gate, "ROUNDS", 2)
    make, _ = gate.GATES[name]
    assert gate.ratio(make()) > 0


@pytest.mark.parametrize(("least", "failed"), [(2.0, []), (4.0, ["one: 3.00 < 4.0"])])
def test_a_gate_fails_below_its_bound(monkeypatch, least, failed):
    monkeypatch.setattr(machine, "instructions", lambda: "AVX-512 VNNI")
    monkeypatch.setattr(gate, "ratio", lambda pair: 3.0)
    monkeypatch.setattr(gate, "GATES", {"one": (lambda: None, {"AVX-512 VNNI": least, "AVX2": 9.0})})
    assert gate.check() == failed


def test_no_gate_on_other_cpus(monkeypatch, capsys):
    monkeypatch.setattr(machine, "instructions", lambda: None)
    assert gate.check() == [] and capsys.readouterr().out.count("no ratio is known for this CPU") == len(gate.GATES)
