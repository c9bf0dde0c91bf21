"""What int8 does to a trained network: `python -m benchmarks.accuracy RUN_FOLDER [--data-dir FOLDER]`.

The accuracy of a run of `qtdog train` on held-out images of its sources and on its targets: as it was trained, packed
with integer activations, and as ONNX Runtime's int8, which are calibrated on the same training images. ONNX Runtime
gets a float network with the values of the quantized weights, and, as another, quantizes them once more.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import qkernels as qk
from qtdog.data import load_dataset
from qtdog.data.loaders import Part
from qtdog.deployment.packed import calibration_batches
from qtdog.results.runs import ModelCard, load_model, read_card
from qtdog.training.evaluation import domain_parts

from . import onnxruntime_peers
from .peers import Forward


def contenders(folder: Path, card: ModelCard, images: torch.Tensor) -> dict[str, Forward]:
    """What to judge, calibrated on images [N, C, H, W]; each takes one image."""
    ensemble = qk.PackedEnsemble.from_models([load_model(folder)], images[:2])
    ensemble.to_integer_(list(images.split(32)))
    plain, one = qk.dequantize_(load_model(folder)), images[:1]
    return {
        "as trained": load_model(folder),
        "packed, integer": ensemble,
        "ONNX Runtime, float32": onnxruntime_peers.float_session(plain, one),
        "ONNX Runtime, int8": onnxruntime_peers.int8_session(plain, one, images),
    }


def predictions(forward: Forward, parts: Sequence[Part]) -> torch.Tensor:
    images = (part.domain.images([index], False) for part in parts for index in part.indices)
    return torch.cat([forward(image.contiguous()).argmax(-1) for image in images])


@torch.no_grad()
def compare(folder: Path, data_dir: str | None, calibration: int) -> list[str]:
    """A Markdown table: each contender's accuracy, and how many answers are those of the trained network."""
    card = read_card(folder)
    dataset = load_dataset(
        card.run.dataset, data_dir or card.run.data_dir, card.images_as_trained(), log=lambda _: None
    )
    parts = domain_parts(card.run, dataset)
    judged = {
        "sources, held out": [parts[f"env{env}_out"] for env in card.source_envs],
        "targets": [parts[f"env{env}_{part}"] for env in card.run.test_envs for part in ("in", "out")],
    }
    training = [parts[f"env{env}_in"] for env in card.source_envs]
    images = torch.cat(calibration_batches(training, calibration, torch.device("cpu")))
    counts = {where: sum(len(part.indices) for part in of) for where, of in judged.items()}
    heads = "".join(f" {where} ({count} images) | the same answer |" for where, count in counts.items())
    lines = ["| |" + heads, "|---|" + "---:|---:|" * len(counts)]
    trained: dict[str, torch.Tensor] = {}
    for name, forward in contenders(folder, card, images).items():
        line = f"| {name} |"
        for where, of in judged.items():
            found = predictions(forward, of)
            right = (found == torch.cat([part.labels() for part in of])).float().mean()
            same = (found == trained.setdefault(where, found)).float().mean()
            line += f" {right:.1%} | {same:.1%} |"
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run of `qtdog train`, quantized")
    parser.add_argument("--data-dir", help="where its images are (default: where they were)")
    parser.add_argument("--calibration", type=int, default=64, metavar="IMAGES", help="default: %(default)s")
    arguments = parser.parse_args()
    print(*compare(arguments.run, arguments.data_dir, arguments.calibration), sep="\n")


if __name__ == "__main__":
    main()
