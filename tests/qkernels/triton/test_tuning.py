"""How the tiles of Triton's convolutions are chosen, on a device that is made up."""

import json
import os

import pytest
import torch

pytest.importorskip("triton")

from qkernels.triton import tuning
from qkernels.triton.tuning import Bucket, Tile

DEVICE = torch.device("cuda", 0)
BUCKET = Bucket.of("int8", 200, 49, 4608, 512, 5)


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    """A GPU of 132 multiprocessors and unknown capability, without a choice in memory; its cache file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "capability_of", lambda device: (99, 0))
    monkeypatch.setattr(tuning, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(tuning, "_tuned", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU/80GB")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning.triton.testing, "do_bench_cudagraph", lambda run, **_: run())
    return tmp_path / "qkernels" / "Some-GPU-80GB.json"


def seconds(tile: Tile) -> float:
    """What a launch takes on the made-up GPU, where the narrowest tile is the fastest."""
    return tile.channels * tile.pixels * tile.num_stages / tile.splits


def test_sizes_are_bucketed():
    assert Bucket("int8", 256, 64, 8192, 128, 8) == BUCKET == Bucket.of("int8", 129, 64, 4097, 128, 8)
    assert Bucket.of("int8", 200, 49, 4608, 96, 5) != BUCKET


def test_an_unknown_device_tunes_once(device):
    best = min(tuning.candidates(BUCKET, DEVICE), key=seconds)
    assert best != tuning.by_rule(BUCKET, DEVICE)
    assert tuning.tile_of(BUCKET, DEVICE, seconds) == best
    unused = pytest.fail
    assert tuning.tile_of(BUCKET, DEVICE, unused) == best  # from memory
    tuning._tuned.clear()
    assert tuning.tile_of(BUCKET, DEVICE, unused) == best  # from the file
    assert os.listdir(device.parent) == [device.name]


def test_tiles_that_do_not_fit_are_skipped():
    rule = tuning.by_rule(BUCKET, DEVICE)

    def only_the_rule_fits(tile):
        if tile != rule:
            raise tuning.triton.OutOfResources(300000, 232448, "shared memory")
        return 1.0

    assert tuning.tile_of(BUCKET, DEVICE, only_the_rule_fits) == rule


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{", '{"a": 1}', '{"a": [1, 2]}', '{"KEY": {"channels": 64}}', '{"KEY": {"channels": "x"}}'),
        json.dumps({"KEY": Tile(64, 32, 64, 4, 3, decoded=2)._asdict()}),
        json.dumps({"KEY": Tile(64, 0, 64, 4, 3)._asdict()}),
    ],
)
def test_a_corrupt_file_is_rewritten(device, content):
    device.parent.mkdir()
    device.write_text(content.replace("KEY", BUCKET.key))
    tile = tuning.tile_of(BUCKET, DEVICE, seconds)
    assert json.loads(device.read_text()) == {BUCKET.key: tile._asdict()}


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert tuning.tile_of(BUCKET, DEVICE, seconds) == min(tuning.candidates(BUCKET, DEVICE), key=seconds)


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.tile_of(BUCKET, DEVICE, pytest.fail) == tuning.by_rule(BUCKET, DEVICE)
    assert not device.exists()


def test_known_devices_and_the_interpreter_are_not_tuned(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    tuning.measured.cache_clear()
    known = Tile(64, 32, 64, 4, 2, 9)
    tuning.write_tiles(tmp_path / "tiles" / "sm_99.json", {BUCKET.key: known})
    rule = tuning.by_rule(BUCKET, DEVICE)
    for capability, tile in ((None, rule), ((9, 9), known)):
        monkeypatch.setattr(tuning, "capability_of", lambda device, capability=capability: capability)
        assert tuning.tile_of(BUCKET, DEVICE, pytest.fail) == tile
    other = Bucket.of("int8", 5000, 49, 4608, 512, 5)
    assert tuning.tile_of(other, DEVICE, pytest.fail) == tuning.by_rule(other, DEVICE)
    tuning.measured.cache_clear()


@pytest.mark.parametrize("dot", ["int8", "fp16", "bf16", "fp32"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (7, 1, 2048, 2048, 5), (2048, 10**6, 4608, 512, 40)])
def test_tiles_are_what_a_product_takes(dot, sizes):
    bucket = Bucket.of(dot, *sizes)
    for tile in tuning.candidates(bucket, DEVICE):
        assert tile.channels >= 64 and tile.pixels >= 16 and tile.depth >= 32
        assert all(n & (n - 1) == 0 for n in tile[:4])
        assert 1 <= tile.splits <= max(1, bucket.depth // tile.depth)
