"""`qtdog data verify`: is the data what it should be, and can every image be read?"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from tqdm import tqdm

from qtdog.data import DIGITS, MNIST_DOMAINS, image_files
from qtdog.data.benchmarks import BENCHMARKS
from qtdog.data.folders import ImageFiles, count
from qtdog.data.images import read_picture, two_ranges
from qtdog.environment import pick_workers
from qtdog.errors import UserError
from qtdog.log import Log

T = TypeVar("T")
MNIST_IMAGES = 70_000
AT_ONCE = 1024  # images handed to the readers, so that a million of them need no million futures


@dataclass
class VerifyConfig:
    """Settings of `qtdog data verify`."""

    dataset: Annotated[str, "which data, as for `qtdog train`"] = "folder"
    data_dir: Annotated[str | None, "root of the data, or the data set's own folder or file"] = None
    num_workers: Annotated[int | None, "images read at once, at most the CPU cores"] = None


def verify(config: VerifyConfig) -> None:
    """Print the counts by domain and class beside those expected, then decode every image.

    Raises:
        UserError: if anything is wrong. What it is was printed before; what the folders lack or have too much of stands
            in the error itself.
    """
    log = Log()
    if config.dataset in DIGITS:
        mistakes = verify_digits(config, log)
    else:
        found = image_files(config.dataset, config.data_dir, lambda line: None)
        log(found.source)
        mistakes = wrong_counts(config.dataset, found, log)
        mistakes += broken_images(found, pick_workers(config.num_workers, reads_files=True), log)
    if mistakes:
        raise UserError(f"{config.dataset} has {mistakes} mistake(s), named above")
    log("no mistakes")


def verify_digits(config: VerifyConfig, log: Log) -> int:
    """Counts of a set held in memory, which so has been read already; returns the number of mistakes."""
    dataset = DIGITS[config.dataset](config.data_dir)
    log(dataset.source)
    for env, domain in enumerate(dataset.domains):
        counts = domain.labels.bincount(minlength=len(dataset.classes)).tolist()
        log(f"  domain {env} {domain.name}: {sum(counts):,} images: {by_class(dataset.classes, counts)}")
    total = sum(len(domain.labels) for domain in dataset.domains)
    if total == MNIST_IMAGES or config.dataset not in MNIST_DOMAINS:  # nobody knows a plug-in's
        return 0
    log(f"  WRONG: {total:,} images, expected {MNIST_IMAGES:,}")
    return 1


def wrong_counts(name: str, found: ImageFiles, log: Log) -> int:
    """Print all counts; returns how many differ from what is known of the data set."""
    benchmark = BENCHMARKS.get(name)
    mistakes = 0
    for env, (domain, files) in enumerate(found.files.items()):
        counts = [len(files[label]) for label in found.classes]
        log(f"  domain {env} {domain}: {sum(counts):,} images: {by_class(found.classes, counts)}")
        if benchmark is None:
            continue
        expected = {domain: (sum(counts), benchmark.images[domain])}
        known = benchmark.class_images.get(domain, counts)
        expected |= {f"{domain}/{c}": (n, k) for c, n, k in zip(found.classes, counts, known, strict=True)}
        for what, (number, wanted) in expected.items():
            if number != wanted:
                log(f"  WRONG: {what} has {number:,} images, expected {wanted:,}")
                mistakes += 1
    return mistakes


def by_class(classes: list[str], counts: list[int]) -> str:
    """One number a class, or the range of them where there are many."""
    if len(classes) > 20:
        return f"{len(classes)} classes of {min(counts):,} to {max(counts):,}"
    return ", ".join(f"{label} {number:,}" for label, number in zip(classes, counts, strict=True))


def broken_images(found: ImageFiles, readers: int, log: Log) -> int:
    """Decode every image, name those that cannot be, and count what was done to the others; returns the mistakes."""
    paths = [path for files in found.files.values() for images in files.values() for path in images]
    domains = [domain for domain, files in found.files.items() for _ in range(count(files))]
    mistakes, conversions = 0, Counter[str]()
    ranges: dict[str, dict[int, tuple[int, Path]]] = defaultdict(dict)  # domain -> white -> images, one of them
    # Threads will do: Pillow lets go of Python's lock while it decodes.
    with ThreadPoolExecutor(max(1, readers)) as pool, tqdm(total=len(paths), desc="decoding", disable=None) as bar:
        for some in chunks(list(zip(domains, paths, strict=True)), AT_ONCE):
            for (domain, path), outcome in zip(some, pool.map(decoded, some), strict=True):
                bar.update()
                if isinstance(outcome, UserError):
                    log(f"  WRONG: {outcome}")
                    mistakes += 1
                    continue
                conversion, white = outcome
                conversions[conversion] += 1
                if white is not None:
                    number, example = ranges[domain].get(white, (0, path))
                    ranges[domain][white] = number + 1, example
    log(f"  {len(paths) - mistakes:,} of {len(paths):,} images can be decoded")
    for conversion, number in sorted(conversions.items()):
        if conversion:
            log(f"  converted to RGB of 8 bits: {number:,} images ({conversion})")
    for domain, seen in ranges.items():
        if len(seen) > 1:
            log(f"  WRONG: {two_ranges(domain, {most: described(*images) for most, images in seen.items()})}")
            mistakes += 1
    return mistakes


def described(number: int, example: Path) -> str:
    return f"{number:,} such as {example}" if number > 1 else str(example)


def decoded(image: tuple[str, Path]) -> tuple[str, int | None] | UserError:
    """What was done to an image, and the range that its numbers were seen to have; or why it cannot be decoded."""
    try:
        picture = read_picture(image[1])
    except UserError as error:
        return error
    return picture.conversion, picture.range


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    """Consecutive slices of a list."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
