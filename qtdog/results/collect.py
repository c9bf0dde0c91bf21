"""`qtdog collect`: the tables of everything under a folder, printed and written in every form."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qtdog.errors import UserError
from qtdog.files import REMEDY, is_done, read_records, write_json, write_text
from qtdog.log import PRINT, Log
from qtdog.results import table_formats
from qtdog.results.runs import RESULTS, find_runs, read_card
from qtdog.results.tables import Result, as_json, averages, build_table


def read_result(folder: Path) -> Result:
    """A finished run's card and last record."""
    card, file = read_card(folder), folder / RESULTS
    names = ["step", *card.accuracies]
    records = read_records(file)
    if not all(isinstance(record.get(name), int | float) for record in records for name in names):
        raise UserError(f"{file} is damaged (a record lacks {', '.join(names[:2])}, ...): {REMEDY}")
    return Result(folder, card, max(records, key=lambda record: record["step"]))


def read_ensemble_record(file: Path) -> dict[str, Any]:
    """The record of an ensemble."""
    (record, *_) = read_records(file)
    kinds = {"dataset": str, "method": str, "target": str, "settings": dict, "domains": list, "trial_seed": int}
    numbers = dict.fromkeys(("target_accuracy", "nbytes", "float_nbytes", "members", "test_env"), int | float)
    wrong = [name for name, kind in (kinds | numbers).items() if not isinstance(record.get(name), kind)]
    if wrong:
        raise UserError(f"{file} is damaged (it lacks {', '.join(wrong)}): {REMEDY}")
    return record


@dataclass
class CollectConfig:
    """Settings of `qtdog collect`."""

    folder: Annotated[str, "folder that holds runs and ensembles at any depth"] = "runs"
    output_dir: Annotated[str | None, "where table.txt, .md, .tex, .csv and .json go (default: the folder)"] = None
    digits: Annotated[int, "decimals of a percent"] = 1


def collect(config: CollectConfig, log: Log = PRINT) -> list[Path]:
    """Print the tables of everything under a folder; returns the paths of table.txt, .md, .tex, .csv and .json."""
    if config.digits < 0:
        raise UserError(f"--digits must not be negative, not {config.digits}")
    folder = Path(config.folder)
    results = [read_result(run) for run in find_runs([config.folder])]
    ensembles = [read_ensemble_record(manifest.with_name(RESULTS)) for manifest in sorted(folder.rglob("members.json"))]
    grouped = {
        name: ([r for r in results if r.card.dataset == name], [e for e in ensembles if e["dataset"] == name])
        for name in sorted({result.card.dataset for result in results})
    }
    for name, (runs, _) in grouped.items():
        if len({tuple(result.card.domains) for result in runs}) > 1:
            raise UserError(f"runs of {name} under {folder} have different domains: collect their folders apart")
    tables = {name: build_table(*group) for name, group in grouped.items()}
    shown = [*tables.values()] + ([averages([*tables.values()])] if len(tables) > 1 else [])
    text = "\n".join(table_formats.as_text(table, config.digits) for table in shown)
    log(text)
    if unfinished := [file.parent for file in sorted(folder.rglob("config.yaml")) if not is_done(file.parent)]:
        some = ", ".join(map(str, unfinished[:5])) + ", ..." * (len(unfinished) > 5)
        log(f"{len(unfinished)} unfinished run(s) left out: {some}")
    output = Path(config.output_dir or config.folder)
    write_text(output / "table.txt", text)
    write_text(output / "table.md", "\n".join(table_formats.as_markdown(table, config.digits) for table in shown))
    write_text(output / "table.tex", "\n".join(table_formats.as_latex(table, config.digits) for table in shown))
    write_text(output / "table.csv", table_formats.as_csv(shown))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = [as_json(tables[name], *group) for name, group in grouped.items()]
    write_json(output / "table.json", {"date": date, "tables": content})
    written = [output / f"table.{suffix}" for suffix in ("txt", "md", "tex", "csv", "json")]
    log("written: " + ", ".join(map(str, written)))
    return written
