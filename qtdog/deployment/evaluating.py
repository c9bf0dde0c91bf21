"""`qtdog eval`: how good a trained model is on data with known classes, by images that it was not trained on."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from qtdog.analysis.pictures import save_picture
from qtdog.data import DIGITS, DomainSet, domain_set, load_dataset
from qtdog.data.image_lists import Image, images_of
from qtdog.data.loaders import EvaluationImages, Part
from qtdog.data.to_judge import files_to_judge
from qtdog.deployment.image_tables import check_table, columns_of, joined, write_table
from qtdog.deployment.predictors import ModelConfig, Predictor, open_predictor
from qtdog.deployment.seen import JUDGED, Role
from qtdog.environment import pick_workers
from qtdog.errors import UserError, listing
from qtdog.files import write_json
from qtdog.log import PRINT, Log
from qtdog.results.metric_plots import confusion_csv, plot_confusion, plot_reliability, reliability_csv
from qtdog.results.metrics import class_scores, confusion_matrix, reliability, risk_coverage, worst_class
from qtdog.results.predictions import Predictions, predict_images

COVERAGES = (0.5, 0.8, 0.9)  # shares of the images that are kept, for selective accuracy


@dataclass
class DataToJudgeConfig(ModelConfig):
    """What the commands have in common that show a trained model data with known classes."""

    data_dir: Annotated[
        str | None,
        "root of the data, as for `qtdog train` (default: where a run found it); of `folder` and `csv` one domain, a "
        "folder of <class>/<image>, or some of the classes will do",
    ] = None
    dataset: Annotated[str | None, "which data (default: the one it was trained on)"] = None
    num_workers: Annotated[int | None, "processes that read images, at most the CPU cores"] = None


@dataclass
class EvalConfig(DataToJudgeConfig):
    """Settings of `qtdog eval`."""

    predictions: Annotated[str | None, "FILE.csv or FILE.parquet: the answer for every image"] = None
    output_dir: Annotated[
        str | None, "where metrics.json, and the reliability diagram and confusion matrix as .png and .csv, go"
    ] = None


@dataclass(frozen=True)
class Judged:
    """The images of a domain that count, what they were to the training, and what the model answers for them."""

    images: list[Image]
    roles: list[Role]
    answers: Predictions

    @property
    def described(self) -> str:
        """What the images were: `target`, or `4 source, held out; 1 never seen`."""
        counts = Counter(self.roles)
        return self.roles[0] if len(counts) == 1 else "; ".join(f"{number} {role}" for role, number in counts.items())

    def columns(self, classes: Sequence[str]) -> dict[str, list[Any]]:
        """A row an image."""
        return {
            "domain": [image.domain for image in self.images],
            "image": [image.name for image in self.images],
            "label": [image.label for image in self.images],
            "role": list(self.roles),
            **columns_of(self.answers, classes),
        }

    def report(self, classes: Sequence[str]) -> dict[str, Any]:
        """Everything that metrics.json says of a domain."""
        found, confusion = self.answers, confusion_matrix(self.answers.log_probabilities, self.answers.labels)
        scores, correct = class_scores(confusion), found.classes == found.labels
        doubts = {"confidence": -found.log_probabilities.amax(1), "disagreement": found.disagreement}
        curves = {name: risk_coverage(doubt, correct) for name, doubt in doubts.items()}
        return {
            "images": Counter(self.roles),
            **found.metrics(),
            "worst_class": classes[worst_class(confusion)[0]],
            "member_accuracies": found.member_accuracies,
            "classes": {
                name: {"recall": recall, "precision": precision, "f1": f1, "images": images}
                for name, recall, precision, f1, images in zip(
                    classes,
                    *(getattr(scores, each).tolist() for each in ("recall", "precision", "f1", "support")),
                    strict=True,
                )
            },
            "confusion": confusion.tolist(),
            "selective": {
                name: {"aurc": curve.area, **{f"acc_at_{share:g}": curve.accuracy_at(share) for share in COVERAGES}}
                for name, curve in curves.items()
            },
        }


def evaluate(config: EvalConfig, log: Log = PRINT) -> dict[str, float]:
    """Print how good a model is on each domain of a data set; returns the accuracies by domain, in 0..1.

    Of the domains that it was trained on only the images that were held out count, of the target the part that the
    tables report, and of any other data all images.

    Raises:
        UserError: for data that it cannot be judged on, or of which no image is left that it was not trained on.
    """
    if config.predictions:
        check_table(config.predictions)
    predictor = open_predictor(config)
    dataset = data_to_judge(config, predictor, log)
    log(f"{predictor.title}, on {dataset.source}")
    if predictor.images is None:
        log("  it does not say which images it was trained on: all are judged, as if it had seen none of them")
    judged = judge(predictor, dataset, pick_workers(config.num_workers, predictor.preprocessing is not None), log)
    if not judged:
        raise UserError(f"{config.file} was trained on all images of {dataset.source}: judge it on others")
    if len(judged) > 1:
        worst = min(judged, key=lambda name: judged[name].answers.accuracy)
        log(f"  worst domain: {worst}, {100 * judged[worst].answers.accuracy:.1f} %")
    if config.predictions:
        write_table(config.predictions, joined([of.columns(dataset.classes) for of in judged.values()]))
        log(f"written: {config.predictions}")
    if config.output_dir:
        write_report(Path(config.output_dir), predictor, judged, dataset.classes)
        log(f"written: {config.output_dir}")
    return {name: of.answers.accuracy for name, of in judged.items()}


def data_to_judge(config: DataToJudgeConfig, predictor: Predictor, log: Callable[[str], None]) -> DomainSet:
    """The data that the settings name, with the classes numbered as the model has them."""
    if predictor.classes is None:
        raise UserError(f"{config.file} does not name its classes: save(classes=...)")
    name, place = config.dataset or predictor.data_kind, config.data_dir
    if place is None and name == predictor.data_kind:
        place = predictor.data_dir
    if name in DIGITS or predictor.preprocessing is None:
        dataset = load_dataset(name, place, predictor.preprocessing, log)
    else:
        dataset = domain_set(files_to_judge(name, place, predictor.classes, log), predictor.preprocessing)
    if dataset.classes != predictor.classes:
        raise UserError(f"the data has the classes {dataset.classes}, {config.file} {predictor.classes}")
    return dataset


def judge(predictor: Predictor, dataset: DomainSet, workers: int, log: Log) -> dict[str, Judged]:
    """The answers for all images that may be judged on, by domain; tells how good they are as they come."""
    judged: dict[str, Judged] = {}
    seen = predictor.seen
    for env, domain in enumerate(tqdm(dataset.domains, desc="evaluating", disable=None)):
        images = images_of(dataset, env)
        seen.refuse_changed(images)
        roles = [seen.role(image) for image in images]
        if trained := [image for image, role in zip(images, roles, strict=True) if role == "trained"]:
            log(f"  {domain.name}: left out, as it was trained on them: {len(trained)} images ({listing(trained)})")
        if predictor.images is not None and domain.name in predictor.sources and set(roles) == {"never seen"}:
            log(
                f"  {domain.name} is called as a domain that it was trained on, but none of its images is known: if "
                "they are the same pictures encoded anew, it was trained on them"
            )
        indices = [index for index, role in enumerate(roles) if role in JUDGED]
        if indices:
            part = EvaluationImages(Part(domain, env, indices), workers)
            found = predict_images(predictor.member_logits, part, predictor.device, predictor.combine)
            judged[domain.name] = Judged([images[i] for i in indices], [roles[i] for i in indices], found)
            tell(domain.name, judged[domain.name], dataset.classes, log)
    return judged


def tell(name: str, judged: Judged, classes: Sequence[str], log: Log) -> None:
    """Two lines on a domain."""
    found = judged.answers
    singles = ", ".join(f"{100 * one:.1f}" for one in found.member_accuracies)
    alone = f"; members alone: {singles}" if len(found.member_accuracies) > 1 else ""
    log(f"  {name:20} {100 * found.accuracy:5.1f} %  of {len(found.labels):6} images  ({judged.described}{alone})")
    numbers = {name: value if name == "nll" else 100 * value for name, value in found.metrics().items()}
    worst = classes[worst_class(confusion_matrix(found.log_probabilities, found.labels))[0]]
    log(
        f"  {'':20} macro {numbers['macro_acc']:.1f} %, F1 {numbers['macro_f1']:.1f} %, worst class "
        f"{numbers['worst_class_acc']:.1f} % ({worst}), NLL {numbers['nll']:.3f}, ECE {numbers['ece']:.1f} %"
    )


def write_report(folder: Path, predictor: Predictor, judged: dict[str, Judged], classes: Sequence[str]) -> None:
    """metrics.json, and of each domain the reliability diagram and the confusion matrix, as pictures and numbers."""
    write_json(
        folder / "metrics.json",
        {"model": predictor.title, "domains": {name: of.report(classes) for name, of in judged.items()}},
    )
    for name, of in judged.items():
        found, stem = of.answers, re.sub(r"[^\w.+-]+", "_", name)
        bins = reliability(found.log_probabilities, found.labels)
        confusion = confusion_matrix(found.log_probabilities, found.labels)
        save_picture(folder / f"{stem}_reliability.png", plot_reliability(bins, name), reliability_csv(bins))
        save_picture(
            folder / f"{stem}_confusion.png",
            plot_confusion(confusion, classes, name),
            confusion_csv(confusion, classes),
        )
