"""The data that finished runs were trained on."""

from typing import Any

from qtdog.data import DomainSet, load_dataset
from qtdog.errors import UserError
from qtdog.log import Log
from qtdog.results.runs import ModelCard


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
