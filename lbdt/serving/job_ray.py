"""A job on Ray Data: actors that share the job's folder. `ray_start.prepare` has to come before it is imported."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import SystemException
from ray.exceptions import RayError

from lbdt.serving import ray_start
from lbdt.serving.job_lines import JobLine
from lbdt.serving.job_workers import BatchDone, JobWorker, Stop, WorkerSettings, told

_MOST_BLOCKS = 10_000


def run_on_ray(
    settings: WorkerSettings,
    batches: Sequence[Sequence[JobLine]],
    stop: Stop,
    count: int,
    address: str | None = None,
) -> Iterator[BatchDone | None]:
    """Runs the batches on `count` actors, each with `settings.threads` CPUs, or one GPU where the device is CUDA's.

    A row of the data set is a batch of the job: its pictures and their records go to the folder, which the nodes share,
    and only their number comes back. A batch whose node was lost is made again on another one.

    Args:
        address: of a cluster to join, "auto": that of this machine; None: Ray is started here, and ended.

    Raises:
        ValueError: a cluster with too few CPUs or no GPU. RuntimeError: what went wrong on a node.
    """
    own = not ray.is_initialized()
    if own:
        ray.init(logging_level=logging.WARNING, **ray_start.options(address, count * settings.threads))
    try:
        yield from _run(settings, batches, stop, count)
    except (RayError, SystemException) as error:
        raise RuntimeError(_in_words(error)) from error
    finally:
        if own:
            ray.shutdown()


def has_gpus(address: str | None) -> bool:
    """Whether there are GPUs in the cluster; without an address on this machine."""
    if address is None and not ray.is_initialized():
        import torch

        return torch.cuda.is_available()
    own = not ray.is_initialized()
    if own:
        ray.init(logging_level=logging.WARNING, **ray_start.options(address, 1))
    try:
        return ray.cluster_resources().get("GPU", 0) >= 1
    finally:
        if own:
            ray.shutdown()


def _run(
    settings: WorkerSettings, batches: Sequence[Sequence[JobLine]], stop: Stop, count: int
) -> Iterator[BatchDone | None]:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    needs = {"num_cpus": settings.threads, "num_gpus": 0}
    if settings.device.startswith("cuda"):
        needs = {"num_cpus": 0, "num_gpus": 1}
    _check_room(needs)
    rows = [{"batch": json.dumps([astuple(line) for line in batch])} for batch in batches]
    done = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS)).map_batches(
        RayWorker,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(count, len(batches))),
        fn_constructor_args=(settings,),
        **needs,
    )
    for row in done.iter_rows():
        yield done_of(str(row["done"]))
        if stop():
            return


class RayWorker:
    """A `JobWorker` as `map_batches` calls it.

    What goes wrong is told in a row: Ray would wrap it in its own errors.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._worker: JobWorker | None = None
        try:
            self._worker = JobWorker(settings)
        except Exception as error:
            self._fault = told(error)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        done = [self._run(text) for text in rows["batch"]]
        return {"done": np.array([json.dumps(each) for each in done])}

    def _run(self, text: str) -> dict[str, Any]:
        if self._worker is None:
            return {"fault": self._fault}
        try:
            return asdict(self._worker.run(lines_of(text)))
        except Exception as error:
            return {"fault": told(error)}


def done_of(text: str) -> BatchDone:
    """What a `RayWorker` says of a batch; RuntimeError where something went wrong."""
    found = json.loads(text)
    if "fault" in found:
        raise RuntimeError(found["fault"])
    return BatchDone(**found)


def lines_of(text: str) -> list[JobLine]:
    """The lines of a batch, from JSON."""
    return [
        JobLine(number, name, prompt, seed, tuple(concepts), None if size is None else tuple(size))
        for number, name, prompt, seed, concepts, size in json.loads(text)
    ]


def _check_room(needs: dict[str, int]) -> None:
    """ValueError where no worker would ever have what it needs: Ray waits for that without end."""
    there = ray.cluster_resources()
    for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        if there.get(name, 0) < needs[key]:
            raise ValueError(
                f"Ray: a worker needs {needs[key]} {name}, and the cluster has {there.get(name, 0):g}; give fewer "
                "--threads, or --device cpu"
            )


def _in_words(error: BaseException) -> str:
    """What Ray says, without its traceback."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"Ray: {lines[-1] if lines else type(error).__name__}; the same command goes on"
