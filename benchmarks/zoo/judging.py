"""One network: quantized, trained, packed with a second one, saved, loaded in a fresh process."""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import qkernels as qk

from .networks import build, family, images_of, show

ROOT = Path(__file__).parents[2]
MEMBERS, BITS = 2, 7
STEPS = 10  # at most: stochastic depth leaves out layers
LARGEST_DIFFERENCE = 1e-4  # of the largest logit
SECONDS = 1200  # for one network


@dataclass
class Row:
    """What became of one network."""

    name: str
    family: str = ""
    image: int = 0  # pixels of its sides
    parameters: int = 0
    quantized: float = 0.0  # their share, in 0..1
    scales: int = 0
    trained: int = 0  # scales with a gradient
    in_turn: str | None = None  # why the members run in turn; None if they are one graph
    difference: float | None = None  # of the packed members' logits, relative to the largest
    moved: float | None = None  # how far one ulp of the images moves the model's own; measured where that is large
    loads: bool = False  # in a fresh process, with the same bits
    integers: float | None = None  # how far they move the logits, relative to the largest
    error: str = ""  # why it came to an end before

    @property
    def trains(self) -> bool:
        """Whether every scale has a gradient."""
        return self.scales == self.trained > 0

    @property
    def packs(self) -> bool:
        """Whether what is packed answers as the members do, and loads."""
        return self.difference is not None and self.difference <= LARGEST_DIFFERENCE and self.loads

    @property
    def fine(self) -> bool:
        """Whether it trains and packs."""
        return self.trains and self.packs and not self.error


def judge(name: str, folder: Path) -> Row:
    """All of it in this process, but for loading; `folder` is for the files.

    Returns:
        The row, up to where an error ended it.
    """
    row = Row(name)
    try:
        _fill(row, folder)
    except Exception as error:
        row.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return row


def _fill(row: Row, folder: Path) -> None:
    """Field by field, so that what was found before an error stands in the row."""
    torch.manual_seed(0)
    models = [build(row.name) for _ in range(MEMBERS)]
    row.family = family(row.name)
    row.parameters = sum(p.numel() for p in models[0].parameters())
    images = images_of(models[0])
    row.image = images.shape[-1]
    for model in models:
        show(model, images)
        row.quantized = qk.quantize_(model, qk.QConfig(weight_bits=BITS)).quantized_share
    row.scales, row.trained = _train(models[0], images)
    ensemble = qk.PackedEnsemble.from_models([model.eval() for model in models], example=images)
    row.in_turn = ensemble.report.in_turn
    row.difference = _difference(ensemble, models, images)
    if row.difference > LARGEST_DIFFERENCE:
        row.moved = _moved(models[0], images)
    logits = ensemble.member_logits(images)
    ensemble.save(folder / "packed")
    torch.save({"images": images, "logits": logits}, folder / "expected.pt")
    _load_elsewhere(row.name, folder)
    row.loads = True
    if row.in_turn is None:
        ensemble.to_integer_([images])
        row.integers = _apart(ensemble.member_logits(images), logits)


def _train(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """With fused weights: how many scales there are, and how many of them get a gradient that moves them."""
    qk.fuse_weights_(model).train()
    scales = [scale for _, scale in qk.named_scales(model)]
    trained: list[Tensor] = []
    for _ in range(STEPS):
        model(images).square().mean().backward()
        trained = [t for t in scales if t.grad is not None and t.grad.isfinite().all() and t.grad.any()]
        if len(trained) == len(scales):
            break
    model.zero_grad()
    return len(scales), len(trained)


@torch.no_grad()
def _difference(ensemble: qk.PackedEnsemble, models: list[nn.Module], example: Tensor) -> float:
    """The largest, on other images than it was packed with: of another number, and of another size if it takes one."""
    count, channels, *sizes = example.shape
    differences = []
    for more in (0, 32):
        images = torch.randn(count + 1, channels, *(size + more for size in sizes))
        try:
            expected = torch.stack([model(images) for model in models])
            answers = ensemble.member_logits(images)
        except (RuntimeError, ValueError, AssertionError, IndexError):
            if not more:
                raise
            continue  # one of a fixed size, or a graph of the example's
        differences.append(_apart(answers, expected))
    return max(differences)


@torch.no_grad()
def _moved(model: nn.Module, images: Tensor) -> float:
    return _apart(model(images * (1 + 2.0**-23)), model(images))


def _apart(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _load_elsewhere(name: str, folder: Path) -> None:
    """`compare_loaded` in a fresh process.

    Raises:
        RuntimeError: with what it said, if it fails.
    """
    code = "import sys; from benchmarks.zoo.judging import compare_loaded; compare_loaded(*sys.argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", code, name, str(folder)]
    process = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if process.returncode:
        raise RuntimeError(f"loading: {(process.stderr.strip().splitlines() or ['it died'])[-1]}")


def compare_loaded(name: str, folder: str) -> None:
    """Whether the saved ensemble answers with the same bits; a model of its architecture is built where it needs one.

    Raises:
        SystemExit: if it does not.
    """
    expected = torch.load(Path(folder) / "expected.pt", weights_only=True)
    packed = Path(folder) / "packed"
    in_turn = json.loads((packed / "config.json").read_text())["report"]["in_turn"] is not None
    ensemble = qk.PackedEnsemble.load(packed, build(name) if in_turn else None)
    if not torch.equal(ensemble.member_logits(expected["images"]), expected["logits"]):
        sys.exit("it gives other logits")


# Many ---------------------------------------------------------------------------------------------------------------


def judge_all(names: list[str], jobs: int) -> Iterator[Row]:
    """A row a network in their order, each from a process of its own with a time limit."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from tqdm(pool.map(lambda name: _judged_apart(name, jobs), names), total=len(names), disable=None)


def _judged_apart(name: str, jobs: int) -> Row:
    command = [sys.executable, "-m", "benchmarks.zoo.judging", name]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    try:
        process = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=SECONDS, env=environment, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return Row(name, error=f"it took more than {SECONDS} s")
    if process.returncode:
        return Row(name, error=(process.stderr.strip().splitlines() or [f"it died ({process.returncode})"])[-1])
    return Row(**json.loads(process.stdout.splitlines()[-1]))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(asdict(judge(sys.argv[1], Path(scratch)))))
