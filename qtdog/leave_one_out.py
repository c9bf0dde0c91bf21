"""Leave-one-domain-out: one run for each target domain and seed, one after the other or several at once."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qtdog.config import RunConfig, TrainConfig
from qtdog.data import DomainSet, Preprocessing, load_dataset
from qtdog.environment import cores, pick_device, pick_workers
from qtdog.errors import UserError
from qtdog.models import preprocessing
from qtdog.presets import settle
from qtdog.runs import Log, run_folder
from qtdog.trainer import prepare_folder, train


@dataclass(frozen=True)
class Planned:
    """A run and all that training it takes; `finished` if it was trained before."""

    run: RunConfig
    dataset: DomainSet
    folder: Path
    preprocessing: Preprocessing | None
    device: torch.device
    workers: int
    finished: bool

    def train(self, progress: bool = True) -> None:
        """Train it, with a progress bar on a terminal if `progress`."""
        train(self.run, self.dataset, self.folder, self.preprocessing, self.device, self.workers, progress)


def train_all(config: TrainConfig) -> list[Path]:
    """Train every run that `config` names and that is not finished; returns all their folders."""
    return carry_out(plan(config), config.jobs)


def plan(config: TrainConfig) -> list[Planned]:
    """Check all settings, read the data and prepare the folder of every run that `config` names."""
    log = Log()
    if config.resume and config.overwrite:
        raise UserError("--resume continues runs, --overwrite starts them again: give one of them")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"--seeds must be different numbers, not {config.seeds}")
    if config.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {config.jobs}")
    for seed in config.seeds:
        template = settle(config, test_env=0, seed=seed)
    device = pick_device(config.device)
    prepared = preprocessing(template.backbone, template.image_size)
    workers = pick_workers(config.num_workers, reads_files=prepared is not None)
    log(f"reading {config.dataset}" + (f" under {config.data_dir}" if config.data_dir else ""))
    dataset = load_dataset(config.dataset, config.data_dir, prepared, log)
    planned = []
    for env in chosen(config.test_envs, dataset):
        for seed in config.seeds:
            run = replace(template, test_env=env, seed=seed)
            target = dataset.domains[env].name
            folder = run_folder(config.output_dir, dataset.name, run.method, target, run.trial_seed, seed)
            finished = not prepare_folder(run, folder, config.resume, config.overwrite)
            planned.append(Planned(run, dataset, folder, prepared, device, workers, finished))
    return planned


def carry_out(planned: Sequence[Planned], jobs: int) -> list[Path]:
    """Train what is not finished, `jobs` runs at once, which share the CPU cores; returns all folders."""
    log = Log()
    for each in planned:
        if each.finished:
            log(f"{each.folder} is finished, not run again (--overwrite would)")
    open_runs = [each for each in planned if not each.finished]
    if jobs == 1:
        for each in open_runs:
            each.train()
    elif open_runs:
        # Not forked: a child of a process whose OpenMP threads have run would hang in its first parallel region.
        context = multiprocessing.get_context("spawn")
        threads = max(1, cores() // jobs)
        with ProcessPoolExecutor(min(jobs, len(open_runs)), context, torch.set_num_threads, (threads,)) as pool:
            for _ in pool.map(Planned.train, open_runs, [False] * len(open_runs)):
                pass
    return [each.folder for each in planned]


def chosen(names: list[str], dataset: DomainSet) -> list[int]:
    """Indices of the target domains that `--test-envs` gives: names, indices or `all`; a name goes before an index."""
    known = [domain.name for domain in dataset.domains]
    envs: list[int] = []
    for name in names:
        if name == "all":
            envs += range(len(known))
        elif name in known:
            envs.append(known.index(name))
        elif name.isdecimal() and int(name) < len(known):
            envs.append(int(name))
        else:
            listed = ", ".join(f"{index} {domain}" for index, domain in enumerate(known))
            raise UserError(f"--test-envs {name}: {dataset.name} has the domains {listed}, or `all`")
    return list(dict.fromkeys(envs))
