"""Sweeps: data set x method x target domain x trial x random hyper-parameters x member.

Every run has a folder of its own, named by a hash of its settings as in DomainBed, so that the same sweep, given again,
goes on where it was: what is done is not run twice, what was interrupted continues from its checkpoint, what failed is
tried again. Settings of a sweep may change between the two, and only runs that are new are trained.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm

from qtdog import plugins
from qtdog.config import RunConfig, TrainConfig
from qtdog.data import DIGITS, domain_names
from qtdog.distributed import world_size
from qtdog.environment import pick_workers
from qtdog.errors import UserError, one_line
from qtdog.files import is_done, write_text
from qtdog.log import Log
from qtdog.methods.checks import check_minibatch
from qtdog.methods.grid import points
from qtdog.methods.method import rule_numbers
from qtdog.methods.numbers import dashed
from qtdog.methods.presets import composed, find_method, meaningless, seeds_of, settle
from qtdog.results.runs import read_card, task_of
from qtdog.training.folders import TrainedElsewhere, is_claimed, sole_owner
from qtdog.training.jobs import Job, check_jobs, run_each
from qtdog.training.starting import check_start
from qtdog.training.tasks import parse_tasks

STATES = ("done", "running", "interrupted", "failed", "missing")


@dataclass(frozen=True)
class SweepJob(Job):
    """A job of a sweep: `dataset` and `target` are the names that people use."""

    dataset: str
    target: str

    def __str__(self) -> str:
        run = self.run
        return (
            f"{self.dataset} {run.method}, target {self.target}, trial {run.trial_seed}, hparams {run.hparams_seed}, "
            f"{''.join(f'{dashed(name)} {value}, ' for name, value in run.point().items())}seed {run.seed}"
        )


@dataclass
class SweepConfig(TrainConfig):
    """Settings of `qtdog sweep`: what to sweep over, and how each run is trained."""

    datasets: Annotated[list[str], "data sets, all under --data-dir"] = field(default_factory=lambda: ["RotatedMNIST"])
    methods: Annotated[list[str], "methods; a setting that one does not know is for the others"] = field(
        default_factory=lambda: ["erm", "qtdog"]
    )
    n_trials: Annotated[int, "trials 0 to n - 1, each with another split"] = 3
    n_hparams: Annotated[int, "sets of hyper-parameters: the presets', then n - 1 random ones (DomainBed's spaces)"] = 1
    members: Annotated[int | None, "seeds 0 to n - 1 of every run (default: 1; eoq 5, eoa 6)"] = None
    output_dir: Annotated[str, "every run gets a folder in it, named by a hash of its settings"] = "sweep"
    show: Annotated[bool, "train nothing: list what is done, running, interrupted, failed and missing"] = False
    engine: Annotated[Literal["local", "ray"], "processes of this machine (--jobs), or a Ray cluster"] = "local"
    ray_address: Annotated[str | None, "of a running Ray cluster (default: RAY_ADDRESS, else this machine)"] = None
    cpus_per_job: Annotated[float, "CPU cores of a run on Ray"] = 1
    gpus_per_job: Annotated[float, "GPUs of a run on Ray; .5 trains two runs on each"] = 0
    retries: Annotated[int, "how often Ray starts a run again, from its checkpoint, after its worker was killed"] = 3


def sweep(config: SweepConfig) -> None:
    """Train all runs of a sweep that are not done, or show how they stand.

    Raises:
        UserError: for settings that make no sense, before anything is trained; or at the end, if runs failed.
    """
    check(config)
    jobs = jobs_of(config)
    log = Log()
    if config.show:
        show(jobs, log)
        return
    states = [state(job.folder) for job in jobs]
    open_jobs = [job for job, its_state in zip(jobs, states, strict=True) if its_state not in ("done", "running")]
    log(f"{len(jobs)} runs: {counted(states)}; {len(open_jobs)} to train")
    errors: list[BaseException] = []
    with tqdm(total=len(open_jobs), desc="sweep", disable=None) as bar:
        for job, error in engine(config, open_jobs):
            log(f"{job}: {outcome(job, error)}")
            if error is not None and not isinstance(error, TrainedElsewhere):
                errors.append(error)
            bar.update()
    for error in errors:
        if not isinstance(error, UserError | OSError):
            raise error
    if errors:
        raise UserError(
            f"{len(errors)} of {len(open_jobs)} runs failed: `--show` tells which, the same sweep tries again"
        )
    needed = [f" --plugin {plugin.path}" for plugin in dict.fromkeys(p for job in jobs for p in job.run.plugins)]
    log(f"`qtdog collect {config.output_dir}{''.join(needed)}` makes the tables")


def outcome(job: Job, error: BaseException | None) -> str:
    """How a run ended; one that another sweep trains now is that one's to report."""
    if error is None:
        return f"target accuracy {read_card(job.folder).target_accuracy:.4f}"
    return one_line(error) if isinstance(error, TrainedElsewhere) else f"FAILED: {one_line(error)}"


def check(config: SweepConfig) -> None:
    """Raises UserError for numbers that make no sweep."""
    for name in ("n_trials", "n_hparams", "members"):
        number = getattr(config, name)
        if number is not None and number < 1:
            raise UserError(f"--{dashed(name)} must be at least 1, not {number}")
    if config.cpus_per_job <= 0 or config.gpus_per_job < 0 or config.retries < 0:
        raise UserError("--cpus-per-job must be greater than 0, --gpus-per-job and --retries must not be negative")
    check_jobs(config.jobs)
    if world_size() > 1:
        raise UserError("a sweep trains each run in one process: start it without torchrun")


def jobs_of(config: SweepConfig) -> list[SweepJob]:
    """All runs of a sweep, in order. Reads names and settings only, no images."""
    jobs = {}
    for dataset in dict.fromkeys(config.datasets):
        title, domains = domain_names(dataset, config.data_dir)
        workers = pick_workers(config.num_workers, reads_files=dataset not in DIGITS, jobs=config.jobs)
        for train_config in train_configs(replace(config, dataset=dataset)):
            for targets, sources in parse_tasks(config.test_envs, config.sources, title, domains):
                for seed in range(config.members) if config.members else seeds_of(train_config):
                    run = replace(settle(train_config, 0, seed), test_envs=targets, sources=sources)
                    run = plugins.remembered(run)
                    check_start(run)
                    check_minibatch(run, find_method(run.method), len(run.source_envs(len(domains))))
                    key = key_of(run, title)
                    folder = Path(config.output_dir) / key
                    jobs[key] = SweepJob(run, folder, config.device, workers, title, task_of(domains, run))
    return list(jobs.values())


def key_of(run: RunConfig, title: str) -> str:
    """The name of a run's folder: a hash of its settings, the same wherever its data and plug-ins lie."""
    arguments = {**run.to_dict(), "dataset": title}
    del arguments["data_dir"]
    if run.plugins:
        arguments["plugins"] = [plugin.sha256 for plugin in run.plugins]
    if len(run.test_envs) == 1:  # as earlier versions, so that their sweeps go on
        arguments["test_env"] = arguments.pop("test_envs")[0]
    return hashlib.md5(json.dumps(arguments, sort_keys=True).encode()).hexdigest()


def train_configs(config: SweepConfig) -> Iterator[TrainConfig]:
    """What `qtdog train` would be told for each method, trial, draw of hyper-parameters and point of the grid.

    A setting that some of the methods do not know is for the others only; one that none of them knows is an error.
    """
    shared = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    unused = {
        name: set(meaningless(config, find_method(composed(replace(config, method=name))))) for name in config.methods
    }
    for_none = set.intersection(*unused.values())
    for method, options in unused.items():
        unknown = options - for_none
        numbers = {name: value for name, value in config.numbers.items() if name not in unknown}
        grid = {name: values for name, values in config.grid.items() if name not in unknown}
        own = {**shared, **dict.fromkeys(unknown - rule_numbers().keys())}
        own |= {"method": method, "numbers": numbers, "grid": grid}
        for trial_seed in range(config.n_trials):
            for hparams_seed in range(config.n_hparams):
                yield from points(TrainConfig(**{**own, "trial_seed": trial_seed, "hparams_seed": hparams_seed}))


def engine(config: SweepConfig, jobs: Sequence[SweepJob]) -> Iterator[tuple[Job, BaseException | None]]:
    """Each job with its error, if any, as they end."""
    if config.engine == "local":
        return run_each(jobs, config.jobs, carry_on)
    from qtdog.training.ray_engine import run_each_on_ray

    return run_each_on_ray(
        jobs,
        carry_on,
        address=config.ray_address,
        cpus=config.cpus_per_job,
        gpus=config.gpus_per_job,
        retries=config.retries,
    )


def carry_on(job: Job, progress: bool) -> None:
    """Start a run, or continue it from its checkpoint; leaves the file `failed` if that cannot be done."""
    failed = job.folder / "failed"
    with sole_owner(job.folder):
        failed.unlink(missing_ok=True)
        try:
            job.train_claimed(progress)
        except Exception as error:
            with suppress(OSError):  # of a full disk that error tells already
                write_text(failed, f"{type(error).__name__}: {one_line(error)}\n")
            raise


def state(folder: Path) -> str:
    """One of STATES."""
    if is_done(folder):
        return "done"
    if is_claimed(folder):
        return "running"
    if not (folder / "config.yaml").is_file():
        return "missing"
    return "failed" if (folder / "failed").is_file() else "interrupted"


def show(jobs: Sequence[SweepJob], log: Log) -> None:
    """Print every run with its state, and how many there are of each."""
    states = [state(job.folder) for job in jobs]
    for job, its_state in zip(jobs, states, strict=True):
        log(f"{its_state:<11}  {job.folder}  {job}")
        if its_state == "failed":
            log(f"{'':<11}  {(job.folder / 'failed').read_text(encoding='utf-8', errors='replace').strip()}")
    log(f"{len(jobs)} runs: {counted(states)}")


def counted(states: Iterable[str]) -> str:
    """How many there are of each state."""
    numbers = Counter(states)
    return ", ".join(f"{numbers[name]} {name}" for name in STATES)
