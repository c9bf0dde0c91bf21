"""The data that finished runs were trained on."""

from pathlib import Path
from typing import Any

from qtdog.data import DomainSet, load_dataset
from qtdog.data.image_lists import ImageList
from qtdog.data.loaders import Part
from qtdog.errors import UserError, listing
from qtdog.log import Log
from qtdog.results.runs import ModelCard
from qtdog.training.evaluation import domain_parts


class DataOfRuns:
    """Reads each data set once.

    Args:
        data_dir: where the data is now; None: where the runs found it.
    """

    def __init__(self, data_dir: str | None, log: Log) -> None:
        self.data_dir, self.log = data_dir, log
        self.read: dict[tuple[Any, ...], DomainSet] = {}

    def of(self, card: ModelCard) -> DomainSet:
        """The data of a run; UserError if what is found now differs."""
        place, images = self.data_dir or card.run.data_dir, card.images_as_trained()
        key = (card.run.dataset, place, images)
        if key not in self.read:
            self.read[key] = load_dataset(card.run.dataset, place, images, self.log)
        dataset = self.read[key]
        found = ([domain.name for domain in dataset.domains], dataset.classes)
        if found != (card.domains, card.classes):
            raise UserError(
                f"the data has domains and classes {found}, the run {(card.domains, card.classes)}: see --data-dir"
            )
        return dataset

    def parts_of(self, folder: Path, card: ModelCard, images: ImageList | None = None) -> dict[str, Part]:
        """The parts of a run's data by DomainBed's names, as the run had them: images are known by their content.

        Args:
            images: divided otherwise than the run's own list has them.

        Raises:
            UserError: for images that are changed or gone. New ones are left out, and named in the log.
        """
        dataset, images = self.of(card), images or ImageList.read(folder)
        if images is None:
            self.log(
                f"{folder}, of an earlier version, has no list of its images: taking them for those that are there"
            )
            return domain_parts(card.run, dataset)
        try:
            parts, new = images.parts_of(dataset)
        except UserError as error:
            raise UserError(f"{folder}: {error}; bring them back, or name the data as it was by --data-dir") from error
        if new:
            self.log(f"{len(new)} image(s) are new since the training of {folder} and left out: {listing(new)}")
        return parts
