"""The jobs of a sweep on a Ray cluster: one task a run, with its share of CPUs and GPUs.

All machines of the cluster see the output folder and the data under the same paths. Where a worker process or its
machine dies, Ray starts the task again elsewhere, and the run continues from its last checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from qtdog.errors import UserError
from qtdog.training.jobs import Job


def run_each_on_ray(
    jobs: Sequence[Job],
    task: Callable[[Job, bool], None],
    *,
    address: str | None,
    cpus: float,
    gpus: float,
    retries: int,
) -> Iterator[tuple[Job, BaseException | None]]:
    """Do `task(job, progress)` for each job on the cluster and yield it with its error, if any, as they end.

    Args:
        address: of the cluster; None: RAY_ADDRESS, else this machine.
        cpus, gpus: what a job takes of them.
        retries: how often a job is started again after its worker was killed.

    Raises:
        UserError: where Ray is not installed, or the cluster has no place for a single job.
    """
    ray = imported()
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    there = ray.cluster_resources()
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        if wanted > there.get(name, 0):
            raise UserError(f"a job wants {wanted:g} {name}, the Ray cluster has {there.get(name, 0):g}")
    threads = max(1, int(cpus))

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)
    def on_worker(job: Job) -> None:
        torch.set_num_threads(threads)
        task(job, False)

    pending = {on_worker.remote(job): job for job in jobs}
    while pending:
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        job = pending.pop(ready)
        try:
            ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            yield job, error.cause or error
        except ray.exceptions.RayError as error:
            yield job, UserError(f"its worker died {retries + 1} times: {str(error).splitlines()[0]}")
        else:
            yield job, None


def imported() -> Any:
    """The package ray, which is optional."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'qtdog[ray]'") from error
    return ray
