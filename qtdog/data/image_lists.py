"""The images of a run's data, each with the part that it was in: `images.csv` in the run's folder.

Whoever judges the run's model later, on this data or other, so knows which images it was trained on. What an image is
says its fingerprint; its name is there for people.
"""

import csv
import hashlib
import io
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from qtdog.data.domains import DomainSet
from qtdog.data.loaders import Part
from qtdog.errors import UserError, listing
from qtdog.files import REMEDY, csv_text, read_sealed, write_text

FILE = "images.csv"
BEFORE = "before"  # the part of images that are none of the data, but trained on by the run that this one started from


class Image(NamedTuple):
    """One image: its domain and class by name, its file's name, its part (`in`, `out`, `before`), and what it is."""

    domain: str
    label: str
    name: str
    part: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.domain}/{self.label}/{self.name}"


@dataclass(frozen=True)
class ImageList:
    """All images of a data set, each domain's `in` part before its `out` part, in the order of the split."""

    images: Sequence[Image]

    @classmethod
    def of(cls, dataset: DomainSet, parts: Mapping[str, Part]) -> "ImageList":
        """Those of `dataset`, divided into `parts`, by DomainBed's names: env0_in, env0_out, env1_in, ..."""
        everything = [images_of(dataset, env) for env in range(len(dataset.domains))]
        return cls(
            [
                everything[part.env][index]._replace(part=name.rpartition("_")[2])
                for name, part in parts.items()
                for index in part.indices
            ]
        )

    def after(self, trained: Sequence[Image]) -> "ImageList":
        """With the images that the run was trained on from which this one starts."""
        return ImageList([*self.images, *(image._replace(part=BEFORE) for image in trained)])

    @property
    def own(self) -> list[Image]:
        """Those of the data, without what was trained on before."""
        return [image for image in self.images if image.part != BEFORE]

    def trained(self, sources: Collection[str]) -> list[Image]:
        """Those that were trained on, in these domains or before."""
        return [i for i in self.images if i.part == BEFORE or (i.part == "in" and i.domain in sources)]

    def without_names(self) -> "ImageList":
        """For others, whom the names of files do not concern."""
        return ImageList([image._replace(name="") for image in self.images])

    @cached_property
    def content(self) -> str:
        """A hash of which images there are, whatever their names, order and parts."""
        return digest(sorted((image.domain, image.label, image.fingerprint) for image in self.own))

    @cached_property
    def division(self) -> str:
        """A hash of which images there are, in which order and part: what training depends on. Names do not matter."""
        return digest((image.domain, image.label, image.part, image.fingerprint) for image in self.images)

    def write(self, folder: Path) -> None:
        """`images.csv` in `folder`, atomically."""
        write_text(folder / FILE, csv_text(Image._fields, self.images))

    @classmethod
    def read(cls, folder: Path) -> "ImageList | None":
        """Inverse of `write`; None where there is no such file.

        Raises:
            UserError: for what is no list of images, or not the one that its folder's seal was made for.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            header, *rows = csv.reader(io.StringIO(read_sealed(file).decode()))
            images = [Image(*row) for row in rows]
            if tuple(header) != Image._fields or {image.part for image in images} - {"in", "out", BEFORE}:
                raise ValueError("it is no list of images")
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{file} is damaged ({error}): {REMEDY}") from error
        return cls(images)

    def copies(self, targets: Sequence[str], sources: Sequence[str]) -> list[str]:
        """A line each on images of the targets, and of the validation parts, that are trained on as well, as copies."""
        trained = {image.fingerprint for image in self.trained(sources)}
        again = [image for image in self.own if image.fingerprint in trained]
        kinds = {
            f"the target {', '.join(targets)}": [image for image in again if image.domain in targets],
            "the validation parts": [image for image in again if image.domain in sources and image.part == "out"],
        }
        return [
            f"{len(found)} image(s) of {what} are trained on as well, as copies or by the run before: {listing(found)}"
            for what, found in kinds.items()
            if found
        ]

    def parts_of(self, dataset: DomainSet) -> tuple[dict[str, Part], list[Image]]:
        """The same parts in the data as it is now, and the images that are new in it.

        Images are known by their content: it does not matter how they are called and ordered now.

        Raises:
            UserError: for images that are not there any more, naming them and what became of them.
        """
        parts: dict[str, Part] = {}
        new: list[Image] = []
        gone: list[Image] = []
        for env, domain in enumerate(dataset.domains):
            here = images_of(dataset, env)
            places: dict[tuple[str, str], deque[int]] = defaultdict(deque)
            for index, image in enumerate(here):
                places[image.label, image.fingerprint].append(index)
            indices: dict[str, list[int]] = {"in": [], "out": []}
            for image in self.own:
                if image.domain == domain.name:
                    found = places[image.label, image.fingerprint]
                    if found:
                        indices[image.part].append(found.popleft())
                    else:
                        gone.append(image)
            parts |= {f"env{env}_{part}": Part(domain, env, chosen) for part, chosen in indices.items()}
            new += [here[index] for left in places.values() for index in left]
        if gone:
            raise UserError(f"the data has changed since: {changes(gone, new)}")
        return parts, new


def images_of(dataset: DomainSet, env: int) -> list[Image]:
    """The images of a domain by index, in no part."""
    domain = dataset.domains[env]
    labels = [dataset.classes[label] for label in domain.labels.tolist()]
    return [
        Image(domain.name, label, name, "", fingerprint)
        for label, name, fingerprint in zip(labels, domain.names(), domain.fingerprints(), strict=True)
    ]


def difference(before: ImageList, now: ImageList) -> str:
    """How two lists differ in which images they have, or nothing."""
    had, has = (Counter(image._replace(name="", part="") for image in each.own) for each in (before, now))
    gone, new = had - has, has - had

    def those(images: Sequence[Image], wanted: Counter[Image]) -> list[Image]:
        return [image for image in images if image._replace(name="", part="") in wanted]

    return changes(those(before.own, gone), those(now.own, new))


def changes(gone: Sequence[Image], new: Sequence[Image]) -> str:
    """What became of a data set that lacks the images `gone` and has the images `new` instead."""
    elsewhere = {image.fingerprint: str(image) for image in new}
    new_names = {str(image) for image in new}
    told: dict[str, list[str]] = {"moved": [], "changed": [], "gone": [], "new": []}
    for image in gone:
        if image.fingerprint in elsewhere:
            told["moved"].append(f"{image} as {elsewhere[image.fingerprint]}")
        else:
            told["changed" if str(image) in new_names else "gone"].append(str(image))
    known = {*told["changed"], *(elsewhere[i.fingerprint] for i in gone if i.fingerprint in elsewhere)}
    told["new"] = [str(image) for image in new if str(image) not in known]
    return "; ".join(f"{len(names)} {what} ({listing(names)})" for what, names in told.items() if names)


def digest(lines: Iterable[tuple[str, ...]]) -> str:
    """SHA-256 of lines of cells."""
    content = hashlib.sha256()
    for line in lines:
        content.update("\t".join(line).encode() + b"\n")
    return content.hexdigest()
