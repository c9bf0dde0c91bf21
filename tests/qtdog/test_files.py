"""What is finished is sealed, and what is read back is what was written."""

import random
import subprocess

import pytest

from qtdog.errors import UserError, one_line
from qtdog.files import append_text, is_done, read_records, read_sealed, seal, write_records, write_text


@pytest.fixture
def sealed(tmp_path):
    write_records(tmp_path / "results.jsonl", [{"step": 0, "accuracy": 0.5}, {"step": 1, "accuracy": 0.75}])
    write_text(tmp_path / "model.json", '{"accuracy": 0.75}')
    seal(tmp_path, ["results.jsonl", "model.json"])
    return tmp_path


def test_sha256sum_reads_a_seal(sealed):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "done"], cwd=sealed, check=True)
    assert is_done(sealed) and read_sealed(sealed / "model.json") == b'{"accuracy": 0.75}'


@pytest.mark.parametrize("name", ["results.jsonl", "done"])
def test_a_flipped_bit_is_noticed(sealed, name):
    """Also one that makes 0.75 to 0.65; and in the seal."""
    content = (sealed / name).read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        bit = draw.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (sealed / name).write_bytes(damaged)
        told = 0
        for read in ("results.jsonl", "model.json"):
            try:
                read_sealed(sealed / read)
            except UserError as error:
                assert "is damaged" in str(error)
                told += 1
        assert told


def test_a_file_that_the_seal_does_not_name_is_not_trusted(sealed):
    write_text(sealed / "model.safetensors", "weights")
    with pytest.raises(UserError, match="done is damaged"):
        read_sealed(sealed / "model.safetensors")


def test_earlier_versions_marked_without_sums(sealed):
    (sealed / "done").write_text("done\n")
    assert is_done(sealed) and len(read_records(sealed / "results.jsonl")) == 2


@pytest.mark.parametrize("content", [b"{", b"5\n", b"[]\n", b"\xff\xfe", b'{"a": 1}\n{"a": \n'])
def test_damaged_records_are_one_line(tmp_path, content):
    (tmp_path / "results.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"results\.jsonl is damaged"):
        read_records(tmp_path / "results.jsonl")


def test_an_error_of_the_disk_names_path_and_remedy(tmp_path):
    with pytest.raises(OSError) as raised:
        append_text(tmp_path, "text")
    told = f"{tmp_path}: Is a directory: a folder lies where a file should: move it away, or name another place"
    assert one_line(raised.value) == told
    (tmp_path / "link").symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        append_text(tmp_path / "link", "text")  # whose write, not whose opening, fails
    assert one_line(raised.value) == f"{tmp_path / 'link'}: No space left on device: make room there"
