"""`python -m qkernels.triton.tune`: many processes compile, one times, and what it has is written whenever it stops."""

import os
import sys

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("timm")

from qkernels.triton import tune, tuning
from qkernels.triton.tuning import Tile

DEVICE = torch.device("cuda", 0)
TILE = Tile(64, 32, 64, 4, 3)


@pytest.fixture
def ran(monkeypatch):
    """What is launched, in order: ("compile" or "time", shape, batch). Every launch finds a tile."""
    launches, now = [], [0.0]

    class Pool:
        """Runs in this process what others would compile."""

        def __init__(self, processes, context, prepare):
            assert prepare is tune.only_compile

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, run, *columns):
            return [launches.append(("compile", shape, batch)) for shape, _, _, batch, _ in zip(*columns, strict=True)]

    def run(shape, channels, geometry, batch, dtype):
        launches.append(("time", shape, batch))
        tuning._tuned[DEVICE][f"{shape}-{batch}"] = TILE
        now[0] += 1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(tuning, "_MEASURED", {(9, 0): {"a": TILE}})
    monkeypatch.setattr(tuning, "_tuned", {})
    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(tune, "run", run)
    monkeypatch.setattr(tune, "layers", lambda model: {((n, 1, 1), 8, None) for n in (1, 2, 3)})
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    return launches


def tuned(monkeypatch, *options):
    monkeypatch.setattr(
        sys, "argv", ["tune", "--models", "m", "--dtypes", "int8", "--batches", "1", "--processes", "2", *options]
    )
    tune.main()


def test_what_is_compiled_together_is_timed_next(monkeypatch, ran, capsys, tmp_path):
    tuned(monkeypatch, "--out", str(tmp_path / "tiles.txt"))
    assert [kind for kind, *_ in ran] == ["compile"] * 2 + ["time"] * 2 + ["compile", "time"]
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "(9, 0): {" and printed.count("Tile(channels=64, pixels=32") == 3
    assert printed == (tmp_path / "tiles.txt").read_text()
    table = eval("{" + printed + "}", {"Tile": Tile})
    assert set(table[9, 0].values()) == {TILE}


def test_the_limit_leaves_what_was_found(monkeypatch, ran, capsys):
    tuned(monkeypatch, "--limit", "1")
    printed = capsys.readouterr().out
    assert "stopped after 2 of 3 shapes" in printed and printed.count("Tile(") == 2


def test_a_process_that_compiles_launches_once_and_keeps_nothing(monkeypatch, ran):
    monkeypatch.setattr(tuning, "milliseconds", tuning.milliseconds)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    tune.only_compile()
    launches = []
    assert tuning.milliseconds(lambda: launches.append(1)) == 0 and launches == [1]
    assert tuning._MEASURED == {} and os.environ["XDG_CACHE_HOME"] == os.devnull
