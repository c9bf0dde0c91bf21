"""Links against the symbols of an older glibc than this machine's, as wheels for manylinux_2_28 need it.

The linker takes the newest version of a symbol (pthread_create of glibc 2.34), although glibc keeps the old ones beside
them. A reference that names its version gets that one, so object files are rewritten to name the version that glibc
2.28 had. What else an old system lacks is in csrc/old_glibc.cpp.
"""

import re
import subprocess
from pathlib import Path

NEWEST = (2, 28)


def write_symbol_versions(file: Path, cxx: str) -> None:
    """One line `symbol symbol@VERSION` for each symbol whose newest version is too new, as `objcopy` reads them."""
    lines = []
    for library in ("libc.so.6", "libm.so.6"):
        path = subprocess.run([cxx, f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout
        lines += symbol_versions(path.strip())
    file.write_text("".join(f"{line}\n" for line in sorted(set(lines))))


def symbol_versions(library: str) -> list[str]:
    table = subprocess.run(["objdump", "-T", library], capture_output=True, text=True, check=True).stdout
    default: dict[str, tuple[int, ...]] = {}
    old: dict[str, tuple[int, ...]] = {}
    for hidden, number, symbol in re.findall(r"\s(\(?)GLIBC_([\d.]+)\)?\s+(?:0x\w+ )?(\w+)$", table, re.MULTILINE):
        version = tuple(map(int, number.split(".")))
        if not hidden:
            default[symbol] = version
        elif version <= NEWEST:
            old[symbol] = max(version, old.get(symbol, ()))
    return [
        f"{symbol} {symbol}@GLIBC_{'.'.join(map(str, old[symbol]))}"
        for symbol, version in default.items()
        if version > NEWEST and symbol in old
    ]
