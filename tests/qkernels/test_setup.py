"""What setup.py decides before it compiles: where nvcc is, for which GPUs to build, and what it says without one."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools


@pytest.fixture
def setup_py(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for name in ("CUDA_HOME", "CUDA_PATH", "QKERNELS_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))


@pytest.mark.parametrize("wanted", ["", "1"])
def test_sanitizers_are_built_in_when_they_are_asked_for(monkeypatch, wanted):
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("QKERNELS_SANITIZE", wanted)
    flags = runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))["CXX_FLAGS"]
    assert any(flag.startswith("-fsanitize=address,undefined") for flag in flags) == (wanted == "1")


@pytest.fixture
def nowhere(setup_py, monkeypatch):
    """No nvcc on PATH nor among installed packages, whose folders are in the list that this returns."""
    monkeypatch.setenv("PATH", "")
    packages = []
    monkeypatch.setitem(setup_py["find_nvcc"].__globals__, "sys", SimpleNamespace(path=packages))
    return packages


def put_nvcc(folder):
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.touch(mode=0o755)
    return nvcc


def test_nvcc_is_found_on_cuda_home_then_path_then_among_packages(setup_py, nowhere, tmp_path, monkeypatch):
    assert setup_py["find_nvcc"]() is None
    packaged = put_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin")
    nowhere.append(str(tmp_path / "site"))
    assert setup_py["find_nvcc"]() == packaged
    on_path = put_nvcc(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup_py["find_nvcc"]() == on_path
    home = put_nvcc(tmp_path / "cuda" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert setup_py["find_nvcc"]() == home


def test_without_nvcc_one_line_says_who_serves_and_how_to_change_it(setup_py, nowhere, monkeypatch):
    nvcc, line = setup_py["cuda_plan"]()
    assert nvcc is None and "\n" not in line
    assert "Triton will serve CUDA tensors" in line and "install nvcc" in line
    monkeypatch.setenv("QKERNELS_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="QKERNELS_BUILD_CUDA=1 but no nvcc"):
        setup_py["cuda_plan"]()


def test_cuda_can_be_left_out(setup_py, tmp_path, monkeypatch):
    put_nvcc(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("QKERNELS_BUILD_CUDA", "0")
    assert setup_py["cuda_plan"]()[0] is None


@pytest.mark.parametrize("separator", [";", " "])
def test_architectures_are_read_as_pytorch_reads_them(setup_py, separator):
    assert setup_py["arch_flags"](separator.join(["8.0", "9.0a", "10.0+PTX"])) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
