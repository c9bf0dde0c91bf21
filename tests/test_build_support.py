"""What a build reads besides our sources: PyTorch's headers, and the symbols of glibc."""

import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "build_support"))
import old_glibc
import torch_headers


def put_torch(site: Path, version: str) -> Path:
    include = site / "torch" / "include"
    include.mkdir(parents=True)
    (site / "torch" / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
    return include


@pytest.fixture
def no_torch(monkeypatch, tmp_path):
    """As in an isolated build for an environment without PyTorch; the folder where its packages would be."""
    paths = dict.fromkeys(("purelib", "platlib"), tmp_path)
    for name, seen in {
        "sys": SimpleNamespace(path=[], executable=sys.executable),
        "sysconfig": SimpleNamespace(get_paths=lambda: paths),
        "site": SimpleNamespace(getusersitepackages=lambda: str(tmp_path / "user")),
    }.items():
        monkeypatch.setattr(torch_headers, name, seen)  # there alone: coverage too asks sysconfig when sys.path changes
    return tmp_path


@pytest.fixture
def downloads(monkeypatch):
    """The commands that would have downloaded a wheel of torch; a small one takes its place."""
    commands = []

    def download(command, check):
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "torch-2.14.1-cp311-cp311-manylinux_2_28_x86_64.whl", "w") as wheel:
            for name in ("torch/csrc/stable/library.h", "c10/macros/Macros.h", "ATen/ATen.h"):
                wheel.writestr(f"torch/include/{name}", "// a header\n")
            wheel.writestr("torch/lib/libtorch_cuda.so", "gigabytes")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torch_headers, "subprocess", SimpleNamespace(run=download))
    return commands


def test_headers_of_this_environment_are_found():
    assert (torch_headers.installed() / "torch" / "csrc" / "stable" / "library.h").is_file()


def test_headers_are_those_of_the_environment_that_isolation_hides(no_torch, downloads):
    include = put_torch(no_torch, "2.11.0+cpu")
    assert torch_headers.torch_include(no_torch) == include and not downloads


@pytest.mark.parametrize("installed", [None, "2.10.1", "1.13"])
def test_without_a_torch_that_is_new_enough_headers_come_out_of_a_wheel_once(no_torch, downloads, installed):
    if installed is not None:
        put_torch(no_torch, installed)
    cache = no_torch / "build"
    cache.mkdir()
    for _ in range(2):
        include = torch_headers.torch_include(cache)
    assert len(downloads) == 1 and {"--no-deps", "torch>=2.11"} <= set(downloads[0])
    files = {str(p.relative_to(include)) for p in include.rglob("*") if p.is_file()}
    assert files == {"torch/csrc/stable/library.h", "c10/macros/Macros.h"}
    assert [p.name for p in cache.iterdir()] == ["torch"]


def test_a_failed_download_says_what_to_do(no_torch, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(torch_headers, "subprocess", SimpleNamespace(run=lambda command, check: failed))
    with pytest.raises(SystemExit, match="`pip install torch` first"):
        torch_headers.torch_include(no_torch)


OBJDUMP = """
/lib/x86_64-linux-gnu/libc.so.6:     file format elf64-x86-64

DYNAMIC SYMBOL TABLE:
0000000000000000      DO *UND*	0000000000000000 (GLIBC_2.35) _rtld_global_ro
0000000000089380 g    DF .text	0000000000000eed (GLIBC_2.2.5) pthread_create
0000000000089380 g    DF .text	0000000000000eed  GLIBC_2.34  pthread_create
00000000000853c0 g    DF .text	000000000000009d (GLIBC_2.3.4) dlmopen
00000000000853c0 g    DF .text	000000000000009d (GLIBC_2.33) dlmopen
00000000000853c0 g    DF .text	000000000000009d  GLIBC_2.34  dlmopen
0000000000035000 g    DF .text	0000000000000010 (GLIBC_2.2.5) memcpy
0000000000035000 g    DF .text	0000000000000010  GLIBC_2.14  memcpy
0000000000098000 g    DF .text	0000000000000010  GLIBC_2.36  arc4random
"""


def test_symbols_get_the_newest_version_that_glibc_2_28_has(monkeypatch):
    finished = subprocess.CompletedProcess([], 0, stdout=OBJDUMP)
    monkeypatch.setattr(old_glibc, "subprocess", SimpleNamespace(run=lambda *args, **kwargs: finished))
    versions = old_glibc.symbol_versions("libc.so.6")
    assert versions == ["pthread_create pthread_create@GLIBC_2.2.5", "dlmopen dlmopen@GLIBC_2.3.4"]
