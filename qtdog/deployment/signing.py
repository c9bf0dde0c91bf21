"""Signing packed ensembles, so that those who get one can tell from whom it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import qkernels as qk
from qtdog.errors import UserError
from qtdog.log import Log


@dataclass
class SignConfig:
    """Settings of `qtdog sign`."""

    file: Annotated[str, "packed ensemble: the folder `packed` that `qtdog ensemble` wrote"] = ""
    key: Annotated[str, "private key: a PEM file (Ed25519, without a password)"] = ""
    new_key: Annotated[bool, "make the key first, and the public one beside it, KEY.pub"] = False


def sign(config: SignConfig) -> None:
    """Write signature.json into the folder of a packed ensemble that is whole."""
    check_named(config.file, config.key)
    log = Log()
    try:
        if config.new_key:
            public = qk.make_signing_key(config.key)
            log(f"{config.key}: a new private key, keep it to yourself; give {public} to those who are to verify")
        written = qk.sign_packed_file(config.file, config.key)
    except FileExistsError as error:
        raise UserError(f"{config.key} is there already: sign without --new-key, or name another") from error
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    log(f"{written} is written")


@dataclass
class CheckSignatureConfig:
    """Settings of `qtdog verify`."""

    file: Annotated[str, "packed ensemble: the folder `packed` that `qtdog ensemble` wrote"] = ""
    key: Annotated[str, "public key of whoever should have signed it: a PEM file"] = ""


def verify(config: CheckSignatureConfig) -> None:
    """Make sure that a packed ensemble is whole, and signed by the owner of a key."""
    check_named(config.file, config.key)
    try:
        qk.verify_packed_file(config.file, config.key)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    Log()(f"{config.file} is whole, and signed by the owner of {config.key}")


def check_named(file: str, key: str) -> None:
    """Raises UserError where there is no such ensemble, or no key is named."""
    if not file or not Path(file).exists():
        raise UserError(f"{file or 'nothing'} is no packed ensemble: name the folder `packed` of `qtdog ensemble`")
    if not key:
        raise UserError("name the key: --key FILE")
