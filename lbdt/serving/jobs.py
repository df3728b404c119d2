"""Batch jobs: a file of prompts to pictures with concepts erased, on one machine or many, to the same bytes.

    from lbdt.serving.jobs import PictureJob, generate

    result = generate(PictureJob("prompts.jsonl", "pictures", concepts=["Cats"], workers=2))
    result.summary["refused"]  # {} where every picture is there

A picture's bits follow from its line, the model, the eraser, the sampling, the rows of a call (`batch`), the kind of
device and the CPU threads of a worker, for these decide how products are summed. All of them are in the folder's
settings. They do not follow from the number of workers, from who makes a picture when, or from interruptions.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lbdt.runs.folder import held
from lbdt.runs.wording import printable
from lbdt.runs.writable import check_out_folder
from lbdt.serving import ray_start
from lbdt.serving.engine import OnFailure
from lbdt.serving.job_files import JobFolder, begun_with
from lbdt.serving.job_lines import JobLine, read_job, unknown_concept
from lbdt.serving.job_workers import BatchDone, WorkerSettings, run_here, run_workers

if TYPE_CHECKING:
    from lbdt.editors import ConceptEraser

COMMAND = "lbdt generate"


@dataclass(frozen=True)
class PictureJob:
    """What is made of what, and by whom."""

    prompts: str | os.PathLike[str]
    """A file of JSON lines (`lbdt.serving.job_lines.read_job`)."""
    out: str | os.PathLike[str]
    """The folder of the pictures; continued if begun."""
    concepts: Sequence[str] | None = None
    """What is erased where a line does not say; None: each line has to."""
    seed: int = 0
    """A line without a seed has this plus its number."""
    model: str | None = None
    """A diffusers pipeline's folder or Hub repository; None: EmojiCanvas's."""
    eraser: str | None = None
    """An eraser's folder or Hub repository; None: EmojiCanvas's, of `kind`."""
    kind: str = "saeuron"
    steps: int | None = None
    guidance: float | None = None
    batch: int = 8
    """Rows of a call of the pipeline."""
    on_failure: OnFailure = "refuse"
    """What becomes of a picture whose concepts could not be erased: none, or one with them, which is named."""
    device: str = "auto"
    workers: int = 1
    threads: int | None = None
    """CPU threads of each worker; None: those the folder was begun with, else this machine's cores / workers."""
    ray: bool = False
    """Whether the workers are actors of Ray Data, on nodes that share `out`."""
    ray_address: str | None = None
    """A cluster to join; None: Ray is started on this machine."""
    progress: bool = True
    """Whether a bar is shown on stderr."""


@dataclass(frozen=True)
class JobResult:
    """How a job ended."""

    made: int
    """Pictures that this call made."""
    there: int
    """Pictures that were there before."""
    interrupted: bool
    """Whether it was stopped before its end; the same call goes on."""
    summary: dict[str, Any]
    """The content of summary.json (`JobFolder.summary`)."""
    threads: int
    device: str


def generate(job: PictureJob) -> JobResult:
    """Makes the pictures that are not there yet; those that were refused are tried again.

    The first Ctrl-C ends it after the batches that are on, on Ray after one of them, a second one at once.

    Raises:
        JobLinesError: what is wrong in the file. ValueError: other arguments; a folder of another job, naming what
            differs, or one that another process is writing. RuntimeError: what went wrong in a worker. ImportError: Ray
            is missing. OSError: something cannot be read or written.
    """
    out = Path(job.out).absolute()
    check_out_folder(Path(job.out))
    _check(job)
    eraser = _eraser(job)
    prompts, lines = read_job(Path(job.prompts), eraser.concepts, job.concepts, job.seed)
    for name in dict.fromkeys(name for line in lines for name in line.concepts):
        eraser.select(name)
    with held(out, COMMAND):
        device = _device(job, out)
        threads = (
            job.threads or begun_with(out, "threads") or max(1, len(os.sched_getaffinity(0)) // job.workers)
        )
        if not isinstance(threads, int):
            raise ValueError(f"{out}: settings.json is not as `{COMMAND}` wrote it; give another folder")
        worker = _worker(job, out, len(lines), eraser, device, threads)
        folder = JobFolder(out, lines)
        folder.begin(_settings(job, worker, eraser), prompts)
        missing = folder.missing()
        there = len(lines) - len(missing)
        if not missing and folder.finished:
            return JobResult(0, there, False, folder.summary(), threads, device)
        folder.reopen()
        try:
            batches = batches_of(missing, job.batch)
            made, interrupted = _run(job, worker, batches, there) if batches else (0, False)
        finally:
            folder.gather()
        summary = folder.summary() if interrupted else folder.finish()
    return JobResult(made, there, interrupted, summary, threads, device)


def batches_of(lines: Sequence[JobLine], batch: int) -> list[list[JobLine]]:
    """The lines in batches of one size each, in the order of their first lines."""
    batches: list[list[JobLine]] = []
    open_: dict[Any, list[JobLine]] = {}
    for line in lines:
        mine = open_.get(line.size)
        if mine is None or len(mine) == batch:
            mine = open_[line.size] = []
            batches.append(mine)
        mine.append(line)
    return batches


def _check(job: PictureJob) -> None:
    for name in ("batch", "workers", "threads", "steps"):
        value = getattr(job, name)
        optional = value is None and name in ("threads", "steps")
        if not optional and (type(value) is not int or value < 1):
            raise ValueError(f"--{name}: expected 1 or more, got {value!r}")
    if job.on_failure not in ("refuse", "unprotected"):
        raise ValueError(f"--on-failure: expected refuse or unprotected, got {job.on_failure!r}")
    if job.model is not None and job.eraser is None:
        raise ValueError("--eraser: an eraser belongs to a pipeline: give it with --model")
    if job.ray:
        from lbdt.runs.extras import needed

        needed("--ray", "serve", "ray", "pandas", "pyarrow")
        ray_start.prepare(job.ray_address)
    else:
        from lbdt.runs.processes import usable_device

        usable_device(job.device)


def _eraser(job: PictureJob) -> ConceptEraser:
    from lbdt.canvas.defaults import eraser_of

    eraser = eraser_of(job.eraser, job.kind)
    for name in job.concepts or ():
        if name not in eraser.concepts:
            raise ValueError(unknown_concept("--concept", name, eraser.concepts))
    if job.concepts and len(set(job.concepts)) < len(job.concepts):
        raise ValueError(f"--concept: expected each name once, got {', '.join(job.concepts)}")
    return eraser


def _device(job: PictureJob, out: Path) -> str:
    """The device that workers are given. On Ray this machine may have none of those that the nodes have."""
    from lbdt.runs.processes import usable_device

    if job.device != "auto":
        return job.device
    if not job.ray:
        return usable_device("auto").type
    if begun := begun_with(out, "device"):
        return str(begun)
    from lbdt.serving.job_ray import has_gpus

    return "cuda" if has_gpus(job.ray_address) else "cpu"


def _worker(
    job: PictureJob, out: Path, lines: int, eraser: ConceptEraser, device: str, threads: int
) -> WorkerSettings:
    from lbdt.canvas.defaults import steps_and_guidance

    steps, guidance = steps_and_guidance(job.model, job.kind, job.steps, job.guidance)
    return WorkerSettings(
        folder=out,
        lines=lines,
        digest=eraser.digest(),
        on_failure=job.on_failure,
        model=_absolute(job.model),
        eraser=_absolute(job.eraser),
        kind=job.kind,
        device=device,
        steps=steps,
        guidance=guidance,
        batch=job.batch,
        threads=threads,
    )


def _absolute(path_or_repo: str | None) -> str | None:
    """Workers of Ray have other working folders."""
    there = path_or_repo is not None and os.path.exists(path_or_repo)
    return os.path.abspath(path_or_repo) if there else path_or_repo


def _settings(job: PictureJob, worker: WorkerSettings, eraser: ConceptEraser) -> dict[str, Any]:
    """What the pictures follow from."""
    from lbdt.activations.pipelines import package_versions

    return {
        "versions": package_versions(),
        "model": job.model,
        "eraser": {"digest": worker.digest, **eraser.settings},
        "steps": worker.steps,
        "guidance": worker.guidance,
        "batch": worker.batch,
        "threads": worker.threads,
        "device": worker.device.partition(":")[0],
        "on_failure": worker.on_failure,
        "concepts": None if job.concepts is None else list(job.concepts),
        "seed": job.seed,
    }


def _run(
    job: PictureJob, worker: WorkerSettings, batches: Sequence[Sequence[JobLine]], there: int
) -> tuple[int, bool]:
    """How many pictures were made, and whether Ctrl-C ended it."""
    made = refused = unprotected = 0
    bar = tqdm(
        total=worker.lines,
        initial=there,
        desc=f"generate {printable(worker.folder.name)}",
        unit="picture",
        disable=not job.progress,
        file=sys.stderr,
    )
    with bar, _Interruption() as interruption:
        for done in _runner(job, worker, batches, interruption):
            interruption.armed = True
            if done is None:
                bar.unpause()  # loading is no part of the time that a picture takes
                continue
            made, refused = made + done.pictures, refused + done.refused
            unprotected += done.unprotected
            if refused or unprotected:
                bar.set_postfix(refused=refused, unprotected=unprotected, refresh=False)
            bar.update(done.pictures + done.refused)
        return made, interruption.happened and made + refused < sum(map(len, batches))


def _runner(
    job: PictureJob, worker: WorkerSettings, batches: Sequence[Sequence[JobLine]], interruption: _Interruption
) -> Iterator[BatchDone | None]:
    if job.ray:
        from lbdt.serving.job_ray import run_on_ray

        return run_on_ray(worker, batches, interruption, job.workers, job.ray_address)
    if job.workers > 1:
        return run_workers(worker, batches, interruption, job.workers)
    return run_here(worker, batches, interruption)


class _Interruption(contextlib.AbstractContextManager):
    """Whether Ctrl-C was pressed while it was `armed`; before, and a second time, it raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.armed = self.happened = False
        self._before: Any = None

    def __call__(self) -> bool:
        return self.happened

    def __enter__(self) -> _Interruption:
        mine = threading.current_thread() is threading.main_thread()
        # What a shell starts in the background ignores interruptions.
        if mine and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: object) -> None:
        if self.happened or not self.armed:
            raise KeyboardInterrupt
        self.happened = True
        with contextlib.suppress(OSError, RuntimeError):
            sys.stderr.write("\nlbdt: ending after this batch; Ctrl-C once more ends at once\n")
