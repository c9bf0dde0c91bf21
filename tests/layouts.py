"""Data sets as archives leave them, of files that are no images."""

from pathlib import Path

from qtdog.data.benchmarks import BENCHMARKS

IMAGE = b"never opened"


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE)
    return root


def pictures(root: Path, between: str = "", domains=("photo", "sketch"), classes=("cat", "dog")) -> Path:
    return write(
        root, *(f"{domain}/{between}{label}/{i}.jpg" for domain in domains for label in classes for i in (1, 2))
    )


def vlcs(root: Path, domains: dict, parts: dict) -> Path:
    """VLCS as many have it; `parts` says how many images of each class each holds."""
    for domain in domains:
        for part, number in parts.items():
            write(root, *(f"{domain}/{part}/{label}/img_{i}.jpg" for label in range(5) for i in range(number)))
    return root


CAPITALS = ["CALTECH", "LABELME", "PASCAL", "SUN"]


def benchmark(root: Path, name: str, rename=str) -> Path:
    facts = BENCHMARKS[name]
    return write(root, *(f"{rename(domain)}/{label}/1.jpg" for domain in facts.images for label in facts.classes))
