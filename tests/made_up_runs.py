"""Runs that were never trained: any method, targets, trial and draw, with made-up numbers at each checkpoint."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from qtdog.config import RunConfig, TrainConfig
from qtdog.data import domain_names
from qtdog.files import records_text
from qtdog.methods.averaging import AVERAGING
from qtdog.methods.presets import find_method, settle
from qtdog.results.metrics import NAMES
from qtdog.results.runs import ModelCard
from qtdog.results.selections import Result
from qtdog.training.evaluation import mean_out_accuracy
from qtdog.training.quantization import may_be_selected

STEPS = (0, 2000, 4000, 5000)  # from 2000 on, those of INQ from 5000 on, weights are quantized


def made_up_run(
    method, targets=(0,), trial=0, draw=0, seed=0, dataset="ColoredMNIST", grid=(), **settings
) -> RunConfig:
    """The settings of a run."""
    config = TrainConfig(dataset=dataset, method=method, trial_seed=trial, hparams_seed=draw, **settings)
    return replace(settle(config, 0, seed), test_envs=tuple(targets), grid=tuple(grid))


def made_up_numbers(random, domains, images=19):
    """Of every part of every domain, as if it had so few images that many numbers are equal.

    Of 19 images no mean in percent lies halfway between two decimals, where the last bit would decide the rounding.
    """
    return {
        f"env{env}_{part}_{name}": random.integers(0, images + 1) / images
        for env in range(len(domains))
        for part in ("in", "out")
        for name in NAMES
    }


def made_up_result(run: RunConfig, random, folder=Path("made up"), steps=STEPS, **values) -> Result:
    """A finished run, whose records are those of checkpoints that it may select, and which selected the best.

    `values` stand instead of random ones at every checkpoint.
    """
    _, domains = domain_names(run.dataset, None)
    selectable = [step for step in steps if may_be_selected(run, step)]
    if AVERAGING[find_method(run.method).averaging].final_only:
        selectable = selectable[-1:]
    records = [{"step": step, **made_up_numbers(random, domains), **values} for step in selectable]
    targets = run.test_envs
    sources = [env for env in range(len(domains)) if env not in targets]
    best = max(records, key=lambda record: mean_out_accuracy(record, sources))
    card = ModelCard(
        config=run.to_dict(), dataset=run.dataset, data_source="none", domains=domains,
        target="+".join(domains[env] for env in targets), classes=["0", "1"], image_shape=[2, 28, 28],
        preprocessing=None, backbone=run.backbone, quantization=None, selection="made up", selected_step=best["step"],
        source_validation_accuracy=mean_out_accuracy(best, sources),
        accuracies={name: value for name, value in best.items() if name != "step"},
        nbytes=1_000_000, float_nbytes=4_000_000, environment={}, date="never",
    )  # fmt: skip
    return Result(folder, card, records)


def write_result(result: Result) -> Path:
    """The folder of a run, with DomainBed's keys in its records."""
    folder, run = result.folder, result.card.run
    args = {
        "dataset": run.dataset, "algorithm": find_method(run.method).label, "task": "domain_generalization",
        "test_envs": list(run.test_envs), "trial_seed": run.trial_seed, "seed": run.seed,
        "hparams_seed": run.hparams_seed, "holdout_fraction": run.holdout_fraction, "steps": run.steps,
    }  # fmt: skip
    folder.mkdir(parents=True)
    contents = {  # written faster than runs write them, and sealed as earlier versions did
        "results.jsonl": records_text([{**record, "args": args, "hparams": {}} for record in result.records]),
        "model.json": json.dumps(asdict(result.card)),
        "config.yaml": json.dumps(run.to_dict()),
        "done": "done\n",
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    return folder


def random_numbers(seed=0):
    """A generator for the numbers of made-up runs."""
    return np.random.default_rng(seed)
