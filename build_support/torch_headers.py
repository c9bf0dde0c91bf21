"""PyTorch's headers, which are all of PyTorch that a build needs.

They are those of the torch beside the build, or of the one where the result will be installed, which pip's build
isolation hides; else they are taken out of a wheel of torch. A torch among the build's requirements would bring its
CUDA packages into each isolated build: gigabytes that nothing reads. The stable ABI makes any of them as good.
"""

import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

OLDEST = (2, 11)
NEEDED = ("c10", "torch/csrc", "torch/headeronly", "torch/standalone")  # folders in torch/include; and files beside


def torch_include(cache: Path) -> Path:
    """The folder to give to the compiler; headers out of a wheel are kept in `cache`."""
    return installed() or from_wheel(cache)


def installed() -> Path | None:
    """The headers of an installed torch that is new enough."""
    paths = sysconfig.get_paths()
    for folder in [*sys.path, paths["purelib"], paths["platlib"], site.getusersitepackages()]:
        torch = Path(folder) / "torch"
        if (torch / "include").is_dir() and version(torch / "version.py") >= OLDEST:
            return torch / "include"
    return None


def version(file: Path) -> tuple[int, int]:
    """Of the torch that `file`, its version.py, belongs to; (0, 0) where it does not tell."""
    text = file.read_text() if file.is_file() else ""
    found = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def from_wheel(cache: Path) -> Path:
    """The headers of the wheel of torch that pip would install here, in `cache`."""
    include = cache / "torch" / "include"
    if include.is_dir():
        return include
    wanted = f"torch>={'.'.join(map(str, OLDEST))}"
    print(f"qtdog: no PyTorch here, so its headers are taken out of a wheel of {wanted}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        if subprocess.run([*pip, "--dest", folder, wanted], check=False).returncode != 0:
            raise SystemExit(
                f"qtdog: building the kernels needs PyTorch's headers, and pip could not download {wanted}: "
                "`pip install torch` first, or build where the package index can be reached."
            )
        (wheel,) = Path(folder).glob("torch-*.whl")
        partial = Path(tempfile.mkdtemp(dir=cache))
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(partial, [name for name in names if is_needed(name.removeprefix("torch/include/"))])
    (cache / "torch").mkdir(exist_ok=True)
    shutil.move(partial / "torch" / "include", include)  # whole or not at all
    shutil.rmtree(partial)
    return include


def is_needed(header: str) -> bool:
    folder = header.rpartition("/")[0]
    return folder.startswith(NEEDED)
