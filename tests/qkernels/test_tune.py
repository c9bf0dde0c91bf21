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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 9))
    monkeypatch.setattr(tuning, "measured", lambda capability: {"a": TILE})
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
    file = tmp_path / "tiles.json"
    tuning.write_tiles(file, {"earlier": TILE})
    tuned(monkeypatch, "--out", str(file))
    assert [kind for kind, *_ in ran] == ["compile"] * 2 + ["time"] * 2 + ["compile", "time"]
    assert capsys.readouterr().out == f"wrote 3 tiles to {file}\n"
    tiles = tuning.read_tiles(file)
    assert len(tiles) == 4 and set(tiles.values()) == {TILE} and list(tiles) == sorted(tiles)


def test_the_limit_leaves_what_was_found(monkeypatch, ran, capsys, tmp_path):
    tuned(monkeypatch, "--limit", "1", "--out", str(tmp_path / "tiles.json"))
    assert "stopped after 2 of 3 shapes" in capsys.readouterr().out
    assert len(tuning.read_tiles(tmp_path / "tiles.json")) == 2


def test_a_file_that_cannot_be_written_is_an_error(monkeypatch, ran):
    with pytest.raises(OSError, match="/dev/null"):
        tuned(monkeypatch, "--out", "/dev/null/tiles.json")


def test_a_process_that_compiles_launches_once_and_keeps_nothing(monkeypatch, ran):
    monkeypatch.setattr(tuning, "milliseconds", tuning.milliseconds)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    tune.only_compile()
    launches = []
    assert tuning.milliseconds(lambda: launches.append(1)) == 0 and launches == [1]
    assert tuning.measured((9, 0)) is None and os.environ["XDG_CACHE_HOME"] == os.devnull
