"""Builds the compiled parts with ninja: `_cpu` and `_cuda` (kernels, LibTorch Stable ABI) and `_codec` (pybind11).

One binary of each kernel library serves every PyTorch >= 2.11, CPU-only or CUDA build, under every Python, and so does
a wheel. The codec, for tests alone, is built for this Python where the build is in place and left out of wheels.

Environment:

    QKERNELS_BUILD_CUDA   1: a missing nvcc is an error; 0: no C++/CUDA kernels; unset: build them if nvcc is found
    TORCH_CUDA_ARCH_LIST  GPU architectures, as PyTorch's extensions take them; default 8.0;8.6;8.9;9.0;10.0+PTX
    CUDA_HOME             where to look for nvcc first
    MAX_JOBS              parallel compilations
    QKERNELS_MANYLINUX    1: what is built runs with glibc 2.28 and GCC 8's libstdc++; `make wheel` sets it
    QKERNELS_SANITIZE     1: with AddressSanitizer and UndefinedBehaviorSanitizer, for tests; `make sanitize` sets it
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_support"))
import old_glibc
from readme import readme
from torch_headers import torch_include

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MANYLINUX = os.environ.get("QKERNELS_MANYLINUX") == "1"
OLD_GLIBC = ["csrc/old_glibc.cpp"] if MANYLINUX else []
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of PyTorch 2.11
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0;10.0+PTX"
# IEEE arithmetic is the contract (csrc/numerics.h): no contraction, no -ffast-math.
CXX_FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Wno-psabi"]
# Without vptr, because the types of PyTorch and pybind11 are not instrumented.
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all"
SANITIZE = SANITIZERS.split() if os.environ.get("QKERNELS_SANITIZE") == "1" else []
if SANITIZE:
    CXX_FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZE]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="]  # errors name csrc/..., wherever it was
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", TORCH_TARGET]


def find_nvcc() -> Path | None:
    """nvcc on CUDA_HOME, on PATH, or from the PyPI package nvidia-cuda-nvcc."""
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        if (path := Path(home) / "bin" / "nvcc").is_file():
            return path
    if found := shutil.which("nvcc"):
        return Path(found)
    for site in sys.path:
        found_in_site = sorted(Path(site).glob("nvidia/*/bin/nvcc"))
        if found_in_site:
            return found_in_site[-1]
    return None


def static_cudart(nvcc: Path) -> Path:
    """The library of CUDA's runtime that nvcc links."""
    says = subprocess.run([nvcc, "--dryrun", "-shared", "none.o"], capture_output=True, text=True, check=True).stderr
    for folder in re.findall(r'"-L([^"]+)"', says):
        if (library := Path(folder) / "libcudart_static.a").is_file():
            return library
    raise SystemExit(f"qtdog: {nvcc} has no libcudart_static.a")


def arch_flags(arch_list: str) -> list[str]:
    """nvcc's -gencode flags of "8.0;9.0a;10.0+PTX" (separated by ; or spaces)."""
    flags = []
    for arch in arch_list.replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_plan() -> tuple[Path | None, str]:
    """nvcc to build with, or None, and one line that says why."""
    wanted = os.environ.get("QKERNELS_BUILD_CUDA", "")
    nvcc = None if wanted == "0" else find_nvcc()
    if nvcc is not None:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
        return nvcc, f"qtdog: building the C++/CUDA kernels with {nvcc} for {archs}"
    if wanted == "1":
        raise SystemExit(
            "qtdog: QKERNELS_BUILD_CUDA=1 but no nvcc: set CUDA_HOME, or put nvcc on PATH, or "
            "`pip install nvidia-cuda-nvcc`; or unset QKERNELS_BUILD_CUDA, and Triton will serve CUDA tensors."
        )
    why = "QKERNELS_BUILD_CUDA=0" if wanted == "0" else "no nvcc found"
    return None, (
        f"qtdog: {why}, so Triton will serve CUDA tensors; to add the C++/CUDA kernels, install nvcc (CUDA_HOME, PATH, "
        "or `pip install nvidia-cuda-nvcc`) and reinstall"
    )


class BuildKernels(build_ext):
    """Writes one build.ninja for all extensions and runs it."""

    def run(self) -> None:
        self.nvcc, line = cuda_plan()
        print(line, flush=True)
        left_out = [] if self.inplace else ["qkernels._codec"]
        if self.nvcc is None:
            left_out.append("qkernels._cuda")
        self.extensions = [e for e in self.extensions if e.name not in left_out]
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        # The kernel libraries are not Python modules and fit every Python.
        if fullname.split(".")[-1] in ("_cpu", "_cuda"):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "schemas.inc").write_text(schema_definitions())
        (build / "build.ninja").write_text(self.ninja_file(build))
        ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([*ninja, *jobs, "-C", str(build)], check=True)

    def ninja_file(self, build: Path) -> str:
        cxx = os.environ.get("CXX", "c++")
        finish, cudart = "", "static"
        if MANYLINUX:
            old_glibc.write_symbol_versions(build / "symbol-versions", cxx)
            finish = f" && objcopy --redefine-syms={build}/symbol-versions $out"
            cudart = "none"  # nvcc's own is linked with the newest glibc; a copy takes its place
        lines = [
            f"cxx = {cxx}",
            "rule cxx",
            f"  command = $cxx -MD -MF $out.d {' '.join([*CXX_FLAGS, *HOST_FLAGS])} $flags -c $in -o $out{finish}",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            # libgcc before libgcc_s, whose conversions of float16 are of GCC 12.
            f"  command = $cxx {' '.join(SANITIZE)} -shared -Wl,--no-as-needed $in $libs -lgcc -o $out",
            # PyTorch's libraries are needed by name only, so empty ones with those names do to link against: the
            # result then loads beside any build of PyTorch, whichever was here.
            "rule stand_in",
            "  command = $cxx -shared -Wl,-soname,$soname -x c++ /dev/null -o $out",
        ]
        for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
            lines += [f"build {build}/{name}: stand_in", f"  soname = {name}"]
        torch_flags = f"-isystem {torch_include(build)}"
        if self.nvcc is not None:
            archs = " ".join(arch_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS))
            host = " ".join(f"-Xcompiler={flag}" for flag in HOST_FLAGS)
            lines += [
                "rule nvcc",
                f"  command = {self.nvcc} -ccbin $cxx -MD -MF $out.d -std=c++20 -O3 -fmad=false -cudart=static "
                f"{host} {archs} {TORCH_TARGET} -DUSE_CUDA {torch_flags} -c $in -o $out{finish}",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link_cuda",
                f"  command = {self.nvcc} -ccbin $cxx -shared -cudart={cudart} -Xlinker=--no-as-needed $in $libs -lgcc "
                "-o $out",
                "rule copy_library",
                f"  command = cp $in $out{finish}",
            ]
        for extension in self.extensions:
            lines += self.ninja_edges(extension, build, torch_flags)
        return "\n".join(lines) + "\n"

    def ninja_edges(self, extension: Extension, build: Path, torch_flags: str) -> list[str]:
        name = extension.name.split(".")[-1]
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        if name == "_codec":
            import pybind11

            flags = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
        else:
            flags = " ".join([*KERNEL_FLAGS, torch_flags, f"-I{build}"])
        lines, objects = [], []
        for source in extension.sources:
            path = ROOT / source
            objects.append(f"{build}/{name}/{path.name}.o")
            rule = "nvcc" if path.suffix == ".cu" else "cxx"
            schemas = f" | {build}/schemas.inc" if path.name == "schemas.cpp" else ""
            lines += [f"build {objects[-1]}: {rule} {path}{schemas}", f"  flags = {flags}"]
        stand_ins = {"_cpu": ["torch_cpu"], "_cuda": ["torch_cpu", "torch_cuda"]}.get(name, [])
        needed = [f"{build}/lib{lib}.so" for lib in stand_ins]
        libs = [f"-L{build}", *(f"-l{lib}" for lib in stand_ins)]
        if MANYLINUX and name == "_cuda":
            cudart = f"{build}/libcudart_static.a"
            lines.append(f"build {cudart}: copy_library {static_cudart(self.nvcc)}")
            needed.append(cudart)
            libs += [cudart, "-lpthread", "-ldl", "-lrt"]
        rule = "link_cuda" if name == "_cuda" else "link"
        lines += [f"build {output}: {rule} {' '.join(objects)} | {' '.join(needed)}", f"  libs = {' '.join(libs)}"]
        return lines


class OneForEveryPython(bdist_wheel):
    """The wheel holds libraries and no Python modules that are compiled: only the platform matters."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def schema_definitions() -> str:
    """The ops of qkernels/ops/schemas.py as csrc/schemas.cpp defines them."""
    schemas = runpy.run_path(str(ROOT / "qkernels" / "ops" / "schemas.py"))["SCHEMAS"]
    return "".join(f'm.def("{name}{schema}");\n' for name, schema in schemas.items())


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in CSRC.glob(pattern))


if platform.system() != "Linux":
    raise SystemExit("qtdog: only Linux is supported so far")


def version() -> str:
    """`qkernels.__version__`, read without importing the package."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "qkernels" / "__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


setup(
    version=version(),
    long_description=readme(ROOT, version()),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension("qkernels._cpu", ["csrc/schemas.cpp", *sources("cpu/*.cpp"), *OLD_GLIBC]),
        Extension("qkernels._cuda", [*sources("cuda/*.cu"), *OLD_GLIBC]),
        Extension("qkernels._codec", ["csrc/codec.cpp"]),
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": OneForEveryPython},
)
