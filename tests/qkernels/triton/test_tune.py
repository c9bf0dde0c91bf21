"""`python -m qkernels.triton.tune`: many processes compile, one times, and what it has is written whenever it stops."""

import sys
from types import SimpleNamespace

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
    """What is launched, in order: ("compile", share) or ("time", shape). Every launch finds a tile."""
    launches, now = [], [0.0]

    class Pool:
        """Runs in this process what others would compile."""

        def __init__(self, processes, context):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, compile_share, shares, of, convolutions):
            assert compile_share is tune.compile_share
            todo = next(convolutions)
            return [launches.append(("compile", f"{share + 1} of {next(of)}", len(todo))) for share in shares]

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
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return launches


def tuned(monkeypatch, *options):
    monkeypatch.setattr(
        sys, "argv", ["tune", "--models", "m", "--dtypes", "int8", "--batches", "1", "--processes", "2", *options]
    )
    tune.main()


def test_what_was_compiled_is_timed(monkeypatch, ran, capsys, tmp_path):
    file = tmp_path / "tiles.json"
    tuning.write_tiles(file, {"earlier": TILE})
    tuned(monkeypatch, "--out", str(file))
    assert ran[:2] == [("compile", "1 of 2", 3), ("compile", "2 of 2", 3)]
    assert ran[2:] == [("time", (n, 1, 1), 1) for n in (1, 2, 3)]
    assert capsys.readouterr().out == f"wrote 3 tiles to {file}\n"
    tiles = tuning.read_tiles(file)
    assert len(tiles) == 4 and set(tiles.values()) == {TILE} and list(tiles) == sorted(tiles)


def test_the_limit_leaves_what_was_found(monkeypatch, ran, capsys, tmp_path):
    tuned(monkeypatch, "--limit", "1", "--out", str(tmp_path / "tiles.json"))
    assert "stopped after 2 of 3 convolutions in int8" in capsys.readouterr().out
    assert len(tuning.read_tiles(tmp_path / "tiles.json")) == 2


def test_a_file_that_cannot_be_written_is_an_error(monkeypatch, ran):
    with pytest.raises(OSError, match="/dev/null"):
        tuned(monkeypatch, "--out", "/dev/null/tiles.json")


def test_processes_share_the_tiles(monkeypatch, ran):
    """Each is compiled by one of them, for every convolution; those that do not fit the GPU are passed over."""
    monkeypatch.setattr(tuning, "_multiprocessors", lambda device: 132)
    bucket = tuning.Bucket.of("int8", 200, 49, 4608, 512, 5)
    tiles = tuning.candidates(bucket, DEVICE)
    launched = []

    def launch(convolution, tile):
        launched.append((convolution, tile))
        if tile == tiles[0]:
            raise tune.triton.OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(tuning, "fastest", tuning.fastest)
    monkeypatch.setattr(tune, "run", lambda c: tuning.fastest(bucket, DEVICE, lambda tile: launch(c, tile)))
    for share in range(3):
        tune.compile_share(share, 3, [("a",), ("b",)])
        assert tuning.measured((9, 0)) is None
    assert sorted(launched) == sorted((c, tile) for c in "ab" for tile in tiles)
