"""Rows of tables: a variant of a method under one selection."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from qtdog.methods.presets import find_method, place_of
from qtdog.results.reported import Metric
from qtdog.results.selections import SELECTIONS, Choice, Result, column_of, sources_of, targets_of
from qtdog.results.statistics import Cell
from qtdog.results.variants import best_draws, described, settings_of

Key = tuple[str, str]  # a method and a variant of it
Values = dict[str, dict[int, list[float]]]  # column, trial, seeds


@dataclass
class Row:
    """One variant of a method, or its ensemble, under one selection: cells by column, and the bytes of the model(s)."""

    method: str
    variant: str
    ensemble: bool
    selection: str
    cells: dict[str, Cell] = field(default_factory=dict)
    in_domain: dict[str, Cell] = field(default_factory=dict)  # the same models on their source domains' out parts
    models: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    float_nbytes: list[int] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)  # of grids, that of each run that was chosen

    @property
    def label(self) -> str:
        """`EoQ`, or `EoQ, weight-bits 4` where there are several."""
        method = find_method(self.method)
        return ", ".join(filter(None, [method.ensemble_label if self.ensemble else method.label, self.variant]))

    def size(self) -> str:
        """Mean size in MB (1e6 bytes), and its ratio to one float model."""
        return f"{fmean(self.nbytes) / 1e6:.2f} MB ({fmean(self.nbytes) / fmean(self.float_nbytes):.3f}x)"


def in_order(key: Key) -> tuple[int, str, str]:
    """Sorts variants by the order of the methods."""
    method, variant = key
    return *place_of(method), variant


def by_key(results: Sequence[Result], names: Mapping[str, list[str]]) -> dict[Key, list[Result]]:
    """Runs by the rows that they belong to; `names` are the settings that tell a method's variants apart."""
    found: dict[Key, list[Result]] = defaultdict(list)
    for result in results:
        run = result.card.run
        found[run.method, described(settings_of(run), names[run.method])].append(result)
    return dict(found)


def single_row(
    key: Key, selection: str, results: Sequence[Result], wider: Sequence[Result], metric: Metric
) -> Row | None:
    """The row of single models; None if the selection needs what is not there."""
    row = Row(*key, ensemble=False, selection=selection)
    choices = chosen(selection, results, wider)
    targets: Values = defaultdict(lambda: defaultdict(list))
    sources: Values = defaultdict(lambda: defaultdict(list))
    for result, choice in choices:
        card, trial = result.card, result.card.run.trial_seed
        targets[result.column][trial].append(metric.of(choice.values, result.targets, "in"))
        sources[result.column][trial].append(metric.of(choice.values, result.sources, "out"))
        row.models.append(1)
        row.nbytes.append(card.nbytes)
        row.float_nbytes.append(card.float_nbytes)
        if point := card.run.point():
            row.points.append(point)
    row.cells, row.in_domain = cells(targets), cells(sources)
    return row if choices else None


def chosen(selection: str, results: Sequence[Result], wider: Sequence[Result]) -> list[tuple[Result, Choice]]:
    """What a selection takes for each target, trial and seed.

    `wider` are the runs of the same variant that left out one domain more.
    """

    def draw(result: Result) -> tuple[Any, ...]:
        run = result.card.run
        return run.trial_seed, run.seed, run.hparams_seed, *run.point().items()

    beside: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in wider:
        beside[draw(result)].append(result)
    candidates = []
    for result in results:
        if choice := SELECTIONS[selection].choose(result, beside.get(draw(result), [])):
            candidates.append((result, choice))
    return best_draws(candidates, lambda pair: pair[0].card.run, lambda pair: pair[1].score)


def ensemble_row(key: Key, ensembles: Sequence[dict[str, Any]], metric: Metric) -> Row:
    """The row of ensembles."""
    row = Row(*key, ensemble=True, selection="source validation")
    targets: Values = defaultdict(lambda: defaultdict(list))
    sources: Values = defaultdict(lambda: defaultdict(list))
    for record in ensembles:
        left_out, trial = targets_of(record), record["trial_seed"]
        column = column_of(record["domains"], left_out)
        targets[column][trial].append(metric.of(record, left_out, "in"))
        held_out = [env for env in sources_of(record) if metric.name(env, "out") in record]
        if held_out:
            sources[column][trial].append(metric.of(record, held_out, "out"))
        row.models.append(record["members"])
        row.nbytes.append(record["nbytes"])
        row.float_nbytes.append(record["float_nbytes"])
    row.cells, row.in_domain = cells(targets), cells(sources)
    return row


def cells(values: Values) -> dict[str, Cell]:
    """The mean of the values of each column's trials."""
    return {
        column: Cell({trial: fmean(seeds) for trial, seeds in sorted(trials.items())})
        for column, trials in values.items()
    }
