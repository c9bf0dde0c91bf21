"""docs/performance.md from a small results file."""

import json

import pytest

from benchmarks import summary
from benchmarks.report import RESULTS, write_performance_page

pytestmark = pytest.mark.slow


def times(milliseconds, ratio):
    return {"milliseconds": [milliseconds * 0.9, milliseconds, milliseconds * 1.1], "ratio": [ratio, ratio, ratio]}


def row(parameters, **changes):
    return {
        "parameters": parameters,
        "size": 1000,
        "base": "fake_quantize",
        "rounds": 5,
        "contenders": {"fake_quantize": times(2.0, 1.0), "eager LSQ": times(8.0, 4.0)},
        "launched_from_python": [],
        "absent": {"torchao": "not installed"},
        "facts": {},
        "work": {"fake_quantize": [[10**6, 5000, "float32"]]},
        "phases": {},
        "allocator": "default",
        "date": "2026-01-02",
        "commit": "abc1234",
        "set": "quick",
        "versions": {"torch": "9.9", "torchao": "not installed"},
    } | changes


@pytest.fixture
def results():
    shape = "{}, float32, per channel, forward + backward"
    step = row("resnet18", phases={"float": {"forward": 1.0, "backward": 2.0, "update": 0.5}}, work={})
    return {
        "machine": "Small CPU, 1 threads",
        "device": "cpu",
        "roofline": {"bandwidth": 1e9, "float32": 1e11, "int8": 4e11},
        "cases": {
            "bench_fake_quantize.py::bench_weight": {
                "text": "fake_quantize of one weight\n\nWords about it.",
                "rows": [row(shape.format(n), size=n) for n in (10, 100, 1000, 10000)],
            },
            "bench_training_step.py::bench_qat_step": {"text": "Training step\n\nMore words.", "rows": [step]},
        },
    }


def page_of(results, folder):
    (folder / "results").mkdir()
    (folder / "docs").mkdir()
    (folder / "results" / "small.json").write_text(json.dumps(results))
    first = write_performance_page(folder / "results", folder / "docs").read_text()
    return first + (folder / "docs" / "performance" / "small.md").read_text()


def test_page(results, tmp_path):
    page = page_of(results, tmp_path)
    assert (
        "# Performance on Small CPU, 1 threads" in page
        and "[Small CPU, 1 threads](performance/small.md)" in page
        and "copies move 1.0 GB/s" in page
    )
    assert "## fake_quantize of one weight\n\nWords about it." in page
    assert "2026-01-02, commit abc1234; torch 9.9." in page
    # 1 MB at 1 GB/s is 1 ms of the 2 ms.
    assert "| 100, float32, per channel, forward + backward | 2 | 50 % | 4.00 (4.00..4.00) |" in page
    # A single row has its contenders below each other.
    assert "| eager LSQ | 8 | 4.00 (4.00..4.00) |\n" in page
    assert page.count("- torchao is absent: not installed\n") == 2
    assert "on a GPU yet**: in C++/CUDA `fake_quantize`, " in page and "in Triton `fake_quantize`" in page


def test_plots(results, tmp_path):
    page = page_of(results, tmp_path)
    for kind in ("sizes", "roofline", "steps"):
        svg = (tmp_path / "docs" / "performance" / f"small-{kind}.svg").read_text()
        assert f"(small-{kind}.svg)" in page
        assert "Small CPU, 1 threads" in svg
    before = svg
    write_performance_page(tmp_path / "results", tmp_path / "docs")
    assert (tmp_path / "docs" / "performance" / "small-steps.svg").read_text() == before


def test_both_allocators_stand_beside_each_other(results, tmp_path):
    case = results["cases"]["bench_training_step.py::bench_qat_step"]
    case["rows"].append(case["rows"][0] | {"allocator": "keeping memory", "facts": {"layout": "any"}})
    page = page_of(results, tmp_path)
    assert "resnet18, default allocator, ms" in page and "resnet18, keeping memory allocator, ms" in page
    assert "- layout: any (resnet18, keeping memory allocator)\n" in page


def test_networks_with_many_contenders_have_a_table_each(results, tmp_path):
    names = ["fake_quantize", *(f"peer {number}" for number in range(9))]
    several = {name: times(2.0, 1.0) for name in names}
    rows = [row(f"{net}, batch {size}", contenders=several) for size in (1, 8) for net in ("resnet", "vit")]
    results["cases"]["bench_deployed.py::bench_deployed_networks"] = {"text": "Networks\n\nWords.", "rows": rows}
    page = page_of(results, tmp_path)
    for net in ("resnet", "vit"):
        assert f"| | {net}, batch 1, ms | ratio | of the roofline | {net}, batch 8, ms |" in page
    assert page.count("\n| peer 8 | 2 | 1.00 (1.00..1.00) |") == 2


def test_a_gpu_ends_the_warning(results, tmp_path):
    assert "on a GPU yet" not in page_of(results | {"device": "cuda"}, tmp_path)


def test_the_summary_names_the_best_peer(results, tmp_path, monkeypatch):
    line = summary.Line(
        "weights", "small", "weight", "100, float32, per channel, forward + backward", "fake_quantize", "LSQ"
    )
    monkeypatch.setattr(summary, "LINES", (line, line._replace(machine="never measured")))
    (tmp_path / "README.md").write_text("before\n<!-- performance -->\nold\n<!-- /performance -->\nafter\n")
    page = page_of(results, tmp_path)
    assert "| weights | 2 | eager LSQ | **4.00** | Small CPU, 1 threads |" in page
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before") and readme.endswith("after\n") and "old" not in readme and "eager LSQ" in readme


def test_every_line_of_the_summary_is_measured():
    machines = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    assert len(list(summary.table(machines))) == 2 + len(summary.LINES) == 15
