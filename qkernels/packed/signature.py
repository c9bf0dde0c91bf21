"""Ed25519 signatures of packed ensembles: they tell who made a file, where checksums only tell that it is whole.

What is signed is config.json, to the byte, which has the checksum of the tensors. The package `cryptography` does it.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any

from ..atomic import replace_file
from .file import SIGNATURE, PackedFileError

PURPOSE = (
    b"qkernels.packed_ensemble config.json\n"  # so that a signature of something else with the key is none of this
)
LARGEST_SIGNATURE = 4096


def make_signing_key(path: str | Path) -> Path:
    """A new private key at `path`, which only its owner may read, and the public one beside it, at `path`.pub.

    Returns:
        The public key's path: what those get who are to verify.

    Raises:
        FileExistsError: if there is a file already.
    """
    private, public = Path(path), Path(f"{path}.pub")
    serialization, ed25519 = _cryptography()
    key = ed25519.Ed25519PrivateKey.generate()
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    with open(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    shared = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    replace_file(public, lambda temporary: temporary.write_bytes(shared))
    return public


def read_private_key(path: str | Path) -> Any:
    """The key of a PEM file, for `write_signature`.

    Raises:
        ImportError: without the package `cryptography`.
        ValueError: if it is none, or has a password.
    """
    serialization, ed25519 = _cryptography()
    try:
        key = serialization.load_pem_private_key(Path(path).read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no private key without a password: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ValueError(f"{path} is no Ed25519 key")
    return key


def write_signature(folder: Path, config: bytes, key: Any) -> Path:
    """Sign these bytes of config.json. Returns the file that is written into the folder."""
    written = {"algorithm": "Ed25519", "signature": base64.b64encode(key.sign(PURPOSE + config)).decode()}
    replace_file(folder / SIGNATURE, lambda path: path.write_text(json.dumps(written) + "\n"))
    return folder / SIGNATURE


def read_public_key(path: str | Path) -> Any:
    """The key of a PEM file, for `check_signature`.

    Raises:
        ImportError: without the package `cryptography`.
        ValueError: if it is none.
    """
    serialization, ed25519 = _cryptography()
    try:
        key = serialization.load_pem_public_key(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no public key: {error}") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ValueError(f"{path} is no Ed25519 key")
    return key


def check_signature(folder: Path, config: bytes, key: Any) -> None:
    """Make sure that the owner of a key has signed these bytes of config.json.

    Raises:
        PackedFileError: if there is no signature, or it is not of this file and key.
    """
    from cryptography.exceptions import InvalidSignature

    if not (folder / SIGNATURE).is_file():
        raise PackedFileError(f"it is not signed: it has no {SIGNATURE}")
    try:
        with (folder / SIGNATURE).open("rb") as file:
            signature = base64.b64decode(json.loads(file.read(LARGEST_SIGNATURE))["signature"], validate=True)
        key.verify(signature, PURPOSE + config)
    except (InvalidSignature, ValueError, TypeError, KeyError, RecursionError) as error:
        raise PackedFileError("its signature is not of this file by the owner of the key") from error


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ImportError("signatures need the package cryptography: pip install 'qtdog[sign]'") from error
    return serialization, ed25519
