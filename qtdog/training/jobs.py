"""Leave-one-domain-out: one run for each target domain and seed, one after the other or several at once."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch

from qtdog import distributed, plugins
from qtdog.config import Device, RunConfig, TrainConfig
from qtdog.data import DIGITS, DomainSet, Preprocessing, load_dataset
from qtdog.data.image_lists import ImageList, difference
from qtdog.environment import cores, describe_environment, pick_device, pick_workers
from qtdog.errors import UserError
from qtdog.files import is_done
from qtdog.log import Log
from qtdog.methods.checks import check_minibatch
from qtdog.methods.grid import points
from qtdog.methods.numbers import dashed
from qtdog.methods.presets import find_method, seeds_of, settle
from qtdog.models import preprocessing
from qtdog.results.runs import checkpoint_records, read_card, run_folder, seconds_of, task_of
from qtdog.training.evaluation import domain_parts
from qtdog.training.facts import facts
from qtdog.training.folders import prepare_folder, sole_owner
from qtdog.training.progress import Progress, clock
from qtdog.training.starting import check_start
from qtdog.training.tasks import parse_tasks
from qtdog.training.trainer import train

WATCH_SECONDS = 0.5  # between two looks at how far the runs are
_steps_done: "Synchronized[int] | None" = None  # in a process that `run_each` has started


@dataclass(frozen=True)
class Job:
    """A run, its folder, and how to train it; it reads the data itself, so that any process or machine can do it."""

    run: RunConfig
    folder: Path
    device: Device
    workers: int

    @property
    def finished(self) -> bool:
        """Whether it has been trained to its end."""
        return is_done(self.folder)

    def train(self, shown: bool = True) -> None:
        """Claim its folder and train it there, with log and progress bar printed if `shown`; nothing if it is finished.

        Raises:
            TrainedElsewhere: if another process trains it now.
        """
        with sole_owner(self.folder):
            self.train_claimed(shown)

    def train_claimed(self, shown: bool) -> None:
        """`train` in a folder that is claimed: what was known of it before may have changed until then."""
        plugins.load_installed()  # for a process of its own
        plugins.load(plugin.path for plugin in self.run.plugins)
        plugins.require(self.run.plugins, str(self.folder), unchanged=True)
        if distributed.first_says(distributed.is_first() and prepare_folder(self.run, self.folder, True, False)):
            prepared, dataset = self.data(shown)
            train(self.run, dataset, self.folder, prepared, pick_device(self.device), self.workers, shown, count)

    def data(self, shown: bool) -> tuple[Preprocessing | None, DomainSet]:
        """How its images are prepared, and the images."""
        prepared = preprocessing(self.run.backbone, self.run.image_size, self.run.background)
        return prepared, read_dataset(self.run.dataset, self.run.data_dir, prepared, shown)

    def facts(self) -> list[str]:
        """What it has mostly in common with the other runs of a command, a line each."""
        _, dataset = self.data(shown=True)
        return facts(self.run, dataset, describe_environment(pick_device(self.device)))

    def outcome(self) -> str:
        """What came out, in a line."""
        card, run = read_card(self.folder), self.run
        took = clock(seconds_of(checkpoint_records(self.folder)))
        return (
            f"{find_method(run.method).label}, target domain {card.target}, trial {run.trial_seed}, "
            f"{''.join(f'{dashed(name)} {value}, ' for name, value in run.point().items())}seed {run.seed}: "
            f"source out {card.source_validation_accuracy:.4f}  target in {card.target_accuracy:.4f}  {took}"
        )


@lru_cache(maxsize=1)
def read_dataset(name: str, data_dir: str | None, prepared: Preprocessing | None, shown: bool) -> DomainSet:
    """The data set, read once by the jobs that a process trains one after the other."""
    log = Log(shown=shown)
    if name not in DIGITS:
        log(f"reading {name}" + (f" under {data_dir}" if data_dir else ""))
    return load_dataset(name, data_dir, prepared, log)


def train_all(config: TrainConfig) -> list[Path]:
    """Train every run that `config` names and that is not finished; returns all their folders."""
    check_jobs(config.jobs)
    with distributed.processes(pick_device(config.device)):
        jobs = plan(config)
        distributed.barrier()  # the first process has prepared the folders
        return carry_out(jobs, config.jobs)


def plan(config: TrainConfig) -> list[Job]:
    """Check all settings, read the data and prepare the folder of every run that `config` names."""
    if config.resume and config.overwrite:
        raise UserError("--resume continues runs, --overwrite starts them again: give one of them")
    seeds = seeds_of(config)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must be different numbers, not {seeds}")
    check_jobs(config.jobs)
    templates = [plugins.remembered(settle(point, test_env=0, seed=seed)) for point in points(config) for seed in seeds]
    check_start(templates[0])
    pick_device(config.device)
    prepared = preprocessing(templates[0].backbone, templates[0].image_size, templates[0].background)
    processes = config.jobs * distributed.local_world_size()
    workers = pick_workers(config.num_workers, reads_files=prepared is not None, jobs=processes)
    read_dataset.cache_clear()  # what is on disk now, not what another plan of this process has read
    dataset = read_dataset(config.dataset, config.data_dir, prepared, True)
    domains = [domain.name for domain in dataset.domains]
    jobs = []
    for targets, sources in parse_tasks(config.test_envs, config.sources, dataset.name, domains):
        for template in templates:
            run = replace(template, test_envs=targets, sources=sources)
            trained_on = len(run.source_envs(len(domains)))
            check_minibatch(run, find_method(run.method), trained_on, distributed.world_size())
            folder = run_folder(config.output_dir, dataset.name, task_of(domains, run), run)
            if folder.resolve() == Path(run.weights).resolve():
                raise UserError(f"--weights {run.weights} is where this run goes: use another --output-dir")
            job = Job(run, folder, config.device, workers)
            if distributed.is_first():
                prepare(job, config)
            jobs.append(job)
    if finished := [job for job in jobs if job.finished]:
        refuse_other_data(finished, ImageList.of(dataset, domain_parts(template, dataset)))
    return jobs


def refuse_other_data(jobs: Sequence[Job], images: ImageList) -> None:
    """UserError if one of these finished runs was trained on other images than there are now."""
    for job in jobs:
        if read_card(job.folder).images not in (None, images.content):
            before = ImageList.read(job.folder)
            changed = f" ({difference(before, images)})" if before else ""
            raise UserError(
                f"{job.folder} was trained on other data{changed}: bring that back, name another --output-dir, or "
                "start again with --overwrite"
            )


def prepare(job: Job, config: TrainConfig) -> None:
    """Prepare the folder of a job that no other process is training, whose files --overwrite would pull away."""
    with sole_owner(job.folder):
        prepare_folder(job.run, job.folder, config.resume, config.overwrite)


def check_jobs(jobs: int) -> None:
    """Raises UserError for a number of runs at once that cannot be."""
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {jobs}")
    if jobs > 1 and distributed.world_size() > 1:
        raise UserError("--jobs trains several runs at once, torchrun one run in several processes: use one of them")


def carry_out(jobs: Sequence[Job], at_once: int, threads: int | None = None) -> list[Path]:
    """Train what is not finished, `at_once` jobs at a time (see `run_each`), until one fails; returns all folders."""
    log = Log()
    for job in jobs:
        if job.finished:
            log(f"{job.folder} is finished, not run again (remove it, or train with --overwrite, to do so)")
    left = [job for job in jobs if not distributed.first_says(job.finished)]
    for fact in dict.fromkeys(fact for job in left for fact in job.facts()):
        log(fact)
    if at_once == 1:
        for job in left:
            job.train()
    elif left:
        with Progress(f"{len(left)} runs", sum(job.run.steps for job in left), log) as progress:
            for job, error in run_each(left, at_once, watch=progress, threads=threads):
                if error is not None:
                    raise error
                log(job.outcome())
    return [job.folder for job in jobs]


def run_each(
    jobs: Sequence[Job],
    at_once: int,
    task: Callable[[Job, bool], None] = Job.train,
    watch: Callable[[int], object] = lambda steps: None,
    threads: int | None = None,
) -> Iterator[tuple[Job, BaseException | None]]:
    """Do `task(job, shown)` for each job and yield it with its error, if any, as they end.

    With `at_once` > 1 each is done in one of that many processes, which print nothing and compute in `threads` threads,
    by default their share of the CPU cores; `watch` is told now and then how many steps they have done together.
    """
    if at_once == 1 or not jobs:
        for job in jobs:
            try:
                task(job, True)
            except Exception as error:
                yield job, error
            else:
                yield job, None
        return
    # Not forked: a child of a process whose OpenMP threads have run would hang in its first parallel region.
    context = multiprocessing.get_context("spawn")
    share, done = threads or max(1, cores() // at_once), steps_done()
    before = done.value
    with ProcessPoolExecutor(min(at_once, len(jobs)), context, start_worker, (share, done)) as pool:
        left = {pool.submit(task, job, False): job for job in jobs}
        try:
            while left:
                ended, _ = wait(left, timeout=WATCH_SECONDS, return_when=FIRST_COMPLETED)
                watch(done.value - before)
                for future in ended:
                    problem = future.exception()
                    if isinstance(problem, BrokenProcessPool):
                        raise UserError(
                            "a process was killed, perhaps for want of memory: try fewer --jobs, what is done and the "
                            "checkpoints are kept"
                        ) from problem
                    yield left.pop(future), problem
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@cache
def steps_done() -> "Synchronized[int]":
    """Where all processes that this one starts count their steps: one for all, so that it is there as long as they."""
    return multiprocessing.get_context("spawn").Value("q", 0)


def start_worker(threads: int, done: "Synchronized[int]") -> None:
    """Make this process one of those that `run_each` starts: its share of the cores, and where it counts its steps."""
    global _steps_done
    torch.set_num_threads(threads)
    _steps_done = done


def count(steps: int) -> None:
    """Add to the steps that the processes of `run_each` have done together; nothing where there are none."""
    if _steps_done is not None:
        with _steps_done.get_lock():
            _steps_done.value += steps
