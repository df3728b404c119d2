"""A batch of pictures by one method: the pipeline's call, what is attached or edited for it, what is kept of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lbdt.editors import UnetEditor
from lbdt.editors.attachment import Attachment
from lbdt.evaluation.jobs import Job
from lbdt.evaluation.series import Series
from lbdt.evaluation.start_noise import RunNoise
from lbdt.runs.digests import sha256

WATCHED_PATCHES, WATCHED_TIMESTEPS = 4, 10


def generate(
    pipe: Any,
    series: Series,
    editors: Sequence[UnetEditor],
    jobs: Sequence[Job],
    hookpoint: str | None,
    noise: RunNoise | None = None,
) -> tuple:
    """One batch: PIL pictures, tensors and a record.

    `noise`: what the pictures start from; None: each from its prompt's seed, which donors are drawn by then too.

    Tensors: `seeds` int64 [P], of the donors; `digests` int64 [P], of the pictures' bytes; with hooks `changed` int64
    [P], how many patches were changed, over all steps, halves and attachments; for PER by one attachment `timesteps`
    [steps], the places `own` int64 [M] of pictures whose prompt names the one erased concept, and their `cells` uint8
    [M, steps, H, W] (bit 0 detected, bit 1 replaced, conditional half); for a watched series `watched` [rows, d] of the
    block `hookpoint`.
    """
    seeds = [job.prompt.seed if noise is None else noise.donor_seed(job.prompt) for job in jobs]
    watch = None
    with contextlib.ExitStack() as stack:
        attachments = [
            stack.enter_context(
                editor.attach(
                    pipe, concepts=sets, seed=seeds, keep_masks=series.method == "per", stack=len(editors) > 1
                )
            )
            for editor, sets in zip(editors, _sets(series, jobs, len(editors)), strict=True)
        ]
        if series.watched:
            from lbdt.evaluation.block_watch import BlockWatch

            watch = stack.enter_context(
                BlockWatch(
                    pipe,
                    hookpoint,
                    seeds,
                    patches=WATCHED_PATCHES,
                    timesteps=min(WATCHED_TIMESTEPS, series.kind.steps),
                )
            )
        stack.enter_context(_quiet(pipe))
        make = _edited_model if series.method == "uce" else _call
        pictures = make(pipe, series, jobs, noise)
    tensors = {"seeds": torch.tensor(seeds), "digests": torch.tensor(list(map(_digest, pictures)))}
    if attachments:
        tensors["changed"] = sum(attachment.patches_changed() for attachment in attachments)
    if series.method == "per" and len(attachments) == 1:
        tensors |= _masks(attachments[0], jobs)
    if watch is not None:
        tensors["watched"] = watch.rows()
    record = {
        "pictures": len(pictures),
        # The changed share of all patches; several attachments may change a patch more than once.
        "replaced": [attachment.report().replaced for attachment in attachments],
    }
    return pictures, tensors, record


def _call(pipe: Any, series: Series, jobs: Sequence[Job], noise: RunNoise | None) -> list[Any]:
    """The pictures of one call of the pipeline."""
    call: dict[str, Any] = {"num_inference_steps": series.kind.steps}
    if series.kind.guidance is not None:
        call["guidance_scale"] = series.kind.guidance
    if series.method == "negative":
        call["negative_prompt"] = [series.texts.negative(job.erased) for job in jobs]
    if noise is not None:
        call["latents"] = noise.latents(pipe, [job.prompt for job in jobs])
    return pipe(
        [job.prompt.text for job in jobs],
        generator=[torch.Generator().manual_seed(job.prompt.seed) for job in jobs],
        **call,
    ).images


def _edited_model(pipe: Any, series: Series, jobs: Sequence[Job], noise: RunNoise | None) -> list[Any]:
    """The pictures of a model that is edited for each set of erased concepts in turn: a call for each."""
    places: dict[tuple[str, ...], list[int]] = {}
    for place, job in enumerate(jobs):
        places.setdefault(job.erased, []).append(place)
    pictures: list[Any] = [None] * len(jobs)
    for erased, mine in places.items():
        with series.texts.editing(erased).attach(pipe):
            made = _call(pipe, series, [jobs[n] for n in mine], noise)
            for place, picture in zip(mine, made, strict=True):
                pictures[place] = picture
    return pictures


def _digest(picture: Any) -> int:
    """63 bits of a picture's SHA-256: pictures of equal bits have equal ones."""
    return int(sha256(picture.convert("RGB").tobytes())[:16], 16) >> 1


def _masks(attachment: Attachment, jobs: Sequence[Job]) -> dict[str, Tensor]:
    masks = attachment.masks()
    cells = [mask.detected.to(torch.uint8) | (mask.replaced.to(torch.uint8) << 1) for mask in masks]
    own = [place for place, job in enumerate(jobs) if job.erased == (job.prompt.concept,)]
    return {
        "timesteps": torch.tensor([mask.timestep for mask in masks]),
        "own": torch.tensor(own, dtype=torch.int64),
        "cells": torch.stack(cells, dim=1).cpu()[own],
    }


def _sets(series: Series, jobs: Sequence[Job], editors: int) -> Iterator[list[list[str]]]:
    for number in range(editors):
        if series.stacked:
            yield [list(job.erased[number : number + 1]) for job in jobs]
        else:
            yield [list(job.erased) for job in jobs]


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    from lbdt.activations.capture import quiet

    undo = quiet(pipe)
    try:
        yield
    finally:
        undo()
