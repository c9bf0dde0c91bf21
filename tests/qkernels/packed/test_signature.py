"""Signatures: what the owner of a key has signed is verified, and nothing else is."""

import base64
import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import qkernels as qk
from hostile_files import with_right_checksums
from qkernels.packed.file import CONFIG, MODEL, SIGNATURE, PackedFileError

FILES = Path(__file__).parent / "files_v1"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FILES / "vit", tmp_path / "packed")


@pytest.fixture
def keys(tmp_path):
    """The private and the public key."""
    pytest.importorskip("cryptography")
    public = qk.make_signing_key(tmp_path / "me.pem")
    return tmp_path / "me.pem", public


def test_what_is_signed_is_verified(folder, keys):
    private, public = keys
    assert qk.sign_packed_file(folder, private) == folder / SIGNATURE
    qk.verify_packed_file(folder, public)
    qk.verify_packed_file(folder / MODEL, public)
    qk.PackedEnsemble.load(folder, public_key=public)
    qk.PackedEnsemble.load(folder)  # whoever asks for no signature gets along with one
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


def other_key(folder, tmp_path):
    qk.make_signing_key(tmp_path / "other.pem")
    qk.sign_packed_file(folder, tmp_path / "other.pem")


def change_signature(change):
    def to(folder, tmp_path):
        plain = json.loads((folder / SIGNATURE).read_text())
        change(plain)
        (folder / SIGNATURE).write_text(json.dumps(plain))

    return to


CHANGES = {
    "no signature": lambda folder, tmp_path: (folder / SIGNATURE).unlink(),
    "another key": other_key,
    "other settings": lambda folder, tmp_path: with_right_checksums(folder, lambda c: c["info"].update(classes=["x"])),
    "other tensors": lambda folder, tmp_path: with_right_checksums(
        folder, change_tensors=lambda tensors: next(iter(tensors.values())).zero_()
    ),
    "white space": lambda folder, tmp_path: (folder / CONFIG).write_text((folder / CONFIG).read_text() + " "),
    "a flipped bit": change_signature(
        lambda s: s.update(signature=base64.b64encode(bytes(b ^ 1 for b in base64.b64decode(s["signature"]))).decode())
    ),
    "half a signature": change_signature(lambda s: s.update(signature=s["signature"][:40])),
    "a number": change_signature(lambda s: s.update(signature=7)),
    "no key": change_signature(lambda s: s.pop("signature")),
    "no JSON": lambda folder, tmp_path: (folder / SIGNATURE).write_text("["),
    "a long file": lambda folder, tmp_path: (folder / SIGNATURE).write_text(" " * 10_000),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_afterwards_is_refused(folder, keys, tmp_path, what):
    private, public = keys
    qk.sign_packed_file(folder, private)
    CHANGES[what](folder, tmp_path)
    for refuse in (qk.verify_packed_file, lambda path, key: qk.PackedEnsemble.load(path, public_key=key)):
        with pytest.raises(PackedFileError, match=r"not signed|not of this file"):
            refuse(folder, public)


def test_damage_behind_a_good_signature_is_refused(folder, keys):
    private, public = keys
    qk.sign_packed_file(folder, private)
    content = bytearray((folder / MODEL).read_bytes())
    content[-1] ^= 1
    (folder / MODEL).write_bytes(content)
    with pytest.raises(PackedFileError, match="checksums do not match"):
        qk.verify_packed_file(folder, public)


def test_saving_again_removes_the_signature(folder, keys):
    private, public = keys
    ensemble = qk.PackedEnsemble.load(folder)
    qk.sign_packed_file(folder, private)
    ensemble.save(folder)
    with pytest.raises(PackedFileError, match="not signed"):
        qk.verify_packed_file(folder, public)


def test_what_is_no_key(folder, keys, tmp_path):
    private, public = keys
    (tmp_path / "junk.pem").write_text("junk")
    for use in (qk.sign_packed_file, qk.verify_packed_file):
        with pytest.raises(ValueError, match=r"junk\.pem is no p"):
            use(folder, tmp_path / "junk.pem")
    with pytest.raises(ValueError, match=r"me\.pem\.pub is no private key"):
        qk.sign_packed_file(folder, public)
    with pytest.raises(FileExistsError):
        qk.make_signing_key(private)


@pytest.mark.slow
def test_without_cryptography_the_error_says_what_to_install(folder, tmp_path):
    script = """
import sys
sys.modules["cryptography"] = None
import qkernels as qk
qk.PackedEnsemble.load(sys.argv[1])
try:
    qk.PackedEnsemble.load(sys.argv[1], public_key="me.pem.pub")
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert "qtdog[sign]" in result.stdout
