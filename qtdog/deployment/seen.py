"""Which images a model knows from its training: none that it was trained on may say how good it is.

Images are known by their content. One that was copied, moved or renamed is the same image; one that was encoded anew is
another, and nobody can tell that from a new one.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Literal

from qtdog.data.image_lists import BEFORE, Image, ImageList
from qtdog.errors import UserError, listing

Role = Literal["trained", "source, held out", "target", "target, held out", "never seen"]

# Of an image that was there several times, as copies, the first of these that it was anywhere.
ROLES: tuple[Role, ...] = ("trained", "source, held out", "target, held out", "target", "never seen")
JUDGED: tuple[Role, ...] = ("target", "source, held out", "never seen")


def merged(lists: Sequence[ImageList], targets: Collection[str]) -> ImageList:
    """One list for models that share their images, and perhaps divide them differently.

    An image is in the `in` part of a source if any of them was trained on it. Where they divide them differently, all
    of a target is in its `in` part: none was trained on it.
    """
    first = lists[0]
    if all(images.division == first.division for images in lists):
        return first
    inside = {key(image) for images in lists for image in images.images if image.part == "in"}
    parts = ["in" if image.domain in targets or key(image) in inside else "out" for image in first.own]
    before = {key(image): image for images in lists for image in images.images if image.part == BEFORE}
    own = [image._replace(part=part) for image, part in zip(first.own, parts, strict=True)]
    return ImageList(own).after(list(before.values()))


def key(image: Image) -> tuple[str, str, str]:
    """By which models that share their images know one of them."""
    return image.domain, image.label, image.fingerprint


class Seen:
    """What each image of a data set was to the training of a model.

    Args:
        images: every image of the data that it was trained on.
        targets, sources: names of the domains that were left out, and trained on. Others were not looked at.
    """

    def __init__(self, images: ImageList, targets: Collection[str], sources: Collection[str]) -> None:
        kinds: dict[tuple[bool, str], Role] = {
            (True, "in"): "trained",
            (True, "out"): "source, held out",
            (False, "in"): "target",
            (False, "out"): "target, held out",
        }
        self.names = {str(image) for image in images.own if image.name}
        self.roles: dict[str, Role] = {}
        self.trained: dict[tuple[str, str], set[str]] = defaultdict(set)  # fingerprints by domain and label
        for image in images.own:
            if image.domain in targets or image.domain in sources:
                role = kinds[image.domain in sources, image.part]
                self.roles[image.fingerprint] = min(role, self.role(image), key=ROLES.index)
        for image in images.trained(sources):
            self.roles[image.fingerprint] = "trained"
            self.trained[image.domain, image.label].add(image.fingerprint)

    def role(self, image: Image) -> Role:
        """What the image was."""
        return self.roles.get(image.fingerprint, "never seen")

    def refuse_changed(self, domain: Sequence[Image]) -> None:
        """UserError for images that may be ones that were trained on, with another content since.

        Of a domain in which some images are known, those have the place and name of one, where names are known; or are
        new in a class from which others, that were trained on, are gone.
        """
        if all(self.role(image) == "never seen" for image in domain):
            return
        cells: dict[tuple[str, str], list[Image]] = defaultdict(list)
        for image in domain:
            cells[image.domain, image.label].append(image)
        for cell, images in cells.items():
            unknown = [image for image in images if self.role(image) == "never seen"]
            gone = self.trained.get(cell, set()) - {image.fingerprint for image in images}
            changed = [image for image in unknown if str(image) in self.names]
            if changed or (unknown and gone):
                raise UserError(
                    f"{len(changed or unknown)} image(s) of {'/'.join(cell)} are {'' if changed else 'new or '}changed "
                    f"({listing(changed or unknown)}) and {len(gone)} that were trained on are gone, so nobody can "
                    "tell whether these are those: bring the old ones back, or put new ones into a domain of their own"
                )
