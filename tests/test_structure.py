"""What keeps the house in order: who imports whom, how long files and functions may be, where an op stands."""

import ast
import importlib
import inspect
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

import qkernels as qk
from qkernels.backends import FOR_CPUS, NOT_IN_CUDA, STEMS

ROOT = Path(__file__).parents[1]
PACKAGES = ("qkernels", "qtdog", "benchmarks")
LONGEST_FILE, LONGEST_FUNCTION = 450, 60
# Triton kernels take no structures: half of these are arguments, one a line, and an inner loop cut up reads no better.
LONG_KERNELS = {"conv_kernel", "depthwise_kernel"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in python_files(*PACKAGES)}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of each name that a file of ours imports from a module of ours, wherever it does so."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] in PACKAGES]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] in PACKAGES:
                found += [(module, alias.name) for alias in node.names]
    return found


def test_no_module_imports_one_that_imports_it():
    """Also not in a function or for types alone."""
    graph = {
        name: {f"{module}.{what}" if f"{module}.{what}" in MODULES else module for module, what in imports(path)}
        for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_arrows_run_downward():
    """qtdog -> qkernels, and only by what `qkernels` itself names."""
    public = ast.literal_eval(
        next(
            node.value
            for node in tree_of(ROOT / "qkernels" / "__init__.py").body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        )
    )
    for name, path in MODULES.items():
        for module, what in imports(path):
            package = module.split(".")[0]
            assert not (name.startswith("qkernels") and package != "qkernels"), f"{name} imports {module}"
            if name.startswith("qtdog"):
                assert package != "benchmarks", f"{name} imports {module}"
                allowed = module == "qkernels" and what in ("", "__version__", *public)
                assert package != "qkernels" or allowed, f"{name} imports {what} from {module}"


EVERYWHERE = python_files(*PACKAGES, "tests")


def test_private_names_stay_in_their_package():
    for path in EVERYWHERE:
        own = path.relative_to(ROOT).parts[0]
        for module, what in imports(path):
            private = [part for part in (*module.split("."), what) if part.startswith("_") and not part.endswith("__")]
            assert module.split(".")[0] == own or not private, f"{path} imports {what} from {module}"


def test_nothing_is_too_long():
    for path in EVERYWHERE:
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST_FILE, f"{path} has {lines} lines"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in LONG_KERNELS:
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{node.name} in {path} has {lines} lines"


def test_an_op_has_one_stem_everywhere():
    """Its Python side, its kernels on the CPU and in Triton, and where there are such those in C++/CUDA."""
    for op, stem in STEMS.items():
        assert (ROOT / "qkernels" / "ops" / f"{stem}.py").is_file(), op
        assert op in FOR_CPUS or getattr(importlib.import_module(f"qkernels.triton.{stem}"), op)
        for folder, suffix in (("cpu", "cpp"), ("cuda", "cu")):
            if folder == "cpu" or op not in NOT_IN_CUDA:
                files = (ROOT / "csrc" / folder).glob(f"*.{suffix}")
                (source,) = (file for file in files if f'm.impl("{op}"' in file.read_text())
                # Several of a family may share a file, and one may have several.
                assert stem.startswith(source.stem) or source.stem.startswith(stem), f"{op} is in {source}"


def test_every_public_definition_is_documented():
    """And a class' public methods and properties, but for those that PyTorch names."""
    for name in qk.__all__:
        public = getattr(qk, name)
        assert inspect.getdoc(public), name
        members = vars(public) if inspect.isclass(public) else {}
        for member, value in members.items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(function) and not member.startswith("_") and not hasattr(torch.nn.Module, member):
                assert inspect.getdoc(getattr(public, member)), f"{name}.{member}"
