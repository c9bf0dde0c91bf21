"""Settings that must stand before torch or triton are imported by a test."""

import dataclasses
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as qtdog does, see qtdog/__init__.py
# Of pytest-xdist's processes there is one for each core: one thread in each.
os.environ.update({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {})
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on the CPU, slowly
    from triton.runtime.interpreter import interpreter_builder

    # Half of the interpreter's time goes into assertions that it evaluates and, not in debug mode, never looks at.
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)

every_time = hypothesis.settings(
    max_examples=20, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
hypothesis.settings.register_profile("every time", every_time)
hypothesis.settings.register_profile("nightly", every_time, max_examples=200)
hypothesis.settings.load_profile("every time")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: the cores that this process may use, be they of the machine's or of a container's."""
    return len(os.sched_getaffinity(0))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The commands of the docs, the longest of all tests, first: at the end one process would work on them alone."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_docs.py"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """As no_cover of pytest-cov, which in a process of pytest-xdist has one tracer below another and only stops one."""
    if item.get_closest_marker("untraced") is None:
        return (yield)
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(trace)


@pytest.fixture
def forget():
    """Forgets the plug-ins that this process has loaded since; called once more after the test."""
    from qtdog import plugins

    before = [dict(registry) for registry in plugins._REGISTRIES]

    def forget():
        for registry, entries in zip(plugins._REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(entries)

    yield forget
    forget()


@pytest.fixture
def plugin(forget, tmp_path):
    """A copy of examples/plugin.py."""
    return shutil.copy(Path(__file__).parents[1] / "examples" / "plugin.py", tmp_path)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forgotten_graphs():
    """What a test compiled: the compiler counts how often the same code was compiled anew, and gives up."""
    yield
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty* filled with NaN, so that an element that nobody writes shows up in a comparison."""

    def poisoned(allocate):
        def allocate_and_poison(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and not t.is_meta else t

        return allocate_and_poison

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
