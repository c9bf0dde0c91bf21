"""`qtdog collect`: the tables of everything under a folder, printed and written in every form."""

import datetime
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qtdog.data.image_lists import ImageList, difference
from qtdog.errors import UserError, listing
from qtdog.files import REMEDY, is_done, read_records, write_json, write_text
from qtdog.log import PRINT, Log
from qtdog.results import table_formats
from qtdog.results.reported import METRICS, Metric, MetricName
from qtdog.results.runs import MANIFEST, RESULTS, find_runs, read_card
from qtdog.results.selections import Result, sources_of, targets_of
from qtdog.results.tables import Table, as_json, averages, build_tables

_NUMBER = re.compile(r"env\d+_(in|out)_(\w+)")  # of a domain's part in a record


def read_result(folder: Path) -> Result:
    """A finished run's card, and the numbers of its records."""
    card, file = read_card(folder), folder / RESULTS
    names = ["step", *(name for name in card.accuracies if (of := _NUMBER.fullmatch(name)) and of[2] == "acc")]
    records = read_records(file)
    if not all(isinstance(record.get(name), int | float) for record in records for name in names):
        raise UserError(f"{file} is damaged (a record lacks {', '.join(names[:2])}, ...): {REMEDY}")
    numbers = [
        {name: value for name, value in record.items() if name == "step" or _NUMBER.fullmatch(name)}
        for record in records
    ]
    return Result(folder, card, numbers)


def read_ensemble_record(file: Path) -> dict[str, Any]:
    """The record of an ensemble."""
    (record, *_) = read_records(file)
    kinds: dict[str, Any] = {"dataset": str, "method": str, "settings": dict, "domains": list, "trial_seed": int}
    kinds |= {"target": str, "target_accuracy": int | float}
    kinds |= {"test_envs": list} if "test_envs" in record else {"test_env": int}
    kinds |= dict.fromkeys(("nbytes", "float_nbytes", "members"), int | float)
    wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
    if not wrong:
        names = [f"env{env}_in_acc" for env in targets_of(record)]
        if not record.get("mix"):  # of several splits, which may hold none out together
            names += [f"env{env}_out_acc" for env in sources_of(record)]
        wrong = [name for name in names if not isinstance(record.get(name), int | float)]
    if wrong:
        raise UserError(f"{file} is damaged (it lacks {', '.join(wrong)}): {REMEDY}")
    return record


@dataclass(frozen=True)
class Collected:
    """The finished runs and the ensembles of one data set under a folder."""

    results: list[Result]
    ensembles: list[dict[str, Any]]


def read_folder(place: str, metric: Metric) -> dict[str, Collected]:
    """Everything under a folder by data set.

    Raises:
        UserError: for runs of a data set that differ in their domains, or what does not have the metric.
    """
    folder = Path(place)
    results = [read_result(run) for run in find_runs([place])]
    records = {file.parent: read_ensemble_record(file.with_name(RESULTS)) for file in manifests(folder)}
    refuse_missing(metric, results, records)
    found: dict[str, Collected] = defaultdict(lambda: Collected([], []))
    for result in results:
        found[result.card.dataset].results.append(result)
    for name, collected in found.items():
        if len({tuple(result.card.domains) for result in collected.results}) > 1:
            raise UserError(f"runs of {name} under {folder} have different domains: collect their folders apart")
        refuse_other_images(name, collected.results)
        collected.ensembles.extend(record for record in records.values() if record["dataset"] == name)
    return dict(sorted(found.items()))


def manifests(folder: Path) -> list[Path]:
    """The members.json of the ensembles at any depth."""
    return sorted(folder.rglob(MANIFEST))


def refuse_other_images(name: str, results: Sequence[Result]) -> None:
    """UserError for runs of one data set that were not trained on the same images."""
    by_images = {result.card.images: result.folder for result in results if result.card.images is not None}
    if len(by_images) > 1:
        first, second, *_ = by_images.values()
        before, now = ImageList.read(first), ImageList.read(second)
        how = f" ({difference(before, now)} in the second)" if before and now else ""
        raise UserError(f"{first} and {second}, of {name}, have different images{how}: collect their folders apart")


def refuse_missing(metric: Metric, results: Sequence[Result], ensembles: Mapping[Path, dict[str, Any]]) -> None:
    """Raises UserError for runs and ensembles that do not have the metric: earlier versions measured accuracy alone."""
    lacking = []
    for result in results:
        names = {metric.name(env, "in") for env in result.targets} | {metric.name(env, "out") for env in result.sources}
        if any(not names <= values.keys() for values in (result.card.accuracies, *result.records)):
            lacking.append(result.folder)
    for folder, record in ensembles.items():
        if any(metric.name(env, "in") not in record for env in targets_of(record)):
            lacking.append(folder)
    if lacking:
        raise UserError(
            f"--metric {metric.flag} is not in the results of {listing(lacking)}, of an earlier version: remove them "
            "and train (ensembles: `qtdog ensemble`) again, or name a folder without them; --metric accuracy needs "
            "neither"
        )


@dataclass
class CollectConfig:
    """Settings of `qtdog collect`."""

    folder: Annotated[str, "folder that holds runs and ensembles at any depth"] = "runs"
    metric: Annotated[
        MetricName,
        "what the cells hold; `worst` is the accuracy of the worst domain (accuracy selects models in any case)",
    ] = "accuracy"
    output_dir: Annotated[
        str | None,
        "where table.txt, .md, .tex, .csv and .json go, or of another metric table_<metric>.* (default: the folder)",
    ] = None
    digits: Annotated[int, "decimals of a percent; of nats two more"] = 1


def collect(config: CollectConfig, log: Log = PRINT) -> list[Path]:
    """Print the tables of everything under a folder; returns the paths of table.txt, .md, .tex, .csv and .json."""
    if config.digits < 0:
        raise UserError(f"--digits must not be negative, not {config.digits}")
    folder = Path(config.folder)
    metric = METRICS[config.metric]
    collected = read_folder(config.folder, metric)
    tables = {name: build_tables(one.results, one.ensembles, metric) for name, one in collected.items()}
    shown = in_order([table for each in tables.values() for table in each])
    text = "\n".join(table_formats.as_text(table, config.digits) for table in shown)
    log(text)
    if unfinished := [file.parent for file in sorted(folder.rglob("config.yaml")) if not is_done(file.parent)]:
        log(f"{len(unfinished)} unfinished run(s) left out: {listing(unfinished)}")
    stem = "table" if config.metric == "accuracy" else f"table_{config.metric}"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = [as_json(table, one.results, one.ensembles) for name, one in collected.items() for table in tables[name]]
    forms = {
        "txt": text,
        "md": "\n".join(table_formats.as_markdown(table, config.digits) for table in shown),
        "tex": "\n".join(table_formats.as_latex(table, config.digits) for table in shown),
        "csv": table_formats.as_csv(shown),
    }
    output = Path(config.output_dir or config.folder)
    written = [output / f"{stem}.{suffix}" for suffix in (*forms, "json")]
    for path, form in zip(written, forms.values(), strict=False):
        write_text(path, form)
    write_json(written[-1], {"date": date, "tables": content})
    log("written: " + ", ".join(map(str, written)))
    return written


def in_order(tables: Sequence[Table]) -> list[Table]:
    """Tables of runs that leave out one domain, of those that leave out two, ...; averages behind several data sets."""
    shown = []
    for left_out in sorted({table.left_out for table in tables}):
        group = [table for table in tables if table.left_out == left_out]
        shown += [*group, *([averages(group)] if len(group) > 1 else [])]
    return shown
