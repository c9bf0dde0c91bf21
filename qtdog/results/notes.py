"""What is said below a table."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from qtdog.methods.presets import dashed
from qtdog.results.reported import Metric
from qtdog.results.rows import Key, Row, in_order
from qtdog.results.selections import SELECTIONS, Result
from qtdog.results.variants import described, differing, settings_of, value_text


def common_notes(rows: Sequence[Row], metric: Metric, left_out: int = 1) -> list[str]:
    """What a cell is, the summaries, and each selection in one line."""
    n = span(len(cell.trials) for row in rows for cell in row.cells.values())
    part = "in part of the domain left out" if left_out == 1 else "in parts of the domains left out"
    part += ", mean over them" if left_out > 1 and not metric.is_of_the_worst_domain else ""
    worst = "smallest" if metric.worst is min else "greatest"
    return [
        f"Target {metric.title} in {metric.unit} ({part}), mean +/- standard error over trials "
        f"(population std / sqrt(n)), n = {n}{', which gives no error' if n == '1' else ''}. X: not run.",
        f"Worst: for each trial the {worst} value of all columns, then as a cell.",
        *(f"{name}: {SELECTIONS[name].definition}." for name in SELECTIONS if name in {row.selection for row in rows}),
        "In-domain: the same models on the source domains' out parts, "
        f"{'the worst of' if metric.is_of_the_worst_domain else 'mean over'} all targets.",
    ]


def run_notes(rows: Sequence[Row], singles: Mapping[Key, Sequence[Result]]) -> list[str]:
    """What is special about the single models."""
    notes = []
    for key in sorted(singles, key=in_order):
        label, results = Row(*key, False, "").label, singles[key]
        cards = [result.card for result in results]
        notes += [f"{label} selected: {text}." for text in sorted({card.selection for card in cards})]
        seeds, draws = defaultdict(set), defaultdict(set)
        for result in results:
            run = result.card.run
            seeds[result.column, run.trial_seed].add(run.seed)
            draws[result.column, run.trial_seed, run.seed].add(run.hparams_seed)
        if max(map(len, seeds.values())) > 1:
            notes.append(f"{label}: a trial's value is the mean over {span(map(len, seeds.values()))} seeds.")
        own = [row for row in rows if (row.method, row.variant, row.ensemble) == (*key, False)]
        notes += grid_notes(label, own, results)
        if max(map(len, draws.values())) > 1:
            notes.append(f"{label}: {span(map(len, draws.values()))} sets of hyper-parameters.")
        elif apart := differing([settings_of(card.run) for card in cards]):
            notes.append(f"{label}: its runs differ in {', '.join(apart)}.")
    results = [result for each in singles.values() for result in each]
    size = fmean(result.card.float_nbytes for result in results) / 1e6
    notes.append(f"Size: weights at their bits, all else float32; the ratio is to one float model ({size:.2f} MB).")
    return notes + [f"Data: {source}." for source in sorted({result.card.data_source for result in results})]


def grid_notes(label: str, rows: Sequence[Row], results: Sequence[Result]) -> list[str]:
    """Over which values hyper-parameters were searched, and how often each selection took which."""
    values: dict[str, set[Any]] = defaultdict(set)
    for result in results:
        for name, value in result.card.run.point().items():
            values[name].add(value)
    if not values:
        return []
    searched = " and ".join(f"{dashed(name)} of {', '.join(map(value_text, ordered(values[name])))}" for name in values)
    taken = []
    for row in rows:
        counts = Counter(described(point, list(point)) for point in row.points)
        points = ", ".join(f"{point} {times(count)}" for point, count in counts.most_common())
        taken.append(f"by {row.selection}: {points}")
    return [f"{label}: searched over {searched}. Chosen {'; '.join(taken)}."]


def ordered(values: Iterable[Any]) -> list[Any]:
    """Sorted where they are comparable, with None first."""
    return sorted(values, key=lambda value: (value is not None, not isinstance(value, int | float), value))


def times(count: int) -> str:
    """`once`, or `3 times`."""
    return "once" if count == 1 else f"{count} times"


def ensemble_notes(several: Mapping[Key, Sequence[dict[str, Any]]]) -> list[str]:
    """How many members, and how they are combined."""
    notes = []
    for key in sorted(several, key=in_order):
        ways = " or ".join(sorted({record["combine"] for record in several[key]}))
        members = span(record["members"] for record in several[key])
        notes.append(f"{Row(*key, True, '').label}: {members} members, mean of their {ways}.")
    return notes


def span(numbers: Iterable[int]) -> str:
    """`3`, or `1 to 3`; `0` of none."""
    values = sorted(set(numbers)) or [0]
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
