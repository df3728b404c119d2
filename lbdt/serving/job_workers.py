"""What makes a job's pictures: an engine that writes what it makes, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lbdt.runs.digests import sha256
from lbdt.runs.processes import end_with
from lbdt.runs.reading import reason
from lbdt.serving.job_files import picture_file, write_batch
from lbdt.serving.job_lines import JobLine

Stop = Callable[[], bool]
"""Whether no further batch is to be begun."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is started with: as `lbdt.serving.loading.EngineSettings`, and the job's own."""

    folder: Path
    lines: int
    """How many the whole job has."""
    digest: str
    """The eraser's, which a worker on another machine must have too."""
    on_failure: str
    model: str | None
    eraser: str | None
    kind: str
    device: str
    steps: int
    guidance: float | None
    batch: int
    threads: int
    fill: bool = True


@dataclass(frozen=True)
class BatchDone:
    """What became of a batch: how many pictures of each kind."""

    pictures: int
    refused: int
    unprotected: int


class JobWorker:
    """An engine, and where its pictures go."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Loads.

        Raises:
            ValueError: an eraser or a pipeline other than the job's. Others: as `engine_of`.
        """
        from lbdt.activations.pipelines import fingerprint
        from lbdt.runs.settings import keep_settings
        from lbdt.serving.loading import engine_of

        self.settings = settings
        self.engine, eraser = engine_of(settings)
        if (digest := eraser.digest()) != settings.digest:
            raise ValueError(
                f"the eraser here is not the job's (digest {digest[:12]}... here, {settings.digest[:12]}... there); "
                "copy the job's to each machine"
            )
        wording = "holds pictures of another model: {names} differ; give the same model to continue, or another folder"
        keep_settings(settings.folder, "model.json", fingerprint(self.engine.pipe), wording)

    def run(self, lines: Sequence[JobLine]) -> BatchDone:
        """Makes a batch of pictures, of one size, and writes them and their records.

        Raises:
            OSError: they cannot be written.
        """
        from lbdt.serving.engine import Picture, Work

        works = [
            Work(line.prompt, line.seed, line.concepts, self.settings.on_failure, line.size) for line in lines
        ]
        pictures: dict[str, bytes] = {}
        rows: list[dict[str, Any]] = []
        for line, made in zip(lines, self.engine.generate(works), strict=True):
            path = picture_file(line, self.settings.lines)
            rows.append(_row(line, path, made))
            if isinstance(made, Picture):
                pictures[path] = made.png
        write_batch(self.settings.folder, lines[0], pictures, rows)
        unprotected = sum(row["outcome"] == "unprotected" for row in rows)
        return BatchDone(len(pictures), len(rows) - len(pictures), unprotected)

    def close(self) -> None:
        """Takes the eraser off."""
        self.engine.close()


def _row(line: JobLine, path: str, made: Any) -> dict[str, Any]:
    """A picture's record, with its `path` if it was made or not."""
    from lbdt.editors import UnprotectedError
    from lbdt.serving.engine import Picture, PromptTooLongError

    row = {
        "line": line.number,
        "id": line.id,
        "seed": line.seed,
        "concepts": list(line.concepts),
        "path": path,
    }
    if isinstance(made, Picture):
        return row | {
            "outcome": "protected" if made.protected else "unprotected",
            "reason": made.reason,
            "detected": list(made.detected),
            "replaced": list(made.replaced),
            "gated": made.gated,
            "file": path,
            "bytes": len(made.png),
            "image": sha256(made.png),
        }
    refused = isinstance(made, UnprotectedError)
    told = refused or isinstance(made, PromptTooLongError)
    return row | {
        "outcome": "refused" if refused else "failed",
        "reason": reason(made) if told else f"{type(made).__name__}: {reason(made)}",
        "detected": [],
        "replaced": [],
        "gated": False,
        "file": None,
        "bytes": None,
        "image": None,
    }


def run_here(
    settings: WorkerSettings, batches: Sequence[Sequence[JobLine]], stop: Stop
) -> Iterator[BatchDone | None]:
    """Runs the batches in this process; None: it is loaded, and begins."""
    import torch

    threads = torch.get_num_threads()
    try:
        worker = JobWorker(settings)
        try:
            yield None
            for batch in batches:
                if stop():
                    return
                yield worker.run(batch)
        finally:
            worker.close()
    finally:
        torch.set_num_threads(threads)


def run_workers(
    settings: WorkerSettings, batches: Sequence[Sequence[JobLine]], stop: Stop, count: int
) -> Iterator[BatchDone | None]:
    """Runs the batches in `count` new processes, each of which gets the next one when it has done one; None: one of
    them is loaded. On CUDA devices, if none is named, each takes its own, in turn. They end with this process.

    Raises:
        RuntimeError: what went wrong in one of them, or that one was ended.
    """
    context = multiprocessing.get_context("spawn")
    processes, busy = [], []
    ready: set[Connection] = set()
    left = iter(batches)
    try:
        for rank in range(min(count, len(batches))):
            ours, theirs = context.Pipe()
            given = replace(settings, device=_device(settings.device, rank))
            # A daemon: or an interrupted parent would wait for it at its end.
            process = context.Process(target=_serve, args=(os.getpid(), theirs, given), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            busy.append(ours)
        while busy:
            for pipe in wait(busy, _POLL_SECONDS):
                done = _received(pipe, count)
                ready.add(pipe)
                batch = None if stop() else next(left, None)
                pipe.send(batch)
                if batch is None:
                    busy.remove(pipe)
                yield done
            if stop():
                busy = [pipe for pipe in busy if pipe in ready]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _device(name: str, rank: int) -> str:
    import torch

    cuda = name in ("cuda", "auto") and torch.cuda.is_available()
    return f"cuda:{rank % torch.cuda.device_count()}" if cuda else name


def _received(pipe: Any, count: int) -> BatchDone | None:
    try:
        found = pipe.recv()
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(
            f"a worker was ended; is there too little memory for {count}? The same command goes on, also with fewer "
            "--workers"
        ) from error
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _serve(parent: int, pipe: Any, settings: WorkerSettings) -> None:
    """A worker's process: None goes up when it is loaded, then a `BatchDone` for each batch that comes down, until None
    does. A text that goes up is what went wrong."""
    end_with(parent)
    # A terminal's Ctrl-C reaches all processes; the parent says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        worker = JobWorker(settings)
        pipe.send(None)
        while (batch := pipe.recv()) is not None:
            pipe.send(worker.run(batch))
    except Exception as error:
        pipe.send(told(error))


def told(error: Exception) -> str:
    """What went wrong in a worker, for the job's process."""
    return str(error) or type(error).__name__
