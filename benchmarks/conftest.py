"""What the benchmarks share: the options of `python -m benchmarks` and the fixture `contest`.

pytest-benchmark drives the rounds and writes the file. A round runs every contender once, so what pytest-benchmark
itself times is the whole round; the times of the contenders and their ratios in each round are in its `extra_info`.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from .contest import Contest
from .report import result_lines
from .timing import work_stream


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--threads", type=int, default=None)
    group.addoption("--seconds", type=float, default=2.0, help="to measure, for each set of parameters")
    group.addoption("--full", action="store_true", help="all parameters")
    group.addoption("--slow", help="regular expression of the names of slow peers that take part")
    group.addoption("--profile", action="store_true", help="time nothing, run each of ours once for a profiler")
    group.addoption("--case", default="", help="regular expression of the names of benchmarks")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = {"gpu"} if config.getoption("--device") == "cpu" else {"cpu"}
    if not config.getoption("--full"):
        unwanted.add("full")
    items[:] = [
        item
        for item in items
        if re.search(config.getoption("--case"), item.nodeid) and not unwanted & {m.name for m in item.iter_markers()}
    ]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots between the results."""
    return ("passed", "", "") if report.when == "call" and report.passed else None


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any, device: str) -> Iterator[Contest]:
    """The contest that a benchmark fills with contenders and lets measure."""
    option = request.config.getoption

    def drive(one_round: Callable[[], object], rounds: int) -> None:
        benchmark.pedantic(one_round, rounds=rounds)

    def record(result: dict[str, Any]) -> None:
        case, _, parameters = request.node.nodeid.rpartition("/")[2].partition("[")
        text = inspect.cleandoc(request.function.__doc__)
        benchmark.extra_info.update(result, case=case, text=text, id=parameters.rstrip("]"))
        reporter: Any = request.config.pluginmanager.get_plugin("terminalreporter")
        for line in result_lines(result):
            reporter.write_line(line)

    torch.manual_seed(0)
    with work_stream(device):
        yield Contest(device, option("--seconds"), drive, record, option("--slow"), option("--profile"))
